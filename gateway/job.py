"""A job: what an API asks of the pipeline. A prompt of one kind, generation options, a caller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from gateway.clock import Stopwatch
from opticnerve.errors import ContextLengthExceeded

if TYPE_CHECKING:
    from gateway.api.schemas.messages import ItemSource, Message
    from gateway.api.schemas.sampling import SamplingFields
    from gateway.clock import Deadline
    from gateway.edge.admission import Ticket
    from gateway.edge.auth import Caller

UNLIMITED = -1  # As max_tokens: as many tokens as the context leaves.


class PromptKind:
    """The words that error messages use for a prompt of one kind."""

    __slots__ = ()

    field: ClassVar[str]  # The request's field.
    need: ClassVar[str]  # Such as "the prompt needs", before a number of tokens.
    shorter: ClassVar[str]  # Such as "a shorter prompt".


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. ``parameters``: the JSON schema of its arguments, which
    are an object; None: any object. ``strict``: enforce the schema also where calling the tool is
    up to the model."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False


class CallMode(StrEnum):
    """Whether an answer calls tools."""

    NONE = "none"
    AUTO = "auto"  # The model decides.
    REQUIRED = "required"  # At least one call, and nothing else.
    NAMED = "named"  # One call of the tool ToolUse.name, and nothing else.


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request, and how an answer may call them. ``parallel``: whether it may have
    more than one call."""

    tools: tuple[Tool, ...]
    mode: CallMode = CallMode.AUTO
    name: str = ""
    parallel: bool = True

    @property
    def calls_only(self) -> bool:
        """Whether an answer consists of calls alone, without text."""
        return self.mode in (CallMode.REQUIRED, CallMode.NAMED)


class FormatKind(StrEnum):
    """The notation in which a request gives an output format."""

    JSON_OBJECT = "json_object"  # Any JSON object.
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """The form that an answer must have. ``value`` depends on ``kind``: a JSON schema (a mapping,
    or a boolean), the text of a regular expression or a grammar, or a tuple of texts. ``param``:
    the request's field, for errors. ``strict``: refuse a schema that cannot be enforced completely.
    ``whitespace``: a regular expression for the white space between the parts of JSON; empty: none
    is allowed."""

    kind: FormatKind
    value: Any
    param: str = "response_format"
    strict: bool = True
    whitespace: str | None = None  # None: the server's default.


@dataclass(frozen=True, slots=True)
class ChatPrompt(PromptKind):
    """Messages, which the model's chat template renders, and the pictures in them, in order.
    ``size``: the work of rendering and encoding, in characters of text."""

    field: ClassVar[str] = "messages"
    need: ClassVar[str] = "the conversation needs"
    shorter: ClassVar[str] = "a shorter conversation"

    messages: Sequence[Message]
    size: int
    sources: tuple[ItemSource, ...] = ()
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = None
    reasoning_effort: str | None = None
    tools: tuple[Tool, ...] = ()  # The tools that the template shows to the model.
    chat_template: str | None = None  # Instead of the model's own.
    documents: Sequence[Mapping[str, str]] | None = None  # For the template.
    # Whether the tokenizer adds its own special tokens; None: only if the template writes no BOS.
    add_special_tokens: bool | None = None


@dataclass(frozen=True, slots=True)
class TextPrompt(PromptKind):
    """Text that goes to the model as it is. Special tokens in it are special, but placeholders of
    pictures are plain text. ``add_special_tokens``: whether the tokenizer adds its own, such as
    BOS. ``sources``: its pictures, one for each occurrence of ``marker`` in the text, in order."""

    field: ClassVar[str] = "prompt"
    need: ClassVar[str] = "the prompt needs"
    shorter: ClassVar[str] = "a shorter prompt"

    text: str
    add_special_tokens: bool = True
    sources: tuple[ItemSource, ...] = ()
    marker: str = ""

    @property
    def size(self) -> int:
        return len(self.text)


@dataclass(frozen=True, slots=True)
class TokenPrompt(PromptKind):
    """Token ids that go to the model as they are."""

    field: ClassVar[str] = TextPrompt.field
    need: ClassVar[str] = TextPrompt.need
    shorter: ClassVar[str] = TextPrompt.shorter
    sources: ClassVar[tuple[ItemSource, ...]] = ()

    token_ids: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.token_ids)


AnyPrompt = ChatPrompt | TextPrompt | TokenPrompt


def prompt_too_long(
    kind: type[PromptKind], max_tokens: int, needed: str, remedy: str = ""
) -> ContextLengthExceeded:
    """The error for a prompt that needs ``needed`` tokens where ``max_tokens`` fit. ``remedy``
    replaces the advice to send a shorter prompt."""
    return ContextLengthExceeded(
        f"{ContextLengthExceeded.lead}, {max_tokens} tokens; {kind.need} {needed}; "
        f"{remedy or f'send {kind.shorter}'}",
        param=kind.field,
    )


@dataclass(frozen=True, slots=True)
class Truncation:
    """Keeps the last ``tokens`` tokens of a prompt, or with ``first`` the first ones. UNLIMITED: as
    many as fit into the context."""

    tokens: int
    first: bool = False


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How a prompt is continued.

    ``max_tokens``: None: the model's default. ``max_tokens_field``: the request's field, for
    errors. ``shorten_to_fit``: lower ``max_tokens`` to what the context leaves instead of failing.
    ``top_logprobs``: the number of most likely tokens reported for each sampled one; None: no
    log-probabilities at all. ``top_logprobs_field``: the request's field, for errors.
    ``end_logprobs``: report them also for the token that ended a choice, whose text is not shown.
    ``prompt_logprobs``: as ``top_logprobs``, for every token of the prompt. ``echo``: begin the
    answer with the prompt, and with ``top_logprobs`` report its tokens' log-probabilities.
    """

    sampling: SamplingFields
    max_tokens: int | None = None
    max_tokens_field: str = "max_tokens"
    shorten_to_fit: bool = False
    top_logprobs: int | None = None
    top_logprobs_field: str = "top_logprobs"
    end_logprobs: bool = False
    prompt_logprobs: int | None = None
    echo: bool = False
    priority: int | None = None  # None: the caller's default.
    cache_salt: str = ""
    running_usage: bool = False  # Every event carries the usage so far.
    truncation: Truncation | None = None
    token_ids: bool = False  # The answer includes the token ids of the prompt and of the output.
    tokens_as_ids: bool = False  # Log-probabilities show tokens as ``token_id:ID``.
    format: OutputFormat | None = None
    tools: ToolUse | None = None
    reasoning: bool = True  # The answer shows the model's reasoning.


@dataclass
class Job:
    """One request to the pipeline. ``prompt`` is dropped once it is rendered, because base64 in its
    messages may be most of the memory that the request holds."""

    prompt: AnyPrompt | None
    options: GenerationOptions
    request_id: str
    caller: Caller
    deadline: Deadline
    ticket: Ticket
    body_bytes: int = 0  # Bytes that the ticket holds for the prompt.
    watch: Stopwatch = field(default_factory=Stopwatch)
    system_fingerprint: str | None = None  # Set before the first event.
    # Parts of formats and tools that are not enforced; set before the first event.
    not_enforced: Sequence[str] = ()

    def drop_prompt(self) -> None:
        """Frees the prompt and the body's bytes, once the prompt is rendered."""
        self.prompt = None
        self.ticket.free_bytes(self.body_bytes)
