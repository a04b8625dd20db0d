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

UNLIMITED = -1  # The value of max_tokens for as many tokens as the context leaves.


class PromptKind:
    """How errors speak about a prompt of one kind."""

    __slots__ = ()

    field: ClassVar[str]  # The request's field.
    need: ClassVar[str]  # Such as "the prompt needs", before a number of tokens.
    shorter: ClassVar[str]  # Such as "a shorter prompt".


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. ``parameters``: the JSON schema of its arguments, an
    object's; None: any object. ``strict``: whether the arguments must follow the schema even if the
    model is free to call or not."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False


class CallMode(StrEnum):
    """Whether an answer calls tools."""

    NONE = "none"
    AUTO = "auto"  # The model decides.
    REQUIRED = "required"  # One call at least, and nothing else.
    NAMED = "named"  # One call, of ToolUse.name, and nothing else.


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
        """Whether an answer is calls, and no text."""
        return self.mode in (CallMode.REQUIRED, CallMode.NAMED)


class FormatKind(StrEnum):
    """What an output format is given as."""

    JSON_OBJECT = "json_object"  # Any JSON object.
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """The form that an answer must have. ``value``: a JSON schema (a mapping, or a boolean), the
    text of a regular expression or a grammar, or a tuple of texts, by ``kind``. ``param``: the
    request's field, for errors. ``strict``: a schema that cannot be enforced as a whole is refused.
    ``whitespace``: a regular expression of what may stand between the parts of JSON; empty:
    nothing."""

    kind: FormatKind
    value: Any
    param: str = "response_format"
    strict: bool = True
    whitespace: str | None = None  # None: this server's.


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
    tools: tuple[Tool, ...] = ()  # Those that the template shows to the model.
    chat_template: str | None = None  # Instead of the model's own.
    documents: Sequence[Mapping[str, str]] | None = None  # Likewise.
    # Whether the tokenizer adds its own special tokens; None: if the template writes no BOS.
    add_special_tokens: bool | None = None


@dataclass(frozen=True, slots=True)
class TextPrompt(PromptKind):
    """Text that goes to the model as it is. Special tokens in it are special, except that
    placeholders of pictures are text. ``add_special_tokens``: whether the tokenizer adds its own,
    such as BOS. ``sources``: its pictures, in the order of the places in it that ``marker`` marks,
    of which there are as many."""

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
    """The error of a prompt that needs ``needed`` tokens, where ``max_tokens`` fit. ``remedy``
    replaces the advice to send a shorter one."""
    return ContextLengthExceeded(
        f"{ContextLengthExceeded.lead}, {max_tokens} tokens; {kind.need} {needed}; "
        f"{remedy or f'send {kind.shorter}'}",
        param=kind.field,
    )


@dataclass(frozen=True, slots=True)
class Truncation:
    """How many tokens of a prompt are kept: the last ones, or with ``first`` the first ones.
    ``tokens``: UNLIMITED for as many as the context has room for."""

    tokens: int
    first: bool = False


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How a prompt is continued.

    ``max_tokens``: None stands for the model's default. ``max_tokens_field``: the request's field
    that errors about it name. ``shorten_to_fit``: whether an answer may be shorter than
    ``max_tokens`` where the context leaves no more; otherwise such a job fails. ``top_logprobs``:
    how many of the most likely tokens have their log-probability in the answer, besides the sampled
    one; None: no log-probabilities at all. ``top_logprobs_field``: the request's field of that
    number. ``end_logprobs``: whether the token that ended a choice, whose text is not shown, has
    them too. ``prompt_logprobs``: as ``top_logprobs``, for every token of the prompt. ``echo``: the
    answer has the prompt, and with ``top_logprobs`` its tokens' log-probabilities.
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
    running_usage: bool = False  # Every event has the usage so far.
    truncation: Truncation | None = None
    token_ids: bool = False  # The answer has the ids of its tokens, and of the prompt's.
    tokens_as_ids: bool = False  # Log-probabilities spell tokens as ``token_id:`` and the id.
    format: OutputFormat | None = None
    tools: ToolUse | None = None
    reasoning: bool = True  # The answer shows what the model thinks.


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
    not_enforced: Sequence[str] = ()  # Of formats and tools; set before the first event too.

    def drop_prompt(self) -> None:
        """Frees the prompt and the body's bytes, once the prompt is rendered."""
        self.prompt = None
        self.ticket.free_bytes(self.body_bytes)
