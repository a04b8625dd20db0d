"""The token budget of a step, and a model of how long steps take on this machine.

No tensors and no clock: the engine times a step and passes the seconds in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llm_service.policy.sequence import Sequence, Status
from llm_service.policy.step_plan import StepPlan, Work
from opticnerve.media.plan import SpanAttention

# Coefficients before the first step: a slow CPU's, so that first chunks are rather too small.
FIRST_GUESS = (0.02, 0.002, 0.01)  # Seconds per step, decoding sequence and prefill token.
# The part of the estimate's error that is corrected after each step.
GAIN = 0.3
# Bound on the log error taken from one step, which may have waited for another process.
MAX_ERROR = math.log(2)
# In a step with prefill, most of the error is attributed to prefill, since other steps measure
# decoding alone. Prefill's weight has a minimum: a coefficient that is far too small has hardly any
# share in the estimate, and would never be corrected.
DECODING_WEIGHT = 0.1
MIN_PREFILL_WEIGHT = 0.3
# Fewer prefill tokens (the end of a cached prompt, a forked choice) take less time than steps vary.
MEANINGFUL_TOKENS = 128
# First steps, with and without prefill, whose error is not bounded: the guess may be off by any
# factor.
FIRST_STEPS = 3
MIN_S, MAX_S = 1e-7, 1e3  # Bounds of each coefficient.
MIN_PREFILL_FRACTION = 1 / 4  # Part of the target time for prefill, however long decoding takes.


class CostModel:
    """seconds = a + b * decoding sequences + c * prefill tokens, with a, b and c above zero.

    After a step each coefficient is corrected in proportion to its share of the estimate: gradient
    descent on the squared logarithm of measured over expected seconds. This works for microseconds
    and for seconds, follows a machine that becomes ten times slower within ten steps, and lets an
    outlier move the estimate by a quarter at most. b and c follow the cost of attention as contexts
    grow.
    """

    def __init__(self) -> None:
        self._coefficients = FIRST_GUESS
        self.total_s = 0.0  # Duration of all steps.
        self._learned = [0, 0]  # Measurements without prefill, and with it.
        self._pending = (0, 0, 0)  # Steps, decodes and prefill tokens not yet measured,
        self._pending_s = 0.0  # and the seconds that they took on the host.

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prefill speed without a step's other costs; 0 before the first measurement."""
        return 1 / self._coefficients[2] if any(self._learned) else 0.0

    def seconds(self, decodes: int, prefill_tokens: int) -> float:
        """Expected duration of one step."""
        return self._expect((1, decodes, prefill_tokens))

    def prefill_tokens(self, decodes: int, target_s: float) -> int:
        """Prefill tokens that a step can have beside ``decodes`` sequences to end in ``target_s``.

        At least MIN_PREFILL_FRACTION of ``target_s`` is for prefill, however long decoding takes.
        """
        left = max(target_s - self.seconds(decodes, 0), MIN_PREFILL_FRACTION * target_s)
        return int(left / self._coefficients[2])

    def learn(self, plan: StepPlan, seconds: float, whole: bool = True) -> None:
        """Learns that ``plan`` took ``seconds``. ``whole``: all of its works were computed.

        A step that samples nothing may return before the device is done, so such steps are
        measured together with the next step that samples.
        """
        self.total_s += seconds
        if not whole:
            return
        decodes = plan.num_decodes
        steps, sequences, tokens = self._pending
        self._pending = (steps + 1, sequences + decodes, tokens + plan.num_tokens - decodes)
        self._pending_s += seconds
        if any(work.samples for work in plan.works):
            self._correct(self._pending, max(self._pending_s, MIN_S))
            self._pending, self._pending_s = (0, 0, 0), 0.0

    def _expect(self, counts: tuple[int, int, int]) -> float:
        return sum(c * count for c, count in zip(self._coefficients, counts, strict=True))

    def _correct(self, counts: tuple[int, int, int], seconds: float) -> None:
        expected = self._expect(counts)
        error = math.log(seconds / expected)
        kind = int(counts[2] > 0)
        self._learned[kind] += 1
        if self._learned[kind] > FIRST_STEPS:
            error = min(max(error, -MAX_ERROR), MAX_ERROR)
        shares = [c * count / expected for c, count in zip(self._coefficients, counts, strict=True)]
        corrections = shares
        if kind:
            decoding = [DECODING_WEIGHT * share for share in shares[:2]]
            least = MIN_PREFILL_WEIGHT * min(1.0, counts[2] / MEANINGFUL_TOKENS)
            corrections = [*decoding, max(shares[2], least)]
        effect = sum(part * share for part, share in zip(corrections, shares, strict=True))
        step = max(GAIN, 1 / self._learned[kind]) * error / effect
        a, b, c = (
            min(max(coefficient * math.exp(step * part), MIN_S), MAX_S)
            for coefficient, part in zip(self._coefficients, corrections, strict=True)
        )
        self._coefficients = (a, b, c)


@dataclass(slots=True)
class Budget:
    """What is left of a step's budget, in tokens. ``prefill``: after one token for each decoding
    sequence, and bounded by the step's time. Only a bidirectional span, which cannot be cut, may
    take tokens of decoding sequences."""

    tokens: int  # For prefill and decoding together.
    prefill: int
    timed: bool  # Time bounds ``prefill``; chunks then end at block boundaries.
    block_size: int
    for_text: int = 0  # Part of ``prefill`` reserved for prompts without pictures.
    for_decoding: int = 0  # Part of ``tokens`` reserved for decoding sequences.
    begun: bool = False  # A sequence prefills in this step.

    def chunk(self, seq: Sequence) -> int:
        """The longest chunk that ``seq`` may prefill."""
        reserved = self.for_text if seq.request.spans else 0
        return max(0, min(self.tokens - self.for_decoding, self.prefill - reserved))

    def spend(self, work: Work) -> None:
        self.tokens -= work.num_tokens
        if not work.decodes:
            self.prefill = max(0, self.prefill - work.num_tokens)
            if not work.seq.request.spans:
                self.for_text = max(0, self.for_text - work.num_tokens)
            self.begun = True

    def chunk_end(self, seq: Sequence, start: int) -> int:
        """The end of a chunk of ``seq`` from ``start``; ``start`` itself if there is no room.

        The first chunk of a step always has some tokens, or a whole bidirectional span, which may
        take longer than the time allows.
        """
        end = min(start + self.chunk(seq), seq.num_tokens)
        if self.timed and end < seq.num_tokens:
            block_end = end - end % self.block_size
            if block_end > start or self.begun:
                end = max(block_end, start)
        span_end = _span_end(seq, start)
        # Otherwise a stream of newly admitted sequences could leave nothing for decoding.
        reserved = 0 if seq.status is Status.RUNNING else self.for_decoding
        if not self.begun and start < span_end <= start + self.tokens - reserved:
            end = max(end, span_end)
        return end


def _span_end(seq: Sequence, start: int) -> int:
    """The end of the bidirectional span that begins at ``start``; ``start`` where none does."""
    spans = seq.request.spans
    index = seq.generation.span_at(start)
    if index < len(spans):
        span = spans[index]
        if span.attention is SpanAttention.BIDIRECTIONAL and span.token_offset == start:
            return start + span.num_tokens
    return start
