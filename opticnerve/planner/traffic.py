"""A description of traffic: how often requests come, and what they contain."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from opticnerve.benchmark.arrivals import arrivals
from opticnerve.planner.rates import Rates

Range = tuple[int, int]  # Inclusive, every number equally likely.


@dataclass(frozen=True)
class Traffic:
    rate: float  # Requests a second.
    pictures: int = 1  # In each request.
    sizes: tuple[str, ...] = ("448x448",)  # Taken in turn.
    prompt_tokens: Range = (32, 32)  # Without pictures.
    output_tokens: Range = (64, 64)
    repeat: float = 0.0  # Share of pictures whose embeddings are cached.
    cached_prompt: float = 0.0  # Share of a prompt's tokens that the prefix cache has.
    burstiness: float = 1.0


@dataclass(slots=True)
class Visit:
    """One simulated request; times in seconds, infinite until they come."""

    arrived: float
    patches: list[int]  # For each picture that has to be encoded.
    prefill: int  # Tokens to compute.
    prompt: int  # Tokens, cached ones included.
    output: int
    first: float = float("inf")
    ended: float = float("inf")

    @property
    def ttft(self) -> float:
        return self.first - self.arrived

    @property
    def tpot(self) -> float:
        """Seconds per token after the first; 0 if there is only one."""
        return (self.ended - self.first) / (self.output - 1) if self.output > 1 else 0.0


def visits(traffic: Traffic, rates: Rates, seed: int) -> Iterator[Visit]:
    """Endless requests, in order of arrival."""
    source = random.Random(seed)
    costs = [rates.picture(size) for size in traffic.sizes] if traffic.pictures else []
    shown = 0
    for arrived in arrivals(traffic.rate, source, burstiness=traffic.burstiness):
        patches, prompt = [], source.randint(*traffic.prompt_tokens)
        for _ in range(traffic.pictures):
            cost = costs[shown % len(costs)]
            shown += 1
            prompt += cost.tokens
            if source.random() >= traffic.repeat:
                patches.append(cost.patches)
        prefill = max(1, round(prompt * (1 - traffic.cached_prompt)))
        yield Visit(arrived, patches, prefill, prompt, source.randint(*traffic.output_tokens))
