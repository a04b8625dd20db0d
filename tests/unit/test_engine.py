"""The engine on a fake runner, whose tokens tell when a page, a row or a slot was wrong."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from llm_service.engine.engine import Engine, Message
from llm_service.policy.engine_config import EngineConfig
from llm_service.policy.messages import (
    AbortedEvent,
    EngineStats,
    Event,
    FailedEvent,
    FinishedEvent,
    GenerateRequest,
    NeedRowsEvent,
    PrefilledEvent,
    PromptLogprobsEvent,
    TokensEvent,
)
from opticnerve.errors import (
    ContextLengthExceeded,
    DeviceLost,
    EmbeddingNotFound,
    EngineFailure,
    InvalidRequest,
    Overloaded,
)
from opticnerve.generation.values import (
    ChoiceOutput,
    Delta,
    FinishReason,
    Logprob,
    PositionLogprobs,
    Sampling,
)
from opticnerve.media.plan import Grid, Modality, Span, SpanAttention
from tests.fake_runner import FakeRows, FakeRunner, clear_cache, oracle


class Bench:
    """An engine, what it emitted, and what each request got."""

    def __init__(self, rows: FakeRows | None = None, **config: Any) -> None:
        values = {
            "num_blocks": 32,
            "block_size": 16,
            "max_model_len": 512,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 32,
            "row_bytes": 1,
        }
        self.config = EngineConfig(**{**values, **config})
        self.rows = rows or FakeRows()
        self.runner = FakeRunner(self.config, self.rows)
        self.engine = Engine(self.config, self.runner, self.rows, self.emit)
        self.events: dict[str, list[Event]] = defaultdict(list)
        self.stats = EngineStats()

    def emit(self, messages: list[Message]) -> None:
        for message in messages:
            if isinstance(message, EngineStats):
                self.stats = message
            else:
                assert not isinstance(message, type(None))
                self.events[message.request_id].append(message)  # type: ignore[union-attr]

    def run(self, *requests: GenerateRequest, limit: int = 2000) -> None:
        for request in requests:
            self.engine.submit(request)
        for _ in range(limit):
            self.engine.check_integrity()
            if not self.engine.step():
                self.engine.check_integrity()
                return
        raise AssertionError("the engine does not come to rest")

    def of(self, request_id: str, kind: type) -> list[Any]:
        return [event for event in self.events[request_id] if isinstance(event, kind)]

    def tokens(self, request_id: str, choice: int = 0) -> list[int]:
        tokens: list[int] = []
        for event in self.of(request_id, TokensEvent):
            if event.delta.choice == choice:
                tokens += event.delta.token_ids
        return tokens

    def last(self, request_id: str) -> Event:
        return self.events[request_id][-1]

    def assert_clean(self) -> None:
        self.engine.check_integrity()
        assert self.engine.blocks.num_free == self.config.num_blocks
        assert not self.rows.leases


def request(name: str, length: int = 20, **fields: Any) -> GenerateRequest:
    sampling = fields.pop("sampling", {})
    tokens = fields.pop("token_ids", tuple(i % 7 + 1 for i in range(length)))
    return GenerateRequest(
        name, tokens, sampling=Sampling(**{"max_tokens": 8, **sampling}), **fields
    )


def span(offset: int, length: int, item: int = 0, row: int = 0, **fields: Any) -> Span:
    return Span(offset, length, item, row, Modality.IMAGE, Grid(1, 2, length * 2), **fields)


BIDIRECTIONAL = SpanAttention.BIDIRECTIONAL


def test_a_request_becomes_tokens_and_ends_once() -> None:
    bench = Bench()
    ask = request("a", 40)
    bench.run(ask)
    assert bench.tokens("a") == oracle(ask)
    finished = bench.last("a")
    assert isinstance(finished, FinishedEvent)
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (40, 8)
    assert [event.delta.first_index for event in bench.of("a", TokensEvent)] == list(range(8))
    assert bench.of("a", TokensEvent)[-1].delta.finish_reason is FinishReason.LENGTH
    assert len(bench.of("a", FinishedEvent)) == 1
    bench.assert_clean()


def test_many_requests_share_steps_and_none_disturbs_another() -> None:
    bench = Bench(max_num_seqs=3)
    asks = [request(f"r{i}", 5 + 9 * i, sampling={"seed": i}) for i in range(8)]
    bench.run(*asks)
    for ask in asks:
        assert bench.tokens(ask.request_id) == oracle(ask)
    assert max(len(plan.works) for plan in bench.runner.plans) == 3
    bench.assert_clean()


def test_a_prefix_is_computed_once() -> None:
    bench = Bench()
    first, second = request("a", 60), request("b", 60, sampling={"seed": 9})
    bench.run(first)
    bench.run(second)
    assert bench.tokens("b") == oracle(second)
    assert bench.last("b").usage.cached_tokens == 48  # type: ignore[union-attr]


def test_what_is_cached_of_a_prompt_is_told_before_its_first_token() -> None:
    bench = Bench()
    bench.run(request("a", 60))
    bench.run(request("b", 60, sampling={"n": 2}))
    assert bench.of("b", PrefilledEvent) == [PrefilledEvent("b", 48)]
    assert bench.events["b"][0] == PrefilledEvent("b", 48)


def test_output_is_cached_for_the_next_turn() -> None:
    bench = Bench()
    first = request("a", 20, sampling={"max_tokens": 30})
    bench.run(first)
    again = request("b", token_ids=(*first.token_ids, *bench.tokens("a"), 1, 2, 3))
    bench.run(again)
    assert bench.tokens("b") == oracle(again)
    assert bench.last("b").usage.cached_tokens == 48  # type: ignore[union-attr]


def test_a_prompt_that_is_cached_whole_computes_its_last_page_again() -> None:
    bench = Bench()
    bench.run(request("a", 32))
    bench.run(request("b", 32))
    assert bench.last("b").usage.cached_tokens == 16  # type: ignore[union-attr]
    assert bench.tokens("b") == bench.tokens("a")


def test_salt_and_skip_keep_prefixes_apart() -> None:
    bench = Bench()
    bench.run(request("a", 60))
    for name, fields in {
        "salted": {"cache_salt": "s"},
        "skips": {"skip_prefix_cache": True},
        "scored": {"sampling": {"prompt_logprobs": 0}},
    }.items():
        bench.run(request(name, 60, **fields))
        assert bench.last(name).usage.cached_tokens == 0, name  # type: ignore[union-attr]


def test_what_skips_the_prefix_cache_is_not_shared_either() -> None:
    bench = Bench()
    bench.run(request("a", 60, skip_prefix_cache=True))
    bench.run(request("b", 60))
    assert bench.last("b").usage.cached_tokens == 0  # type: ignore[union-attr]


def test_two_pictures_of_one_size_have_their_own_answers() -> None:
    bench = Bench(FakeRows({"red", "blue"}))
    spans = (span(4, 30),)
    for name, key in (("a", "red"), ("b", "blue"), ("c", "red")):
        bench.run(request(name, 60, spans=spans, items=(key,)))
    assert bench.tokens("a") != bench.tokens("b")
    assert bench.tokens("a") == bench.tokens("c")
    assert bench.last("b").usage.cached_tokens == 0  # type: ignore[union-attr]
    assert bench.last("c").usage.cached_tokens == 48  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "change",
    [
        {"grid_thw": Grid(2, 2, 60)},
        {"grid_thw": Grid(1, 4, 60)},
        {"grid_thw": Grid(1, 2, 30)},
        {"token_offset": 3},
        {"row_start": 1},
        {"seconds_per_grid": 0.5},
        {"modality": Modality.VIDEO},
        {"attention": BIDIRECTIONAL},
    ],
)
def test_one_key_under_another_span_is_another_prefix(change: dict[str, Any]) -> None:
    bench = Bench(FakeRows({"red"}))
    fields = {
        "token_offset": 2,
        "num_tokens": 30,
        "item": 0,
        "row_start": 0,
        "modality": Modality.IMAGE,
        "grid_thw": Grid(1, 2, 60),
    }
    bench.run(request("a", 60, spans=(Span(**fields),), items=("red",)))
    other = request("b", 60, spans=(Span(**{**fields, **change}),), items=("red",))
    bench.run(other)
    assert bench.last("b").usage.cached_tokens == 0  # type: ignore[union-attr]
    assert bench.tokens("b") == oracle(other)


def test_text_before_a_picture_is_computed_while_the_picture_is_encoded() -> None:
    bench = Bench()
    ask = request("a", 60, spans=(span(20, 10),), items=("red",))
    bench.run(ask)
    assert bench.of("a", NeedRowsEvent) == [NeedRowsEvent("a", ("red",))]
    assert bench.engine.scheduler.running[0].num_computed == 20
    assert bench.rows.leases == {"red": 10}
    bench.rows.present.add("red")
    bench.engine.rows_ready("red")
    bench.run()
    assert bench.tokens("a") == oracle(ask)
    assert bench.last("a").usage.embedding_tokens == 10  # type: ignore[union-attr]
    bench.assert_clean()


def test_the_lease_ends_with_the_last_span() -> None:
    bench = Bench(FakeRows({"red"}), max_num_batched_tokens=16)
    bench.engine.submit(request("a", 80, spans=(span(2, 4), span(10, 4, row=4)), items=("red",)))
    bench.engine.step()
    assert not bench.rows.leases
    assert bench.rows.acquired == ["red"]


def test_a_picture_that_a_prefix_hit_covers_needs_no_rows() -> None:
    bench = Bench(FakeRows({"red"}))
    ask = request("a", 60, spans=(span(2, 20),), items=("red",))
    bench.run(ask)
    bench.rows.present.clear()
    bench.run(request("b", 60, spans=ask.spans, items=ask.items))
    assert not bench.of("b", NeedRowsEvent)
    assert bench.tokens("b") == oracle(ask)
    assert bench.rows.acquired == ["red"]


def test_a_hit_that_ends_in_a_picture_needs_its_rows() -> None:
    bench = Bench(FakeRows({"red"}))
    ask = request("a", 32, spans=(span(2, 30),), items=("red",))
    bench.run(ask)
    bench.rows.present.clear()
    bench.run(request("b", 32, spans=ask.spans, items=ask.items))
    assert bench.of("b", NeedRowsEvent)
    bench.rows.present.add("red")
    bench.engine.rows_ready("red")
    bench.run()
    assert bench.tokens("b") == oracle(ask)
    assert bench.last("b").usage.cached_tokens == 16  # type: ignore[union-attr]


def test_rows_that_are_gone_when_they_are_wanted_are_asked_for_again() -> None:
    bench = Bench(FakeRows({"red"}))
    ask = request("a", 60, spans=(span(40, 10),), items=("red",))
    bench.engine.submit(ask)
    bench.engine.step()
    ready, bench.rows.ready = bench.rows.ready, lambda key: True  # type: ignore[method-assign]
    bench.rows.present.clear()
    bench.run()
    assert bench.of("a", NeedRowsEvent) == [NeedRowsEvent("a", ("red",))]
    bench.rows.ready = ready  # type: ignore[method-assign]
    bench.rows.present.add("red")
    bench.engine.rows_ready("red")
    bench.run()
    assert bench.tokens("a") == oracle(ask)


def test_rows_that_never_come_fail_their_request_alone() -> None:
    bench = Bench()
    lost = request("a", 60, spans=(span(20, 10),), items=("red",))
    text = request("b", 30)
    bench.run(lost, text)
    error = EmbeddingNotFound("gone for good")
    bench.engine.rows_failed("a", "red", error)
    bench.run()
    assert bench.last("a") == FailedEvent("a", error)
    assert bench.tokens("b") == oracle(text)
    bench.assert_clean()


def test_a_failure_of_rows_that_were_used_already_is_no_failure() -> None:
    bench = Bench(FakeRows({"red"}))
    bench.engine.submit(request("a", 20, spans=(span(2, 4),), items=("red",)))
    bench.engine.step()
    bench.engine.rows_failed("a", "red", EmbeddingNotFound("too late"))
    bench.run()
    assert isinstance(bench.last("a"), FinishedEvent)


def test_over_the_tier_no_new_pictures_are_admitted_and_text_goes_on() -> None:
    rows = FakeRows(budget=25)
    bench = Bench(rows)
    asks = [request(f"p{i}", 40, spans=(span(2, 20),), items=(f"k{i}",)) for i in range(3)]
    text = request("t", 10)
    bench.run(*asks, text)
    assert set(rows.leases) == {"k0"}
    assert isinstance(bench.last("t"), FinishedEvent)
    for i in range(3):
        assert set(rows.leases) == {f"k{i}"}
        rows.present.add(f"k{i}")
        bench.engine.rows_ready(f"k{i}")
        bench.run()
        assert bench.tokens(f"p{i}") == oracle(asks[i])
    bench.assert_clean()


def test_a_picture_larger_than_the_tier_runs_alone() -> None:
    bench = Bench(FakeRows({"big"}, budget=5))
    ask = request("a", 40, spans=(span(2, 20),), items=("big",))
    bench.run(ask)
    assert bench.tokens("a") == oracle(ask)


def test_a_bidirectional_span_is_one_chunk_and_never_half_a_hit() -> None:
    bench = Bench(FakeRows({"red"}), max_num_batched_tokens=32)
    ask = request("a", 70, spans=(span(10, 32, attention=BIDIRECTIONAL),), items=("red",))
    bench.run(ask)
    assert bench.tokens("a") == oracle(ask)
    shorter = request(
        "b", token_ids=ask.token_ids[:43], spans=ask.spans, items=ask.items
    )  # Hits 32 tokens, in the middle of the span.
    bench.run(shorter)
    assert bench.tokens("b") == oracle(shorter)
    assert bench.last("b").usage.cached_tokens == 0  # type: ignore[union-attr]


def test_preemption_recomputes_and_changes_nothing() -> None:
    bench = Bench(num_blocks=8, max_num_seqs=4)
    asks = [request(f"r{i}", 20, sampling={"seed": i, "max_tokens": 60}) for i in range(4)]
    bench.run(*asks)
    assert bench.engine.scheduler.num_preemptions > 0
    for ask in asks:
        assert bench.tokens(ask.request_id) == oracle(ask)
    assert bench.last("r0").timings.preemptions == 0  # type: ignore[union-attr]
    assert bench.last("r3").timings.preemptions > 0  # type: ignore[union-attr]
    bench.assert_clean()


def test_a_preempted_picture_keeps_its_key_and_asks_for_rows_again() -> None:
    rows = FakeRows({"red"})
    bench = Bench(rows, num_blocks=8)
    text = request("t", 20, sampling={"max_tokens": 100})
    picture = request("p", 30, spans=(span(2, 20),), items=("red",), sampling={"max_tokens": 60})
    bench.engine.submit(text)
    bench.engine.submit(picture)
    while not bench.engine.scheduler.num_preemptions:
        assert bench.engine.step()
    rows.present.clear()
    clear_cache(bench.engine.blocks)
    bench.run()
    assert bench.of("p", NeedRowsEvent) == [NeedRowsEvent("p", ("red",), preempted=True)]
    rows.present.add("red")
    bench.engine.rows_ready("red")
    bench.run()
    assert bench.tokens("p") == oracle(picture)
    assert bench.tokens("t") == oracle(text)


def test_priority_comes_before_arrival() -> None:
    bench = Bench(max_num_seqs=1)
    low, high = request("low", priority=5), request("high", priority=-5)
    bench.run(request("first"), low, high)
    order = [plan.works[0].seq.request_id for plan in bench.runner.plans]
    assert order.index("high") < order.index("low")


def test_choices_fork_after_prefill_and_share_its_pages() -> None:
    bench = Bench()
    ask = request("a", 40, sampling={"n": 3, "max_tokens": 20})
    bench.run(ask)
    for choice in range(3):
        assert bench.tokens("a", choice) == oracle(ask, choice)
    assert bench.last("a").usage.completion_tokens == 60  # type: ignore[union-attr]
    computed = sum(plan.num_tokens for plan in bench.runner.plans)
    assert computed == 40 + 2 + 3 * 19  # The forks compute one token of the prompt again.
    assert sum(len(plan.copies) for plan in bench.runner.plans) == 2
    bench.assert_clean()


def test_choices_without_room_wait_like_anybody() -> None:
    bench = Bench(max_num_seqs=2, num_blocks=6)
    ask = request("a", 40, sampling={"n": 5, "max_tokens": 20})
    bench.run(ask)
    for choice in range(5):
        assert bench.tokens("a", choice) == oracle(ask, choice)
    bench.assert_clean()


def test_choices_of_a_prompt_that_ends_in_a_picture() -> None:
    bench = Bench(FakeRows({"red"}))
    for attention in SpanAttention:
        name = attention.value
        ask = request(
            name, 40, sampling={"n": 2}, spans=(span(15, 25, attention=attention),), items=("red",)
        )
        bench.run(ask)
        assert [bench.tokens(name, c) for c in range(2)] == [oracle(ask, c) for c in range(2)]
    bench.assert_clean()


def test_a_choice_that_ends_at_once_still_forks() -> None:
    bench = Bench()
    ask = request("a", 20, sampling={"n": 2, "max_tokens": 1})
    bench.run(ask)
    assert [bench.tokens("a", c) for c in range(2)] == [oracle(ask, c) for c in range(2)]


def test_stop_rules() -> None:
    bench = Bench()
    free = oracle(request("x", sampling={"max_tokens": 40}))
    stop = free[5]
    first = free.index(stop)
    cases = {
        "stop": ({"stop_token_ids": (stop,)}, first + 1),
        "eos": ({"eos_token_ids": (stop,)}, first + 1),
        "ignored": ({"eos_token_ids": (stop,), "ignore_eos": True}, 40),
    }
    for name, (sampling, length) in cases.items():
        ask = request(name, sampling={"max_tokens": 40, **sampling})
        bench.run(ask)
        assert bench.tokens(name) == oracle(ask) == free[:length]
        end = bench.of(name, TokensEvent)[-1].delta
        assert (end.finish_reason, end.stop_token_id) == (
            (FinishReason.LENGTH, None) if name == "ignored" else (FinishReason.STOP, stop)
        )


def test_min_tokens_hold_stops_back() -> None:
    bench = Bench()
    free = oracle(request("x", sampling={"max_tokens": 40}))
    ask = request("a", sampling={"max_tokens": 40, "stop_token_ids": tuple(free), "min_tokens": 7})
    bench.run(ask)
    assert bench.tokens("a") == free[:8]  # The model's fake does not mask: the eighth may end it.


def test_a_continuation_is_counted_and_not_sent_again() -> None:
    bench = Bench()
    whole = request("a", sampling={"max_tokens": 30, "seed": 4})
    expected = oracle(whole)
    sent = (ChoiceOutput(0, tuple(expected[:11])),)
    ask = request("b", sampling={"max_tokens": 30, "seed": 4}, outputs=sent)
    bench.run(ask)
    assert bench.tokens("b") == expected[11:]
    assert bench.of("b", TokensEvent)[0].delta.first_index == 11
    assert bench.last("b").usage.completion_tokens == 30  # type: ignore[union-attr]


def test_a_continuation_of_what_had_ended_ends_at_once() -> None:
    bench = Bench()
    done = request("a", sampling={"max_tokens": 3}, outputs=(ChoiceOutput(0, (1, 2, 3)),))
    stopped = request("b", sampling={"stop_token_ids": (2,)}, outputs=(ChoiceOutput(0, (1, 2)),))
    known = request("c", sampling={"n": 2}, outputs=tuple(ended(i, (1, 2)) for i in range(2)))
    bench.run(done, stopped, known)
    assert bench.of("a", TokensEvent) == [
        TokensEvent("a", Delta(0, 3, (), (), FinishReason.LENGTH))
    ]
    assert bench.of("b", TokensEvent)[0].delta.finish_reason is FinishReason.STOP
    assert bench.of("b", TokensEvent)[0].delta.stop_token_id == 2
    assert not bench.runner.plans
    for name, count in (("a", 3), ("b", 2), ("c", 4)):
        assert bench.last(name).usage.completion_tokens == count  # type: ignore[union-attr]
    assert bench.of("c", TokensEvent) == []
    bench.assert_clean()


def ended(choice: int, output_ids: tuple[int, ...] = ()) -> ChoiceOutput:
    return ChoiceOutput(choice, output_ids, finished=True)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_choices_continue_with_outputs_of_their_own(prefix_caching: bool) -> None:
    """One has ended, one has ended without anybody saying so, one has not begun, two are at
    work; what they share is computed once, prefix cache or not."""
    bench = Bench(prefix_caching=prefix_caching, max_num_seqs=6)
    sampling = {"n": 5, "max_tokens": 30, "seed": 4}
    whole = [oracle(request("a", sampling=sampling), choice) for choice in range(5)]
    sent = [tuple(whole[0][:9]), tuple(whole[1][:17]), (), tuple(whole[3]), tuple(whole[4][:2])]
    ask = request(
        "b",
        sampling=sampling,
        outputs=(
            ended(0, sent[0]),
            *(ChoiceOutput(choice, sent[choice]) for choice in (4, 1, 3)),
        ),
    )
    bench.run(ask)
    for choice in range(1, 5):
        assert list(sent[choice]) + bench.tokens("b", choice) == whole[choice]
        deltas = [event.delta for event in bench.of("b", TokensEvent)]
        events = [delta for delta in deltas if delta.choice == choice]
        assert events[0].first_index == len(sent[choice])
        assert [each.finish_reason for each in events if each.finish_reason] == [
            FinishReason.LENGTH
        ]
    assert bench.tokens("b", 0) == []
    assert bench.last("b").usage.completion_tokens == 9 + 4 * 30  # type: ignore[union-attr]
    computed = sum(plan.num_tokens for plan in bench.runner.plans)
    decoded = sum(len(whole[choice]) - len(sent[choice]) for choice in range(1, 5))
    leader, own = len(ask.token_ids) + 17, 0 + 2
    assert computed == leader + own + decoded - 2  # Two were sampled with what was prefilled.
    bench.assert_clean()


def test_a_choice_elsewhere_keeps_its_number() -> None:
    bench = Bench()
    whole = request("a", sampling={"n": 3})
    part = request("b", sampling={"n": 3}, outputs=(ended(0), ended(1)))
    bench.run(whole, part)
    assert bench.tokens("b", choice=2) == bench.tokens("a", choice=2)


def test_prompt_logprobs_come_with_each_chunk_before_the_first_token() -> None:
    bench = Bench(FakeRows({"red"}), max_num_batched_tokens=16)
    ask = request(
        "a",
        50,
        sampling={"prompt_logprobs": 1, "n": 2},
        spans=(span(33, 4),),
        items=("red",),
    )
    bench.run(ask)
    kinds = [type(event) for event in bench.events["a"]]
    assert kinds.count(PromptLogprobsEvent) > 1
    assert PromptLogprobsEvent not in kinds[kinds.index(TokensEvent) :]
    positions = scores(bench, "a")
    assert len(positions) == 50
    absent = {0, 33, 34, 35, 36}
    for index, entry in enumerate(positions):
        expected = PositionLogprobs(Logprob(ask.token_ids[index], float(index), 1))
        assert entry == (PositionLogprobs() if index in absent else expected)


def scores(bench: Bench, name: str) -> list[PositionLogprobs]:
    return [entry for event in bench.of(name, PromptLogprobsEvent) for entry in event.positions]


def test_prompt_logprobs_survive_preemption() -> None:
    bench = Bench(max_num_batched_tokens=16)
    scored = request("s", 80, sampling={"prompt_logprobs": 0})
    bench.engine.submit(scored)
    for _ in range(3):
        bench.engine.step()
    (seq,) = bench.engine.scheduler.running
    assert seq.num_computed == 48
    bench.engine.scheduler.preempt(seq)
    bench.run()
    found = scores(bench, "s")
    assert [entry.sampled[0] for entry in found[1:]] == list(scored.token_ids[1:])
    assert bench.tokens("s") == oracle(scored)


def test_abort_at_every_stage_frees_everything() -> None:
    for steps in range(8):
        bench = Bench(max_num_seqs=2)
        ask = request("a", 60, spans=(span(40, 8),), items=("red",), sampling={"n": 2})
        waiting = request("w", 10)
        bench.rows.present.update({"red"} if steps > 3 else ())
        bench.engine.submit(ask)
        bench.engine.submit(waiting)
        for _ in range(steps):
            bench.engine.step()
        bench.engine.abort("a")
        bench.engine.abort("unknown")
        bench.run()
        assert isinstance(bench.last("a"), AbortedEvent)
        assert bench.tokens("w") == oracle(waiting)
        bench.engine.abort("a")
        bench.run()
        assert len(bench.of("a", AbortedEvent)) == 1
        bench.assert_clean()


def test_an_error_in_one_request_fails_that_request() -> None:
    bench = Bench()
    bad, good = request("a", 20), request("b", 25)
    bench.runner.slot_errors.append(ValueError("a tensor of the wrong shape"))
    bench.run(bad, good)
    failed = bench.last("a")
    assert isinstance(failed, FailedEvent)
    assert isinstance(failed.error, EngineFailure)
    assert "tensor" not in str(failed.error)
    assert bench.tokens("b") == oracle(good)
    bench.assert_clean()


def test_pages_of_what_the_engine_failed_on_are_shared_no_more() -> None:
    bench = Bench()
    bench.run(request("a", 60))
    bench.runner.slot_errors.append(EngineFailure("the output is not finite"))
    bench.run(request("b", 60))
    assert isinstance(bench.last("b"), FailedEvent)
    bench.run(request("c", 60))
    assert bench.last("c").usage.cached_tokens == 0  # type: ignore[union-attr]
    bench.runner.slot_errors.append(InvalidRequest("no token is allowed"))
    bench.run(request("d", 60))
    bench.run(request("e", 60))
    assert bench.last("e").usage.cached_tokens == 48  # type: ignore[union-attr]
    bench.assert_clean()


def test_a_failed_step_fails_its_sequences_and_shares_none_of_their_pages() -> None:
    bench = Bench(max_num_seqs=2)
    asks = [request("a", 40), request("b", 40), request("c", 40)]
    bench.runner.failures.append(RuntimeError("illegal memory access"))
    bench.run(*asks)
    assert isinstance(bench.last("a"), FailedEvent)
    later = [name for name in "bc" if isinstance(bench.last(name), FinishedEvent)]
    assert "c" in later
    for name in later:
        assert bench.tokens(name) == oracle(asks["abc".index(name)])
    bench.assert_clean()


def test_a_failed_step_takes_the_forks_whose_pages_it_copied() -> None:
    bench = Bench(max_num_batched_tokens=20)
    ask, other = request("a", 20, sampling={"n": 3}), request("b", 20)
    bench.engine.submit(ask)
    bench.engine.step()
    bench.runner.failures.append(RuntimeError("broken"))
    bench.run(other)
    assert isinstance(bench.last("a"), FailedEvent)
    bench.run(request("c", 20))
    assert bench.tokens("c") == oracle(other)
    bench.assert_clean()


def test_a_fork_whose_copy_was_in_the_broken_step_fails_with_it() -> None:
    """Its parent stopped at once, and the step's budget went to another request."""
    bench = Bench(max_num_batched_tokens=20)
    greedy = request("b", 200, spans=(span(0, 4),), items=("red",), share="ada")
    picture = {"spans": (span(0, 4),), "items": ("blue",), "share": "ada"}
    bench.rows.present.add("blue")
    stop = tuple(oracle(request("a", 20, **picture))[:1])
    ask = request("a", 20, **picture, sampling={"n": 2, "stop_token_ids": stop})
    bench.run(greedy)
    bench.engine.submit(ask)
    bench.engine.step()
    assert [len(bench.tokens("a", choice)) for choice in range(2)] == [1, 0]
    bench.rows.present.add("red")
    bench.engine.rows_ready("red")
    bench.runner.failures.append(RuntimeError("broken"))
    bench.engine.step()
    (plan,) = bench.runner.plans[-1:]
    assert plan.copies
    assert [work.seq.request_id for work in plan.works] == ["b"]
    assert isinstance(bench.last("a"), FailedEvent)
    bench.assert_clean()


