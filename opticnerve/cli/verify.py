"""``opticnerve verify``: compares the split model with the unsplit one, on the user's machine."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from opticnerve.addresses import gateway_url
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.cli.check import Report, gib, inspect
from opticnerve.client import EncoderClient
from opticnerve.config import GatewayConfig, ModelConfig
from opticnerve.config.command_line import Parser, add_options, argument_type, number_type
from opticnerve.config.options import build
from opticnerve.config.shared import CallsConfig, CertificateConfig
from opticnerve.config.up import up_options
from opticnerve.errors import OpticNerveError, StartupError
from opticnerve.extras import require_extra
from opticnerve.local.serve import serve
from opticnerve.rpc.tls import ChannelTls
from opticnerve.secret import make_secret

DESCRIPTION = (
    "Compares a checkpoint served in two halves with the same checkpoint in transformers, unsplit: "
    "ids of prompts, rows of pictures, greedy tokens and log-probabilities, over texts, pictures, "
    "several pictures, turns and prompts that are computed in chunks; asked alone, together, and "
    "again when all is cached. First `up` is started with MODEL and its flags and asked; when it "
    "has ended, the unsplit model is loaded."
)
EPILOG = (
    "In float32 a token may differ only where the unsplit model's logits of both are closer than "
    "0.001, a log-probability may be off by 0.001, and rows must have a cosine of 0.99999 and "
    "numbers that are off by no more than 0.001 of the largest; in bfloat16 these are 0.5, 1, "
    "0.999 and 0.1, in float16 0.5, 0.125, 0.999 and 0.05. Exit status: 0 if all is equal by this "
    "rule, 1 if not, 2 if it could not begin."
)
# Small, so that prompts are computed in chunks and the two sides need little memory.
DEFAULTS = {"max_num_batched_tokens": 512, "kv_cache_tokens": 32768}
OVERHEAD = 1.15  # Factor on the weights: activations, and what libraries take.
CASES = (20, 1000)


def parser() -> Parser:
    made = Parser("verify", DESCRIPTION, "[MODEL] [flags]", EPILOG)
    how = made.add_argument_group("Comparison")
    how.add_argument(
        "--cases",
        metavar="N",
        type=number_type(int, minimum=CASES[0]),
        default=40,
        help=f"chats to compare, {CASES[0]} to {CASES[1]} (default: 40)",
    )
    how.add_argument(
        "--max-tokens",
        metavar="N",
        type=number_type(int, minimum=1),
        default=24,
        help="tokens of each answer (default: 24)",
    )
    how.add_argument(
        "--seed", metavar="N", type=number_type(int), default=0, help="chats' seed (default: 0)"
    )
    how.add_argument(
        "--against",
        metavar="URL",
        type=argument_type(gateway_url),
        help="a running gateway to audit, instead of one that is started here; OPENAI_API_KEY is "
        "its key. Rows of pictures are then not compared",
    )
    how.add_argument(
        "--force", action="store_true", help="begin although memory seems too small for it"
    )
    how.add_argument("--json", action="store_true", help="print one JSON object")
    add_options(made, up_options())
    return made


@dataclass(frozen=True)
class VerifySettings:
    """The command's own arguments."""

    cases: int
    max_tokens: int
    seed: int
    against: str | None
    force: bool
    json: bool


def main(argv: Sequence[str]) -> int:
    made = parser()
    given = vars(made.parse_args(argv))
    flags = {item.name: given.pop(item.name) for item in up_options()}
    settings = VerifySettings(**given)
    if settings.cases > CASES[1]:
        made.error(f"--cases: at most {CASES[1]}")
    require_extra("worker", "verify")
    report = inspect(build(GatewayConfig, flags), flags["dtype"] or "auto")
    model = build(ModelConfig, flags)
    _check_memory(report, model.device, settings, flags)
    try:
        # Before the stack is started, so that a missing package is reported at once.
        processor = _verification("whole").load_processor(Checkpoint.configured(model))
        asked = _ask(settings, flags)
        comparison = _compare(settings, model, processor, asked)
    except StartupError:
        raise
    except OpticNerveError as error:
        print(f"opticnerve: the stack failed: {error.message}", file=sys.stderr)
        return 1
    return _tell(settings, report, comparison)


# ---- memory


def _check_memory(
    report: Report, device: str, settings: VerifySettings, flags: Mapping[str, Any]
) -> None:
    """Prints how much memory both sides need. Raises StartupError if that is not free."""
    whole = (report.encoder_bytes or 0) + (report.llm_bytes or 0)
    cache = flags["kv_cache_tokens"] or DEFAULTS["kv_cache_tokens"]
    split = 0 if settings.against else whole + (report.cache_bytes_per_token or 0) * cache
    split, whole, free = int(split * OVERHEAD), int(whole * OVERHEAD), _free_memory(device)
    first = f"about {gib(split)} for the services, and when they have ended " if split else ""
    told = f"{first}about {gib(whole)} for the unsplit model, and {gib(free)} are free"
    print(f"this takes {told}", file=sys.stderr)
    if max(split, whole) > free and not settings.force:
        raise StartupError(
            f"there is too little memory: this takes {told}; free some, choose another --device or "
            "--dtype, or give --force to try all the same"
        )


