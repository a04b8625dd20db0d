"""Is it right? Every path that CUDA takes, against attention by hand or transformers' own model.

Each check takes a ``Room`` and returns what was seen; it raises CheckFailed if something is wrong,
and Skipped if it cannot run here. In half precision, a result's distance from fp32 may be up to one
and a half times that of transformers in the same precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bench.gpu.models import Picture, Prompt, Room, Said, Split
from llm_service.device.attention import make_backend
from llm_service.device.attention.base import AttentionStep, BlockShape, Chunk
from opticnerve.models.decoders.spec import LayerSpec
from opticnerve.models.towers import varlen
from tests.reference import image_rows

EXACT, HALF = torch.float32, torch.bfloat16
ATTENTION_ERROR = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}
ROWS_ERROR = 5e-4  # Relative to the largest value, fp32.
LOGPROB_ERROR = {torch.float32: 5e-3, torch.bfloat16: 0.3}
BLOCK = 16
Figures = dict[str, Any]
Call = Callable[[Callable[[], Any]], Any]  # Calls its argument, and may observe the call.


class CheckFailed(Exception):
    """Something is wrong; the message has the numbers."""


class Skipped(Exception):
    """The check cannot run here; the message says why."""


@dataclass(frozen=True)
class Seen:
    text: str
    figures: Figures


def expect(true: bool, message: str) -> None:
    if not true:
        raise CheckFailed(message)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """‖got - want‖ / ‖want‖, in fp64; NaN where ``got`` has one."""
    want = want.double()
    return float((got.double() - want).norm() / want.norm())


def _call(work: Callable[[], Any]) -> Any:
    return work()


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- attention alone


def _by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, hidden: torch.Tensor | None
) -> torch.Tensor:
    """fp64 attention of q [rows, heads, dim] over k, v [keys, kv_heads, dim]."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    scores = q @ k.mT * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


TOWER_LENGTHS = {"alike": [64] * 5, "pictures": [256, 100, 256, 36], "windows": [64] * 6 + [16, 1]}


def tower_attention(room: Room) -> Seen:
    """Checks the tower's attention: its own choice, and each way that it could have chosen."""
    figures: Figures = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for dim, heads in ((80, 4), (64, 4)):
            for kind, lengths in TOWER_LENGTHS.items():
                for way, error in tower_case(room, dtype, dim, heads, lengths).items():
                    name = f"{way} {short(dtype)}"
                    expect(error <= ATTENTION_ERROR[dtype], f"{name} {kind} {dim}: {error:.2e}")
                    figures[name] = max(figures.get(name, 0.0), error)
    ways = "kernel and runs" if any(name.startswith("kernel") for name in figures) else "runs alone"
    return Seen(f"{ways}; worst {max(figures.values()):.1e}", figures)


def tower_case(
    room: Room, dtype: torch.dtype, dim: int, heads: int, lengths: list[int], call: Call = _call
) -> dict[str, float]:
    """Relative errors by way. ``call``: calls the tower's own choice."""
    size = (1, heads, sum(lengths), dim)
    q, k, v = (torch.randn(size, device=room.device, dtype=dtype) for _ in range(3))
    packing = varlen.Packing.of(lengths, room.device)
    scale = dim**-0.5
    parts = zip(*(x[0].transpose(0, 1).split(lengths) for x in (q, k, v)), strict=True)
    want = torch.cat([_by_hand(*part, scale, None) for part in parts])
    bounds = {"cu_seq_lens_q": packing.cu_seqlens, "packings": [packing]}
    chosen, _ = call(lambda: varlen.attend(None, q, k, v, None, scaling=scale, **bounds))
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    found = {"chosen": chosen[0], "runs": varlen._attend_by_runs(*packed, packing, scale)}
    if room.on_cuda and dtype is not torch.float32:
        usable = varlen.has_varlen_kernel(room.device, dtype, dim)
        expect(usable, f"torch's variable-length kernel is not used for {short(dtype)}, dim {dim}")
        found["kernel"] = varlen._attend_by_kernel(*packed, packing, scale)
    return {way: relative(got, want) for way, got in found.items()}


@dataclass(frozen=True)
class Case:
    """Sequences, by their numbers of tokens in pages and of new tokens."""

    cached: tuple[int, ...]
    new: tuple[int, ...]
    bidirectional: tuple[tuple[int, int], ...] = ()
    window: int | None = None


