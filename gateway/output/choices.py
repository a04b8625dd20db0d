"""From token deltas to events: text, log-probabilities and the end of each choice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from gateway.job import GenerationOptions
from gateway.output.detokenizer import Vocabulary
from gateway.output.events import (
    ChoiceEnd,
    EndReason,
    OutputEvent,
    Text,
    TextLogprobs,
)
from gateway.output.sections import Sections
from gateway.output.stops import OutputText
from opticnerve.errors import EngineFailure
from opticnerve.generation.values import Delta, FinishReason, PositionLogprobs


class Choices:
    """The choices of one answer while they are written."""

    def __init__(
        self,
        options: GenerationOptions,
        vocabulary: Vocabulary,
        sections: Callable[[int], Sections] | None = None,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        """``sections``: makes the sections of a choice; None: all is text. ``shown_ids``: special
        tokens that the sections need to see."""
        sampling = options.sampling
        self._vocabulary = vocabulary
        self._top_logprobs = options.top_logprobs
        self._tokens_as_ids = options.tokens_as_ids
        self._end_logprobs = options.end_logprobs
        self._none_wanted = options.max_tokens == 0
        self._stop_ids = frozenset(sampling.stop_token_ids or ())
        self._shows_stop = sampling.include_stop_str_in_output
        self._outputs = [
            OutputText(
                vocabulary,
                sampling.stop_strings,
                include_stop=sampling.include_stop_str_in_output,
                skip_special_tokens=sampling.skip_special_tokens,
                shown_ids=shown_ids,
                min_tokens=sampling.min_tokens or 0,
            )
            for _ in range(sampling.n or 1)
        ]
        self._sections = sections and [sections(choice) for choice in range(sampling.n or 1)]
        self.finish_reasons: list[EndReason | None] = [None] * len(self._outputs)

    @property
    def ended(self) -> bool:
        """Whether every choice is complete, so that no more tokens are needed."""
        return None not in self.finish_reasons

    def has_ended(self, choice: int) -> bool:
        return self.finish_reasons[choice] is not None

    def tokens_of(self, choice: int) -> int:
        """Tokens of one choice, up to the stop string that ended it."""
        return self._outputs[choice].num_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of all choices, up to the stop strings that ended them."""
        return sum(output.num_tokens for output in self._outputs)

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens of all choices' reasoning, its markers included."""
        return sum(each.num_reasoning_tokens for each in self._sections or ())

    def take(self, delta: Delta) -> list[OutputEvent | ChoiceEnd]:
        """The events of ``delta``; none for a choice that has ended.

        Raises EngineFailure if the worker aborted the sequence.
        """
        if self.has_ended(delta.choice):
            return []
        if delta.finish_reason is FinishReason.ABORT:
            raise EngineFailure("the LLM worker aborted the generation; send the request again")
        if self._none_wanted:
            self.finish_reasons[delta.choice] = "length"
            return [ChoiceEnd(delta.choice, "length")]
        output = self._outputs[delta.choice]
        hidden = self._hides_last(delta)
        piece = output.push(delta.token_ids[:-1] if hidden else delta.token_ids)
        text, starts = piece.text, piece.starts
        if delta.finish_reason is not None and output.stopped is None:
            if hidden:
                output.count_hidden()
                starts += (output.num_characters,) if self._end_logprobs else ()
            text += output.finish().text
        logprobs = self._logprobs(delta.logprobs, starts)
        end = self._end(delta, output)
        events: list[OutputEvent | ChoiceEnd] = []
        if self._sections is not None:
            sections = self._sections[delta.choice]
            events += sections.push(text, logprobs, piece.starts, last=end is not None)
            end = _end_of_calls(sections, end, delta.choice)
        elif text or logprobs:
            events.append(Text(delta.choice, text, logprobs))
        if end is not None:
            self.finish_reasons[delta.choice] = end.finish_reason
            events.append(end)
        return events

    def _hides_last(self, delta: Delta) -> bool:
        """Whether the last token ended the choice and its text is not shown."""
        if delta.finish_reason is not FinishReason.STOP or not delta.token_ids:
            return False
        last = delta.token_ids[-1]
        return last == delta.stop_token_id and not (self._shows_stop and last in self._stop_ids)

    def _end(self, delta: Delta, output: OutputText) -> ChoiceEnd | None:
        if output.stopped is not None:
            return ChoiceEnd(delta.choice, "stop", output.stopped)
        if delta.finish_reason is FinishReason.STOP:
            asked = delta.stop_token_id in self._stop_ids
            return ChoiceEnd(delta.choice, "stop", delta.stop_token_id if asked else None)
        return ChoiceEnd(delta.choice, "length") if delta.finish_reason else None

    def _logprobs(
        self, positions: Iterable[PositionLogprobs], starts: Sequence[int]
    ) -> tuple[TextLogprobs, ...] | None:
        """The log-probabilities of the first ``len(starts)`` positions."""
        most = self._top_logprobs
        if most is None:
            return None
        spelled = partial(self._vocabulary.spelled_logprob, as_id=self._tokens_as_ids)
        return tuple(
            TextLogprobs(spelled(at.sampled), tuple(map(spelled, at.top[:most])), start)
            for at, start in zip(positions, starts, strict=False)
            if at.sampled is not None
        )


def _end_of_calls(sections: Sections, end: ChoiceEnd | None, choice: int) -> ChoiceEnd | None:
    """The end of a choice that may have called tools."""
    if sections.ended:
        end = ChoiceEnd(choice, "stop")
    if end is not None and end.finish_reason == "stop" and sections.called:
        return ChoiceEnd(choice, "tool_calls")
    return end
