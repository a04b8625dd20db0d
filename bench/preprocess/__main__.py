"""The cost of preparing and encoding a picture, compared with Hugging Face's own code.

    python -m bench.preprocess [--only FAMILY ...] [--rounds N] [--depth N] [--cpu] [--quick]

Preparing: from a 1024x768 JPEG's bytes to a tower's floats, by stage, on one thread. Ours resizes
and cuts 8-bit pixels; a table on the tower's device, here the CPU, makes them floats. "as it was",
the former way, made floats and the doubled frame before the tower. Hugging Face's processors get
the picture decoded by Pillow; all they do except Pillow's resizing counts as cutting, including
torchvision's resizing. torchvision is installed for this run, in a folder of its own.

Encoding: the tower and projector of one picture against transformers' own, with the widths of a
published model and a few of its layers, in float32, on one thread; and how far the rows differ.

Figures are medians over rounds, in which the contestants take turns. ``--cpu`` measures the
thread's CPU time, for a machine that others use too.
"""

from __future__ import annotations

import argparse
import gc
import io
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import report

JPEG_SIZE = (1024, 768)
STAGES = ("decode", "resize", "cut", "table")
OURS, WAS, PILLOW, TORCHVISION = "ours", "as it was", "Pillow-backed", "torchvision-backed"

Clock = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="FAMILY", help="these families")
    parser.add_argument("--rounds", type=int, default=15, help="for preparing; encoding: half")
    parser.add_argument("--depth", type=int, default=4, help="layers of the towers")
    parser.add_argument("--cpu", action="store_true", help="measure CPU time, not wall time")
    parser.add_argument("--quick", action="store_true", help="3 rounds, towers of 2 layers")
    args = parser.parse_args()
    rounds, depth = (3, 2) if args.quick else (args.rounds, args.depth)
    clock = time.thread_time if args.cpu else time.perf_counter
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        results = run(args.only, rounds, depth, clock, Path(folder))
    show(results)
    print("written to", report.save("preprocess", results).relative_to(Path.cwd()))


def say(text: str) -> None:
    print(text, file=sys.stderr)


