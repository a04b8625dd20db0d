"""The only room that owns device memory: weights, KV pages, what each slot sampled last.

``execute`` turns a StepPlan into a StepResult with one forward pass. It knows nothing of queues,
requests or text; what fails for one sequence is that sequence's error in the result.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from llm_service.device.attention import AttentionBackend, PageShape, active
from llm_service.device.batch import Batch, pack
from llm_service.device.logprobs import ABSENT, describe
from llm_service.device.memory import cache_budget, to_device
from llm_service.device.sampler import Drawn, Sampler
from llm_service.device.slots import SlotTable
from llm_service.policy.plan import Sampled, Segment, StepPlan, StepResult, Work
from llm_service.policy.rows import RowSource
from opticnerve.embeddings.ref import tensor_names
from opticnerve.errors import (
    ConfigError,
    DeviceLost,
    EmbeddingCorrupt,
    EngineFailure,
    InvalidRequest,
    OpticNerveError,
    device_is_lost,
)
from opticnerve.generation.values import PositionLogprobs
from opticnerve.models.family import Language, Layout

log = logging.getLogger(__name__)

# Rows of a prompt whose logits are held at once, for their log-probabilities.
PROMPT_LOGIT_ROWS = 256


@dataclass(frozen=True, slots=True)
class RunnerLimits:
    """What the runner makes room for. Zeros are worked out from the device and the backend."""

    max_model_len: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    kv_cache_tokens: int = 0
    block_size: int = 0


@dataclass(frozen=True, slots=True)
class _Overwrite:
    """Rows of an item, checked, that replace input embeddings of one work."""

    offset: int  # From the work's first token.
    rows: torch.Tensor  # [n, hidden_size]
    levels: dict[int, torch.Tensor]  # DeepStack, the same rows of each level.


@dataclass(frozen=True, slots=True)
class _Drawn:
    """What a step's logits became, on the host."""

    token_ids: list[int]
    failed: dict[int, Exception]  # By index in the batch's logit_works.
    logprobs: dict[int, PositionLogprobs]