CASES = {
    "decode alike": Case((200,) * 4, (1,) * 4),
    "decode ragged": Case((517, 300, 64, 15, 1), (1,) * 5),
    "prompt": Case((0, 0), (300, 33)),
    "cached chunk": Case((130, 37), (600, 20)),
    "mixed": Case((400, 31, 64, 0), (1, 1, 90, 50)),
    "both ways": Case((20, 0), (60, 40), ((5, 30),)),
    "decode in a window": Case((517, 300, 64, 15, 1), (1,) * 5, window=70),
    "mixed in a window": Case((400, 31, 64, 0), (1, 1, 90, 150), ((5, 30),), window=70),
}
HEADS = ((12, 2, 128), (4, 4, 64))  # Heads, key heads, their dimension.


def decoder_attention(room: Room) -> Seen:
    """Checks the backend's attention over pages, for every kind of step."""
    figures: Figures = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for heads in HEADS if room.on_cuda or dtype is EXACT else HEADS[:1]:
            for kind, case in CASES.items():
                error = decoder_case(room, dtype, heads, case)
                name = f"{kind} {short(dtype)}"
                expect(error <= ATTENTION_ERROR[dtype], f"{name} {heads}: {error:.2e}")
                figures[name] = max(figures.get(name, 0.0), error)
    return Seen(f"{len(CASES)} kinds of steps; worst {max(figures.values()):.1e}", figures)


def decoder_case(
    room: Room, dtype: torch.dtype, heads: tuple[int, int, int], case: Case, call: Call = _call
) -> float:
    """The relative error. ``call``: calls the attention of the new tokens, once the cached ones are
    in pages."""
    count, kv_heads, dim = heads
    totals = [cached + new for cached, new in zip(case.cached, case.new, strict=True)]
    pages = _tables(totals)
    backend = make_backend("auto")
    shape = BlockShape(1, kv_heads, dim, BLOCK)
    layers = (LayerSpec(window=case.window),)
    backend.allocate(shape, sum(map(len, pages)), dtype, room.device, layers)
    keys = [
        torch.randn(total, 2 * kv_heads, dim, device=room.device, dtype=dtype) for total in totals
    ]
    filled = [i for i, cached in enumerate(case.cached) if cached]
    if filled:
        spans = [(i, 0, case.cached[i]) for i in filled]
        _step(backend, pages, spans, ())
        fill = torch.cat([keys[i][: case.cached[i]] for i in filled])
        query = torch.randn(len(fill), count, dim, device=room.device, dtype=dtype)
        backend.attend(0, query, fill, dim**-0.5)
    spans = [(i, case.cached[i], totals[i]) for i in range(len(totals))]
    _step(backend, pages, spans, case.bidirectional)
    new = torch.cat([keys[i][start:end] for i, start, end in spans])
    query = torch.randn(len(new), count, dim, device=room.device, dtype=dtype)
    got = call(lambda: backend.attend(0, query, new, dim**-0.5))
    parts = query.split(list(case.new))
    want = [
        _by_hand(q, *keys[i].chunk(2, dim=1), dim**-0.5, _hidden(room, start, end, case))
        for q, (i, start, end) in zip(parts, spans, strict=True)
    ]
    backend.free()
    return relative(got, torch.cat(want))


