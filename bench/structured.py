"""Structured output on the demo checkpoint: its validity, and its cost. python -m bench.structured
[--schemas 1000] [--rounds 7] [--concurrency 16] [--cpu] [--quick] First, random schemas at
temperature 1.5, with a seed each, go through the engine: every output that ends by itself must
validate. Then the output tokens a second of the same engine are compared with and without a
grammar, on the same prompts, numbers of tokens and seeds, in turns within each round; the ratio is
the median over rounds. The grammar of an endless list keeps constrained outputs as long as the
others. ``--cpu`` measures the process's CPU time, for a machine that others use too."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import numpy as np
import torch

from bench import report
from gateway.grammar import grammar_of
from gateway.job import FormatKind, OutputFormat
from llm_service.engine.grammar_compiler import GrammarCompiler
from llm_service.policy.messages import GenerateRequest, TokensEvent
from opticnerve.generation.grammars import load_vocabulary
from opticnerve.generation.values import FinishReason, Sampling
from tests.checkpoints import DEMO, EOS, VOCAB_SIZE
from tests.local_engine import LocalEngine
from tests.random_schemas import random_schema

GOAL = 0.9  # Least share of the rate without a grammar.
TOKENS = 96  # Of each output whose speed is measured.
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
# No dates, since a grammar of their form allows the year 0 and the 30th of February.
FORMATS = jsonschema.FormatChecker(formats=("uuid", "ipv4"))
ENDLESS = {"type": "array", "items": PERSON, "minItems": 10_000}


class Bench:
    """One engine, with the vocabulary for grammars."""

    def __init__(self, concurrency: int) -> None:
        self.vocabulary = load_vocabulary(DEMO, (EOS,), VOCAB_SIZE)
        self.engine = LocalEngine.load(
            DEMO,
            max_num_seqs=concurrency,
            prefix_caching=False,
            grammars=GrammarCompiler(lambda: self.vocabulary),
        )
        self._made = 0

    def request(self, length: int, **sampling: Any) -> GenerateRequest:
        self._made += 1
        source = np.random.default_rng(length)
        ids = tuple(source.integers(5, 600, length).tolist())
        return GenerateRequest(f"bench-{self._made}", ids, sampling=Sampling(**sampling))

    def run(self, requests: list[GenerateRequest]) -> dict[str, tuple[list[int], FinishReason]]:
        """Each request's output, and how it ended."""
        self.engine.messages.clear()
        answers = self.engine.generate(requests)
        ends = {
            message.request_id: message.delta.finish_reason
            for message in self.engine.messages
            if isinstance(message, TokensEvent) and message.delta.finish_reason is not None
        }
        return {name: (answer.token_ids, ends[name]) for (name, _), answer in answers.items()}

    # ---- validity

    def validity(self, number: int, say: Callable[[str], None]) -> dict[str, int]:
        """The numbers of outputs that are valid, that were cut short, and that are invalid (which
        must be 0)."""
        found = {"valid": 0, "cut_short": 0, "invalid": 0}
        batch = 100
        for first in range(0, number, batch):
            say(f"random schemas: {first} of {number}")
            self._validate(range(first, min(first + batch, number)), found)
        return found

    def _validate(self, seeds: range, found: dict[str, int]) -> None:
        schemas: dict[str, Any] = {}
        requests = []
        for seed in seeds:
            schema = random_schema(seed)
            grammar = grammar_of(OutputFormat(FormatKind.JSON_SCHEMA, schema))
            asked = {"temperature": 1.5, "max_tokens": 600, "eos_token_ids": (EOS,)}
            requests.append(self.request(20 + seed % 30, grammar=grammar, seed=seed, **asked))
            schemas[requests[-1].request_id] = schema
        for name, (ids, end) in self.run(requests).items():
            if end is not FinishReason.STOP:
                found["cut_short"] += 1
                continue
            right = self._is_valid(ids, schemas[name])
            found["valid" if right else "invalid"] += 1

    def _is_valid(self, ids: list[int], schema: Any) -> bool:
        text = self.vocabulary.decode_str([token for token in ids if token != EOS])
        try:
            jsonschema.validate(json.loads(text), schema, format_checker=FORMATS)
        except (ValueError, jsonschema.ValidationError) as error:
            print(f"\n{text!r} does not validate: {error}")
            return False
        return True

    # ---- speed

    def speed(
        self, rounds: int, count: int, clock: Callable[[], float], say: Callable[[str], None]
    ) -> dict[str, list[float]]:
        """Output tokens a second of each round, with and without a grammar."""
        grammar = grammar_of(OutputFormat(FormatKind.JSON_SCHEMA, ENDLESS, whitespace=""))
        rates: dict[str, list[float]] = {"free": [], "constrained": []}
        self._rate("", 4, clock), self._rate(grammar, 4, clock)  # Warm.
        for number in range(rounds):
            say(f"speed: round {number + 1} of {rounds}")
            order = [*rates] if number % 2 else [*rates][::-1]
            for name in order:
                rate = self._rate(grammar if name == "constrained" else "", count, clock)
                rates[name].append(rate)
        return rates

    def _rate(self, grammar: str, count: int, clock: Callable[[], float]) -> float:
        asked = {"max_tokens": TOKENS, "temperature": 1.0, "ignore_eos": True, "grammar": grammar}
        requests = [self.request(20 + i, seed=i, **asked) for i in range(count)]
        start = clock()
        outputs = self.run(requests)
        seconds = clock() - start
        return sum(len(ids) for ids, _ in outputs.values()) / seconds


def progress(line: str) -> None:
    print(f"\r{line:60}", end="", flush=True)


def rows(rates: dict[str, list[float]]) -> Iterator[list[str]]:
    for name, measured in rates.items():
        yield [name, f"{statistics.median(measured):,.0f}", f"{min(measured):,.0f}"]


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    schemas, rounds = (60, 2) if options.quick else (options.schemas, options.rounds)
    bench = Bench(options.concurrency)
    found = bench.validity(schemas, progress)
    clock = time.process_time if options.cpu else time.perf_counter
    rates = bench.speed(rounds, 3 * options.concurrency, clock, progress)
    pairs = zip(rates["constrained"], rates["free"], strict=True)
    ratio = statistics.median(constrained / free for constrained, free in pairs)
    print(f"\r{'':60}\rRandom schemas at temperature 1.5: {found}\n")
    print(
        f"Output tokens a second, {options.concurrency} at once, fp32, {options.threads} thread\n"
    )
    print(report.table(["", "median", "least"], list(rows(rates))))
    print(f"\nconstrained / free: {ratio:.3f} (goal: {GOAL} or more)")
    if not options.quick:
        results = {
            "schemas": found,
            "concurrency": options.concurrency,
            "threads": options.threads,
            "clock": "cpu" if options.cpu else "wall",
            "rounds": rounds,
            "tokens_per_s": {name: statistics.median(each) for name, each in rates.items()},
            "ratio": ratio,
        }
        print("kept in", report.save("structured", results).name)
    if found["invalid"]:
        raise SystemExit(1)


def parse() -> argparse.Namespace:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.structured", description=summary)
    parser.add_argument("--schemas", type=int, default=1000, help="random schemas")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--concurrency", type=int, default=16, help="requests at once")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--cpu", action="store_true", help="measure CPU time, not wall time")
    parser.add_argument("--quick", action="store_true", help="60 schemas, two rounds, not saved")
    return parser.parse_args()


if __name__ == "__main__":
    main()
