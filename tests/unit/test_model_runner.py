"""The model runner on the demo checkpoint: what it keeps to one sequence, packs and sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_service.device.attention.sdpa import SdpaBackend
from llm_service.device.batch import SlotTable, pack
from llm_service.device.memory import available_memory
from llm_service.device.model_runner import ModelRunner, RunnerLimits
from llm_service.policy.messages import FailedEvent, GenerateRequest, TokensEvent
from llm_service.policy.sequence import GenerationState
from llm_service.policy.sequence import Sequence as Choice
from llm_service.policy.step_plan import StepPlan, Work
from opticnerve.errors import (
    ConfigError,
    DeviceLost,
    EmbeddingCorrupt,
    EmbeddingNotFound,
    EngineFailure,
    InvalidRequest,
)
from opticnerve.media.plan import SpanAttention
from tests.local_engine import DictRows, LocalEngine
from tests.runners import WIDTH, ids_of, load_demo, request, rows, tokens, with_picture


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return load_demo()


# ---- errors that stay with one sequence


def failure(engine: LocalEngine, name: str) -> Exception:
    (error,) = [
        m.error for m in engine.messages if isinstance(m, FailedEvent) and m.request_id == name
    ]
    return error


def tokens_said(engine: LocalEngine, name: str) -> list[int]:
    return [
        token
        for message in engine.messages
        if isinstance(message, TokensEvent) and message.request_id == name
        for token in message.delta.token_ids
    ]


def execute_prefill(demo: tuple[Any, Any], embeddings: dict[str, Any]) -> tuple[Any, ModelRunner]:
    """One step of two sequences: a picture's, and a plain one."""
    language, layout = demo
    store = DictRows()
    store.items |= embeddings
    limits = RunnerLimits(max_model_len=256, max_num_seqs=4, kv_cache_tokens=512)
    runner = ModelRunner(language, layout, SdpaBackend(), limits, store)
    works = (
        work_of(request("bad", with_picture()), 0, (3, 4)),
        work_of(request("ok", tokens(9)), 1, (7,)),
    )
    return runner.execute(StepPlan(1, works)), runner


def work_of(ask: GenerateRequest, slot: int, table: tuple[int, ...], **changes: Any) -> Work:
    from llm_service.policy.step_plan import Segment

    seq = Choice(GenerationState(ask, 0, 0.0), 0)
    span = ask.spans[0] if ask.spans else None
    segments = (
        () if span is None else (Segment(ask.items[0], span.token_offset, 0, span.num_tokens),)
    )
    return replace(Work(seq, slot, 0, len(ask.token_ids), table, segments, True), **changes)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"rows": rows(count=8)}, "shape"),
        ({"rows": rows()[:, :100]}, "shape"),
        ({"rows": rows()[0]}, "shape"),
        ({"rows": torch.zeros(9, WIDTH, dtype=torch.int64)}, "int64"),
        ({"other": rows()}, "exactly the tensors"),
        ({"rows": rows(), "deepstack.0": rows()}, "exactly the tensors"),
        ({"rows": rows(), "deepstack.x": rows()}, "exactly the tensors"),
        ({"rows": rows(), "deepstack.99999999999": rows()}, "exactly the tensors"),
    ],
)
def test_unfit_rows_fail_their_sequence_alone(
    demo: tuple[Any, Any], tensors: dict[str, torch.Tensor], says: str
) -> None:
    result, _ = execute_prefill(demo, {"a" * 64: tensors})
    error = result[0].error
    assert isinstance(error, EmbeddingCorrupt) and says in error.message and error.param == "a" * 64
    good, _ = execute_prefill(demo, {"a" * 64: {"rows": rows()}})
    assert good[0].error is None and good[0].token_id is not None
    assert result[1] == good[1] and result[0].token_id is None


def test_missing_rows_name_their_key(demo: tuple[Any, Any]) -> None:
    result, _ = execute_prefill(demo, {})
    assert isinstance(result[0].error, EmbeddingNotFound) and result[0].error.param == "a" * 64
    assert result[1].token_id is not None