def _tables(totals: Sequence[int]) -> list[np.ndarray]:
    """The pages of every sequence, in random order."""
    counts = [-(-total // BLOCK) for total in totals]
    order = np.random.default_rng(0).permutation(sum(counts))
    return np.split(order, np.cumsum(counts)[:-1])


def _hidden(room: Room, start: int, end: int, case: Case) -> torch.Tensor:
    """bool [end - start, end]: keys that a new token does not see."""
    rows = torch.arange(start, end, device=room.device)[:, None]
    hidden = torch.arange(end, device=room.device) > rows
    if end - start > 1:
        for first, last in case.bidirectional:
            hidden[first:last, start + first : start + last] = False
    if case.window is not None:
        hidden |= torch.arange(end, device=room.device) <= rows - case.window
    return hidden


def _step(
    backend: Any,
    pages: list[np.ndarray],
    spans: list[tuple[int, int, int]],
    bidirectional: tuple[tuple[int, int], ...],
) -> None:
    """Prepares a step of (sequence, first token, end), decoding sequences first, the longest
    first."""
    decodes = [(i, end) for i, start, end in spans if end - start == 1 and start]
    table = np.zeros((len(decodes), max((len(pages[i]) for i, _ in decodes), default=0)), np.int64)
    for row, (i, _) in enumerate(decodes):
        table[row, : len(pages[i])] = pages[i]
    slots, chunks, row = [], [], 0
    for i, start, end in spans:
        tokens = np.arange(start, end)
        slots.append(pages[i][tokens // BLOCK] * BLOCK + tokens % BLOCK)
        if (i, end) not in decodes:
            used = pages[i][: -(-end // BLOCK)]
            chunks.append(Chunk(row, end - start, start, used, bidirectional))
        row += end - start
    lengths = np.array([end for _, end in decodes], dtype=np.int64)
    backend.prepare(AttentionStep(np.concatenate(slots), table, lengths, tuple(chunks)))


# ---- the tower


def encoder_rows(room: Room, name: str, dtype: torch.dtype) -> Seen:
    """Compares packed pictures of several sizes with the unsplit model's rows, one by one."""
    split = room.split(name, dtype)
    pictures = [split.picture(size, seed) for seed, size in enumerate(room.sizes.pictures)]
    found = split.backend.encode([p.pixels for p in pictures], [p.plan for p in pictures])
    got = torch.cat([item["rows"] for item in found]).float()
    want = _rows(room, name, EXACT, pictures)
    cosine = float(F.cosine_similarity(got, want, dim=-1).min())
    largest = float((got - want).abs().max() / want.abs().max())
    error = relative(got, want)
    figures = {"cosine": cosine, "largest_difference": largest, "error": error}
    if dtype is EXACT:
        expect(largest <= ROWS_ERROR and cosine >= 0.99999, f"{largest:.2e}, cosine {cosine:.6f}")
    else:
        theirs = relative(_rows(room, name, dtype, pictures), want)
        figures["transformers_error"] = theirs
        expect(error <= 1.5 * theirs + 1e-3, f"error {error:.2e}, transformers' is {theirs:.2e}")
    return Seen(f"cosine {cosine:.6f}, largest difference {largest:.1e}", figures)


def _rows(room: Room, name: str, dtype: torch.dtype, pictures: list[Picture]) -> torch.Tensor:
    whole = room.whole(name, dtype)
    family = whole.config.model_type
    rows = []
    for each in pictures:
        grid = each.plan.grid
        inputs = {
            "pixel_values": each.values.to(room.device, dtype),
            "image_grid_thw": torch.tensor([(grid.t, grid.h, grid.w)], device=room.device),
        }
        rows.append(image_rows(whole, family, inputs).float().cpu())
    return torch.cat(rows)


# ---- tower and decoder


def prompts(room: Room, split: Split) -> list[Prompt]:
    """Prompts: text only; a picture first; a picture last; several pictures of several sizes."""
    one, two, three = (split.picture(size, i) for i, size in enumerate(room.sizes.pictures))
    return [
        split.prompt(40, seed=1),
        split.prompt(one, 12, seed=2),
        split.prompt(30, two, seed=3),
        split.prompt(9, one, 5, two, three, 8, seed=4),
    ]


def split_equals_whole(room: Room, name: str, dtype: torch.dtype) -> Seen:
    """Compares the log-probability of every text token of prompt and answer, and checks that each
    answered token is the unsplit model's best."""
    split = room.split(name, dtype)
    asked = prompts(room, split)
    answers = split.ask(split.engine(), asked, "whole-", prompt_logprobs=1)
    errors, theirs, gaps = [], [], []
    for prompt, said in zip(asked, answers, strict=True):
        exact = _logprobs(room, name, EXACT, prompt, said)
        where, tokens, ours = (part.to(room.device) for part in _told(prompt, said))
        errors.append(ours - exact[where, tokens])
        best = exact[len(prompt.token_ids) - 1 :].max(-1).values
        gaps.append(best - exact[where, tokens][-len(best) :])
        if dtype is not EXACT:
            half = _logprobs(room, name, dtype, prompt, said)
            theirs.append(half[where, tokens] - exact[where, tokens])
    error, gap = torch.cat(errors), float(torch.cat(gaps).max())
    figures = {"tokens": len(error), "rms": _rms(error), "largest": _largest(error), "gap": gap}
    if dtype is EXACT:
        bound = LOGPROB_ERROR[EXACT]
        expect(_largest(error) <= bound and gap <= bound, f"{figures}")
    else:
        other = torch.cat(theirs)
        figures |= {"transformers_rms": _rms(other), "transformers_largest": _largest(other)}
        expect(_rms(error) <= 1.5 * _rms(other) + 0.01, f"{figures}")
        expect(gap <= 0.05 + 3 * _largest(other), f"{figures}")
    return Seen(f"{len(error)} log-probabilities, rms {_rms(error):.1e}", figures)


def _logprobs(
    room: Room, name: str, dtype: torch.dtype, prompt: Prompt, said: Said
) -> torch.Tensor:
    """fp32 [tokens, vocab]: the unsplit model's log-probabilities after each token but the last."""
    whole = room.whole(name, dtype)
    ids = torch.tensor([[*prompt.token_ids, *said.token_ids[:-1]]], device=room.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.pictures:
        pixels = torch.cat([each.values for each in prompt.pictures])
        grids = [each.plan.grid for each in prompt.pictures]
        sizes = [(grid.t, grid.h, grid.w) for grid in grids]
        inputs["pixel_values"] = pixels.to(room.device, dtype)
        inputs["image_grid_thw"] = torch.tensor(sizes, device=room.device)
        inputs["mm_token_type_ids"] = (ids == whole.config.image_token_id).int()
    with torch.inference_mode():
        return whole(**inputs).logits[0].float().log_softmax(-1)


def _told(prompt: Prompt, said: Said) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For every token with a log-probability from the engine: (the row that predicts it, its id,
    the log-probability)."""
    count = len(prompt.token_ids)
    told = [
        (position - 1, each.sampled[0], each.sampled[1])
        for position, each in enumerate(said.prompt)
        if each.sampled is not None
    ]
    expect(len(told) >= count // 50, "the engine told nothing of its prompt")
    told += [(count - 1 + i, *each.sampled[:2]) for i, each in enumerate(said.logprobs)]
    where, tokens, values = zip(*told, strict=True)
    return torch.tensor(where), torch.tensor(tokens), torch.tensor(values)


def _rms(errors: torch.Tensor) -> float:
    return float(errors.square().mean().sqrt())


def _largest(errors: torch.Tensor) -> float:
    return float(errors.abs().max())


# ---- the engine against itself


def chunks_equal_whole(room: Room, name: str, dtype: torch.dtype) -> Seen:
    """A prefill in chunks that cut pictures answers like one in one piece."""
    split = room.split(name, dtype)
    asked = prompts(room, split)
    budget = max(len(prompt.token_ids) for prompt in asked) // 3 + 1
    whole = split.ask(split.engine(max_num_batched_tokens=2048), asked, "whole-")
    pieces = split.ask(split.engine(max_num_batched_tokens=budget), asked, "pieces-")
    return _same(pieces, whole, dtype)


def prefix_equals_cold(room: Room, name: str, dtype: torch.dtype) -> Seen:
    split = room.split(name, dtype)
    asked, engine = prompts(room, split), split.engine()
    cold = split.ask(engine, asked, "cold-")
    warm = split.ask(engine, asked, "warm-")
    expect(all(each.cached >= 16 for each in warm), "the second time found nothing in pages")
    return _same(warm, cold, dtype)


def batched_equals_alone(room: Room, name: str, dtype: torch.dtype) -> Seen:
    split = room.split(name, dtype)
    asked = prompts(room, split)
    engine = split.engine(prefix_caching=False)
    alone = [split.ask(engine, [each], f"{i}-")[0] for i, each in enumerate(asked)]
    return _same(split.ask(engine, asked, "together-"), alone, dtype)


def _same(got: list[Said], want: list[Said], dtype: torch.dtype) -> Seen:
    """Checks for equal tokens and close log-probabilities. Tokens that tie within the tolerance may
    differ; what follows is then another text and is not compared."""
    bound = LOGPROB_ERROR[dtype]
    worst, compared, ties = 0.0, 0, 0
    for ours, theirs in zip(got, want, strict=True):
        for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
            if a.sampled[0] != b.sampled[0]:
                gap = b.top[0][1] - b.top[1][1]
                expect(gap <= 2 * bound, f"another token, {gap:.3f} less likely")
                ties += 1
                break
            difference = abs(a.sampled[1] - b.sampled[1])
            expect(difference <= bound, f"log-probabilities differ by {difference:.2e}")
            worst, compared = max(worst, difference), compared + 1
    figures = {"tokens": compared, "largest": worst, "ties": ties}
    return Seen(f"{compared} tokens equal, log-probabilities within {worst:.1e}", figures)
