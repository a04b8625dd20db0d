"""From token deltas to what a client reads: text, log-probabilities and the reason of the end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gateway.api.schemas.chat import ChatRequest
from gateway.api.sse import ContentLogprob, TokenText
from gateway.output.detokenizer import Vocabulary
from gateway.output.stops import OutputText
from opticnerve.errors import EngineFailure
from opticnerve.generation.values import Delta, FinishReason, Logprob, PositionLogprobs, Usage


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one delta adds to a choice. ``finish_reason`` is set on the choice's last one;
    ``usage``, that of all choices so far, where the request asks for it in every chunk."""

    index: int
    text: str
    logprobs: tuple[ContentLogprob, ...] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    usage: Usage | None = None


class Choices:
    """The choices of one answer while they are written."""

    def __init__(self, request: ChatRequest, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._with_logprobs = bool(request.logprobs)
        self._num_top = request.top_logprobs or 0
        self._stop_ids = frozenset(request.stop_token_ids or ())
        self._shows_stop = request.include_stop_str_in_output
        self._outputs = [
            OutputText(
                vocabulary,
                request.stop_strings,
                include_stop=request.include_stop_str_in_output,
                skip_special_tokens=request.skip_special_tokens,
                min_tokens=request.min_tokens or 0,
            )
            for _ in range(request.n or 1)
        ]
        self.finish_reasons: list[str | None] = [None] * len(self._outputs)

    @property
    def ended(self) -> bool:
        """Whether every choice is at its end; then the generation can be left."""
        return None not in self.finish_reasons

    def has_ended(self, choice: int) -> bool:
        return self.finish_reasons[choice] is not None

    @property
    def num_tokens(self) -> int:
        """Tokens of all choices, up to the stop strings that ended them."""
        return sum(output.num_tokens for output in self._outputs)

    def take(self, delta: Delta) -> TextDelta | None:
        """What the client gets for ``delta``; None for nothing, or for a choice that has ended.

        Raises EngineFailure when the worker gave the sequence up.
        """
        if self.has_ended(delta.choice):
            return None
        if delta.finish_reason is FinishReason.ABORT:
            raise EngineFailure("the LLM worker gave the answer up; send the request again")
        output = self._outputs[delta.choice]
        hidden = self._hides_last(delta)
        shown_ids = delta.token_ids[:-1] if hidden else delta.token_ids
        piece = output.push(shown_ids)
        text = piece.text
        logprobs = self._logprobs(delta.logprobs[: piece.num_tokens])
        if delta.finish_reason is not None and output.stopped is None:
            if hidden:
                output.skip(delta.token_ids[-1])
            text += output.finish().text
        reason, stop = self._ending(delta, output)
        self.finish_reasons[delta.choice] = reason
        if not text and not logprobs and reason is None:
            return None
        return TextDelta(delta.choice, text, logprobs, reason, stop)

    def _hides_last(self, delta: Delta) -> bool:
        """Whether the last token is the one that ended the choice, and is not to be shown."""
        if delta.finish_reason is not FinishReason.STOP or not delta.token_ids:
            return False
        last = delta.token_ids[-1]
        return last == delta.stop_token_id and not (self._shows_stop and last in self._stop_ids)

    def _ending(self, delta: Delta, output: OutputText) -> tuple[str | None, str | int | None]:
        if output.stopped is not None:
            return "stop", output.stopped
        if delta.finish_reason is FinishReason.STOP:
            return "stop", delta.stop_token_id if delta.stop_token_id in self._stop_ids else None
        return ("length", None) if delta.finish_reason is FinishReason.LENGTH else (None, None)

    def _logprobs(self, positions: Iterable[PositionLogprobs]) -> tuple[ContentLogprob, ...] | None:
        if not self._with_logprobs:
            return None
        return tuple(
            ContentLogprob(
                self._text(position.sampled),
                tuple(self._text(token) for token in position.top[: self._num_top]),
            )
            for position in positions
            if position.sampled is not None
        )

    def _text(self, token: Logprob) -> TokenText:
        data = self._vocabulary.token_bytes(token.token_id)
        return TokenText(
            self._vocabulary.token_text(token.token_id), max(token.logprob, -9999.0), tuple(data)
        )