def test_what_a_layout_raises_fails_its_sequence_alone(
    demo: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(num_tokens: int, spans: Any) -> Any:
        if spans:
            raise ZeroDivisionError
        return np.zeros((3, num_tokens), dtype=np.int64), 0

    monkeypatch.setattr(demo[1], "positions", broken)
    result, _ = execute_prefill(demo, {"a" * 64: {"rows": rows()}})
    assert isinstance(result[0].error, EngineFailure)
    assert "ZeroDivisionError" in str(result[0].error)
    assert result[1].token_id is not None


class Poisoned:
    """A language model in which one token makes hidden states that are not finite."""

    def __init__(self, language: Any, token: int) -> None:
        self._language, self._token = language, token

    def __getattr__(self, name: str) -> Any:
        return getattr(self._language, name)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        embeds = self._language.embed(token_ids)
        embeds[token_ids == self._token] = float("nan")
        return embeds


def test_output_that_is_not_finite_fails_its_request_and_spreads_nothing(
    demo: tuple[Any, Any],
) -> None:
    language, layout = demo
    plain = [request(str(i), tuple(t for t in tokens(30, i) if t != 77)) for i in range(3)]
    want = ids_of(LocalEngine(*demo), plain)
    engine = LocalEngine(Poisoned(language, 77), layout, kv_cache_tokens=256)
    sick = request("sick", (*tokens(40), 77, 5))
    for round_ in range(3):  # Later rounds get the pages that the sick one had.
        engine.engine.submit(replace(sick, request_id=f"sick{round_}"))
        named = [replace(ask, request_id=f"{round_}-{ask.request_id}") for ask in plain]
        for ask in named:
            engine.engine.submit(ask)
        engine.run()
        assert isinstance(failure(engine, f"sick{round_}"), EngineFailure)
        for ask, original in zip(named, plain, strict=True):
            assert tokens_said(engine, ask.request_id) == want[f"{original.request_id}/0"]


def test_constraints_that_leave_nothing_fail_their_request(demo: tuple[Any, Any]) -> None:
    engine = LocalEngine(*demo)
    impossible = request(
        "no", tokens(9), allowed_token_ids=(629,), min_tokens=2, eos_token_ids=(629,)
    )
    engine.engine.submit(impossible)
    engine.engine.submit(request("yes", tokens(9)))
    engine.run()
    assert isinstance(failure(engine, "no"), InvalidRequest)
    assert len(tokens_said(engine, "yes")) == 12


CUBLAS = "CUDA error: CUBLAS_STATUS_{} when calling `cublasSgemm(handle, m, n, k)`"


@pytest.mark.parametrize("place", ["prepare", "admit"])
@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (torch.AcceleratorError("an illegal memory access was encountered", 700), DeviceLost),
        (RuntimeError(CUBLAS.format("EXECUTION_FAILED")), DeviceLost),
        (RuntimeError(CUBLAS.format("ALLOC_FAILED")), RuntimeError),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError),
        (RuntimeError("shape mismatch"), RuntimeError),
    ],
)
def test_a_lost_device_is_told_apart(
    demo: tuple[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    error: Exception,
    seen: type[Exception],
) -> None:
    """In the step itself, and where one sequence enters it."""

    def fail(*_: Any) -> Any:
        raise error

    language, layout = demo
    limits = RunnerLimits(max_model_len=64, max_num_seqs=2, kv_cache_tokens=128)
    runner = ModelRunner(language, layout, SdpaBackend(), limits, DictRows())
    monkeypatch.setattr(runner._backend if place == "prepare" else runner._sampler, place, fail)
    plan = StepPlan(1, (work_of(request("x", tokens(5)), 0, (1,)),))
    if place == "admit" and seen is not DeviceLost:
        assert isinstance(runner.execute(plan)[0].error, EngineFailure)
        return
    with pytest.raises(seen) as caught:
        runner.execute(plan)
    assert isinstance(caught.value, DeviceLost) == (seen is DeviceLost)


# ---- DeepStack, packing, positions


class Recorder(Poisoned):
    """Keeps what the language model is given."""

    def __init__(self, language: Any) -> None:
        super().__init__(language, -1)
        self.calls: list[tuple[torch.Tensor, Any]] = []

    def forward(
        self, embeds: torch.Tensor, positions: torch.Tensor, deepstack: Any, rows: Any
    ) -> Any:
        self.calls.append((embeds.clone(), list(deepstack)))
        return self._language.forward(embeds, positions, deepstack, rows)


def test_deepstack_levels_go_where_their_rows_go(
    demo: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    language, layout = demo
    monkeypatch.setattr(type(layout), "deepstack_levels", 2)
    recorder = Recorder(language)
    engine = LocalEngine(recorder, layout, max_num_batched_tokens=10, prefix_caching=False)
    item = {"rows": rows(0), "deepstack.0": rows(1), "deepstack.1": rows(2)}
    ask = request("d", with_picture(before=6, after=7), max_tokens=2)
    engine.rows.items["a" * 64] = item
    engine.generate([ask])
    (
        (first, early),
        (second, late),
        _,
    ) = recorder.calls[:3]
    torch.testing.assert_close(first[6:10], item["rows"][:4])
    torch.testing.assert_close(second[:5], item["rows"][4:])
    for level, name in enumerate(("deepstack.0", "deepstack.1")):
        indices, added = early[level]
        assert indices.tolist() == [6, 7, 8, 9]
        torch.testing.assert_close(added, item[name][:4])
        indices, added = late[level]
        assert indices.tolist() == [0, 1, 2, 3, 4]
        torch.testing.assert_close(added, item[name][4:])
    assert recorder.calls[-1][1] == []


def test_an_embedding_that_lacks_a_level_is_refused(
    demo: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(demo[1]), "deepstack_levels", 2)
    result, _ = execute_prefill(demo, {"a" * 64: {"rows": rows(0), "deepstack.0": rows(1)}})
    error = result[0].error
    assert isinstance(error, EmbeddingCorrupt) and "exactly the tensors" in error.message


def test_packing_puts_decodes_first_and_keeps_track(demo: tuple[Any, Any]) -> None:
    slots = SlotTable(4, 8, demo[1])
    atomic = with_picture()
    atomic["spans"] = (replace(atomic["spans"][0], attention=SpanAttention.BIDIRECTIONAL),)
    chunk = work_of(request("c", atomic), 2, (5, 6))
    decode = work_of(
        request("d", tokens(20)), 0, (1, 2), start=20, num_tokens=1, last_token_on_device=True
    )
    last = work_of(request("e", tokens(17)), 3, (3, 4), start=16, num_tokens=1, samples=False)
    for work in (chunk, decode, last):
        slots.admit(work.slot, work.seq)
        slots.update_blocks(work.slot, work.block_table)
    batch = pack([chunk, decode, last], slots, 16)
    assert batch.works == (decode, last, chunk)
    assert batch.first_indices == [0, 1, 2]
    assert batch.token_ids.tolist()[1:] == [last.seq.token_ids[16], *chunk.seq.token_ids]
    assert batch.read_indices.tolist() == [0] and batch.read_slots.tolist() == [0]
    assert batch.logit_works == [0, 2] and batch.logit_indices.tolist() == [0, 23]
    assert batch.output_positions.tolist() == [1, 0]
    assert batch.attention.decode_lengths.tolist() == [21, 17]
    assert batch.attention.token_slots.tolist()[:2] == [2 * 16 + 4, 4 * 16]
    (described,) = batch.attention.chunks
    assert described.bidirectional == ((6, 15),) and described.blocks.tolist() == [5, 6]
    positions, delta = demo[1].positions(22, chunk.seq.request.spans)
    np.testing.assert_array_equal(batch.positions[:, 2:], positions)
    np.testing.assert_array_equal(
        slots.positions(2, 20, 4)[:, 2:], np.arange(22, 24) + [[delta]] * 3
    )


def test_block_tables_follow_the_plan(demo: tuple[Any, Any]) -> None:
    slots = SlotTable(1, 8, demo[1])
    for table in ((4,), (4, 5), (4, 5, 6), (9, 5, 6), (9, 5), (1, 2, 3, 7)):
        slots.update_blocks(0, table)
        assert slots.blocks[0, : len(table)].tolist() == list(table)


# ---- memory


def test_kv_cache_is_sized_as_asked_or_from_memory(demo: tuple[Any, Any]) -> None:
    language, layout = demo
    limits = RunnerLimits(max_model_len=100, max_num_seqs=3)
    runner = ModelRunner(language, layout, SdpaBackend(), limits, DictRows())
    assert runner.num_blocks == 3 * 7  # All that three sequences of 100 could use.
    assert runner.kv_cache_bytes == runner.num_blocks * 16 * 4 * 2 * 64 * 4
    asked = replace(limits, kv_cache_tokens=1000, block_size=64)
    runner = ModelRunner(language, layout, SdpaBackend(), asked, DictRows())
    assert (runner.num_blocks, runner.block_size) == (15, 64)
    runner.close()
    with pytest.raises(ConfigError, match="16, 32"):
        ModelRunner(language, layout, SdpaBackend(), replace(limits, block_size=24), DictRows())


def test_too_little_memory_is_said_at_start(
    demo: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_service.device.model_runner.cache_budget", lambda device: 1000)
    with pytest.raises(ConfigError, match="memory"):
        ModelRunner(*demo, SdpaBackend(), RunnerLimits(max_model_len=100), DictRows())


def test_control_groups_bound_what_is_available(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert available_memory(tmp_path) == 8000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("1000\n")
    (group / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) == 8000 * 1024
    (group / "memory.max").write_text("5000\n")
    assert available_memory(tmp_path) == 4000
