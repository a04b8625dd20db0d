"""``POST /v1/completions``: continues texts or token ids, and scores them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal, NotRequired

from pydantic import Discriminator, Field, Tag, model_validator
from starlette.responses import Response
from typing_extensions import TypedDict

from gateway.api.answer import (
    TIMINGS_HEADER,
    AnswerHead,
    PromptLogprobs,
    StopReason,
    WholeChoice,
    WholePart,
    streamed,
)
from gateway.api.choice_writer import ChoiceWriter, CompletionUsage, ShownIds, StreamUsage
from gateway.api.legacy_logprobs import LegacyLogprobs, Scores, legacy_json, of_output, of_prompt
from gateway.api.routing import Call, make_router
from gateway.api.schemas.base import INTEGRAL, BoundedList, UnsupportedField, fault
from gateway.api.schemas.generate import NumLogprobs
from gateway.api.schemas.messages import ImageUrl, Source, picture
from gateway.api.schemas.sampling import TokenId
from gateway.api.schemas.structured import StructuredFields
from gateway.api.sse import add_json, dumps, with_encoded
from gateway.edge.limits import MAX_MARKER_CHARACTERS, MAX_PROMPTS
from gateway.job import UNLIMITED, GenerationOptions, Job, TextPrompt, TokenPrompt
from gateway.output.events import (
    ChoiceEnd,
    EndReason,
    OutputEvent,
    PromptEvent,
    PromptText,
    Text,
    TextLogprobs,
    TokenIds,
)

DEFAULT_MAX_TOKENS = 16  # OpenAI's default for this route.
IMAGE_MARKER = "<IMAGE_TOKEN>"

router = make_router("generation")


def _form(prompt: Any) -> str:
    """Which form of ``prompt`` validates it; the names are as in ``schemas.messages._tag``."""
    if not isinstance(prompt, list):
        return "<text>"
    first = prompt[0] if prompt else None
    return (
        "<texts>" if isinstance(first, str) else "<lists>" if isinstance(first, list) else "<ids>"
    )


Words = Annotated[str, Field(min_length=1)]
PromptIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
SEVERAL = Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)
Prompts = Annotated[
    Annotated[Words, Tag("<text>")]
    | Annotated[PromptIds, Tag("<ids>")]
    | Annotated[list[Words], SEVERAL, Tag("<texts>")]
    | Annotated[list[PromptIds], SEVERAL, Tag("<lists>")],
    Discriminator(_form),
]
Marker = Annotated[str, Field(min_length=1, max_length=MAX_MARKER_CHARACTERS)]


class CompletionRequest(StructuredFields):
    """Prompts, and how to continue them."""

    unsupported: ClassVar[Mapping[str, UnsupportedField]] = {
        "suffix": UnsupportedField(
            ("",), "put what follows into the prompt, in the model's own form"
        ),
    }

    prompt: Annotated[
        Prompts,
        Field(
            description="Text or token ids, or a list of either: then the choices of the i-th "
            "prompt have the indices from i * n on. Special tokens in a text are special, except "
            "that placeholders of pictures are text."
        ),
    ]
    max_tokens: Annotated[int, Field(ge=UNLIMITED, le=2**31 - 1), INTEGRAL] | None = Field(
        None, description="Default: 16. -1: no limit. 0: nothing is written, for echo and logprobs."
    )
    echo: bool = Field(
        False, description="The text begins with the prompt, and so do logprobs if they are asked."
    )
    logprobs: NumLogprobs | None = Field(
        None,
        description="How many of the most likely tokens have their log-probability in the answer, "
        "besides each token itself.",
    )
    add_special_tokens: bool = Field(
        True, description="Whether the tokenizer adds its own to a text, such as BOS."
    )
    images: BoundedList[Source | ImageUrl] | None = Field(
        None,
        description="Pictures, by URL or in base64, one for each image_marker in the texts, in "
        "order. Each marker becomes the model's placeholder for a picture; what the model expects "
        "around it is written in the text. An extension of this server.",
    )
    image_marker: Marker | None = Field(
        None, description=f"What marks a picture's place. Default: {IMAGE_MARKER}, with images."
    )

    @model_validator(mode="after")
    def _bounded(self) -> CompletionRequest:
        choices = len(self.sources) * (self.n or 1)
        if choices > MAX_PROMPTS:
            raise fault("prompt", f"asks for {choices} choices, and at most {MAX_PROMPTS} are made")
        return self

    @model_validator(mode="after")
    def _marked(self) -> CompletionRequest:
        if self.images is None and self.image_marker is None:
            return self
        given, marked = len(self.images or ()), sum(map(self._count, self.sources))
        if self.images and not isinstance(self.sources[0], str):
            raise fault("images", "go with a text prompt; send text instead of token ids")
        if given != marked:
            shown = self.marker[:20].encode("ascii", "replace").decode()
            raise fault(
                "images", f"should be one for each {shown} in the prompt: {marked}, not {given}"
            )
        return self

    @property
    def marker(self) -> str:
        return self.image_marker or IMAGE_MARKER

    @property
    def sources(self) -> Sequence[str | Sequence[int]]:
        """The prompts, at least one."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    @property
    def prompts(self) -> list[TextPrompt | TokenPrompt]:
        """Raises InvalidRequest for pictures that have no usable source."""
        pictures = iter([picture(each, f"images[{i}]") for i, each in enumerate(self.images or ())])
        return [
            TextPrompt(
                source,
                self.add_special_tokens,
                tuple(islice(pictures, self._count(source))) if self.images else (),
                self.marker,
            )
            if isinstance(source, str)
            else TokenPrompt(tuple(source))
            for source in self.sources
        ]

    @property
    def options(self) -> GenerationOptions:
        limit = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        options = self.generation_options(limit, "max_tokens", self.logprobs)
        return replace(options, top_logprobs_field="logprobs", end_logprobs=True, echo=self.echo)

    def _count(self, source: str | Sequence[int]) -> int:
        return source.count(self.marker) if isinstance(source, str) else 0


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: NotRequired[LegacyLogprobs | None]
    finish_reason: EndReason | None
    stop_reason: NotRequired[StopReason]
    prompt_logprobs: NotRequired[PromptLogprobs]
    token_ids: NotRequired[ShownIds]
    prompt_token_ids: NotRequired[ShownIds]


