"""What the step being planned can still take, and where chunks are cut to fit."""

from __future__ import annotations

from dataclasses import dataclass

from llm_service.policy.plan import Work
from llm_service.policy.sequence import Sequence, Status
from opticnerve.media.plan import SpanAttention


@dataclass(slots=True)
class Budget:
    """In tokens. ``prefill`` is what the sequences that decode leave, a token for each, or what the
    step's time leaves of that. Only a bidirectional span, which cannot be cut, may take theirs."""

    tokens: int  # Of any kind.
    prefill: int
    timed: bool  # Time bounds ``prefill``: chunks are cut at pages.
    block_size: int
    for_text: int = 0  # Of ``prefill``, kept for prompts without pictures.
    for_decoding: int = 0  # Of ``tokens``, kept for sequences that decode.
    begun: bool = False  # A sequence prefills in this step.

    def chunk(self, seq: Sequence) -> int:
        """The longest chunk that is left for prefill of ``seq``."""
        kept = self.for_text if seq.request.spans else 0
        return max(0, min(self.tokens - self.for_decoding, self.prefill - kept))

    def spend(self, work: Work) -> None:
        self.tokens -= work.num_tokens
        if not work.decodes:
            self.prefill = max(0, self.prefill - work.num_tokens)
            if not work.seq.request.spans:
                self.for_text = max(0, self.for_text - work.num_tokens)
            self.begun = True

    def chunk_end(self, seq: Sequence, start: int) -> int:
        """The token before which a chunk of ``seq`` from ``start`` has to end; ``start``: no room.

        The first chunk of a step has some tokens in any case, and the whole of a bidirectional
        span, which may take longer than the time allows.
        """
        end = min(start + self.chunk(seq), seq.num_tokens)
        if self.timed and end < seq.num_tokens:
            page_end = end - end % self.block_size
            if page_end > start or self.begun:
                end = max(page_end, start)
        span_end = _span_end(seq, start)
        # Of sequences that wait there may be a stream, which would leave decoding nothing.
        kept = 0 if seq.status is Status.RUNNING else self.for_decoding
        if not self.begun and start < span_end <= start + self.tokens - kept:
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
