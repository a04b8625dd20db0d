"""Milliseconds of one sampler step, by the sampling parameters of the requests.

    python -m bench.sampler [--rows 64] [--vocab 151936] [--steps N] [--threads N]

Rows are greedy, so that there is only one ``max`` beside the lists. Every row is its own request,
with its own lists, as long as the gateway allows. CPU time of the process is measured, which other
users of the machine hardly change. ``admit`` is paid once, when a sequence gets its slot.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bench import report
from llm_service.device.sampler import Sampler
from opticnerve.generation.values import Sampling

# The limits of gateway.api.schemas.sampling.
MAX_ALLOWED = 2**16
MAX_BIASES = 1024
MAX_WORDS = 512  # 256, each with and without a space before it.
REPEATED = 7  # The token that the text of every row repeats.


@dataclass(frozen=True, slots=True)
class StepCost:
    """Medians for one batch."""

    asked: str
    step_ms: float
    admit_ms: float  # Of one row.


Ask = Callable[[random.Random, int], Sampling]


def nothing(_: random.Random, vocab: int) -> Sampling:
    return Sampling()


def allowed(source: random.Random, vocab: int) -> Sampling:
    count = min(MAX_ALLOWED, vocab)
    return Sampling(allowed_token_ids=tuple(source.sample(range(vocab), count)))


def biased(source: random.Random, vocab: int) -> Sampling:
    ids = source.sample(range(vocab), min(MAX_BIASES, vocab))
    return Sampling(logit_bias={token: source.uniform(-5, 5) for token in ids})


def short_words(source: random.Random, vocab: int) -> Sampling:
    words = (source.choices(range(vocab), k=1 + index % 4) for index in range(MAX_WORDS))
    return Sampling(bad_words=tuple(map(tuple, words)))


def nested_words(source: random.Random, vocab: int) -> Sampling:
    """Words whose beginnings all stand at the end of the text."""
    ends = source.choices(range(vocab), k=MAX_WORDS)
    return Sampling(bad_words=tuple((*[REPEATED] * length, end) for length, end in enumerate(ends)))


ASKS: dict[str, Ask] = {
    "nothing": nothing,
    "65,536 allowed_token_ids": allowed,
    "1,024 of logit_bias": biased,
    "512 bad_words of 1 to 4 tokens": short_words,
    "512 bad_words of 1 to 512, all about to end": nested_words,
}


def step_cost(asked: str, rows: int, vocab: int, steps: int) -> StepCost:
    """``steps`` steps of ``rows`` requests that all ask for ``asked``."""
    source = random.Random(0)
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))
    slots = np.arange(rows, dtype=np.int64)
    sampler = Sampler(vocab, rows, torch.device("cpu"))
    params = [ASKS[asked](source, vocab) for _ in range(rows)]
    text = [REPEATED] * MAX_WORDS
    admitted = []
    for slot, each in enumerate(params):
        start = time.process_time()
        sampler.admit(slot, each, 0, list(text), len(text))
        admitted.append(time.process_time() - start)
    took = []
    for position in range(steps):
        start = time.process_time()
        sampler.sample(logits, slots, np.full(rows, position)).token_ids.tolist()
        sampler.observe(slots, [REPEATED] * rows)
        took.append(time.process_time() - start)
    return StepCost(asked, 1e3 * statistics.median(took), 1e3 * statistics.median(admitted))


def step_costs(rows: int = 64, vocab: int = 151_936, steps: int = 7) -> list[StepCost]:
    with torch.inference_mode():
        return [step_cost(asked, rows, vocab, steps) for asked in ASKS]


def table(costs: Sequence[StepCost]) -> str:
    return report.table(
        ["asked of every row", "step ms", "admit ms"],
        [[each.asked, f"{each.step_ms:.1f}", f"{each.admit_ms:.2f}"] for each in costs],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sampler", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rows", type=int, default=64, help="sequences of the batch")
    parser.add_argument("--vocab", type=int, default=151_936, help="size of the vocabulary")
    parser.add_argument("--steps", type=int, default=7, help="steps, of which the median is shown")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    costs = step_costs(options.rows, options.vocab, options.steps)
    print(f"One sampler step, {options.rows} rows, {options.vocab:,} tokens, CPU time\n")
    print(table(costs))


if __name__ == "__main__":
    main()
