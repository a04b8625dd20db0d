"""The part of the prompt that an answer shows: its text, token ids and log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from gateway.output.detokenizer import Vocabulary
from gateway.output.events import PromptEvent, PromptText, PromptToken, PromptTokens, TokenIds
from opticnerve.generation.values import Delta, PositionLogprobs, PromptPiece


class Echo:
    """The events of one prompt, before those of its choices."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        token_ids: Sequence[int],
        text: str | None = None,
        starts: Sequence[int] | None = None,
        *,
        as_ids: bool = False,
        show_ids: bool = False,
    ) -> None:
        """``text``: the prompt's text; None if it is not to be shown. ``starts``: where each token
        begins in it, in characters. ``as_ids``: name tokens by their ids. ``show_ids``: show the
        ids."""
        self._vocabulary = vocabulary
        self._token_ids = token_ids
        self._text = text
        self._starts = starts
        self._as_ids = as_ids
        self._show_ids = show_ids
        self._told = 0  # Number of tokens reported so far.

    def take(self, event: PromptPiece | Delta) -> list[PromptEvent | TokenIds]:
        """The prompt's events for ``event``; for a delta, those that must come before its own."""
        events: list[PromptEvent | TokenIds] = []
        if self._show_ids:
            events.append(TokenIds(0, tuple(self._token_ids), of_prompt=True))
            self._show_ids = False
        if self._text is not None:
            events.append(PromptText(0, self._text))
            self._text = None
        if isinstance(event, PromptPiece) and event.logprobs:
            events.append(PromptTokens(0, tuple(map(self._token, event.logprobs))))
        return events

    def _token(self, at: PositionLogprobs) -> PromptToken:
        """The next token, whose log-probabilities are ``at``."""
        place, vocabulary, as_id = self._told, self._vocabulary, self._as_ids
        spelled = partial(vocabulary.spelled_logprob, as_id=as_id)
        self._told += 1
        return PromptToken(
            vocabulary.spelled(self._token_ids[place], as_id=as_id),
            self._starts[place] if self._starts is not None else 0,
            None if at.sampled is None else spelled(at.sampled),
            tuple(map(spelled, at.top)),
        )
