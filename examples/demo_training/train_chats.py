"""Trains the demo checkpoint on synthetic picture conversations (see scenes.py).

    python -m examples.demo_training.make_tokenizer MODEL_DIR
    python -m examples.demo_training.train_tower MODEL_DIR OUT_DIR --seconds 540
    python -m examples.demo_training.train_chats MODEL_DIR OUT_DIR --seconds 4500 \
        --init OUT_DIR/vision

MODEL_DIR holds config.json, the tokenizer and the image processor's settings. Needs
torch >= 2.10 (Muon).
"""

import argparse
import json
import random
import time

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl import modeling_qwen2_vl

from examples.demo_training import questions, scenes

IGNORE = -100


class Samples(torch.utils.data.IterableDataset):
    """Packed samples of the lesson that is due, in batches; each worker draws its own seeds."""

    def __init__(self, model_dir, part, first_seed, seconds):
        self.model_dir, self.part, self.batch, self.first_seed = (
            model_dir,
            part,
            part * 4,
            first_seed,
        )
        self.started, self.seconds = time.time(), seconds

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        if info:
            torch.set_num_threads(1)
        encode = Encoder(self.model_dir)
        step, stride = (info.id, info.num_workers) if info else (0, 1)
        while True:
            progress = (time.time() - self.started) / self.seconds
            _, kinds, sizes = next(
                (lesson for lesson in questions.LESSONS if progress < lesson[0]),
                questions.LESSONS[-1],
            )
            seed = self.first_seed + step * self.batch
            size = sizes[step % len(sizes)]  # one size a batch: no padding between pictures
            samples = sorted(
                (encode(questions.sample(seed + i, kinds, size)) for i in range(self.batch)),
                key=lambda s: len(s[0]),
            )
            parts = [
                samples[i : i + self.part] for i in range(0, self.batch, self.part)
            ]  # by length: little padding
            random.Random(seed).shuffle(parts)
            yield from (collate(part, encode.pad) for part in parts)
            step += stride


def read_settings(model_dir):
    with open(f"{model_dir}/preprocessor_config.json") as file:
        return json.load(file)