class ModelRunner:
    """Runs ``language`` over paged keys and values. Used from one thread at a time."""

    def __init__(
        self,
        language: Language,
        layout: Layout,
        backend: AttentionBackend,
        limits: RunnerLimits,
        rows: RowSource,
    ) -> None:
        self._language = language
        self._backend = backend
        self._rows = rows
        self._tensor_names = tensor_names(layout.deepstack_levels)  # Of an embedding.
        self._device = torch.device(language.device)
        self.block_size = _block_size(backend, limits.block_size)
        shape = PageShape(
            language.num_layers, language.num_kv_heads, language.head_dim, self.block_size
        )
        self.num_blocks = _num_blocks(shape, limits, language)
        self.backend_name = backend.name
        self._shape = shape
        max_pages = -(-limits.max_model_len // self.block_size)
        self._slots = SlotTable(limits.max_num_seqs, max_pages, layout)
        self._sampler = Sampler(language.vocab_size, limits.max_num_seqs, self._device)
        self._last_tokens = torch.zeros(limits.max_num_seqs, dtype=torch.int64, device=self._device)
        backend.allocate(shape, self.num_blocks, language.dtype, self._device)

    # ---- life

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes that the KV pages take when all are in use."""
        return self.num_blocks * self._shape.bytes_per_block(_element_size(self._language.dtype))

    def close(self) -> None:
        """Gives the KV pages back. The runner is of no use afterwards."""
        self._backend.free()

    # ---- one step

    def execute(self, plan: StepPlan) -> StepResult:
        """One forward pass. Raises DeviceLost when the device is gone; any other exception is
        the step's, and leaves the runner fit for the next one."""
        try:
            with torch.inference_mode():
                return self._execute(plan)
        except RuntimeError as error:
            if not isinstance(error, torch.AcceleratorError) and not device_is_lost(error):
                raise
            raise DeviceLost(f"the device failed: {type(error).__name__}") from error

    def _execute(self, plan: StepPlan) -> StepResult:
        for slot in plan.freed_slots:
            self._slots.release(slot)
            self._sampler.release(slot)
        self._backend.copy_pages(plan.copies)
        errors: dict[int, Exception] = {}
        overwrites: dict[int, list[_Overwrite]] = {}
        works = [work for work in plan.works if self._enter(work, overwrites, errors)]
        sampled: dict[int, Sampled] = {}
        if works:
            batch = pack(works, self._slots, self.block_size)
            hidden, wanted = self._forward(batch, overwrites)
            drawn = self._draw(batch, wanted)
            prompts = self._prompt_logprobs(batch, hidden)
            sampled = self._collect(batch, drawn, prompts, errors)
        empty = {work.slot: Sampled(work.slot, ()) for work in plan.works if work.slot in errors}
        return StepResult(
            plan.step, tuple({**sampled, **empty}[work.slot] for work in plan.works), errors
        )

    def _enter(
        self,
        work: Work,
        overwrites: dict[int, list[_Overwrite]],
        errors: dict[int, Exception],
    ) -> bool:
        """Makes the slot ready for its work. False, with an error, if that sequence cannot run."""
        try:
            if work.num_logits > 1:
                raise EngineFailure("the model runner samples one token a step")
            if not self._slots.holds(work.slot, work.seq):
                self._admit(work)
            self._slots.update_pages(work.slot, work.block_table)
            if work.segments:
                overwrites[work.slot] = [self._overwrite(segment) for segment in work.segments]
        except torch.AcceleratorError:
            raise
        except OpticNerveError as error:
            errors[work.slot] = error
        except Exception as error:
            if device_is_lost(error):
                raise
            log.exception("request %s failed before its step", work.seq.request_id)
            errors[work.slot] = EngineFailure(
                f"the model runner could not take the request: {type(error).__name__}"
            )
        return work.slot not in errors

    def _admit(self, work: Work) -> None:
        seq = work.seq
        self._slots.admit(work.slot, seq)
        self._sampler.admit(
            work.slot, seq.request.sampling, seq.choice, seq.token_ids, seq.num_prompt
        )

    # ---- embeddings

    def _overwrite(self, segment: Segment) -> _Overwrite:
        tensors = self._rows.get(key := segment.item_key)
        try:
            slices = {
                level: self._slice(tensors[name], segment)
                for level, name in enumerate(self._tensor_names, start=-1)
                if name in tensors
            }
            if -1 not in slices or len(slices) != len(tensors):
                raise EmbeddingCorrupt("an embedding has no rows, or unknown levels", param=key)
        except EmbeddingCorrupt:
            self._rows.discard(key)
            raise
        return _Overwrite(segment.chunk_offset, slices.pop(-1), slices)

    def _slice(self, tensor: torch.Tensor, segment: Segment) -> torch.Tensor:
        """The segment's rows, on the device, in the model's dtype. Raises EmbeddingCorrupt."""
        width = self._language.hidden_size
        last = segment.row_start + segment.num_rows
        fits = tensor.ndim == 2 and tensor.shape[1] == width and tensor.shape[0] >= last
        if not fits or not tensor.is_floating_point():
            raise EmbeddingCorrupt(
                f"an embedding of shape {tuple(tensor.shape)}, {tensor.dtype}, came where rows up "
                f"to {last} of width {width} were wanted",
                param=segment.item_key,
            )
        rows = tensor[segment.row_start : last]  # Finite: whoever brought them has looked.
        return rows.to(self._device, self._language.dtype, non_blocking=True)

    def _embed(
        self, batch: Batch, overwrites: dict[int, list[_Overwrite]]
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Input embeddings [T, hidden_size], and for each DeepStack level (indices, rows)."""
        ids = self._to_device(batch.token_ids)
        if len(batch.read_slots):
            last = self._last_tokens[self._to_device(batch.read_slots)]
            whole = len(batch.read_rows) == batch.num_tokens
            ids = last if whole else ids.index_copy(0, self._to_device(batch.read_rows), last)
        embeds = self._language.embed(ids)
        if not overwrites:
            return embeds, []
        found: dict[int, list[tuple[int, torch.Tensor]]] = {}
        for work, first in zip(batch.works, batch.first_rows, strict=True):
            for each in overwrites.get(work.slot, ()):
                row = first + each.offset
                embeds[row : row + len(each.rows)] = each.rows
                for level, rows in each.levels.items():
                    found.setdefault(level, []).append((row, rows))
        return embeds, [self._level(found.get(i, [])) for i in range(max(found, default=-1) + 1)]

    def _level(
        self, parts: Sequence[tuple[int, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not parts:
            empty = torch.empty(0, dtype=torch.int64, device=self._device)
            return empty, torch.empty((0, self._language.hidden_size), device=self._device)
        indices = np.concatenate([np.arange(row, row + len(rows)) for row, rows in parts])
        return self._to_device(indices), torch.cat([rows for _, rows in parts])

    # ---- forward

    def _forward(
        self, batch: Batch, overwrites: dict[int, list[_Overwrite]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states: of every token where prompt log-probabilities want them, and of the
        batch's logit_rows."""
        embeds, deepstack = self._embed(batch, overwrites)
        self._backend.prepare(batch.attention)
        positions = self._to_device(batch.positions)
        rows = None
        if len(batch.logit_rows) != batch.num_tokens:
            rows = self._to_device(batch.logit_rows)
        whole = any(work.prompt_logprobs for work in batch.works)
        asked = None if whole else rows
        with active(self._backend):
            hidden = self._language.forward(embeds, positions, deepstack, asked)
        return hidden, hidden[rows] if whole and rows is not None else hidden

    def _to_device(self, array: NDArray[np.int64]) -> torch.Tensor:
        return to_device(array, self._device)

    # ---- tokens

    def _draw(self, batch: Batch, hidden: torch.Tensor) -> _Drawn:
        """``hidden``: of the batch's logit_rows."""
        if not batch.logit_works:
            return _Drawn([], {}, {})
        logits = self._language.logits(hidden)
        drawn = self._sampler.sample(logits, batch.logit_slots, batch.output_positions)
        slots = self._to_device(batch.logit_slots)
        self._last_tokens.index_copy_(0, slots, drawn.token_ids)
        token_ids, best, left = _to_host(drawn)
        finite = [math.isfinite(value) for value in best]
        failed: dict[int, Exception] = {}
        if not all(finite):
            failed |= self._not_finite(batch, finite)
        if not all(left):
            nothing = InvalidRequest("the request's token constraints leave no token to choose")
            failed |= {i: nothing for i, ok in enumerate(left) if not ok and i not in failed}
        self._sampler.observe(batch.logit_slots, token_ids)
        return _Drawn(token_ids, failed, self._token_logprobs(batch, logits, drawn.token_ids))

    def _not_finite(self, batch: Batch, finite: list[bool]) -> dict[int, Exception]:
        """Keeps what is broken in one sequence from whoever gets its pages next."""
        failed: dict[int, Exception] = {}
        for i, ok in enumerate(finite):
            if not ok:
                work = batch.works[batch.logit_works[i]]
                log.error("request %s: the model's output is not finite", work.seq.request_id)
                self._backend.scrub(work.block_table)
                failed[i] = EngineFailure("the model's output for this request is not finite")
        return failed

    def _token_logprobs(
        self, batch: Batch, logits: torch.Tensor, token_ids: torch.Tensor
    ) -> dict[int, PositionLogprobs]:
        counts: dict[int, int] = {}
        for i, index in enumerate(batch.logit_works):
            wanted = batch.works[index].seq.request.sampling.logprobs
            if wanted is not None:
                counts[i] = wanted
        if not counts:
            return {}
        rows = self._to_device(np.array(list(counts), dtype=np.int64))
        found = describe(logits[rows], token_ids[rows], list(counts.values()))
        return dict(zip(counts, found, strict=True))

    def _prompt_logprobs(
        self, batch: Batch, hidden: torch.Tensor
    ) -> dict[int, tuple[PositionLogprobs, ...]]:
        """By slot. A placeholder has none: nobody predicts it."""
        return {
            work.slot: tuple(self._chunk_logprobs(work, hidden[first:]))
            for work, first in zip(batch.works, batch.first_rows, strict=True)
            if work.prompt_logprobs
        }

    def _chunk_logprobs(self, work: Work, hidden: torch.Tensor) -> Iterable[PositionLogprobs]:
        """Of the prompt's tokens start + 1 to start + num_tokens."""
        seq = work.seq
        targets = seq.token_ids[: seq.num_prompt][work.start + 1 : work.start + work.num_tokens + 1]
        absent = self._slots.is_placeholder(work.slot, seq)[work.start + 1 :]
        count = seq.request.sampling.prompt_logprobs or 0
        for begin in range(0, len(targets), PROMPT_LOGIT_ROWS):
            piece = targets[begin : begin + PROMPT_LOGIT_ROWS]
            logits = self._language.logits(hidden[begin : begin + len(piece)])
            ids = self._to_device(np.array(piece, dtype=np.int64))
            found = describe(logits, ids, [count] * len(piece))
            hidden_ones = absent[begin : begin + len(piece)].tolist()
            yield from (
                ABSENT if hide else each for hide, each in zip(hidden_ones, found, strict=True)
            )

    def _collect(
        self,
        batch: Batch,
        drawn: _Drawn,
        prompts: dict[int, tuple[PositionLogprobs, ...]],
        errors: dict[int, Exception],
    ) -> dict[int, Sampled]:
        """One Sampled a work, by slot; what failed goes to ``errors``."""
        sampled: dict[int, Sampled] = {}
        for i, (index, token) in enumerate(zip(batch.logit_works, drawn.token_ids, strict=True)):
            slot = batch.works[index].slot
            if i in drawn.failed:
                errors[slot] = drawn.failed[i]
                continue
            logprobs = (drawn.logprobs[i],) if i in drawn.logprobs else ()
            sampled[slot] = Sampled(slot, (token,), logprobs, prompts.get(slot, ()))
        for work in batch.works:
            if not work.num_logits:
                sampled[work.slot] = Sampled(work.slot, (), (), prompts.get(work.slot, ()))
        return sampled


def _to_host(drawn: Drawn) -> tuple[list[int], list[float], list[bool]]:
    """Tokens, best raw logits, and whether masks left anything; the step's one wait for the
    device. An id is exact in fp64."""
    columns = [drawn.token_ids.double(), drawn.best.double()]
    if drawn.best_left is not None:
        columns.append(drawn.best_left.double())
    token_ids, best, *left = torch.stack(columns).tolist()
    possible = [value > -math.inf for value in left[0]] if left else [True] * len(best)
    return [int(token) for token in token_ids], best, possible


def _block_size(backend: AttentionBackend, wanted: int) -> int:
    if wanted and wanted not in backend.page_sizes:
        sizes = ", ".join(map(str, backend.page_sizes))
        raise ConfigError(
            f"the {backend.name} backend has no pages of {wanted} tokens, but {sizes}"
        )
    return wanted or backend.page_sizes[0]


def _element_size(dtype: torch.dtype) -> int:
    return int(dtype.itemsize)


def _num_blocks(shape: PageShape, limits: RunnerLimits, language: Language) -> int:
    """As asked; else what memory holds, up to what all slots could ever use."""
    useful = limits.max_num_seqs * -(-limits.max_model_len // shape.block_size)
    if limits.kv_cache_tokens:
        return max(limits.kv_cache_tokens // shape.block_size, 1)
    block_bytes = shape.bytes_per_block(_element_size(language.dtype))
    fitting = cache_budget(torch.device(language.device)) // block_bytes
    if fitting * shape.block_size < min(limits.max_model_len, 512):
        raise ConfigError(
            f"memory is left for {fitting * shape.block_size} tokens of KV cache; free some, "
            "or take a smaller model or --max-model-len"
        )
    return min(fitting, useful)
