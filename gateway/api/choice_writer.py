"""Writes answers whose choices are a list: those of chats and of completions."""

from __future__ import annotations

import uuid
from abc import abstractmethod
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from gateway.api.answer import AnswerWriter, WholeChoice
from gateway.api.sse import DONE, add_json, dumps, event, ids_json, with_encoded
from gateway.job import Job
from gateway.output.events import AnswerEvent, ChoiceEnd, End, OutputEvent, PromptEvent, TokenIds
from opticnerve.generation.values import Usage


class PromptTokensDetails(TypedDict):
    cached_tokens: int
    image_tokens: int


class CompletionTokensDetails(TypedDict):
    reasoning_tokens: int


class CompletionUsage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: NotRequired[
        Annotated[CompletionTokensDetails, Field(description="If the model has thought.")]
    ]


StreamUsage = Annotated[
    CompletionUsage | None,
    Field(
        description="In the last chunk, with stream_options.include_usage; in every chunk, for all "
        "choices so far, with continuous_usage_stats too."
    ),
]
ShownIds = Annotated[list[int], Field(description="With `return_token_ids`.")]


def usage_json(usage: Usage, reasoning_tokens: int = 0) -> CompletionUsage:
    shown: CompletionUsage = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "image_tokens": usage.embedding_tokens,
        },
    }
    if reasoning_tokens:
        shown["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return shown


class ChoiceWriter(AnswerWriter):
    """An answer with ``choices``, and a stream whose chunks have one choice each."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    prompt_ids_by_choice: ClassVar[bool]  # Prompt ids go into choices, or the answer.

    def __init__(self, model: str, *, usage: bool = False, timings: bool = False) -> None:
        super().__init__(model, usage=usage, timings=timings)
        self._id = f"{self.id_prefix}{uuid.uuid4().hex}"
        self._n = 1
        self._shows_ids = False
        # In a stream: to be sent with a choice's next chunk.
        self._ids: dict[int, list[int]] = {}
        self._prompt_ids: dict[int, bytes] = {}

    def begin(self, job: Job) -> None:
        super().begin(job)
        self._n = job.options.sampling.n or 1
        self._shows_ids = job.options.token_ids

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
        usage = usage_json(end.usage, end.reasoning_tokens)
        head = {**self._head(self.whole_object), "usage": usage}
        encoded: Iterable[bytes] = self.encoded(choices)
        if self._shows_ids:
            encoded = self._with_ids(encoded, choices)
        listed = b"[" + b",".join(encoded) + b"]"
        body = with_encoded({**head, **self.timings_of(end)}, {"choices": listed})
        if self._shows_ids and not self.prompt_ids_by_choice:
            body = add_json(body, "prompt_token_ids", choices[0].prompt_ids)
        return body

    def _with_ids(
        self, encoded: Iterable[bytes], choices: Sequence[WholeChoice]
    ) -> Iterator[bytes]:
        """The choices with token ids."""
        for place, (body, choice) in enumerate(zip(encoded, choices, strict=True)):
            shown = add_json(body, "token_ids", ids_json(choice.token_ids))
            if self.prompt_ids_by_choice:
                first = choices[place // self._n * self._n]
                shown = add_json(shown, "prompt_token_ids", first.prompt_ids)
            yield shown

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
            elif isinstance(last, TokenIds):
                self._keep(last)
            else:
                data = b""
                if last.choice not in begun:
                    begun.add(last.choice)
                    usage = last.usage and replace(last.usage, completion_tokens=shown)
                    opening = self.opening(last.choice)
                    data = b"" if opening is None else self._chunk(opening, usage, opens=True)
                choice = self.ending(last) if isinstance(last, ChoiceEnd) else self.output(last)
                yield data + self._chunk(choice, last.usage)
                shown = last.usage.completion_tokens if last.usage else 0
            last = await anext(events)
        if self._usage or self._timings:
            head = {**self._head(self.chunk_object), "choices": []}
            usage_at_end = usage_json(last.usage, last.reasoning_tokens)
            yield event({**head, "usage": usage_at_end, **self.timings_of(last)})
        yield DONE

    def _whole(self, choice: WholeChoice) -> bytes:
        assert choice.end is not None
        body = self.whole(choice, choice.end)
        if choice.logprobs is None:
            return with_encoded(body, {"logprobs": b"null"})
        content = b",".join(choice.logprobs)
        return with_encoded(body, {"logprobs": b'{"content":[' + content + b'],"refusal":null}'})

    def _keep(self, more: TokenIds) -> None:
        """Token ids for the next chunks of their choices."""
        if not more.of_prompt:
            self._ids.setdefault(more.choice, []).extend(more.token_ids)
            return
        several = self._n if self.prompt_ids_by_choice else 1
        shown = ids_json(more.token_ids)
        for choice in range(more.choice, more.choice + several):
            self._prompt_ids[choice] = shown

    def _chunk(
        self, choice: Mapping[str, Any], usage: Usage | None, *, opens: bool = False
    ) -> bytes:
        body = {**self._head(self.chunk_object), "choices": [choice]}
        if self._usage:
            body["usage"] = usage and usage_json(usage)
        if not self._shows_ids:
            return event(body)
        return self._chunk_with_ids(body, choice, opens=opens)

    def _chunk_with_ids(
        self, body: dict[str, Any], choice: Mapping[str, Any], *, opens: bool
    ) -> bytes:
        """``opens``: the chunk comes before the choice's output."""
        index: int = choice["index"]
        prompt = self._prompt_ids.pop(index if self.prompt_ids_by_choice else 0, None)
        del body["choices"]
        encoded = dumps(choice)
        if not opens:
            encoded = add_json(encoded, "token_ids", ids_json(self._ids.pop(index, ())))
        if prompt is not None and self.prompt_ids_by_choice:
            encoded = add_json(encoded, "prompt_token_ids", prompt)
        data = with_encoded(body, {"choices": b"[" + encoded + b"]"})
        if prompt is not None and not self.prompt_ids_by_choice:
            data = add_json(data, "prompt_token_ids", prompt)
        return b"data: " + data + b"\n\n"

    def encoded_chunk(self, choice: bytes) -> bytes:
        """A chunk whose choice is encoded JSON; without usage."""
        head = self._head(self.chunk_object) | ({"usage": None} if self._usage else {})
        return b"data: " + with_encoded(head, {"choices": b"[" + choice + b"]"}) + b"\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self.system_fingerprint,
        }