def run(families: list[str], rounds: int, depth: int, clock: Clock, folder: Path) -> dict[str, Any]:
    from bench.preprocess.ways import add_torchvision

    say("installing torchvision ...")
    missing = add_torchvision(folder / "torchvision")
    if missing:
        say(f"torchvision cannot be had, and its rows are left out: {missing}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from bench.preprocess.published import PUBLISHED

    results: dict[str, Any] = {
        "clock": "wall" if clock is time.perf_counter else "cpu",
        "rounds": rounds,
        "depth": depth,
        "preparing": {},
        "encoding": {},
    }
    for family in families or PUBLISHED:
        published = PUBLISHED[family]
        say(f"{published.model}: a random checkpoint with its widths and {depth} layers ...")
        path = published.write(family, depth, folder)
        say(f"{published.model}: preparing, {rounds} rounds")
        results["preparing"][published.model] = preparing(family, path, rounds, clock, not missing)
        say(f"{published.model}: encoding, {rounds // 2 + 1} rounds")
        results["encoding"][published.model] = encoding(family, path, rounds // 2 + 1, clock)
        gc.collect()
    return results


# ---- preparing


def preparing(
    family: str, path: Path, rounds: int, clock: Clock, with_torchvision: bool
) -> dict[str, Any]:
    """Milliseconds by stage, and bytes a picture, by contestant."""
    from bench.preprocess.published import PUBLISHED
    from bench.preprocess.ways import CPU, Ours, Way, theirs, torchvision_processor, upload
    from tests.families import samples

    jpeg = _jpeg(JPEG_SIZE)
    ours = Ours(path, jpeg, clock)
    sample = samples()[family]
    ways: dict[str, Way] = {OURS: ours}
    if PUBLISHED[family].was_before:
        ways[WAS] = ours.as_it_was
    processor = sample.image_processor(path)
    ways[PILLOW] = theirs(sample, processor, clock)
    if with_torchvision:
        ways[TORCHVISION] = theirs(sample, torchvision_processor(family, processor), clock)
    outcomes = {name: way(jpeg)[1] for name, way in ways.items()}  # Warms up.
    values = ours.table(upload([outcomes[OURS]], CPU)).numpy()
    if not np.array_equal(values, sample.pixels({"pixel_values": outcomes[PILLOW]})):
        raise SystemExit("these floats are not those of the Pillow-backed processor")
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name in _in_turn(list(ways), turn):
            seen[name].append(ways[name](jpeg)[0])
    return {
        name: {
            "bytes": outcomes[name].nbytes,
            "total_ms": 1e3 * statistics.median(sum(stages.values()) for stages in seen[name]),
            **{
                f"{stage}_ms": 1e3 * statistics.median(stages[stage] for stages in seen[name])
                for stage in seen[name][0]
            },
        }
        for name in ways
    }


def _jpeg(size: tuple[int, int]) -> bytes:
    """A picture of smooth areas with some noise, at a photograph's usual quality."""
    from tests.reference import picture

    file = io.BytesIO()
    picture(*size).save(file, "JPEG", quality=90)
    return file.getvalue()


def _in_turn(names: list[str], turn: int) -> list[str]:
    first = turn % len(names)
    return names[first:] + names[:first]


# ---- encoding


def encoding(family: str, path: Path, rounds: int, clock: Clock) -> dict[str, Any]:
    """Milliseconds for a picture in our tower and in transformers', and how far the rows differ."""
    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.media.plan import Structure
    from opticnerve.models import registry
    from tests.families import samples
    from tests.reference import load_reference, picture

    checkpoint, sample = Checkpoint.open(str(path), side="encoder"), samples()[family]
    layout = registry.make_layout(checkpoint)
    image = picture(448, 336)
    plan = layout.plan(Structure("png", *image.size))
    pixels = registry.make_preprocessor(checkpoint, layout)(image, plan)
    tower = registry.load_tower(checkpoint, torch.float32, "cpu")
    whole = load_reference(path)
    inputs = sample.image_inputs(sample.image_processor(path), [image])
    contestants: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: tower.encode([pixels], [plan])[0]["rows"],
        "transformers": lambda: sample.rows(whole, inputs)["rows"],
    }
    rows = {name: encode() for name, encode in contestants.items()}
    difference = (rows["ours"] - rows["transformers"]).abs().max()
    seen: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        for name in _in_turn(list(contestants), turn):
            started = clock()
            contestants[name]()
            seen[name].append(1e3 * (clock() - started))
    return {
        "patches": plan.num_patches,
        "ours_ms": statistics.median(seen["ours"]),
        "transformers_ms": statistics.median(seen["transformers"]),
        "times_as_fast": statistics.median(
            theirs / mine for mine, theirs in zip(seen["ours"], seen["transformers"], strict=True)
        ),
        "largest_difference": float(difference / rows["transformers"].abs().max()),
    }


# ---- telling


def show(results: Mapping[str, Any]) -> None:
    rows = [
        (
            model,
            name,
            *(f"{of[f'{stage}_ms']:.1f}" if f"{stage}_ms" in of else "-" for stage in STAGES),
            f"{of['total_ms']:.1f}",
            f"{of['bytes'] / 1e6:.2f}",
        )
        for model, ways in results["preparing"].items()
        for name, of in ways.items()
    ]
    print(report.table(("a 1024x768 JPEG, ms", "", *STAGES, "in all", "MB"), rows), end="\n\n")
    rows = [
        (
            model,
            of["patches"],
            f"{of['ours_ms']:.0f}",
            f"{of['transformers_ms']:.0f}",
            f"{of['times_as_fast']:.2f}x",
            f"{of['largest_difference']:.1e}",
        )
        for model, of in results["encoding"].items()
    ]
    header = (f"a picture, {results['depth']} layers", "patches", "ours, ms", "transformers, ms")
    print(report.table((*header, "", "rows differ by"), rows), end="\n\n")


if __name__ == "__main__":
    main()
