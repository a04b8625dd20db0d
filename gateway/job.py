"""What an API asks of the pipeline: a prompt of one kind, options for its generation, a caller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from gateway.clock import Stopwatch

if TYPE_CHECKING:
    from gateway.api.schemas.messages import ItemSource, Message
    from gateway.api.schemas.sampling import SamplingFields
    from gateway.clock import Deadline
    from gateway.edge.admission import Ticket
    from gateway.edge.auth import Caller

UNLIMITED = -1  # Of max_tokens: as many as the context leaves.


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Messages, which the model's chat template renders, and the pictures in them, in order."""

    field: ClassVar[str] = "messages"
    need: ClassVar[str] = "the messages need"
    shorter: ClassVar[str] = "shorter messages"

    messages: Sequence[Message]
    size: int
    sources: tuple[ItemSource, ...] = ()
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = None
    reasoning_effort: str | None = None


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text that goes to the model as it is. Special tokens in it are special, but those that stand
    for pictures are text. ``add_special_tokens``: such as the tokenizer puts before a text."""

    field: ClassVar[str] = "prompt"
    need: ClassVar[str] = "the prompt needs"
    shorter: ClassVar[str] = "a shorter prompt"

    text: str
    add_special_tokens: bool = True

    @property
    def size(self) -> int:
        return len(self.text)


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids that go to the model as they are."""

    field: ClassVar[str] = TextPrompt.field
    need: ClassVar[str] = TextPrompt.need
    shorter: ClassVar[str] = TextPrompt.shorter

    token_ids: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.token_ids)


AnyPrompt = ChatPrompt | TextPrompt | TokenPrompt
"""``field``: the request's field that errors name; ``need`` and ``shorter``: words for them.
``size``: what there is to render and encode, in characters of text or in ids."""


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How a prompt is continued.

    ``max_tokens``: None: the model's default. ``top_logprobs``: of how many of the most likely
    tokens log-probabilities are wanted, besides the sampled one's; None: no log-probabilities at
    all. Errors about ``max_tokens`` name the request's field ``max_tokens_field``.
    """

    sampling: SamplingFields
    max_tokens: int | None = None
    max_tokens_field: str = "max_tokens"
    top_logprobs: int | None = None
    priority: int | None = None  # None: the caller's default.
    cache_salt: str = ""
    running_usage: bool = False  # Every event has the usage so far.


@dataclass
class Job:
    """One request on its way. The pipeline drops ``prompt`` once it is rendered: base64 in its
    messages may be most of what the request holds."""

    prompt: AnyPrompt | None
    options: GenerationOptions
    request_id: str
    caller: Caller
    deadline: Deadline
    ticket: Ticket
    body_bytes: int = 0  # Bytes that the ticket holds for the prompt.
    watch: Stopwatch = field(default_factory=Stopwatch)
    system_fingerprint: str | None = None  # Known once the first event has come.

    def drop_prompt(self) -> None:
        """The prompt is rendered: nothing of the request's body is needed any more."""
        self.prompt = None
        self.ticket.free_bytes(self.body_bytes)