class Completion(AnswerHead):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: CompletionUsage


class CompletionChunk(AnswerHead):
    """The data of one event of a streamed answer. The last event's data is ``[DONE]``."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: NotRequired[StreamUsage]


@dataclass(slots=True)
class WholeCompletion(WholeChoice):
    """A choice of a whole answer; the first choice of a prompt also holds the prompt. ``copies``:
    the number of choices that continue the prompt, each of which repeats it."""

    most: int | None = None  # Number of most likely tokens in scores; None: no scores.
    echo: bool = False
    copies: int = 1
    scores: Scores = field(default_factory=Scores)
    prompt_scores: Scores = field(default_factory=Scores)

    def add_ids(self, more: TokenIds) -> int:
        return WholeChoice.add_ids(self, more) * (self.copies if more.of_prompt else 1)

    def add_prompt(self, more: PromptEvent) -> int:
        size = WholeChoice.add_prompt(self, more)
        if self.echo and self.most is not None and not isinstance(more, PromptText):
            size += self.prompt_scores.add(of_prompt(token, self.most) for token in more.tokens)
        return size * self.copies

    def add_logprobs(self, part: WholePart, found: Sequence[TextLogprobs]) -> int:
        most = self.most
        return 0 if most is None else self.scores.add(of_output(at, most) for at in found)


class CompletionWriter(ChoiceWriter):
    id_prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"
    prompt_ids_by_choice = True

    def begin(self, job: Job) -> None:
        super().begin(job)
        self._most = job.options.top_logprobs
        self._echo = job.options.echo
        self._echoed: dict[int, int] = {}  # Characters of the prompt, by its first choice.

    # ---- a stream

    def prompt(self, more: PromptEvent) -> Iterator[bytes]:
        text, scores = "", b"null"
        if isinstance(more, PromptText):
            text, self._echoed[more.choice] = more.text, len(more.text)
        elif self._most is not None:
            entries = [of_prompt(token, self._most) for token in more.tokens]
            scores = dumps(legacy_json(entries))
        for choice in range(more.choice, more.choice + self._n):
            body = {"index": choice, "text": text, "finish_reason": None}
            yield self.encoded_chunk(with_encoded(body, {"logprobs": scores}))

    def output(self, more: OutputEvent) -> CompletionChoice:
        assert isinstance(more, Text)
        scores: LegacyLogprobs | None = None
        if self._most is not None and more.logprobs is not None:
            before = self._echoed.get(more.choice // self._n * self._n, 0)
            scores = legacy_json([of_output(at, self._most) for at in more.logprobs], before)
        return {"index": more.choice, "text": more.text, "logprobs": scores, "finish_reason": None}

    def ending(self, end: ChoiceEnd) -> CompletionChoice:
        return {**_ended("", end), "logprobs": None}

    # ---- a whole answer

    def new_choice(self) -> WholeCompletion:
        return WholeCompletion(
            prompt_most=self.prompt_most, most=self._most, echo=self._echo, copies=self._n
        )

    def encoded(self, choices: Sequence[WholeChoice]) -> Iterator[bytes]:
        for place, choice in enumerate(choices):
            first = choices[place // self._n * self._n]
            assert isinstance(choice, WholeCompletion) and isinstance(first, WholeCompletion)
            assert choice.end is not None
            text = "".join([first.prompt_text, *choice.texts])
            scores = b"null"
            if self._most is not None:
                scores = choice.scores.json(len(first.prompt_text), first.prompt_scores)
            body = with_encoded(_ended(text, choice.end), {"logprobs": scores})
            if self.prompt_most is not None:
                entries = b"[" + b",".join(first.prompt_logprobs) + b"]"
                body = add_json(body, "prompt_logprobs", entries)
            yield body


def _ended(text: str, end: ChoiceEnd) -> CompletionChoice:
    return {
        "index": end.choice,
        "text": text,
        "finish_reason": end.finish_reason,
        "stop_reason": end.stop_reason,
    }


@router.post(
    "/v1/completions",
    summary="Continue texts, or token ids",
    response_model=Completion,
    responses=streamed(CompletionChunk),
    openapi_extra=TIMINGS_HEADER,
)
async def create_completion(call: Call, body: CompletionRequest) -> Response:
    writer = call.writer(CompletionWriter, body)
    jobs = call.jobs(body.prompts, body.options)
    stream = bool(body.stream)
    del body  # Frees a long prompt once its job drops it.
    return await call.answer_all(jobs, writer, stream=stream)