def test_a_fork_that_gave_its_pages_back_has_none_copied() -> None:
    bench = Bench()
    ask = request("a", 20, sampling={"n": 2})
    bench.engine.submit(ask)
    bench.engine.step()
    bench.engine.scheduler.preempt(bench.engine.scheduler.running[1])
    bench.run()
    assert not any(plan.copies for plan in bench.runner.plans)
    assert [bench.tokens("a", choice) for choice in range(2)] == [oracle(ask, c) for c in range(2)]


def test_a_lost_device_fails_everything_and_leaves_the_loop() -> None:
    bench = Bench(max_num_seqs=1)
    bench.runner.failures.append(DeviceLost("the GPU fell off the bus"))
    bench.engine.submit(request("a"))
    bench.engine.submit(request("b"))
    with pytest.raises(DeviceLost):
        bench.engine.step()
    for name in "ab":
        assert isinstance(bench.last(name).error, DeviceLost)  # type: ignore[union-attr]
    bench.assert_clean()


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"token_ids": ()}, InvalidRequest),
        ({"token_ids": (1, -1)}, InvalidRequest),
        ({"token_ids": (1, 50)}, InvalidRequest),
        ({"outputs": (ChoiceOutput(0, (50,)),)}, InvalidRequest),
        ({"outputs": (ChoiceOutput(1, (1,)),)}, InvalidRequest),
        ({"outputs": (ChoiceOutput(0, (1,)), ChoiceOutput(0, (1,)))}, InvalidRequest),
        ({"sampling": {"max_tokens": 0}}, InvalidRequest),
        ({"sampling": {"n": 0}}, InvalidRequest),
        ({"sampling": {"n": 1000}}, InvalidRequest),
        ({"length": 500, "sampling": {"max_tokens": 13}}, ContextLengthExceeded),
        ({"length": 5000}, ContextLengthExceeded),
        ({"spans": (span(18, 4),), "items": ("k",)}, InvalidRequest),
        ({"spans": (span(2, 4),)}, InvalidRequest),
        ({"spans": (span(2, 4), span(5, 4)), "items": ("k",)}, InvalidRequest),
        ({"spans": (span(9, 4), span(2, 4)), "items": ("k",)}, InvalidRequest),
        ({"spans": (span(2, 0),), "items": ("k",)}, InvalidRequest),
        (
            {"length": 60, "spans": (span(2, 40, attention=BIDIRECTIONAL),), "items": ("k",)},
            InvalidRequest,
        ),
        ({"token_ids": (1, "two")}, EngineFailure),
    ],
)
def test_what_can_never_be_served_fails_at_once(fields: dict[str, Any], error: type) -> None:
    bench = Bench(vocab_size=50)
    bench.run(request("a", **fields))
    assert [type(event) for event in bench.events["a"]] == [FailedEvent]
    assert type(bench.last("a").error) is error  # type: ignore[union-attr]
    bench.run(request("b"))
    assert isinstance(bench.last("b"), FinishedEvent)
    bench.assert_clean()


