"""Is the CUDA path right, and how fast is it? One command, under eight minutes.

    python -m bench.gpu [--dry] [--only TEXT] [--budget-s SECONDS] [--out FILE] [--commit NAME]

Needs torch and transformers (with their dependencies, and Pillow) and this directory. Checks of
correctness come first, then figures; each is independent, and the others go on if one fails. On
CUDA the table is also kept in ``bench/results/gpu/<device>.json``, which is written after every
check, so that an interrupted run keeps its results. ``--dry`` runs the CPU twin of every check at
small size, as does a machine without CUDA; nothing is then kept unless ``--out`` names a file. Exit
status 1 if a check failed.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging as transformers_logging

from bench import report
from bench.gpu import checks, engines, figures, stack
from bench.gpu.models import REAL, TWIN, Room

BUDGET_S = 420.0
HANG_S = 30.0  # After the budget, when whatever still runs must be hanging.
SHOWN = 110  # Letters of a result in the table; progress lines and the JSON have all.
WIDE = "real widths"


@dataclass(frozen=True)
class Check:
    name: str
    run: Callable[[Room], checks.Seen]
    group: str  # Models are released between groups.


@dataclass(frozen=True)
class Outcome:
    name: str
    result: str  # "ok", "FAILED", "skipped" or "not run".
    seconds: float
    said: str
    figures: checks.Figures
    trace: str = ""


def all_checks() -> list[Check]:
    return [*_correctness(), *_figures()]


def _correctness() -> list[Check]:
    found = [
        Check("tower attention", checks.tower_attention, "attention"),
        Check("decoder attention", checks.decoder_attention, "attention"),
    ]
    for model in ("demo", WIDE, "qwen2_5_vl", "llava"):
        for dtype in (checks.EXACT, checks.HALF):
            named = f"{model}, {checks.short(dtype)}"
            bound = {"name": model, "dtype": dtype}
            found.append(
                Check(f"encoder rows, {named}", partial(checks.encoder_rows, **bound), "rows")
            )
    found.append(Check("tower engines", engines.tower_engines, "engines"))
    for model, dtype in ((m, d) for m in ("demo", WIDE) for d in (checks.EXACT, checks.HALF)):
        named = f"{model}, {checks.short(dtype)}"
        found += [
            Check(f"{title}, {named}", partial(function, name=model, dtype=dtype), model)
            for title, function in (
                ("split equals whole", checks.split_equals_whole),
                ("chunks equal whole", checks.chunks_equal_whole),
                ("prefix hit equals cold", checks.prefix_equals_cold),
                ("batched equals alone", checks.batched_equals_alone),
            )
        ]
    return found


def _figures() -> list[Check]:
    batches = (1, 32)
    return [
        Check("ceilings", figures.ceilings, "figures"),
        *(
            Check(f"decode step, batch {n}", partial(figures.decode_step, batch=n), "figures")
            for n in batches
        ),
        Check("prefill", figures.prefill, "figures"),
        Check("tower", figures.tower, "figures"),
        *(
            Check(
                f"stack in one process, {n} at once",
                partial(stack.one_process, index=i),
                "figures",
            )
            for i, n in enumerate(REAL.at_once)
        ),
        *(
            Check(f"launches, batch {n}", partial(figures.launches, batch=n), "figures")
            for n in batches
        ),
        Check("attention kernels", figures.attention_kernels, "figures"),
        Check("stack over services", stack.services, "services"),
    ]


class Run:
    """Runs checks one by one within ``budget_s``; a failing check does not end the run."""

    def __init__(
        self,
        room: Room,
        budget_s: float,
        keep: Callable[[list[Outcome]], None] = lambda outcomes: None,
    ) -> None:
        self._room = room
        self._deadline = time.monotonic() + budget_s
        self._keep = keep
        self._lost = ""  # Why the device cannot be used any more.

    def __call__(self, wanted: Sequence[Check]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        group = ""
        for number, check in enumerate(wanted, 1):
            if check.group != group:
                self._give_back()
            group = check.group
            print(f"[{number:2}/{len(wanted)}] {check.name} ... ", end="", flush=True)
            outcome = self._one(check)
            print(f"{outcome.result}, {outcome.seconds:.1f} s: {outcome.said}", flush=True)
            outcomes.append(outcome)
            self._keep(outcomes)
        return outcomes

    def _one(self, check: Check) -> Outcome:
        if self._lost:
            return Outcome(check.name, "not run", 0.0, self._lost, {})
        if time.monotonic() > self._deadline:
            return Outcome(check.name, "not run", 0.0, "out of time", {})
        began = time.monotonic()
        result, said, seen, trace = "ok", "", {}, ""
        try:
            torch.manual_seed(0)
            found = check.run(self._room)
            self._room.synchronize()
            said, seen = found.text, found.figures
        except checks.Skipped as reason:
            result, said = "skipped", str(reason)
        except Exception as error:  # Of any kind: the other checks go on.
            result, said = "FAILED", f"{type(error).__name__}: {error}".splitlines()[0]
            trace = traceback.format_exc()
            self._lost = self._why_lost(check)
        return Outcome(check.name, result, time.monotonic() - began, said, seen, trace)

    def _why_lost(self, check: Check) -> str:
        try:
            self._room.synchronize()
        except Exception as error:
            return f"the device was lost in {check.name!r}: {error}".splitlines()[0]
        return ""

    def _give_back(self) -> None:
        if not self._lost:
            self._room.release()


def _show(outcomes: Sequence[Outcome]) -> None:
    rows = [
        (each.name, each.result, f"{each.seconds:.1f}", textwrap.shorten(each.said, SHOWN))
        for each in outcomes
    ]
    print("\n" + report.table(("check", "result", "s", "seen"), rows))
    for each in outcomes:
        if each.trace:
            print(f"\n{each.name}\n{each.trace}", end="")


def _document(room: Room, commit: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "commit": commit,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "dry": not room.on_cuda,
        "checks": [asdict(each) for each in outcomes],
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:  # No git here.
        return "unknown"
    return done.stdout.strip() or "unknown"


def _file(room: Room, out: str | None) -> Path | None:
    """The file for results, without the suffix that ``report.save`` adds; None: not kept."""
    if out is not None:
        return Path(out).absolute().with_suffix("")
    if not room.on_cuda:
        return None
    name = torch.cuda.get_device_name(room.device).lower()
    slug = "-".join("".join(c if c.isalnum() else " " for c in name).split())
    return report.RESULTS / "gpu" / slug


def make_room(dry: bool, directory: str | Path) -> Room:
    """The room for CUDA, or for the CPU twins. Configures torch in this process."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if dry:
        torch.set_num_threads(1)  # For small work, more threads only wait for each other.
        return Room(torch.device("cpu"), TWIN, Path(directory))
    torch.backends.cudnn.allow_tf32 = False  # float32 must not be TF32.
    return Room(torch.device("cuda"), REAL, Path(directory))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=summary)
    parser.add_argument("--dry", action="store_true", help="each check's CPU twin, at small size")
    parser.add_argument("--only", default="", help="only checks whose names contain this text")
    parser.add_argument(
        "--budget-s", type=float, default=BUDGET_S, help="seconds after which no check is started"
    )
    parser.add_argument("--out", help="JSON file for the results")
    parser.add_argument("--commit", help="name of what is measured, if git cannot tell")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
    dry = options.dry or not torch.cuda.is_available()
    if dry and not options.dry:
        print("no CUDA device is visible: each check's CPU twin runs, at small size (--dry)")
    wanted = [check for check in all_checks() if options.only in check.name]
    if not wanted:
        print(f"no check's name holds {options.only!r}")
        return 2
    faulthandler.dump_traceback_later(options.budget_s + HANG_S, exit=True, file=sys.__stderr__)
    with tempfile.TemporaryDirectory(prefix="opticnerve-gpu-") as directory:
        room = make_room(dry, directory)
        file, commit = _file(room, options.out), options.commit or _commit()

        def keep(outcomes: list[Outcome]) -> None:
            if file is not None:
                report.save("gpu", _document(room, commit, outcomes), file=file)

        outcomes = Run(room, options.budget_s, keep)(wanted)
        room.release()
    faulthandler.cancel_dump_traceback_later()
    _show(outcomes)
    if file is not None:
        print(f"\nkept in {file}.json")
    return int(any(each.result == "FAILED" for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