def _free_memory(device: str) -> int:
    """Free bytes on the device that both sides run on."""
    memory = importlib.import_module("llm_service.device.memory")
    loader = importlib.import_module("opticnerve.checkpoints.loader")
    return int(memory.free_memory(loader.resolve_device(device)))


# ---- the two sides


def _ask(settings: VerifySettings, flags: Mapping[str, Any]) -> Any:
    """The stack's answers to all cases."""
    cases = _verification("cases")
    made = cases.make_cases(settings.cases, settings.seed)
    with _stack(settings, flags) as split, _progress("asking the stack", settings) as bar:
        bar.total = len(made) * 3 // 2
        return split.ask_all(made, bar.update)


@contextlib.contextmanager
def _stack(settings: VerifySettings, flags: Mapping[str, Any]) -> Iterator[Any]:
    """The split model: the gateway at --against, or a stack that is started here."""
    module = _verification("split")
    with contextlib.ExitStack() as exits:
        if settings.against:
            split = module.SplitModel(settings.against, settings.max_tokens)
            exits.callback(split.close)
            yield split
            return
        directory = Path(exits.enter_context(tempfile.TemporaryDirectory()))
        token = flags["rpc_token_file"] or str(make_secret(directory, "rpc_token"))
        chosen = {name: value for name, value in flags.items() if value is not None}
        print("starting a stack", file=sys.stderr)
        chosen |= {"rpc_token_file": token, "max_logprobs": module.BEST}
        stack = exits.enter_context(serve(**{**DEFAULTS, **chosen}))
        split = module.SplitModel(stack.url, settings.max_tokens, trust=stack.trust)
        exits.callback(split.close)
        (address, *_) = split.encoder_addresses()
        tls = ChannelTls.of(build(CallsConfig, flags), build(CertificateConfig, flags))
        split.encoder = exits.enter_context(
            EncoderClient(address, flags["model"], rpc_token_file=token, tls=tls)
        )
        yield split


def _compare(
    settings: VerifySettings, model: ModelConfig, processor: Any, asked: Sequence[Any]
) -> Any:
    """The comparison of all cases with the unsplit model."""
    comparison = _verification("comparison")
    checkpoint = Checkpoint.configured(model)
    print("loading the unsplit model", file=sys.stderr)
    unsplit = _verification("whole").WholeModel(checkpoint, processor, model.dtype, model.device)
    made = comparison.Comparison(unsplit, comparison.Rule.of(unsplit.dtype))
    with _progress("comparing", settings) as bar:
        bar.total = len(asked)
        for each in asked:
            made.add(each)
            bar.update()
    return made


def _verification(name: str) -> Any:
    """A module of ``opticnerve.verification``; most of them import torch and transformers."""
    return importlib.import_module(f"opticnerve.verification.{name}")


def _progress(what: str, settings: VerifySettings) -> Any:
    return tqdm(desc=what, unit="", leave=False, disable=settings.json or None)


# ---- the result


def _tell(settings: VerifySettings, report: Report, comparison: Any) -> int:
    tallies = comparison.tallies
    equal = all(tally.equal for tally in tallies.values())
    if settings.json:
        told = {
            "equal": equal,
            "checkpoint": report.checkpoint,
            "family": report.family,
            "rule": asdict(comparison.rule),
            "kinds": {kind: asdict(tally) for kind, tally in tallies.items()},
        }
        print(json.dumps(told, indent=2))
    else:
        print("\n".join(_table(tallies)))
        print(
            f"{report.checkpoint} ({report.title}): "
            + ("equal" if equal else "NOT equal")
            + f" ({_bounds(comparison.rule)})"
        )
    return 0 if equal else 1


def _bounds(rule: Any) -> str:
    return (
        f"tokens may differ below a gap of {rule.max_gap:g}, log-probabilities may be off by "
        f"{rule.max_drift:g}, rows have a cosine of at least {rule.rows.cosine:g} and numbers that "
        f"are off by at most {rule.rows.difference:g} of the largest"
    )


def _table(tallies: Mapping[str, Any]) -> Iterator[str]:
    head = ("chats", "prompts", "tokens", "close", "wrong", "drift", "pictures", "cosine")
    yield _row(("", *head, "difference"))
    for kind, tally in tallies.items():
        rows = (f"{tally.least_cosine:.7f}", f"{tally.largest_difference:.2g}")
        yield _row(
            (
                kind,
                tally.cases,
                f"{tally.prompts_differ} differ" if tally.prompts_differ else "equal",
                tally.tokens,
                tally.close_calls,
                tally.wrong_tokens,
                f"{tally.largest_drift:.2g}",
                tally.pictures,
                *(rows if tally.pictures else ("-", "-")),
            )
        )
    for kind, tally in tallies.items():
        yield from (f"{kind}: {fault}" for fault in tally.faults)


def _row(cells: Sequence[object]) -> str:
    first, *rest = cells
    return f"{first:<17}" + "".join(f"{cell!s:>11}" for cell in rest)
