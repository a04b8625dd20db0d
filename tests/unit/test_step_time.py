"""While anything decodes, a step keeps to its time, and whoever prefills gets on all the same."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from llm_service.engine.engine import Engine, Message
from llm_service.policy.engine_config import EngineConfig
from llm_service.policy.messages import FinishedEvent, GenerateRequest, TokensEvent
from opticnerve.errors import EngineFailure
from opticnerve.generation.values import Sampling
from opticnerve.media.plan import Grid, Modality, Span, SpanAttention
from tests.fake_runner import FakeRows, FakeRunner, Machine

TARGET_S = 0.2
PAGE = 16


def slow_machine() -> Machine:
    """600 prompt tokens a second, 20 ms for one sequence that decodes."""
    return Machine(0.018, 0.002, 1 / 600)


class Bench:
    """An engine on a machine, and when each request got its tokens."""

    def __init__(self, machine: Machine, **config: Any) -> None:
        values = {"num_blocks": 512, "block_size": PAGE, "max_model_len": 4096, "row_bytes": 1}
        self.config = EngineConfig(**{**values, "max_step_s": TARGET_S, **config})
        self.machine = machine
        self.rows = FakeRows({"k"})
        self.runner = FakeRunner(self.config, self.rows, machine)
        self.engine = Engine(self.config, self.runner, self.rows, self.emit)
        self.engine.clock = machine.clock
        self.times: dict[str, list[float]] = {}
        self.finished: set[str] = set()

    def emit(self, messages: list[Message]) -> None:
        for message in messages:
            if isinstance(message, TokensEvent):
                self.times.setdefault(message.request_id, []).append(self.machine.now)
            elif isinstance(message, FinishedEvent):
                self.finished.add(message.request_id)

    def submit(self, name: str, length: int, max_tokens: int = 20, **fields: Any) -> None:
        tokens = tuple((len(name) + ord(name[0]) + i) % 40 for i in range(length))
        sampling = Sampling(max_tokens=max_tokens)
        self.engine.submit(GenerateRequest(name, tokens, sampling=sampling, **fields))

    def decode(self, name: str = "a", max_tokens: int = 20) -> None:
        """Starts a short request and steps until it decodes."""
        self.submit(name, 10, max_tokens)
        for _ in range(3):
            self.engine.step()

    def run(self, limit: int = 1000) -> None:
        for _ in range(limit):
            if not self.engine.step():
                self.engine.check_integrity()
                return
        raise AssertionError("the engine does not come to rest")

    def longest_gap(self, name: str = "a") -> float:
        times = self.times[name]
        return max(after - before for before, after in pairwise(times))

    def chunks(self, name: str) -> list[int]:
        works = (work for plan in self.runner.plans for work in plan.works)
        return [w.num_tokens for w in works if w.seq.request_id == name and not w.decodes]


def test_a_decoding_sequence_does_not_wait_for_a_long_prompt() -> None:
    bench = Bench(slow_machine())
    bench.decode()
    bench.submit("b", 2000, 2)
    bench.run()
    assert bench.longest_gap() < 1.1 * TARGET_S
    assert bench.finished == {"a", "b"}


def test_without_a_bound_it_waits_for_all_of_it() -> None:
    bench = Bench(slow_machine(), max_step_s=0.0)
    bench.decode()
    bench.submit("b", 2000, 2)
    bench.run()
    assert bench.longest_gap() == pytest.approx(bench.machine.seconds(1, 2000))
    assert bench.chunks("b") == [2000]


def test_a_prompt_has_whole_steps_while_nothing_decodes() -> None:
    bench = Bench(slow_machine(), max_num_batched_tokens=1024)
    bench.submit("a", 2000, 1)
    bench.run()
    assert bench.chunks("a") == [1024, 976]


def test_chunks_end_with_pages() -> None:
    bench = Bench(slow_machine())
    bench.decode(max_tokens=60)
    bench.submit("b", 1003, 2)
    bench.run()
    *chunks, last = bench.chunks("b")
    assert len(chunks) > 5
    assert all(chunk % PAGE == 0 for chunk in chunks)
    assert sum(chunks) + last == 1003


def test_what_one_prompt_leaves_of_the_time_is_the_next_ones() -> None:
    bench = Bench(slow_machine())
    bench.decode(max_tokens=60)
    for name in ("b", "c", "d"):
        bench.submit(name, 40, 2)
    bench.run()
    first = next(plan for plan in bench.runner.plans if plan.works[-1].seq.request_id == "d")
    assert len(first.works) == 4
    assert bench.longest_gap() < 1.1 * TARGET_S


def test_prefill_gets_a_part_of_the_time_where_decoding_takes_all_of_it() -> None:
    bench = Bench(Machine(0.3, 0.01, 0.0005))
    bench.submit("warm", 600, 1)
    bench.run()
    for index in range(4):
        bench.decode(f"a{index}", max_tokens=40)
    bench.submit("b", 640, 2)
    bench.run()
    assert bench.longest_gap("a3") < 1.1 * (bench.machine.seconds(4, 0) + TARGET_S / 4)
    assert max(bench.chunks("b")) > PAGE


def test_prefill_gets_a_page_where_even_that_takes_too_long() -> None:
    bench = Bench(Machine(0.01, 0.001, 0.1))
    bench.decode(max_tokens=40)
    bench.submit("b", 160, 2)
    bench.run()
    assert bench.chunks("b") == [PAGE] * 10


def test_bidirectional_spans_get_on_whole() -> None:
    """They may exceed the time; what comes before and after them does not."""
    bench = Bench(slow_machine())
    span = Span(100, 400, 0, 0, Modality.IMAGE, Grid(1, 40, 40), 0.0, SpanAttention.BIDIRECTIONAL)
    bench.decode(max_tokens=60)
    for name in ("b", "c"):
        bench.submit(name, 700, 2, spans=(span,), items=("k",))
    bench.run()
    assert bench.finished == {"a", "b", "c"}
    assert max(bench.chunks("b")) == max(bench.chunks("c")) == 400
    assert bench.longest_gap() == pytest.approx(bench.machine.seconds(3, 400), rel=0.02)


def test_decoding_has_its_tokens_before_prompts_that_are_ahead_of_it() -> None:
    """Order decides who is preempted, not whether a step leaves a token for decoding."""
    bench = Bench(Machine(0.001, 0.0001, 0.00001), max_num_batched_tokens=64)
    bench.decode(max_tokens=30)
    bench.submit("b", 1000, 2, priority=-1)
    before = len(bench.times["a"])
    for _ in range(10):
        bench.engine.step()
    assert len(bench.times["a"]) == before + 10
    assert bench.chunks("b")[1:] == [48] * 9  # 63 and 48, whole pages.


@pytest.mark.parametrize("kind", ["failures", "slot_errors"])
def test_a_step_that_fails_teaches_nothing(kind: str) -> None:
    bench = Bench(slow_machine())
    bench.decode()
    before = bench.engine.scheduler.costs.seconds(1, 500)
    getattr(bench.runner, kind).append(EngineFailure("broken"))
    bench.machine.per_step = 0.0
    bench.engine.step()
    assert bench.engine.scheduler.costs.seconds(1, 500) == before


def test_the_engine_tells_its_speed() -> None:
    bench = Bench(slow_machine())
    bench.submit("a", 600)
    bench.run()
    stats = bench.engine.stats()
    assert stats.step_seconds == pytest.approx(bench.machine.now)
    assert stats.prefill_tokens_per_s == pytest.approx(600, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("max_step_s", [TARGET_S, 0.0])
def test_text_does_not_wait_behind_a_burst_of_pictures(max_step_s: float) -> None:
    bench = Bench(slow_machine(), max_step_s=max_step_s, max_num_batched_tokens=512)
    bench.decode(max_tokens=2000)
    span = Span(0, 4, 0, 0, Modality.IMAGE, Grid(1, 4, 4))
    for number in range(30):
        bench.submit(f"picture{number}", 300, 1, spans=(span,), items=("k",))
    bench.submit("text", 40, 1)
    steps = 0
    while "text" not in bench.times:
        bench.engine.step()
        steps += 1
    assert steps <= 3
    assert sum(name.startswith("picture") for name in bench.times) <= 5
    bench.run(4000)
    assert len(bench.finished) == 32


def test_pictures_get_on_beside_a_flood_of_text() -> None:
    bench = Bench(slow_machine())
    bench.decode(max_tokens=2000)
    span = Span(0, 4, 0, 0, Modality.IMAGE, Grid(1, 4, 4))
    bench.submit("picture", 300, 1, spans=(span,), items=("k",))
    for number in range(100):
        bench.submit(f"text{number}", 200, 1)
        if "picture" in bench.times:
            break
        bench.engine.step()
    assert "picture" in bench.times
