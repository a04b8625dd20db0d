"""Which tokens the grammars of running sequences allow next, by slot.

A thread fills a step's masks while the model runs: ``prepare`` starts it, ``apply`` waits for it.
Where a grammar may end, every id that ends the request's choices is allowed. A slot's state depends
on the grammar and the output alone, so a sequence that gets a slot again replays its output.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask_par
from numpy.typing import NDArray

from llm_service.device.memory import to_device
from opticnerve.errors import InvalidRequest, OpticNerveError
from opticnerve.generation.grammars import Grammar, grammar_error

WORD = 32  # Tokens in one word of a mask.
Words = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class GrammarEnd:
    """The end of a choice by its grammar: nothing can follow the output, or ``error`` occurred.
    ``drawn``: whether the token drawn in this step belongs to the output; False if the grammar had
    ended before."""

    error: OpticNerveError | None = None
    drawn: bool = True


@dataclass(slots=True)
class Place:
    """Where one sequence is in its grammar. ``end``: set once it cannot go on."""

    matcher: LLMatcher
    ending_ids: frozenset[int]
    ending: Words  # ``ending_ids`` as a mask.
    end: GrammarEnd | None = None

    def advance(self, token_ids: Sequence[int]) -> None:
        """Consumes the next tokens of the output, in a call each: one may take milliseconds, and
        other threads run in between."""
        if not all(self.matcher.consume_token(token) for token in token_ids):
            self.end = GrammarEnd(grammar_error(self.matcher.get_error()))
        elif self.matcher.is_stopped():
            self.end = GrammarEnd()

    def complete(self, mask: Words, eos: Words) -> None:
        """Replaces the ids that end an answer in the library's mask (``eos``) by the request's
        ending ids, where the output may end."""
        if self.matcher.is_error():
            self.end = GrammarEnd(grammar_error(self.matcher.get_error()), drawn=False)
        elif self.matcher.is_accepting():
            mask &= ~eos
            if mask.any():
                mask |= self.ending
            else:
                self.end = GrammarEnd(drawn=False)


class GrammarMasks:
    """The places of all slots whose requests have a grammar, and a step's masks."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._places: dict[int, Place] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._filling: Future[None] | None = None
        self._rows: list[int] = []  # Rows of the step's batch that have a mask.
        self._executor: LLExecutor | None = None  # Starts threads, so it is made when needed.
        self._masks: Words = np.zeros((0, 0), dtype=np.int32)  # Rows for the largest batch yet.
        self._eos: Words = self._masks[:0]
        self._bits = to_device(2 ** np.arange(8, dtype=np.uint8), device)  # The bits of a byte.

    # ---- slots

    def admit(
        self, slot: int, grammar: Grammar, ending_ids: Iterable[int], output_ids: list[int]
    ) -> None:
        """Assigns the slot to a sequence. Raises InvalidRequest if its output does not follow the
        grammar."""
        self._wait()
        if self._executor is None:
            self._allocate(grammar.vocabulary)
        ids = frozenset(ending_ids)
        place = Place(grammar.matcher.deep_copy(), ids, self._bits_of(ids))
        place.advance(output_ids)
        if place.end is not None and place.end.error is not None:
            raise InvalidRequest("the output so far does not follow the grammar", param="outputs")
        if place.end is not None:
            place.end = GrammarEnd(drawn=False)
        self._places[slot] = place

    def release(self, slot: int) -> None:
        self._places.pop(slot, None)

    def _allocate(self, vocabulary: LLTokenizer) -> None:
        self._executor = LLExecutor()
        self._masks = np.zeros((1, -(-vocabulary.vocab_size // WORD)), dtype=np.int32)
        self._eos = self._bits_of(vocabulary.eos_tokens)

    def _bits_of(self, ids: Iterable[int]) -> Words:
        """A mask of ``ids``, as far as the vocabulary has them."""
        width = self._masks.shape[1]
        bits = np.zeros(width * WORD, dtype=np.uint8)
        bits[[token for token in ids if token < len(bits)]] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    # ---- one step

    def prepare(self, slots: NDArray[np.int64]) -> None:
        """Starts to fill the masks for a batch: ``slots`` has one for each row of its logits."""
        self._wait()
        places = {row: self._places.get(slot) for row, slot in enumerate(slots.tolist())}
        going_on = {row: place for row, place in places.items() if place and place.end is None}
        self._rows = [*going_on]
        if len(going_on) > len(self._masks):
            self._masks = np.zeros((len(going_on), self._masks.shape[1]), dtype=np.int32)
        if going_on:
            self._filling = self._thread.submit(self._fill, [*going_on.values()])

    def _fill(self, places: list[Place]) -> None:
        assert self._executor is not None
        pairs = [(place.matcher, number) for number, place in enumerate(places)]
        fill_next_token_bitmask_par(self._executor, pairs, self._masks)
        for mask, place in zip(self._masks, places, strict=False):
            place.complete(mask, self._eos)

    def _wait(self) -> None:
        filling, self._filling = self._filling, None
        if filling is not None:
            filling.result()

    def apply(self, logits: torch.Tensor) -> None:
        """Sets the tokens that no grammar allows to minus infinity; ``logits`` fp32 [rows, vocab],
        with a row for each slot of ``prepare``."""
        self._wait()
        if not self._rows:
            return
        masks = to_device(self._masks[: len(self._rows)].view(np.uint8), self._device)
        forbidden = (masks.unsqueeze(-1) & self._bits).eq(0).flatten(1)[:, : self._vocab_size]
        known = forbidden.shape[1]
        if len(self._rows) == len(logits):
            logits[:, :known].masked_fill_(forbidden, -torch.inf)
            logits[:, known:] = -torch.inf
            return
        rows = to_device(np.array(self._rows, dtype=np.int64), self._device)
        part = logits[rows]
        part[:, :known].masked_fill_(forbidden, -torch.inf)
        part[:, known:] = -torch.inf
        logits[rows] = part

    def observe(self, slots: NDArray[np.int64], token_ids: list[int]) -> dict[int, GrammarEnd]:
        """Records the tokens that were drawn; returns the ends of grammars, by slot."""
        ends: dict[int, GrammarEnd] = {}
        for slot, token in zip(slots.tolist(), token_ids, strict=True):
            place = self._places.get(slot)
            if place is None:
                continue
            if place.end is None and token not in place.ending_ids:
                place.advance([token])
            if place.end is not None:
                ends[slot] = place.end
        return ends