class Encoder:
    """Turns a chat into token ids, labels, 3D positions and the pictures' pixels."""

    def __init__(self, model_dir):
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self.config = Qwen2VLConfig.from_pretrained(model_dir)
        self.settings = read_settings(model_dir)
        self.pad = self.tokenizer.pad_token_id
        self.text_ids = {}

    def ids(self, text):
        if text not in self.text_ids:
            self.text_ids[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.text_ids[text]

    def __call__(self, messages):
        unit = self.settings["patch_size"] * self.settings["merge_size"]
        ids, labels, positions, videos = [], [], [], []
        position = 0

        def text(tokens, learn):
            nonlocal position
            ids.extend(tokens)
            labels.extend(tokens if learn else [IGNORE] * len(tokens))
            steps = np.arange(position, position + len(tokens))
            positions.append(np.stack([steps] * 3))
            position += len(tokens)

        def vision(frames, token):
            nonlocal position
            pixels = np.stack([np.asarray(resize(frame, unit)) for frame in frames])  # [T, H, W, 3]
            t, h, w = -(-len(frames) // 2), pixels.shape[1] // unit, pixels.shape[2] // unit
            ids.extend([token] * (t * h * w))
            labels.extend([IGNORE] * (t * h * w))
            grid = np.stack(
                np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij")
            ).reshape(3, -1)
            positions.append(grid + position)
            position += max(h, w)
            videos.append(pixels)

        if messages[0]["role"] != "system":
            text(self.ids("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"), False)
        for message in messages:
            answer = message["role"] == "assistant"
            text(self.ids(f"<|im_start|>{message['role']}\n"), False)
            for part in message["content"]:
                if part["type"] == "text":
                    text(self.ids(part["text"]), answer)
                else:
                    text(self.ids("<|vision_start|>"), False)
                    if part["type"] == "image":
                        vision([part["image"]], self.config.image_token_id)
                    else:
                        vision(part["video"], self.config.video_token_id)
                    text(self.ids("<|vision_end|>"), False)
            text(self.ids("<|im_end|>"), answer)
            text(self.ids("\n"), False)
        return np.array(ids), np.array(labels), np.concatenate(positions, axis=1), videos


def resize(image, unit):
    width, height = (max(unit, round(side / unit) * unit) for side in image.size)
    return image if (width, height) == image.size else image.resize((width, height), 3)


def collate(samples, pad):
    longest = max(len(ids) for ids, *_ in samples)
    input_ids = np.full((len(samples), longest), pad)
    labels = np.full((len(samples), longest), IGNORE)
    positions = np.zeros((3, len(samples), longest), dtype=np.int64)
    pictures = []
    for row, (ids, targets, pos, videos) in enumerate(samples):
        input_ids[row, : len(ids)], labels[row, : len(ids)], positions[:, row, : len(ids)] = (
            ids,
            targets,
            pos,
        )
        pictures += [torch.from_numpy(np.ascontiguousarray(v)) for v in videos]
    lengths = torch.tensor([len(ids) for ids, *_ in samples])
    return (
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        torch.from_numpy(positions),
        lengths,
        pictures,
    )


def patches(pictures, settings, device):
    """Normalised patches of uint8 [T, H, W, 3] pictures: ([N, C*2*P*P], grid [M, 3])."""
    p, m = settings["patch_size"], settings["merge_size"]
    mean = torch.tensor(settings["image_mean"], device=device)
    std = torch.tensor(settings["image_std"], device=device)
    by_shape = {}
    for index, picture in enumerate(pictures):
        by_shape.setdefault(tuple(picture.shape), []).append(index)
    rows, grids = [None] * len(pictures), [None] * len(pictures)
    for (t, h, w, _), indices in by_shape.items():
        x = torch.stack([pictures[i] for i in indices]).to(device, non_blocking=True)
        x = ((x / 255 - mean) / std).permute(0, 1, 4, 2, 3)  # [N, T, C, H, W]
        if t % 2:
            x = torch.cat([x, x[:, -1:]], dim=1)
        gt, gh, gw = x.shape[1] // 2, h // p, w // p
        x = x.reshape(len(indices), gt, 2, 3, gh // m, m, p, gw // m, m, p)
        x = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(len(indices), gt * gh * gw, -1)
        for row, index in zip(x, indices, strict=True):
            rows[index], grids[index] = row, (gt, gh, gw)
    return torch.cat(rows), torch.tensor(grids, device=device)


def same_size_attention(self, hidden_states, cu_seqlens, position_embeddings=None, **kwargs):
    """Vision attention over pictures of one size as one batch instead of one call a picture."""
    n, pictures = hidden_states.shape[0], len(cu_seqlens) - 1
    q, k, v = self.qkv(hidden_states).reshape(n, 3, self.num_heads, -1).unbind(1)
    q, k = modeling_qwen2_vl.apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    q, k, v = (
        x.reshape(pictures, n // pictures, self.num_heads, -1).transpose(1, 2) for x in (q, k, v)
    )
    out = F.scaled_dot_product_attention(q, k.to(q), v.to(q))
    return self.proj(out.transpose(1, 2).reshape(n, -1).to(hidden_states.dtype))


def forward(model, batch, settings, config, device):
    input_ids, labels, positions, lengths, pictures = batch
    input_ids, labels, positions = (
        x.to(device, non_blocking=True) for x in (input_ids, labels, positions)
    )
    embeds = model.model.language_model.embed_tokens(input_ids)
    if pictures:
        pixels, grid = patches(pictures, settings, device)
        seen = model.model.visual(pixels, grid_thw=grid)
        seen = getattr(seen, "pooler_output", seen)
        where = (input_ids == config.image_token_id) | (input_ids == config.video_token_id)
        embeds = embeds.masked_scatter(where[..., None], seen.to(embeds.dtype))
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).to(device, non_blocking=True)
    hidden = model.model.language_model(
        inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False
    )[0]
    learn = labels[:, 1:] != IGNORE
    logits = model.lm_head(hidden[:, :-1][learn]).float()
    targets = labels[:, 1:][learn]
    loss = F.cross_entropy(logits, targets)
    with torch.no_grad():
        wrong = torch.zeros_like(labels[:, 1:], dtype=torch.bool)
        wrong[learn] = logits.argmax(-1) != targets
    return loss, ~wrong.any(1)


def optimizers(model, lr, matrix_lr, vision_share):
    """Muon for the matrices, AdamW for the rest; each group keeps its ``peak`` rate."""
    seeing = {id(p) for p in model.model.visual.parameters()}
    groups = {False: [], True: []}
    for matrices in groups:
        for sees in (False, True):
            chosen = [
                p
                for name, p in model.named_parameters()
                if (p.ndim == 2 and "embed_tokens" not in name) == matrices
                and (id(p) in seeing) == sees
            ]
            groups[matrices].append(
                {
                    "params": chosen,
                    "peak": (matrix_lr if matrices else lr) * (vision_share if sees else 1),
                }
            )
    return [
        torch.optim.AdamW(groups[False], betas=(0.9, 0.98), weight_decay=0.01),
        torch.optim.Muon(groups[True], weight_decay=0.01),
    ]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model_dir")
    parser.add_argument("out_dir")
    parser.add_argument(
        "--init", help="start from this checkpoint's weights, for example pretrain_vision.py's"
    )
    parser.add_argument("--seconds", type=float, default=4500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--matrix-lr", type=float, default=0.006)
    parser.add_argument(
        "--vision-share", type=float, default=0.4, help="the tower's share of both learning rates"
    )
    parser.add_argument(
        "--decay-from",
        type=float,
        default=0.55,
        help="share of the time after which the rates fall to zero",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="processes that draw samples; on two cores they cost more than they give",
    )
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    config = Qwen2VLConfig.from_pretrained(args.model_dir)
    settings = read_settings(args.model_dir)
    model = (
        Qwen2VLForConditionalGeneration(config)
        if not args.init
        else Qwen2VLForConditionalGeneration.from_pretrained(args.init, dtype=torch.float32)
    )
    model = model.to(device).train()
    modeling_qwen2_vl.VisionAttention.forward = same_size_attention
    steppers = optimizers(model, args.lr, args.matrix_lr, args.vision_share)
    samples = Samples(args.model_dir, args.batch, 1_000_000, args.seconds)
    loader = torch.utils.data.DataLoader(
        samples,
        batch_size=None,
        num_workers=args.workers,
        prefetch_factor=4 if args.workers else None,
        multiprocessing_context="fork" if args.workers else None,
    )
    started, losses, exact = time.time(), [], []
    for step, batch in enumerate(loader, 1):
        progress = (time.time() - started) / args.seconds
        if progress >= 1:
            break
        share = min(1, step / 40, max(0.02, (1 - progress) / (1 - args.decay_from)))
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss, right = forward(model, batch, settings, config, device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = group["peak"] * share
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        losses.append(loss.item())
        exact.append(right.float().mean().item())
        if step % 50 == 0:
            print(
                f"step {step} {time.time() - started:.0f}s rate {share:.2f} "
                f"loss {np.mean(losses[-50:]):.4f} exact {np.mean(exact[-50:]):.3f}",
                flush=True,
            )
        if step % 1000 == 0:
            save(model, args, "checkpoint")
    save(model, args, "final")
    evaluate(model, args, settings, config, device)


def save(model, args, name):
    path = f"{args.out_dir}/{name}"
    state = model.state_dict()
    copy = Qwen2VLForConditionalGeneration(model.config)
    copy.load_state_dict(state)
    copy.to(torch.bfloat16).save_pretrained(path)


@torch.no_grad()
def evaluate(model, args, settings, config, device):
    model.eval()
    encode = Encoder(args.model_dir)
    for kind in questions.CHATS:
        right = []
        for start in range(0, 1024, 256):
            size = scenes.PICTURE_SIZES[start // 256 % len(scenes.PICTURE_SIZES)]
            batch = collate(
                [encode(questions.sample(start + i, [kind], size)) for i in range(256)], encode.pad
            )
            with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                right.append(forward(model, batch, settings, config, device)[1])
        print(
            f"held out, {kind[0].__name__}: all answers exact in "
            f"{torch.cat(right).float().mean().item():.4f} of 1024 chats",
            flush=True,
        )


if __name__ == "__main__":
    main()