def test_a_request_that_just_fits_the_cache_is_served() -> None:
    bench = Bench(num_blocks=4, max_model_len=512)
    ask = request("a", 40, sampling={"max_tokens": 24})
    bench.run(ask)
    assert bench.tokens("a") == oracle(ask)
    bench.run(request("b", 40, sampling={"max_tokens": 25}))
    assert isinstance(bench.last("b").error, ContextLengthExceeded)  # type: ignore[union-attr]


def test_choices_that_wait_take_no_places_of_the_queue() -> None:
    bench = Bench(max_num_seqs=1, max_waiting=2)
    bench.engine.submit(request("many", 20, sampling={"n": 40}))
    bench.engine.step()
    assert bench.engine.stats().waiting == 39
    asks = [request(name, 20) for name in "ab"]
    bench.run(*asks)
    for ask in asks:
        assert bench.tokens(ask.request_id) == oracle(ask)


def test_too_many_waiting_requests_are_turned_away() -> None:
    bench = Bench(max_num_seqs=1, max_waiting=2)
    bench.run(*(request(name) for name in "abc"))
    assert isinstance(bench.last("c").error, Overloaded)  # type: ignore[union-attr]
    assert bench.last("c").error.retry_after_s  # type: ignore[union-attr]
    assert isinstance(bench.last("b"), FinishedEvent)


def test_stats_count_from_the_start() -> None:
    bench = Bench()
    bench.run(request("a", 60))
    bench.run(request("b", 60))
    assert bench.stats.prompt_tokens == 120
    assert bench.stats.cached_tokens == 48
    assert bench.stats.completion_tokens == 16
    assert bench.stats.running == bench.stats.waiting == 0
    assert bench.stats.free_blocks == 32
