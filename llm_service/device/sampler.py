"""From logits to tokens, and their log-probabilities, for a whole batch at once.

Each slot's settings are stored when it is admitted; a step applies only what some sequence of its
batch asks for, and a batch of plain greedy sequences is one ``max``. The order, for each row:

    1. repetition penalty over prompt and output (divides positive logits, multiplies the others),
       frequency and presence penalties over output alone
    2. logit_bias
    3. masks: allowed_token_ids, bad_words, before min_tokens the ids that would end the choice, and
       what the grammar does not allow
    4. temperature; 0 takes the most likely token here
    5. top_k, then top_p over what is left, then min_p
    6. one uniform number, a function of (seed, choice, output position), against the cumulative
       probabilities in the order of the vocabulary

All tokens that tie with the last one that top_k or top_p keeps are kept, so that the result depends
on the row alone and not on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag

import numpy as np
import torch
from numpy.typing import NDArray

from llm_service.device.constraints import Constraints, constrains
from llm_service.device.grammar_masks import GrammarEnd, GrammarMasks
from llm_service.device.memory import to_device
from opticnerve.generation.grammars import Grammar
from opticnerve.generation.values import Logprob, PositionLogprobs, Sampling

# Temperatures below this are greedy: dividing by them overflows, and only the best is likely.
MIN_TEMPERATURE = 1e-5
# Candidates that nearly always hold the top_p mass of a large vocabulary.
NUCLEUS_CANDIDATES = 1024
PHILOX_WORDS = 4  # Numbers that Philox makes per counter value.


class Feature(IntFlag):
    """What a slot needs of the sampler beyond the best token."""

    NONE = 0
    RANDOM = 1
    TOP_K = 2
    TOP_P = 4
    MIN_P = 8
    PENALTIES = 16
    CONSTRAINTS = 32  # logit_bias, allowed_token_ids, bad_words or min_tokens.
    GRAMMAR = 64


REWRITES = Feature.PENALTIES | Feature.CONSTRAINTS | Feature.GRAMMAR


def features_of(params: Sampling) -> Feature:
    """The features that ``params`` needs."""
    asked = Feature.NONE
    if params.temperature >= MIN_TEMPERATURE:
        asked |= Feature.RANDOM
        asked |= Feature.TOP_K if params.top_k > 0 else Feature.NONE
        asked |= Feature.TOP_P if params.top_p < 1.0 else Feature.NONE
        asked |= Feature.MIN_P if params.min_p > 0.0 else Feature.NONE
    if params.repetition_penalty != 1.0 or params.frequency_penalty or params.presence_penalty:
        asked |= Feature.PENALTIES
    asked |= Feature.CONSTRAINTS if constrains(params) else Feature.NONE
    asked |= Feature.GRAMMAR if params.grammar else Feature.NONE
    return asked


@dataclass(frozen=True, slots=True)
class Drawn:
    """Sampled tokens, one value per row. The host copies all three tensors at once, so that it
    waits for the device once per step."""

    token_ids: torch.Tensor  # int64
    best: torch.Tensor  # fp32: the best raw logit; not finite if any logit is NaN or +inf.
    best_left: torch.Tensor | None  # fp32: the best after masks; -inf: none left; None: no masks.


class Sampler:
    """Owns the per-slot state of sampling, on the host and on the device."""

    def __init__(self, vocab_size: int, num_slots: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._num_slots = num_slots
        self._device = device
        self._features = np.zeros(num_slots, dtype=np.int64)
        self._numbers = np.zeros((num_slots, 7), dtype=np.float32)
        self._uniforms = UniformCache(num_slots)
        self._constraints = Constraints(vocab_size, device)
        self._grammars = GrammarMasks(vocab_size, device)
        self._prompt_seen: torch.Tensor | None = None  # bool [slots, vocab]
        self._output_counts: torch.Tensor | None = None  # fp32 [slots, vocab]
        self._rewritten: torch.Tensor | None = None  # fp32 [rows of the largest batch yet, vocab]

    # ---- slots

    def admit(
        self,
        slot: int,
        params: Sampling,
        choice: int,
        token_ids: list[int],
        num_prompt: int,
        grammar: Grammar | None = None,
    ) -> None:
        """Assigns the slot to a sequence; ``token_ids`` is its prompt, then its output. Raises
        InvalidRequest if the output does not follow the grammar."""
        self.release(slot)
        asked = features_of(params)
        self._features[slot] = asked
        if asked == Feature.NONE:
            return
        self._numbers[slot] = (
            params.temperature if asked & Feature.RANDOM else 1.0,
            params.top_k if params.top_k > 0 else self._vocab_size,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
        )
        if asked & Feature.RANDOM:
            self._uniforms.admit(slot, params.seed, choice)
        if asked & Feature.CONSTRAINTS:
            self._constraints.admit(slot, params, token_ids)
        if grammar is not None:
            self._grammars.admit(slot, grammar, params.ending_ids, token_ids[num_prompt:])
        if asked & Feature.PENALTIES:
            self._count(slot, token_ids, num_prompt)

    def release(self, slot: int) -> None:
        """Forgets the slot's sequence."""
        self._features[slot] = Feature.NONE
        self._constraints.release(slot)
        self._grammars.release(slot)

    def _count(self, slot: int, token_ids: list[int], num_prompt: int) -> None:
        if self._prompt_seen is None or self._output_counts is None:
            size = (self._num_slots, self._vocab_size)
            self._prompt_seen = torch.zeros(size, dtype=torch.bool, device=self._device)
            self._output_counts = torch.zeros(size, dtype=torch.float32, device=self._device)
        seen = np.unique(np.array(token_ids[:num_prompt], dtype=np.int64))
        counted = np.bincount(
            np.array(token_ids[num_prompt:], dtype=np.int64), minlength=self._vocab_size
        )
        self._prompt_seen[slot] = False
        self._prompt_seen[slot, to_device(seen, self._device)] = True
        self._output_counts[slot] = to_device(counted.astype(np.float32), self._device)

    # ---- one step

    def prepare(self, slots: NDArray[np.int64]) -> None:
        """Starts what ``sample`` needs for a batch of ``slots``; called before the forward pass."""
        self._grammars.prepare(slots)

    def sample(
        self, logits: torch.Tensor, slots: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> Drawn:
        """Draws a token for each row. ``logits``: fp32 [rows, vocab], not changed. ``slots``: as in
        ``prepare``; a slot has at most one row. ``positions``: output position of each row."""
        best, greedy = logits.max(dim=-1)
        asked = Feature(int(np.bitwise_or.reduce(self._features[slots], initial=0)))
        if asked == Feature.NONE:
            return Drawn(greedy, best, None)
        best_left = None
        if asked & REWRITES:
            logits = self._copied(logits)
            if asked & Feature.PENALTIES:
                logits = self._penalise(logits, slots)
            if asked & Feature.CONSTRAINTS:
                self._constraints.apply(logits, slots, positions)
            if asked & Feature.GRAMMAR:
                self._grammars.apply(logits)
            best_left, greedy = logits.max(dim=-1)
        tokens = greedy
        if asked & Feature.RANDOM:
            tokens = self._draw(logits, greedy, slots, positions, asked)
        if asked & Feature.PENALTIES:
            self._count_drawn(tokens, slots)
        return Drawn(tokens, best, best_left)

    def observe(self, slots: NDArray[np.int64], token_ids: list[int]) -> dict[int, GrammarEnd]:
        """Records the sampled tokens, for bad words of several tokens and grammars; returns the
        ends of grammars, by slot."""
        self._constraints.observe(slots, token_ids)
        return self._grammars.observe(slots, token_ids)

    def _copied(self, logits: torch.Tensor) -> torch.Tensor:
        """A copy of ``logits`` in a buffer that is reused: memory of this size, allocated at each
        step, would be returned to the system and faulted in again."""
        if self._rewritten is None or len(self._rewritten) < len(logits):
            self._rewritten = torch.empty_like(logits)
        return self._rewritten[: len(logits)].copy_(logits)

    def _with(self, slots: NDArray[np.int64], feature: Feature) -> list[int]:
        """Rows whose slots ask for ``feature``."""
        rows: list[int] = np.flatnonzero(self._features[slots] & feature).tolist()
        return rows

    def _penalise(self, logits: torch.Tensor, slots: NDArray[np.int64]) -> torch.Tensor:
        assert self._prompt_seen is not None and self._output_counts is not None
        rows = np.array(self._with(slots, Feature.PENALTIES), dtype=np.int64)
        where, of = to_device(rows, self._device), to_device(slots[rows], self._device)
        numbers = to_device(self._numbers[slots[rows], 4:], self._device)
        repetition, frequency, presence = (column.unsqueeze(1) for column in numbers.unbind(1))
        counts = self._output_counts[of]
        seen = self._prompt_seen[of] | (counts > 0)
        part = logits[where]
        repeated = torch.where(part > 0, part / repetition, part * repetition)
        part = torch.where(seen, repeated, part)
        part -= frequency * counts + presence * (counts > 0)
        logits[where] = part
        return logits

    def _draw(
        self,
        logits: torch.Tensor,
        greedy: torch.Tensor,
        slots: NDArray[np.int64],
        positions: NDArray[np.int64],
        asked: Feature,
    ) -> torch.Tensor:
        rows = np.array(self._with(slots, Feature.RANDOM), dtype=np.int64)
        if len(rows) < len(slots):
            where = to_device(rows, self._device)
            part = self._draw(logits[where], greedy[where], slots[rows], positions[rows], asked)
            return greedy.index_copy(0, where, part)
        numbers = to_device(self._numbers[slots, :4], self._device)
        temperature, top_k, top_p, min_p = (column.unsqueeze(1) for column in numbers.unbind(1))
        scaled = logits / temperature
        if asked & Feature.TOP_K:
            limits = self._numbers[slots, 1]
            most = int(limits[limits < self._vocab_size].max(initial=1))
            scaled = keep_top_k(scaled, top_k.long(), most)
        probs = scaled.softmax(dim=-1)
        if asked & Feature.TOP_P:
            probs = probs.masked_fill(probs < nucleus_border(probs, top_p), 0.0)
        if asked & Feature.MIN_P:
            border = min_p * probs.amax(dim=-1, keepdim=True)
            probs = probs.masked_fill(probs < border, 0.0)
        return invert(probs, to_device(self._uniforms.take(slots, positions), self._device))

    def _count_drawn(self, tokens: torch.Tensor, slots: NDArray[np.int64]) -> None:
        assert self._output_counts is not None
        rows = np.array(self._with(slots, Feature.PENALTIES), dtype=np.int64)
        where, of = to_device(rows, self._device), to_device(slots[rows], self._device)
        one = torch.ones(len(rows), device=self._device)
        self._output_counts.index_put_((of, tokens[where]), one, accumulate=True)


def keep_top_k(logits: torch.Tensor, top_k: torch.Tensor, most: int) -> torch.Tensor:
    """``logits`` with everything below each row's ``top_k``-th best set to minus infinity.

    ``top_k``: int64 [rows, 1]; the size of the vocabulary for rows that keep everything. ``most``:
    the largest ``top_k`` of the other rows, known on the host.
    """
    best = logits.topk(most, dim=-1).values
    border = best.gather(1, top_k.clamp(max=most) - 1)
    border = border.masked_fill(top_k > most, -torch.inf)
    return logits.masked_fill(logits < border, -torch.inf)


def nucleus_border(probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """[rows, 1]: the smallest probability that top_p keeps. It keeps the most likely tokens whose
    sum reaches ``top_p``; a row whose ``top_p`` is 1 keeps everything, whatever the other rows ask
    for."""
    off = top_p >= 1.0
    return _border(probs, top_p.masked_fill(off, 0.0)).masked_fill(off, 0.0)


def _border(probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    vocab = probs.shape[-1]
    if vocab > 4 * NUCLEUS_CANDIDATES:
        best = probs.topk(NUCLEUS_CANDIDATES, dim=-1).values
        reached = best.cumsum(dim=-1)
        # Waiting for the device here costs less than sorting the whole vocabulary.
        if bool((reached[:, -1:] >= top_p).all()):
            return _last_needed(best, reached, top_p)
    best = probs.sort(dim=-1, descending=True).values
    return _last_needed(best, best.cumsum(dim=-1), top_p)


def _last_needed(best: torch.Tensor, reached: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    needed = (reached - best < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
    return best.gather(1, needed - 1)


def invert(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token at which the cumulative probability passes ``uniform`` (fp64 [rows], below 1)."""
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    target = uniform.unsqueeze(1) * cumulative[:, -1:]
    passed = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return passed.clamp_(max=probs.shape[-1] - 1)


# ---- randomness


def uniforms(seed: int, choice: int, first: int, count: int) -> NDArray[np.float64]:
    """Numbers in [0, 1 - 2**-52] for output positions first .. first + count - 1.

    Philox is counter-based, so its numbers can be made from any position on, without state. They
    are made on the host, so that a token gets the same number on any device, in any batch, and on
    a worker that continues a generation of another. ``seed``: 64 bits.
    """
    key = np.array([seed, choice], dtype=np.uint64)
    skipped = first % PHILOX_WORDS
    words = np.random.Philox(key=key, counter=first // PHILOX_WORDS).random_raw(skipped + count)
    return (words[skipped:] >> np.uint64(12)).astype(np.float64) * 2.0**-52


class UniformCache:
    """The next random numbers of every slot, made BLOCK at a time."""

    BLOCK = 64

    def __init__(self, num_slots: int) -> None:
        self._values = np.zeros((num_slots, self.BLOCK))
        self._firsts = np.full(num_slots, -1, dtype=np.int64)
        self._streams: list[tuple[int, int]] = [(0, 0)] * num_slots

    def admit(self, slot: int, seed: int, choice: int) -> None:
        """Assigns the slot to the stream of (seed, choice)."""
        self._streams[slot] = (seed, choice)
        self._firsts[slot] = -1

    def take(self, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
        """One number for each (slot, output position)."""
        offsets = positions - self._firsts[slots]
        stale = (self._firsts[slots] < 0) | (offsets < 0) | (offsets >= self.BLOCK)
        for slot, position in zip(slots[stale].tolist(), positions[stale].tolist(), strict=True):
            first = position - position % self.BLOCK
            seed, choice = self._streams[slot]
            self._values[slot] = uniforms(seed, choice, first, self.BLOCK)
            self._firsts[slot] = first
        taken: NDArray[np.float64] = self._values[slots, positions - self._firsts[slots]]
        return taken


def position_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, counts: Sequence[int]
) -> list[PositionLogprobs]:
    """Log-probabilities of each row's token: the fp32 log-softmax of the raw logits, before
    anything that sampling does.

    ``logits``: fp32 [rows, vocab]; ``token_ids``: int64 [rows], the token of each row.
    ``counts``: the number of best alternatives to report for each row. Equal logits share a rank.
    """
    best = min(max(counts, default=0), logits.shape[-1])
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    chosen = logits.gather(1, token_ids.unsqueeze(1))
    ranks = (logits > chosen).sum(dim=-1).tolist()
    values = (chosen - normaliser).squeeze(1).tolist()
    ids = token_ids.tolist()
    top_values: list[list[float]] = []
    top_ids: list[list[int]] = []
    if best:
        found = logits.topk(best, dim=-1)
        top_values = (found.values - normaliser).tolist()
        top_ids = found.indices.tolist()
    described = []
    for row, count in enumerate(counts):
        top: tuple[Logprob, ...] = ()
        if count:
            pairs = zip(top_ids[row][:count], top_values[row], strict=False)
            top = tuple(Logprob(token, value, rank) for rank, (token, value) in enumerate(pairs, 1))
        sampled = Logprob(ids[row], values[row], ranks[row] + 1)
        described.append(PositionLogprobs(sampled, top))
    return described
