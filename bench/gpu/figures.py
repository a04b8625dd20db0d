"""How fast is it? The tower, prefill and decode steps, against the device's measured ceilings."""

from __future__ import annotations

import itertools
import re
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu.checks import (
    CASES,
    HALF,
    HEADS,
    TOWER_LENGTHS,
    Figures,
    Seen,
    decoder_case,
    short,
    tower_case,
)
from bench.gpu.models import TEXT_IDS, Room, Split, wall_ms
from llm_service.policy.messages import GenerateRequest, PrefilledEvent
from llm_service.policy.step_plan import StepPlan, WorkResult
from opticnerve.generation.values import Sampling
from opticnerve.media.plan import Grid
from tests.local_engine import LocalEngine

MODEL = "full depth"
WARM_STEPS = 5
PROMPTS = 3  # Timed prompts of each length.
ATTENTION_OPS = re.compile(r"_scaled_dot_product_(\w+)|_(flash|efficient|cudnn)_attention_forward")
_ids = itertools.count()


# ---- ceilings


def ceilings(room: Room) -> Seen:
    """Bytes and operations a second that plain torch reaches on this device."""
    rate, product = bandwidth(room), _product(room)
    figures = {"bytes_per_s": rate, "product_flops_per_s": product, **room.measured}
    return Seen(
        f"memory {_unit(rate)}B/s, {short(room.dtype)} product {_unit(product)}FLOP/s", figures
    )


