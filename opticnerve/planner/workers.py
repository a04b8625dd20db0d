"""Models of workers for the discrete-event simulation: what occupies a device, and in which order.

They behave like the real ones: an encoder takes what waits, first in, first out, up to a batch's
patches; an LLM worker gives every decoding sequence a token in each step, and also prefills what
fits the step's tokens and time. Consecutive steps that change only counts are simulated as one
event.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Generator
from itertools import count
from typing import Any

import simpy

from opticnerve.planner.rates import Rates
from opticnerve.planner.traffic import Visit

Life = Generator[simpy.Event, Any, None]
Encoded = Callable[[], None]
MIN_PREFILL_FRACTION = 1 / 4  # Of a step's time, however long decoding takes.
BLOCK_TOKENS = 16  # Fewest tokens that a step prefills.


class PictureQueue:
    """Pictures that wait for one device, and the threads that prepare them."""

    def __init__(self, env: simpy.Environment, rates: Rates) -> None:
        self.pending = 0  # Patches, until they are encoded.
        self._env = env
        self._rates = rates
        self._prepared: deque[tuple[int, Encoded]] = deque()
        self._threads = [0.0] * max(1, rates.prepare_workers)  # When each thread is free; a heap.

    def submit(self, patches: int, encoded: Encoded, arrived: Callable[[], None]) -> None:
        """Adds a picture. ``arrived`` is called when it is prepared, ``encoded`` when it is
        encoded."""
        self.pending += patches
        sent = self._env.now + self._rates.picture_s
        ready = max(sent, heapq.heappop(self._threads)) + self._rates.prepare_s
        heapq.heappush(self._threads, ready)

        def prepared(_: simpy.Event) -> None:
            self._prepared.append((patches, encoded))
            arrived()

        after(self._env, ready - self._env.now, prepared)

    def __bool__(self) -> bool:
        return bool(self._prepared)

    def run_batch(self) -> Generator[simpy.Event, Any, float]:
        """Encodes the next batch; returns the seconds that it took."""
        batch: list[Encoded] = []
        patches = 0
        while self._prepared:
            size, encoded = self._prepared[0]
            if batch and patches + size > self._rates.max_batch_patches:
                break
            self._prepared.popleft()
            batch.append(encoded)
            patches += size
        seconds = self._rates.batch_s + self._rates.patch_s * patches
        yield self._env.timeout(seconds)
        self.pending -= patches
        for encoded in batch:
            encoded()
        return seconds


class EncoderModel:
    """An encoder: one batch after the other."""

    def __init__(self, env: simpy.Environment, rates: Rates) -> None:
        self.busy_s = 0.0
        self._env = env
        self._pictures = PictureQueue(env, rates)
        self._idle: simpy.Event | None = None
        env.process(self._run())

    @property
    def load(self) -> int:
        return self._pictures.pending

    def encode(self, patches: int, encoded: Encoded) -> None:
        self._pictures.submit(patches, encoded, self._wake)

    def _wake(self) -> None:
        if self._idle is not None:
            self._idle.succeed()
            self._idle = None

    def _run(self) -> Life:
        while True:
            if not self._pictures:
                self._idle = self._env.event()
                yield self._idle
            self.busy_s += yield from self._pictures.run_batch()


class LlmModel:
    """An LLM worker, or with ``encodes`` a whole copy of the model, whose device encodes a batch of
    pictures between two steps."""

    def __init__(self, env: simpy.Environment, rates: Rates, *, encodes: bool = False) -> None:
        self.busy_s = 0.0
        self._env = env
        self._rates = rates
        self._pictures = PictureQueue(env, rates) if encodes else None
        self.load = 0  # Requests that were given to it and have not ended.
        self._waiting: deque[Visit] = deque()
        self._prefilling: deque[list[Any]] = deque()  # [visit, tokens left].
        self._decoding: list[tuple[int, int, Visit]] = []  # A heap, by the step that ends it.
        self._steps = 0
        self._kv_tokens = rates.kv_tokens
        self._order = count()
        self._idle: simpy.Event | None = None
        self._coasting = False  # In several steps at once, which an arrival ends.
        self._life = env.process(self._run())

    @property
    def sequences(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    def encode(self, patches: int, encoded: Encoded) -> None:
        if self._pictures is None:
            raise RuntimeError("an LLM worker encodes no pictures")
        self._pictures.submit(patches, encoded, self._wake)

    def generate(self, visit: Visit) -> None:
        self._waiting.append(visit)
        if self._admits(visit):
            self._wake()

    def _wake(self) -> None:
        if self._idle is not None:
            self._idle.succeed()
            self._idle = None
        elif self._coasting:
            self._coasting = False
            self._life.interrupt()

    # ---- one step

    def _run(self) -> Life:
        while True:
            if self._pictures:
                self.busy_s += yield from self._pictures.run_batch()
            while self._waiting and self._admits(self._waiting[0]):
                self._admit(self._waiting.popleft())
            if self.sequences:
                yield from self._step()
            elif not self._pictures and not self._waiting:
                self._idle = self._env.event()
                yield self._idle

    def _step(self) -> Life:
        """One step, or all steps until the next sequence ends or arrives."""
        chunks = self._chunks()
        tokens = sum(size for _, size in chunks)
        each = self._seconds(len(self._decoding), tokens)
        steps = 1 if chunks or self._pictures else self._decoding[0][0] - self._steps
        began = self._env.now
        self._coasting = steps > 1
        try:
            yield self._env.timeout(each * steps)
        except simpy.Interrupt:
            steps = min(steps, max(1, math.ceil((self._env.now - began) / each)))
            yield self._env.timeout(max(0.0, began + steps * each - self._env.now))
        self._coasting = False
        self.busy_s += each * steps
        self._commit(steps, chunks)

    def _seconds(self, decoding: int, tokens: int) -> float:
        rates = self._rates
        return rates.step_s + rates.sequence_s * decoding + rates.prefill_token_s * tokens

    def _chunks(self) -> list[tuple[list[Any], int]]:
        """What the step prefills: (entry, number of tokens)."""
        rates, decoding = self._rates, len(self._decoding)
        budget = max(rates.max_batched_tokens - decoding, BLOCK_TOKENS)
        if decoding and rates.max_step_s and rates.prefill_token_s:
            left = rates.max_step_s - self._seconds(decoding, 0)
            left = max(left, MIN_PREFILL_FRACTION * rates.max_step_s)
            budget = min(budget, max(int(left / rates.prefill_token_s), BLOCK_TOKENS))
        chunks = []
        for entry in self._prefilling:
            if budget <= 0:
                break
            size = min(entry[1], budget)
            budget -= size
            chunks.append((entry, size))
        return chunks

    def _commit(self, steps: int, chunks: list[tuple[list[Any], int]]) -> None:
        self._steps += steps
        while self._decoding and self._decoding[0][0] <= self._steps:
            self._end(heapq.heappop(self._decoding)[2])
        for entry, size in chunks:
            entry[1] -= size
            if entry[1] == 0:
                self._prefilling.popleft()
                self._begin(entry[0])

    def _begin(self, visit: Visit) -> None:
        """Records the first token."""
        visit.first = self._env.now
        if visit.output == 1:
            self._end(visit)
        else:
            end = self._steps + visit.output - 1
            heapq.heappush(self._decoding, (end, next(self._order), visit))

    def _end(self, visit: Visit) -> None:
        visit.ended = self._env.now
        self.load -= 1
        self._kv_tokens += visit.prompt + visit.output

    # ---- admission

    def _admits(self, visit: Visit) -> bool:
        fits = visit.prompt + visit.output <= self._kv_tokens
        return fits and self.sequences < self._rates.max_sequences

    def _admit(self, visit: Visit) -> None:
        self._kv_tokens -= visit.prompt + visit.output
        self._prefilling.append([visit, visit.prefill])


def after(env: simpy.Environment, seconds: float, call: Callable[[simpy.Event], None]) -> None:
    """Calls ``call`` after ``seconds``; cheaper than a simpy process."""
    event = env.timeout(seconds)
    if event.callbacks is not None:
        event.callbacks.append(call)
