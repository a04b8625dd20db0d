"""Load over HTTP on the whole stack, compared before and after a change.

    python -m bench.load [--before COMMIT] [--scenario NAME,...] [--rounds N] [--quick]

Clients stream answers from ``opticnerve up`` with its default flags, on a random checkpoint in the
Qwen2-VL architecture: a decoder of 92 M parameters (8 layers, bf16, 184 MB) and a tower of 7 M.
Outputs are of fixed length. Scenarios:

* ``alone``: one client, a short text, 64 tokens out;
* ``text8``: 8 clients, the same texts;
* ``turns16``: 16 clients, conversations with two earlier turns, each its own (about 570 tokens);
* ``pictures16``: 16 clients, three new pictures of 448x448 in every request;
* ``burst``: 64 such requests at once, while one more client sends short texts for one token each,
  one after the other, as it did before the burst (idle). The order in which answers ended is
  compared with that in which requests were sent.

With ``--before``, that commit is checked out into a temporary directory, and every round of a
scenario runs before, after, after, before, each time on a fresh stack, one at a time (``--quick``:
on one stack for all scenarios). Figures are medians over these runs. CPU seconds are those that
each process used during the scenario; a busy machine affects them less than wall time.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import opticnerve
from bench import commits, memory, report
from bench.http_client import Figures, drive, encode, figures, medians, order, spread
from examples.demo_training import scenes
from opticnerve.benchmark.connection import LoadTarget
from opticnerve.benchmark.pictures import data_url, draw
from opticnerve.local.serve import Stack

TEXT: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 32_000,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
}
VISION = {"depth": 6, "embed_dim": 256, "num_heads": 4, "mlp_ratio": 4}
MAX_PIXELS = 512 * 28 * 28

WORDS = [*scenes.COLORS, *scenes.SHAPES, *scenes.NUMBERS, *scenes.ORDINALS]  # 1 to 3 tokens.
WARM_UP_SEED = 9  # Not used by any run.
STAGGER_S = 0.005  # Between the clients of a burst, so that they have an order.

SILENCE = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
path = Path(sys.argv[1])
tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
ids = range(tokenizer.get_vocab_size())
parts = [i for i in ids if not (text := tokenizer.decode([i])) or chr(0xFFFD) in text]
for file in path.glob("*.safetensors"):
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("embed_tokens.weight"):  # The head too: their logits are 0.
            tensor[parts] = 0
    save_file(tensors, file, {"format": "pt"})
"""

Say = Callable[[int], None]
Messages = list[dict[str, Any]]
Runs = dict[str, list[Figures]]


class Material:
    """Makes texts and pictures from a seed; each is new."""

    def __init__(self, seed: int, side: int = 448, words: int = 70) -> None:
        self.random = random.Random(seed)
        self.side = side  # Of a picture, in pixels.
        self.turn_words = words  # Of one turn of a conversation.

    def text(self, words: int = 12) -> str:
        return " ".join(self.random.choices(WORDS, k=words))

    def picture(self) -> str:
        """A data URL."""
        return data_url(draw(self.random, (self.side, self.side)), "JPEG")


def text(material: Material) -> Messages:
    return [{"role": "user", "content": material.text()}]


def turns(material: Material) -> Messages:
    roles = ("user", "assistant", "user", "assistant", "user")
    return [{"role": role, "content": material.text(material.turn_words)} for role in roles]


def pictures(material: Material) -> Messages:
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": material.picture()}} for _ in range(3)
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": material.text()}]}]


@dataclass(frozen=True)
class Scenario:
    """``clients`` clients, each of which sends ``each`` requests, one after the other."""

    clients: int
    each: int
    max_tokens: int
    make: Callable[[Material], Messages] = field(repr=False)
    texts: int = 0  # Short texts during the load, and as many before it.
    stagger_s: float = 0.0
    side: int = 448
    turn_words: int = 70

    def bodies(self, seed: int) -> list[bytes]:
        material = Material(seed, self.side, self.turn_words)
        count = self.clients * self.each
        return [encode(self.make(material), self.max_tokens) for _ in range(count)]


FULL = {
    "alone": Scenario(1, 12, 64, text),
    "text8": Scenario(8, 4, 64, text),
    "turns16": Scenario(16, 3, 64, turns),
    "pictures16": Scenario(16, 3, 32, pictures),
    "burst": Scenario(64, 1, 8, pictures, texts=100, stagger_s=STAGGER_S),
}
QUICK = {
    "alone": replace(FULL["alone"], each=2, max_tokens=8),
    "text8": replace(FULL["text8"], each=1, max_tokens=8),
    "turns16": replace(FULL["turns16"], each=1, max_tokens=8, turn_words=10),
    "pictures16": replace(FULL["pictures16"], each=1, max_tokens=4, side=112),
    "burst": replace(FULL["burst"], clients=24, max_tokens=4, texts=4, side=112),
}


async def run(url: str, scenario: Scenario, seed: int, say: Say) -> Figures:
    """One scenario's figures, from a server that is warmed up."""
    bodies = scenario.bodies(seed)
    async with LoadTarget(url) as target:
        if scenario.texts:
            return await beside(target, scenario, bodies, seed, say)
        return figures(await drive(target, bodies, scenario.clients, say=say))


async def beside(
    target: LoadTarget, scenario: Scenario, bodies: list[bytes], seed: int, say: Say
) -> Figures:
    """First short texts alone, then the load, with as many short texts as it lasts for."""
    few = replace(scenario, make=text, clients=1, each=2 * scenario.texts, max_tokens=1)
    idle, during = few.bodies(seed + 1)[::2], few.bodies(seed + 1)[1::2]
    alone = await drive(target, idle, 1)
    load = asyncio.create_task(
        drive(target, bodies, scenario.clients, stagger_s=scenario.stagger_s, say=say)
    )
    meanwhile = []
    for body in during:
        meanwhile.append(await target.ask(body))
        if load.done():
            break
    answers = await load
    return {
        **figures(answers),
        **order(answer for answer in answers if answer.outcome == "answered"),
        **spread("idle text TTFT", [a.ttft for a in alone[: len(meanwhile)] if a.ttft]),
        **spread("text TTFT", [a.ttft for a in meanwhile if a.ttft]),
        "texts meanwhile": len(meanwhile),
        "texts unanswered": sum(a.outcome != "answered" for a in (*alone, *meanwhile)),
    }


async def warm_up(url: str) -> None:
    """Sends one request of each kind, so that first times are not measured."""
    material = Material(WARM_UP_SEED)
    async with LoadTarget(url) as target:
        for make in (text, pictures, turns):
            answer = await target.ask(encode(make(material), 8))
            if answer.outcome != "answered":
                raise SystemExit(f"the server did not answer: {answer.status} {answer.code}")


def measure(stack: Stack, scenario: Scenario, seed: int, say: Say) -> Figures:
    """One scenario's figures, and the CPU time and memory that the stack's processes used."""
    before = commits.cpu_seconds(stack.process.pid)
    found = asyncio.run(run(stack.url, scenario, seed, say))
    after = commits.cpu_seconds(stack.process.pid)
    used = {f"{name} CPU, s": after[name] - before[name] for name in after if name in before}
    peaks = {
        f"{name} peak RSS, MB": memory.resident(pid)["VmHWM"]
        for name, pid in memory.children(stack.process.pid).items()
    }
    return {**found, **used, **peaks}


def make_model(directory: str) -> str:
    """Makes the random checkpoint. Every token that it writes arrives as a chunk of text: every id
    of its vocabulary has a text, and ids that decode to none, or to a part of a character, are
    never likely."""
    memory.make_model(directory, text=TEXT, vision=VISION, max_pixels=MAX_PIXELS)
    path = Path(directory) / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    known = {added["content"]: added["id"] for added in tokenizer["added_tokens"]}
    more = range(max(known.values()) + 1, TEXT["vocab_size"])
    tokenizer["model"]["vocab"] |= known | {f"Ġw{index}": index for index in more}
    path.write_text(json.dumps(tokenizer))
    subprocess.run([sys.executable, "-c", SILENCE, directory], check=True)  # It imports torch.
    return directory


def compare(
    trees: dict[str, Path], model: str, names: list[str], args: argparse.Namespace
) -> dict[str, Runs]:
    """Runs some scenarios, which share a fresh stack in each turn of a side."""
    turn = [*trees] if args.once or len(trees) == 1 else [*trees, *reversed(trees)]
    runs: dict[str, Runs] = {name: {side: [] for side in trees} for name in names}
    for number, side in itertools.product(range(args.rounds), turn):
        with (
            commits.code_of(trees[side]),
            opticnerve.serve(model, threads=args.threads or None) as stack,
        ):
            asyncio.run(warm_up(stack.url))
            for index, name in enumerate(names):
                scenario = (QUICK if args.quick else FULL)[name]
                say = progress(f"{name} {side}, round {number + 1} of {args.rounds}", scenario)
                seed = 100 * len(runs[name][side]) + 10 * index
                runs[name][side].append(measure(stack, scenario, seed, say))
    print(f"\r{'':70}\r", end="", file=sys.stderr)
    return runs


def progress(label: str, scenario: Scenario) -> Say:
    total = scenario.clients * scenario.each

    def say(count: int) -> None:
        print(f"\r{f'{label}: {count}/{total} requests':70}", end="", file=sys.stderr, flush=True)

    say(0)
    return say


def show(name: str, sides: dict[str, Figures]) -> None:
    names = dict.fromkeys(figure for found in sides.values() for figure in found)
    rows = []
    for figure in names:
        values = [found.get(figure) for found in sides.values()]
        ratio = [ratio_of(*values)] if len(values) > 1 else []
        rows.append([figure, *map(number, values), *ratio])
    header = [name, *sides] + (["after/before"] if len(sides) > 1 else [])
    print(report.table(header, rows), end="\n\n", flush=True)


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def ratio_of(before: float | None, after: float | None) -> str:
    return f"{after / before:.2f}x" if before and after is not None else "-"


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # Temporary files are removed.
    with commits.trees(args.before) as trees, tempfile.TemporaryDirectory() as directory:
        model = make_model(directory)
        results = describe(args)
        for names in [args.scenario] if args.quick else [[name] for name in args.scenario]:
            for name, runs in compare(trees, model, names, args).items():
                found = {side: medians(of_side) for side, of_side in runs.items()}
                show(name, found)
                scenario = asdict((QUICK if args.quick else FULL)[name])
                scenario.pop("make")
                results["scenarios"][name] = {**scenario, "medians": found, "runs": runs}
            if not args.quick:  # After each scenario, so that an interrupted run keeps results.
                report.save("load", results, file=args.out)
    print("nothing is kept of a quick run" if args.quick else f"kept in {args.out}.json")


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """What was compared."""
    return {
        **commits.describe(args.before),
        "rounds": args.rounds,
        "threads": args.threads or "default",
        "decoder": TEXT,
        "tower": VISION,
        "scenarios": {},
    }


def parse() -> argparse.Namespace:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=summary)
    parser.add_argument("--before", metavar="COMMIT", help="compare with this commit")
    parser.add_argument(
        "--scenario",
        type=commits.some_of(FULL),
        default=list(FULL),
        metavar="NAME,...",
        help=f"some of {', '.join(FULL)}; default: all",
    )
    parser.add_argument("--rounds", type=int, default=1, metavar="N")
    parser.add_argument("--once", action="store_true", help="run each side only once in a round")
    parser.add_argument(
        "--threads", type=int, default=0, help="--threads of `opticnerve up`; 0: its default"
    )
    parser.add_argument("--quick", action="store_true", help="a small load, not kept")
    parser.add_argument("--out", default="load", metavar="NAME", help="name of the JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
