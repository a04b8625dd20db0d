"""Writes answers whose choices are a list: those of chats and of completions."""

from __future__ import annotations

import uuid
from abc import abstractmethod
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from gateway.api.answer import AnswerWriter, WholeChoice, usage_json
from gateway.api.sse import DONE, event, with_json
from gateway.output.events import AnswerEvent, ChoiceEnd, End, OutputEvent, PromptEvent
from opticnerve.generation.values import Usage


class ChoiceWriter(AnswerWriter):
    """An answer with ``choices``, and a stream whose chunks have one choice each."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, model: str, *, usage: bool = False, timings: bool = False) -> None:
        super().__init__(model, usage=usage, timings=timings)
        self._id = f"{self.id_prefix}{uuid.uuid4().hex}"

    # ---- a choice as JSON, which each API defines

    def opening(self, choice: int) -> Mapping[str, Any] | None:
        """The choice in its first chunk, before its output; None for no such chunk."""
        return None

    def prompt(self, more: PromptEvent) -> Iterator[bytes]:
        """The chunks with more of the prompt; none unless the API streams it."""
        return iter(())

    @abstractmethod
    def output(self, more: OutputEvent) -> Mapping[str, Any]:
        """The choice in a chunk with output."""

    @abstractmethod
    def ending(self, end: ChoiceEnd) -> Mapping[str, Any]:
        """The choice in its last chunk."""

    def whole(self, choice: WholeChoice, end: ChoiceEnd) -> Mapping[str, Any]:
        """The choice in a whole answer, without ``logprobs``; for ``encoded``."""
        raise NotImplementedError

    # ---- bodies

    def whole_answer(self, choices: Sequence[WholeChoice], end: End) -> bytes:
        head = {**self._head(self.whole_object), "usage": usage_json(end.usage)}
        encoded = b",".join(self.encoded(choices))
        return with_json({**head, **self.timings_of(end)}, "choices", b"[" + encoded + b"]")

    def encoded(self, choices: Sequence[WholeChoice]) -> Iterator[bytes]:
        """The JSON of each choice."""
        return map(self._whole, choices)

    async def chunks(
        self, first: AnswerEvent, events: AsyncGenerator[AnswerEvent, None]
    ) -> AsyncGenerator[bytes, None]:
        begun: set[int] = set()
        shown = 0  # Output tokens in the chunks so far.
        last = first
        while not isinstance(last, End):
            if isinstance(last, PromptEvent):
                for data in self.prompt(last):
                    yield data
                last = await anext(events)
                continue
            data = b""
            if last.choice not in begun:
                begun.add(last.choice)
                usage = last.usage and replace(last.usage, completion_tokens=shown)
                opening = self.opening(last.choice)
                data = b"" if opening is None else self._chunk(opening, usage)
            choice = self.ending(last) if isinstance(last, ChoiceEnd) else self.output(last)
            yield data + self._chunk(choice, last.usage)
            shown = last.usage.completion_tokens if last.usage else 0
            last = await anext(events)
        if self._usage or self._timings:
            head, usage_at_end = self._head(self.chunk_object), usage_json(last.usage)
            yield event({**head, "choices": [], "usage": usage_at_end, **self.timings_of(last)})
        yield DONE

    def _whole(self, choice: WholeChoice) -> bytes:
        assert choice.end is not None
        body = self.whole(choice, choice.end)
        if choice.logprobs is None:
            return with_json(body, "logprobs", b"null")
        content = b",".join(choice.logprobs)
        return with_json(body, "logprobs", b'{"content":[' + content + b'],"refusal":null}')

    def _chunk(self, choice: Mapping[str, Any], usage: Usage | None) -> bytes:
        body = {**self._head(self.chunk_object), "choices": [choice]}
        if self._usage:
            body["usage"] = usage and usage_json(usage)
        return event(body)

    def encoded_chunk(self, choice: bytes) -> bytes:
        """A chunk whose choice is encoded JSON; without usage."""
        head = self._head(self.chunk_object) | ({"usage": None} if self._usage else {})
        return b"data: " + with_json(head, "choices", b"[" + choice + b"]") + b"\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self.system_fingerprint,
        }