def bandwidth(room: Room) -> float:
    """Bytes a second: the faster of a copy (read and written) and a sum (read)."""
    if "copy" not in room.measured:
        source = torch.randn(room.sizes.copy_bytes // 4, device=room.device)
        target = torch.empty_like(source)
        copied = room.median_ms(lambda: target.copy_(source)) / 1000
        summed = room.median_ms(source.sum) / 1000
        room.measured |= {"copy": 2 * source.nbytes / copied, "sum": source.nbytes / summed}
    return max(room.measured["copy"], room.measured["sum"])


def _product(room: Room) -> float:
    size = room.sizes.product
    a, b = (torch.randn(size, size, device=room.device, dtype=room.dtype) for _ in range(2))
    return 2 * size**3 / (room.median_ms(lambda: a @ b) / 1000)


# ---- the tower


def tower(room: Room) -> Seen:
    """Patches a second of the device alone, and of ``encode`` with its copies; and the time of
    embedding patches by one product, against that of the convolution it replaces."""
    split = room.split(MODEL, room.dtype)
    picture = split.picture((room.sizes.side, room.sizes.side), seed=0)
    count, grid = picture.plan.num_patches, picture.plan.grid
    figures: Figures = {"patches_a_picture": count}
    for batch in room.sizes.tower_batches:
        patches = torch.randn(
            batch * count, *picture.pixels.shape[1:], device=room.device, dtype=room.dtype
        )
        ms = room.median_ms(lambda p=patches, b=batch: _forward(split, p, [grid] * b))  # type: ignore[misc]
        figures[f"{batch}_patches_per_s"] = batch * count / ms * 1000
        figures[f"{batch}_flops_per_s"] = batch * _tower_flops(split, grid) / ms * 1000
    pixels, plans = [picture.pixels] * batch, [picture.plan] * batch
    wall = _encode_ms(room, lambda: split.backend.encode(pixels, plans))
    figures[f"{batch}_encode_patches_per_s"] = batch * count / wall * 1000
    figures |= _patch_embedding(room, split, patches)
    rate = figures[f"{batch}_patches_per_s"]
    whole = figures[f"{batch}_encode_patches_per_s"]
    return Seen(
        f"{batch} pictures: {rate:,.0f} patches/s ({whole:,.0f} with copies), "
        f"{_unit(figures[f'{batch}_flops_per_s'])}FLOP/s",
        figures,
    )


def _forward(split: Split, patches: torch.Tensor, grids: list[Grid]) -> torch.Tensor:
    with torch.inference_mode():
        named = split.tower.forward(patches, grids)  # type: ignore[attr-defined]
    rows: torch.Tensor = named["rows"]
    return rows


def _patch_embedding(room: Room, split: Split, patches: torch.Tensor) -> Figures:
    tower: Any = split.tower
    embedding, frames = tower.module.patch_embed, tower.frames
    weight = embedding.weight.unflatten(1, (frames, *patches.shape[1:])).permute(0, 4, 1, 2, 3)
    repeated = patches.permute(0, 3, 1, 2)[:, :, None].expand(-1, -1, frames, -1, -1)
    weight, repeated = weight.contiguous(), repeated.contiguous()
    with torch.inference_mode():
        convolution = room.median_ms(lambda: F.conv3d(repeated, weight))
        product = room.median_ms(lambda: embedding(patches))
    return {"patch_convolution_ms": convolution, "patch_product_ms": product}


def _tower_flops(split: Split, grid: Grid) -> float:
    """Operations for one picture: products of blocks and merger, and attention over the picture."""
    config = split.tower.module.config  # type: ignore[attr-defined]
    width, patches = config.embed_dim, grid.num_patches
    block = (4 + 2 * config.mlp_ratio) * width**2 + 2 * patches * width
    merged = width * config.spatial_merge_size**2
    merger = merged * (merged + config.hidden_size) / config.spatial_merge_size**2
    return 2.0 * patches * (config.depth * block + merger)


# ---- prefill


def prefill(room: Room) -> Seen:
    """Tokens a second of text prompts, in one piece, and in pieces of the shortest length."""
    split = room.split(MODEL, room.dtype)
    figures: Figures = {}
    piece = room.sizes.prefills[0]
    for tokens in room.sizes.prefills:
        for budget in sorted({piece, tokens}):
            seconds = _prefill_s(split, tokens, budget)
            name = f"{tokens} in {-(-tokens // budget)}"
            figures[f"{name}_tokens_per_s"] = tokens / seconds
            figures[f"{name}_flops_per_s"] = _decoder_flops(split, tokens) / seconds
    rates = {k: v for k, v in figures.items() if k.endswith("tokens_per_s")}
    said = ", ".join(f"{k.removesuffix('_tokens_per_s')}: {v:,.0f}" for k, v in rates.items())
    return Seen(f"tokens/s of {said}", figures)


def _prefill_s(split: Split, tokens: int, budget: int) -> float:
    engine = split.engine(
        max_model_len=tokens + 16,
        max_num_seqs=1,
        max_num_batched_tokens=budget,
        kv_cache_tokens=tokens + 64,
        prefix_caching=False,
    )
    times = []
    for seed in range(1 + PROMPTS):
        request = _request(tokens, seed, max_tokens=2)
        began = time.perf_counter()
        engine.engine.submit(request)
        _step_until_prefilled(engine, 1)
        times.append(time.perf_counter() - began)
        engine.run()
        engine.messages.clear()
    engine.runner.close()
    return statistics.median(times[1:])


def _decoder_flops(split: Split, tokens: int) -> float:
    """Operations of a prefill: the products of the layers, and causal attention."""
    language = split.language
    config, width = language.spec.config, language.num_heads * language.head_dim
    attention = 2 * width + 2 * language.num_kv_heads * language.head_dim  # q and output, k and v.
    weights = language.num_layers * config.hidden_size * (attention + 3 * config.intermediate_size)
    return 2.0 * tokens * weights + 2.0 * tokens**2 * width * language.num_layers


def _request(tokens: int, seed: int, max_tokens: int) -> GenerateRequest:
    ids = np.random.default_rng(seed).integers(*TEXT_IDS, tokens).tolist()
    sampling = Sampling(max_tokens=max_tokens, ignore_eos=True)
    return GenerateRequest(f"figure-{next(_ids)}", tuple(ids), sampling=sampling)


def _step_until_prefilled(engine: LocalEngine, count: int) -> None:
    while sum(isinstance(each, PrefilledEvent) for each in engine.messages) < count:
        if not engine.engine.step():
            raise RuntimeError("the engine has nothing to do and has not prefilled every prompt")


# ---- decode


class _Clocked:
    """A runner whose ``execute`` is timed; the rest of a step is the engine's own."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.ms: list[float] = []

    def execute(self, plan: StepPlan) -> list[WorkResult]:
        began = time.perf_counter()
        result: list[WorkResult] = self._runner.execute(plan)
        self.ms.append((time.perf_counter() - began) * 1000)
        return result


def _decoding(room: Room, batch: int) -> LocalEngine:
    """An engine in which ``batch`` sequences decode, each over its own context."""
    sizes = room.sizes
    room_for = sizes.context + sizes.steps + 64
    engine = room.split(MODEL, room.dtype).engine(
        max_model_len=room_for,
        max_num_seqs=batch,
        max_num_batched_tokens=max(8192, batch),
        kv_cache_tokens=batch * (room_for + 16),
        prefix_caching=False,
    )
    for seed in range(batch):
        engine.engine.submit(_request(sizes.context, seed, max_tokens=sizes.steps + 60))
    _step_until_prefilled(engine, batch)
    for _ in range(WARM_STEPS):
        engine.engine.step()
    return engine


def decode_step(room: Room, batch: int) -> Seen:
    """Milliseconds of a step, and its floor: reading weights, keys and values once at the measured
    bandwidth."""
    engine = _decoding(room, batch)
    clocked = _Clocked(engine.engine.runner)
    engine.engine.runner = clocked  # type: ignore[assignment]
    steps = [wall_ms(engine.engine.step) for _ in range(room.sizes.steps)]
    split = room.split(MODEL, room.dtype)
    floor = _step_bytes(split, batch * (room.sizes.context + WARM_STEPS)) / bandwidth(room) * 1000
    step, execute = statistics.median(steps), statistics.median(clocked.ms)
    engine.runner.close()
    figures = {
        "step_ms": step,
        "execute_ms": execute,
        "host_ms": step - execute,
        "floor_ms": floor,
        "times_the_floor": step / floor,
        "tokens_per_s": batch / step * 1000,
    }
    return Seen(
        f"{step:.2f} ms, of which {step - execute:.2f} outside the runner; "
        f"{step / floor:.1f} times the floor of {floor:.2f} ms",
        figures,
    )


def _step_bytes(split: Split, tokens: int) -> float:
    """Bytes that a decode step must read: every weight, except an embedding that is not also the
    head, and the keys and values of ``tokens``."""
    language = split.language
    weights = language.weight_bytes()
    if all(tensor is not language._embedding for tensor in language._head.tensors()):
        weights -= language._embedding.nbytes
    per_token = 2 * language.num_layers * language.num_kv_heads * language.head_dim
    return float(weights + tokens * per_token * language.dtype.itemsize)


class _Operations(TorchDispatchMode):
    """Counts operations other than views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [each.alias_info for each in func._schema.returns]
        self.count += not any(alias is not None and not alias.is_write for alias in aliases)
        return func(*args, **(kwargs or {}))


def launches(room: Room, batch: int) -> Seen:
    """The number of a decode step's operations, kernels, copies and waits for the device."""
    engine = _decoding(room, batch)
    step = engine.engine.step
    with _Operations() as operations:
        step()
    figures: Figures = {"operations": operations.count}
    if room.on_cuda:
        figures["waits"] = _waits(step)
    figures |= _device_events(room, step)
    engine.runner.close()
    said = [f"{name.replace('_', ' ')} {value:,.4g}" for name, value in figures.items() if value]
    return Seen(", ".join(said), figures)


def _waits(step: Callable[[], object]) -> int:
    """Operations that made the host wait for the device, as torch counts them."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)


def _device_events(room: Room, step: Callable[[], object]) -> Figures:
    """Kernels, copies, and milliseconds of device time of a profiled step."""
    events = _profile(room, step)
    calls = Counter(event.name for event in events)
    on_device = [each for each in events if str(each.device_type).endswith("CUDA")]
    busy = sum(each.time_range.elapsed_us() for each in on_device) / 1000
    return {
        "kernel_launches": sum(n for name, n in calls.items() if "LaunchKernel" in name),
        "copies": sum(n for name, n in calls.items() if "MemcpyAsync" in name),
        "device_busy_ms": busy,
    }


def _profile(room: Room, work: Callable[[], object]) -> list[Any]:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * room.on_cuda
    with profile(activities=activities) as profiler:
        work()
        room.synchronize()
    return list(profiler.events() or ())


def attention_kernels(room: Room) -> Seen:
    """The attention kernel of torch that each kind of step uses, in bf16."""
    figures: Figures = {}
    for kind, case in CASES.items():
        watch = _Watch(room)
        decoder_case(room, HALF, HEADS[0], case, watch)
        figures[kind] = watch.names
    watch = _Watch(room)
    tower_case(room, HALF, 80, 4, TOWER_LENGTHS["pictures"], watch)
    figures["tower"] = watch.names
    kinds: dict[str, list[str]] = {}
    for kind, names in figures.items():
        kinds.setdefault(names, []).append(kind)
    return Seen("; ".join(f"{k}: {', '.join(v)}" for k, v in kinds.items()), figures)


class _Watch:
    """Calls its argument; ``names``: the attention kernels that ran in the call."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self.names = ""

    def __call__(self, work: Callable[[], Any]) -> Any:
        results: list[Any] = []
        events = _profile(self._room, lambda: results.append(work()))
        matches = [match for each in events if (match := ATTENTION_OPS.search(each.name))]
        found = {(match[1] or match[2]).removesuffix("_attention") for match in matches}
        self.names = ", ".join(sorted(found)) or "none seen"
        return results[0]


# ---- helpers


def _encode_ms(room: Room, work: Callable[[], object], repeats: int = 5) -> float:
    work()
    room.synchronize()
    return statistics.median(wall_ms(work) for _ in range(repeats))


def _unit(value: float) -> str:
    """The value with three digits and a unit prefix."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "
