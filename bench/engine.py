"""Output tokens a second of the engine and of transformers, on the same checkpoint and prompts.

    python -m bench.engine [--model DIR] [--concurrency 1,4,16,64] [--rounds N] [--cpu] [--quick]

Every contestant gets the same requests, all at the start: prompts of 8 to 200 tokens, and 16 to 128
tokens of greedy output (end of sequence is ignored, so that all do the same work), at most
``concurrency`` at once. All run in one process with one dtype (fp32) and one number of threads;
contestants take turns within a round, and figures are medians over rounds. ``--cpu`` measures the
process's CPU time instead of wall time, for a machine that others use too.

* ``generate``: one request after the other (concurrency plays no part);
* ``static batches``: left-padded batches of ``concurrency``, each as long as its longest; only
  tokens that were asked for count;
* ``generate_batch``: transformers' continuous batching, through the manager behind that method,
  started and warm before the clock, with a cache just large enough;
* ``engine``: the scheduler and model runner, stepped in this thread;
* ``engine client``: the same in a thread of its own, behind the client that the service uses.

The second table is about pictures, whose embeddings all contestants get; no tower runs in the
measured time. The third shows the cost of a sampler step by the requests' parameters, see
``bench.sampler``. Outputs are compared with those of ``generate``; a token may differ only where
the two best logits are closer than 1e-3.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

import opticnerve.demo
from bench import report, sampler
from bench.contestants import Ask, Continuous, Ours, Outputs, Picture, ThroughClient, Whole
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.media.plan import Modality, Overrides, Span, Structure
from opticnerve.models.registry import load_tower, make_preprocessor

MAX_GAP = 1e-3
TARGETS = {(1, "generate"): 1.0, (16, "generate"): 8.0}
TARGETS |= {(16, "static batches"): 1.5, (16, "generate_batch"): 1.0}
NAMES = ("generate", "static batches", "generate_batch", "engine", "engine client")


def text_workload(count: int, vocab_size: int, seed: int = 0) -> list[Ask]:
    """Requests of log-uniform lengths: many short ones, some long."""
    random = np.random.default_rng(seed)
    high = min(vocab_size, 600)
    prompts = np.exp(random.uniform(np.log(8), np.log(200), count)).astype(int)
    outputs = np.exp(random.uniform(np.log(16), np.log(128), count)).astype(int)
    return [
        Ask(tuple(random.integers(5, high, int(prompt)).tolist()), int(output))
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


class Race:
    """Times contestants on one set of requests."""

    clock = staticmethod(time.perf_counter)

    def __init__(self, asks: Sequence[Ask]) -> None:
        self.asks = asks
        self.times: dict[str, list[float]] = {}
        self.outputs: dict[str, Outputs] = {}

    def run(self, name: str, contestant: Callable[[], Outputs]) -> None:
        start = self.clock()
        outputs = contestant()
        self.times.setdefault(name, []).append(self.clock() - start)
        self.outputs[name] = outputs

    def rates(self) -> dict[str, float]:
        """Output tokens a second, medians."""
        tokens = sum(ask.num_output for ask in self.asks)
        return {name: tokens / statistics.median(times) for name, times in self.times.items()}

    def check(self, whole: Whole) -> dict[str, int]:
        """The number of requests whose tokens differ from generate's, by contestant. Raises if the
        engine's differ without a tie."""
        differing: dict[str, int] = {}
        for name, outputs in self.outputs.items():
            differing[name] = 0
            for ask, got, want in zip(self.asks, outputs, self.outputs["generate"], strict=True):
                if got == want:
                    continue
                pairs = enumerate(zip(got, want, strict=False))
                at = next((i for i, (a, b) in pairs if a != b), min(len(got), len(want)))
                ours = name.startswith("engine")
                if ours and (len(got) != len(want) or whole.gap(ask, want[:at]) >= MAX_GAP):
                    raise SystemExit(f"{name}: token {at} of a request is wrong")
                differing[name] += 1
        return differing


Races = dict[int, Race]


def race_text(
    whole: Whole,
    ours: Ours,
    asks: Sequence[Ask],
    concurrency: int,
    rounds: int,
    say: Callable[[str], None],
) -> Race:
    race = Race(asks)
    engine = ours.engine(concurrency)
    ours.run(engine, asks[:2])
    for number in range(rounds):
        say(f"{concurrency} at once, round {number + 1} of {rounds}")
        race.run("generate", lambda: whole.generate(asks))
        if concurrency > 1:
            race.run("static batches", lambda: whole.static(asks, concurrency))
        with Continuous(whole, asks, concurrency) as continuous:
            race.run("generate_batch", continuous.run)
        race.run("engine", lambda: ours.run(engine, asks))
        with ThroughClient(engine, asks) as client:
            race.run("engine client", client.run)
    return race


def picture_workload(ours: Ours, path: str, count: int) -> tuple[list[Picture], list[Ask]]:
    """Requests with one picture each, of several sizes, before a question of 8 to 60 tokens."""
    from PIL import Image

    random = np.random.default_rng(1)
    checkpoint = Checkpoint.open(path)
    tower = load_tower(checkpoint, torch.float32, "cpu")
    preprocess = make_preprocessor(checkpoint, ours.layout)
    pictures, asks = [], []
    for index, size in enumerate(((84, 84), (112, 84), (84, 112), (168, 168))):
        blocks = random.integers(0, 255, (5, 5, 3), dtype=np.uint8)
        image = Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)
        plan = ours.layout.plan(Structure("png", *size), Overrides())
        pixels = preprocess(image, plan)
        (rows,) = tower.encode([pixels], [plan])
        pictures.append(Picture(f"picture-{index}", plan, pixels, rows))
    for index in range(count):
        picture = pictures[index % len(pictures)]
        before, after = (
            random.integers(5, 600, 6).tolist(),
            random.integers(5, 600, 8 + index % 52).tolist(),
        )
        expansion = ours.layout.expand(picture.plan)
        span = Span(7, picture.plan.num_tokens, 0, 0, Modality.IMAGE, picture.plan.grid)
        ids = (*before, 630, *expansion.token_ids, 631, *after)
        asks.append(Ask(ids, 16 + index * 7 % 64, index % len(pictures), span))
    return pictures, asks


def race_pictures(
    whole: Whole, ours: Ours, path: str, rounds: int, count: int, say: Callable[[str], None]
) -> Races:
    pictures, asks = picture_workload(ours, path, count)
    whole.pictures = pictures
    races = {concurrency: Race(asks) for concurrency in (1, 16)}
    engines = {concurrency: ours.engine(concurrency, pictures) for concurrency in races}
    for engine in engines.values():
        ours.run(engine, asks[:2])
    for number, (concurrency, race) in itertools.product(range(rounds), races.items()):
        say(f"pictures, {concurrency} at once, round {number + 1} of {rounds}")
        race.run("generate", partial(whole.generate, asks))
        race.run("engine", partial(ours.run, engines[concurrency], asks))
    for race in races.values():
        race.check(whole)
    return races


def rows_of(races: Races, names: Sequence[str]) -> list[list[str]]:
    """Rates, and in brackets the engine's rate relative to them."""
    rows = []
    for concurrency, race in races.items():
        rates = race.rates()
        cells = [str(concurrency)]
        for name in names:
            if name not in rates:
                cells.append("-")
            elif name.startswith("engine"):
                cells.append(f"{rates[name]:,.0f}")
            else:
                cells.append(f"{rates[name]:,.0f} ({rates['engine'] / rates[name]:.2f}x)")
        rows.append(cells)
    return rows


def missed(races: Races) -> list[str]:
    """Targets that this run did not reach."""
    found = []
    for (concurrency, name), target in TARGETS.items():
        if concurrency in races:
            rates = races[concurrency].rates()
            ratio = rates["engine"] / rates[name]
            if ratio < target:
                found.append(f"{concurrency} at once: {ratio:.2f}x of {name}, not {target}x")
    return found


def run(options: argparse.Namespace, say: Callable[[str], None]) -> tuple[Races, Races, Whole]:
    """The races on text and those on pictures, by concurrency."""
    whole = Whole(options.model)
    vocab_size = whole.model.config.get_text_config().vocab_size
    rounds = 2 if options.quick else options.rounds
    text: Races = {}
    for concurrency in map(int, options.concurrency.split(",")):
        count = 16 if options.quick else min(16 * concurrency, 256)
        asks = text_workload(count, vocab_size)
        ours = Ours(options.model, asks)
        text[concurrency] = race_text(whole, ours, asks, concurrency, rounds, say)
    pictures: Races = {}
    if ours.layout.position_dims == 3:
        pictures = race_pictures(whole, ours, options.model, rounds, count=32, say=say)
    return text, pictures, whole


def main() -> None:
    options = parse()
    _quieten()
    torch.set_num_threads(options.threads)
    if options.cpu:
        Race.clock = staticmethod(time.process_time)
    text, pictures, whole = run(options, lambda line: print(f"\r{line:60}", end="", flush=True))
    differing = {concurrency: race.check(whole) for concurrency, race in text.items()}
    print(f"\r{'':60}\r", end="")
    print(f"Output tokens a second, fp32, {torch.get_num_threads()} threads")
    print("(in brackets: how many times as fast the engine is)\n")
    print(report.table(["at once", *NAMES], rows_of(text, NAMES)))
    if pictures:
        print("\nWith a picture each, embeddings given\n")
        pair = ("generate", "engine")
        print(report.table(["at once", *pair], rows_of(pictures, pair)))
    costs = sampler.step_costs(steps=3 if options.quick else 7)
    print("\nOne step of the sampler, 64 rows, a vocabulary of 151,936, CPU time\n")
    print(sampler.table(costs))
    print("\nRequests whose tokens differ from generate's:", differing)
    for line in missed(text):
        print("target missed:", line)
    if not options.quick:
        results = {
            "threads": torch.get_num_threads(),
            "clock": "cpu" if options.cpu else "wall",
            "requests": {c: len(race.asks) for c, race in text.items()},
            "rounds": options.rounds,
            "tokens_per_s": {c: race.rates() for c, race in text.items()},
            "pictures_tokens_per_s": {c: race.rates() for c, race in pictures.items()},
            "sampler": [asdict(each) for each in costs],
            "differing_requests": differing,
            "missed": missed(text),
        }
        name = "engine" if options.threads == 1 else f"engine-{options.threads}-threads"
        print("kept in", report.save("engine", results, file=name).name)


def parse() -> argparse.Namespace:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=summary)
    demo = Path(opticnerve.demo.__file__).parent / "checkpoint"
    parser.add_argument("--model", default=str(demo), help="checkpoint directory")
    parser.add_argument("--concurrency", default="1,4,16,64", help="requests at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu", action="store_true", help="measure CPU time, not wall time")
    parser.add_argument(
        "--threads", type=int, default=1, help="torch's threads, the same for all contestants"
    )
    parser.add_argument("--quick", action="store_true", help="few requests, two rounds, not saved")
    return parser.parse_args()


def _quieten() -> None:
    """Keeps transformers' progress bars and advice out of the report."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)


if __name__ == "__main__":
    main()
