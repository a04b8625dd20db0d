"""The tower's first lesson, alone: what is in each cell of a scene, and which text is drawn.

python -m examples.demo_training.train_tower MODEL_DIR OUT_DIR --seconds 600
"""

import argparse
import math
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl import modeling_qwen2_vl

from examples.demo_training import scenes
from examples.demo_training.train_chats import patches, read_settings, same_size_attention

NONE = len(scenes.SHAPES)


class Lessons(torch.utils.data.IterableDataset):
    def __init__(self, scenes_a_batch, texts_a_batch):
        self.counts = scenes_a_batch, texts_a_batch

    def __iter__(self):
        torch.set_num_threads(1)
        seed = 5_000_000
        while True:
            pictures, cells, words = [], [], []
            for _ in range(self.counts[0]):
                rng = scenes.Random(seed, scenes.PICTURE_SIZES[0])
                seed += 1
                items = scenes.random_items(rng, rng.choice([1, 2, 3, 4, 5]))
                pictures.append(np.asarray(scenes.draw_scene(items, rng)))
                cell = np.full((9, 3), -100)
                cell[:, 0] = NONE
                for i in items:
                    cell[i.cell[0] * 3 + i.cell[1]] = (
                        scenes.SHAPES.index(i.shape),
                        list(scenes.COLORS).index(i.color),
                        list(scenes.SIZES).index(i.size),
                    )
                cells.append(cell)
            for _ in range(self.counts[1]):
                rng = scenes.Random(seed, scenes.PICTURE_SIZES[0])
                seed += 1
                words.append(rng.randrange(len(scenes.TEXTS)))
                pictures.append(np.asarray(scenes.draw_text(scenes.TEXTS[words[-1]], rng)))
            yield (
                torch.from_numpy(np.stack(pictures)),
                torch.from_numpy(np.stack(cells)),
                torch.tensor(words),
            )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model_dir")
    parser.add_argument("out_dir")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = Qwen2VLConfig.from_pretrained(args.model_dir)
    settings = read_settings(args.model_dir)
    model = Qwen2VLForConditionalGeneration(config)
    tower = model.model.visual
    modeling_qwen2_vl.VisionAttention.forward = same_size_attention
    width = config.vision_config.hidden_size
    heads = nn.ModuleList(
        [
            nn.Linear(width, NONE + 1),
            nn.Linear(width, len(scenes.COLORS)),
            nn.Linear(width, len(scenes.SIZES)),
            nn.Linear(9 * width, len(scenes.TEXTS)),
        ]
    )
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.03)
    loader = torch.utils.data.DataLoader(
        Lessons(96, 64), batch_size=None, num_workers=1, prefetch_factor=4
    )
    started = time.time()
    for step, (pictures, cells, words) in enumerate(loader):
        progress = (time.time() - started) / args.seconds
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = (
                args.lr
                * min(1, (step + 1) / 200)
                * (0.5 * (1 + math.cos(math.pi * progress)) * 0.98 + 0.02)
            )
        pixels, grid = patches([p[None] for p in pictures], settings, "cpu")
        seen = tower(pixels, grid_thw=grid)
        seen = getattr(seen, "pooler_output", seen).view(len(pictures), 9, -1)
        scene = seen[: len(cells)]
        logits = [head(scene) for head in heads[:3]]
        losses = [
            F.cross_entropy(x.flatten(0, 1), cells[..., i].flatten(), ignore_index=-100)
            for i, x in enumerate(logits)
        ]
        text = heads[3](seen[len(cells) :].flatten(1))
        losses.append(F.cross_entropy(text, words))
        sum(losses).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            right = [
                (x.argmax(-1) == cells[..., i])[cells[..., 0] != NONE].float().mean().item()
                for i, x in enumerate(logits)
            ]
            right.append((text.argmax(-1) == words).float().mean().item())
            print(
                f"vision step {step} {time.time() - started:.0f}s "
                + " ".join(f"{x.item():.3f}" for x in losses)
                + " right "
                + " ".join(f"{r:.3f}" for r in right),
                flush=True,
            )
    model.save_pretrained(f"{args.out_dir}/vision")


if __name__ == "__main__":
    main()
