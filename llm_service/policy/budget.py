"""Tokens that are left in the step being planned, and where chunks are cut to fit."""

from __future__ import annotations

from dataclasses import dataclass

from llm_service.policy.plan import Work
from llm_service.policy.sequence import Sequence, Status
from opticnerve.media.plan import SpanAttention


@dataclass(slots=True)
class Budget:
    """In tokens. ``prefill``: what is left after a token for each decoding sequence, bounded by the
    step's time. Only a bidirectional span, which cannot be cut, may take tokens of decoding."""

    tokens: int  # Of any kind.
    prefill: int
    timed: bool  # Time bounds ``prefill``: chunks are cut at pages.
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
            page_end = end - end % self.block_size
            if page_end > start or self.begun:
                end = max(page_end, start)
        span_end = _span_end(seq, start)
        # A stream of waiting sequences would otherwise leave nothing to decoding.
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
