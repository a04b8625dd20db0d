"""Owns the device memory: weights, KV blocks, the last token of each slot.

``execute`` turns a StepPlan into WorkResults with one forward pass. A sequence's own error is
returned in its result.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from llm_service.device.attention.base import AttentionBackend, BlockShape, active
from llm_service.device.batch import Batch, SlotTable, pack
from llm_service.device.item_rows import ItemRows, Overwrite
from llm_service.device.memory import cache_budget, to_device
from llm_service.device.sampler import Drawn, Sampler, position_logprobs
from llm_service.policy.row_source import RowSource
from llm_service.policy.step_plan import StepPlan, Work, WorkResult
from opticnerve.errors import (
    ConfigError,
    DeviceLost,
    EngineFailure,
    InvalidRequest,
    OpticNerveError,
    device_is_lost,
)
from opticnerve.generation.values import PositionLogprobs
from opticnerve.models.family import LanguageModel, Layout

log = logging.getLogger(__name__)

# Prompt tokens whose logits are held at once, for prompt log-probabilities.
PROMPT_LOGIT_ROWS = 256


@dataclass(frozen=True, slots=True)
class RunnerLimits:
    """Sizes of the runner's buffers. 0: chosen from the device's memory, or by the backend."""

    max_model_len: int
    max_num_seqs: int = 64
    kv_cache_tokens: int = 0
    block_size: int = 0


class ModelRunner:
    """Runs ``language`` over paged keys and values. Used from one thread at a time."""

    def __init__(
        self,
        language: LanguageModel,
        layout: Layout,
        backend: AttentionBackend,
        limits: RunnerLimits,
        rows: RowSource,
    ) -> None:
        self._language = language
        self._backend = backend
        self._rows = ItemRows(rows, language, layout.deepstack_levels)
        self._device = torch.device(language.device)
        self.block_size = _block_size(backend, limits.block_size)
        shape = BlockShape(
            language.num_layers, language.num_kv_heads, language.head_dim, self.block_size
        )
        self.num_blocks = _num_blocks(shape, limits, language)
        self.backend_name = backend.name
        self._shape = shape
        max_blocks = -(-limits.max_model_len // self.block_size)
        self._slots = SlotTable(limits.max_num_seqs, max_blocks, layout)
        self._sampler = Sampler(language.vocab_size, limits.max_num_seqs, self._device)
        self._last_tokens = torch.zeros(limits.max_num_seqs, dtype=torch.int64, device=self._device)
        backend.allocate(shape, self.num_blocks, language.dtype, self._device, language.layers)

    # ---- life

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes that the KV blocks take when all are in use."""
        return self.num_blocks * self._shape.bytes_per_block(self._language.dtype.itemsize)

    def close(self) -> None:
        """Frees the KV blocks; the runner cannot be used afterwards."""
        self._backend.free()

    # ---- one step

    def execute(self, plan: StepPlan) -> list[WorkResult]:
        """One forward pass. Raises DeviceLost if the device is gone; after any other exception the
        next step can run."""
        try:
            with torch.inference_mode():
                return self._execute(plan)
        except RuntimeError as error:
            if not isinstance(error, torch.AcceleratorError) and not device_is_lost(error):
                raise
            raise DeviceLost(f"the device failed: {type(error).__name__}") from error

    def _execute(self, plan: StepPlan) -> list[WorkResult]:
        for slot in plan.freed_slots:
            self._slots.release(slot)
            self._sampler.release(slot)
        self._backend.copy_blocks(plan.copies)
        results: dict[int, WorkResult] = {}
        overwrites: dict[int, list[Overwrite]] = {}
        works = []
        for work in plan.works:
            error = self._enter(work, overwrites)
            if error is None:
                works.append(work)
            else:
                results[work.slot] = WorkResult(error=error)
        if works:
            batch = pack(works, self._slots, self.block_size)
            self._sampler.prepare(batch.logit_slots)
            results |= self._results(batch, *self._forward(batch, overwrites))
        return [results[work.slot] for work in plan.works]

    def _enter(self, work: Work, overwrites: dict[int, list[Overwrite]]) -> Exception | None:
        """Prepares the work's slot and reads its rows; returns the error if it cannot run."""
        try:
            if not self._slots.holds(work.slot, work.seq):
                self._admit(work)
            self._slots.update_blocks(work.slot, work.block_table)
            if work.segments:
                overwrites[work.slot] = [self._rows.read(segment) for segment in work.segments]
        except torch.AcceleratorError:
            raise
        except OpticNerveError as error:
            return error
        except Exception as error:
            if device_is_lost(error):
                raise
            log.exception("request %s failed before its step", work.seq.request_id)
            return EngineFailure(
                f"the model runner could not take the request: {type(error).__name__}"
            )
        return None

    def _admit(self, work: Work) -> None:
        seq = work.seq
        self._slots.admit(work.slot, seq)
        self._sampler.admit(
            work.slot,
            seq.request.sampling,
            seq.choice,
            seq.token_ids,
            seq.num_prompt,
            seq.generation.grammar,
        )

    # ---- forward

    def _forward(
        self, batch: Batch, overwrites: dict[int, list[Overwrite]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden states, those at the batch's logit_indices). The first are of every token if
        prompt log-probabilities are requested, otherwise the same as the second."""
        embeds = self._language.embed(self._token_ids(batch))
        deepstack = self._rows.write(embeds, batch, overwrites) if overwrites else []
        self._backend.prepare(batch.attention)
        positions = to_device(batch.positions, self._device)
        rows = None
        if len(batch.logit_indices) != batch.num_tokens:
            rows = to_device(batch.logit_indices, self._device)
        whole = any(work.prompt_logprobs for work in batch.works)
        asked = None if whole else rows
        with active(self._backend):
            hidden = self._language.forward(embeds, positions, deepstack, asked)
        return hidden, hidden[rows] if whole and rows is not None else hidden

    def _token_ids(self, batch: Batch) -> torch.Tensor:
        """int64 [T]: the plan's token ids, with those that are still on the device filled in."""
        ids = to_device(batch.token_ids, self._device)
        if not len(batch.read_slots):
            return ids
        last = self._last_tokens[to_device(batch.read_slots, self._device)]
        if len(batch.read_indices) == batch.num_tokens:
            return last
        return ids.index_copy(0, to_device(batch.read_indices, self._device), last)

    # ---- tokens

    def _results(
        self, batch: Batch, hidden: torch.Tensor, wanted: torch.Tensor
    ) -> dict[int, WorkResult]:
        """One for each work, by slot. ``hidden``: of every token if prompt log-probabilities are
        requested; ``wanted``: of the batch's logit_indices."""
        results = self._sample(batch, wanted) if batch.logit_works else {}
        for work, first in zip(batch.works, batch.first_indices, strict=True):
            if work.slot not in results:
                results[work.slot] = WorkResult()
            if work.prompt_logprobs and results[work.slot].error is None:
                found = tuple(self._prompt_logprobs(work, hidden[first:]))
                results[work.slot] = replace(results[work.slot], prompt_logprobs=found)
        return results

    def _sample(self, batch: Batch, hidden: torch.Tensor) -> dict[int, WorkResult]:
        logits = self._language.logits(hidden)
        drawn = self._sampler.sample(logits, batch.logit_slots, batch.output_positions)
        slots = to_device(batch.logit_slots, self._device)
        self._last_tokens.index_copy_(0, slots, drawn.token_ids)
        token_ids, best, possible = _to_host(drawn)
        ends = self._sampler.observe(batch.logit_slots, token_ids)
        logprobs = self._token_logprobs(batch, logits, drawn.token_ids)
        results: dict[int, WorkResult] = {}
        for i, index in enumerate(batch.logit_works):
            work = batch.works[index]
            end = ends.get(work.slot)
            if not math.isfinite(best[i]):
                results[work.slot] = WorkResult(error=self._not_finite(work))
            elif end is not None and not end.drawn:
                results[work.slot] = WorkResult(error=end.error, ends_grammar=end.error is None)
            elif not possible[i]:
                nothing = InvalidRequest(
                    "the request's token constraints exclude every token; relax "
                    "allowed_token_ids, bad_words, logit_bias or the grammar"
                )
                results[work.slot] = WorkResult(error=nothing)
            elif end is not None and end.error is not None:
                results[work.slot] = WorkResult(error=end.error)
            else:
                results[work.slot] = WorkResult(
                    token_ids[i], logprobs.get(i), ends_grammar=end is not None
                )
        return results

    def _not_finite(self, work: Work) -> EngineFailure:
        """The error of a work whose logits are not finite. Scrubs its blocks, so that their values
        do not spread to the next sequence."""
        log.error("request %s: the model's output is not finite", work.seq.request_id)
        self._backend.scrub(work.block_table)
        return EngineFailure("the model's output for this request is not finite")

    def _token_logprobs(
        self, batch: Batch, logits: torch.Tensor, token_ids: torch.Tensor
    ) -> dict[int, PositionLogprobs]:
        """Requested log-probabilities, by index in the batch's logit_works."""
        counts: dict[int, int] = {}
        for i, index in enumerate(batch.logit_works):
            wanted = batch.works[index].seq.request.sampling.logprobs
            if wanted is not None:
                counts[i] = wanted
        if not counts:
            return {}
        rows = to_device(np.array(list(counts), dtype=np.int64), self._device)
        found = position_logprobs(logits[rows], token_ids[rows], list(counts.values()))
        return dict(zip(counts, found, strict=True))

    def _prompt_logprobs(self, work: Work, hidden: torch.Tensor) -> Iterable[PositionLogprobs]:
        """One entry for each prompt token from start + 1 to start + num_tokens; empty for
        placeholders, which the model does not predict. ``hidden``: from the work's first token."""
        seq = work.seq
        targets = seq.token_ids[: seq.num_prompt][work.start + 1 : work.start + work.num_tokens + 1]
        placeholders = self._slots.is_placeholder(work.slot, seq)[work.start + 1 :].tolist()
        count = seq.request.sampling.prompt_logprobs or 0
        for begin in range(0, len(targets), PROMPT_LOGIT_ROWS):
            piece = targets[begin : begin + PROMPT_LOGIT_ROWS]
            logits = self._language.logits(hidden[begin : begin + len(piece)])
            ids = to_device(np.array(piece, dtype=np.int64), self._device)
            found = position_logprobs(logits, ids, [count] * len(piece))
            for absent, each in zip(placeholders[begin:], found, strict=False):
                yield PositionLogprobs() if absent else each


def _to_host(drawn: Drawn) -> tuple[list[int], list[float], list[bool]]:
    """(tokens, best raw logits, whether masks left any token): the step's only wait for the device.
    Token ids are exact in fp64."""
    columns = [drawn.token_ids.double(), drawn.best.double()]
    if drawn.best_left is not None:
        columns.append(drawn.best_left.double())
    token_ids, best, *left = torch.stack(columns).tolist()
    possible = [value > -math.inf for value in left[0]] if left else [True] * len(best)
    return [int(token) for token in token_ids], best, possible


def _block_size(backend: AttentionBackend, wanted: int) -> int:
    if wanted and wanted not in backend.block_sizes:
        sizes = ", ".join(map(str, backend.block_sizes))
        raise ConfigError(
            f"the {backend.name} backend has no blocks of {wanted} tokens; use one of {sizes}"
        )
    return wanted or backend.block_sizes[0]


def _num_blocks(shape: BlockShape, limits: RunnerLimits, language: LanguageModel) -> int:
    """The number of KV blocks: as kv_cache_tokens says, or as many as fit in memory, up to what all
    slots could use. Raises ConfigError if memory is too small."""
    useful = limits.max_num_seqs * -(-limits.max_model_len // shape.block_size)
    if limits.kv_cache_tokens:
        return max(limits.kv_cache_tokens // shape.block_size, 1)
    block_bytes = shape.bytes_per_block(language.dtype.itemsize)
    fitting = cache_budget(torch.device(language.device)) // block_bytes
    if fitting * shape.block_size < min(limits.max_model_len, 512):
        raise ConfigError(
            f"there is memory left for only {fitting * shape.block_size} tokens of KV cache; free "
            "some, use a smaller model, or lower --max-model-len"
        )
    return min(fitting, useful)
