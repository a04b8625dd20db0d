"""Renders messages to a prompt: content in the template's form, rendering, provenance of special
tokens, tokenization. Knows nothing of HTTP, media bytes or workers."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from gateway.api.schemas.messages import (
    DOCUMENTS,
    REASONING_EFFORT,
    Message,
    RefusalPart,
    TextPart,
    call_arguments,
)
from gateway.edge.limits import MAX_PROMPT_CHARACTERS
from gateway.job import ChatPrompt, Tool, prompt_too_long
from gateway.prompt import placeholders
from gateway.prompt.placeholders import ExpandedPrompt
from gateway.prompt.rendering import Rendering
from gateway.prompt.template import ChatTemplate, Renderable, clock, load_template
from gateway.prompt.tokenizer import Tokenizer
from opticnerve.errors import ConfigError, ContextLengthExceeded, InvalidRequest
from opticnerve.media.plan import Plan
from opticnerve.models.family import Layout

RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "strftime_now"})


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A rendered chat, with one placeholder for each item."""

    prompt: str  # Equal to Hugging Face's apply_chat_template(tokenize=False).
    token_ids: tuple[int, ...]
    num_items: int
    contexts: int = 1  # The longest prompt accepted, in context lengths.


@dataclass(frozen=True, slots=True)
class Forms:
    """The forms of content that a template accepts for one role."""

    string: bool
    parts: bool


class ChatRenderer:
    """Renders and tokenizes chats for one checkpoint. Thread-safe: rendering keeps no state."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Renderable,
        layout: Layout,
        default_system: str = "",
    ) -> None:
        """``default_system``: the system message of chats that have none. Raises ConfigError for a
        template that does not show it."""
        self.tokenizer = tokenizer
        self.template = template
        self.layout = layout
        self.aliases = tokenizer.aliases
        names = tokenizer.named
        self._named = dict(names)
        self._named_hidden = {name: self.aliases.hide(text) for name, text in names.items()}
        self._forms = {role: self._probe(role) for role in ("system", "user", "assistant", "tool")}
        self.builds_pieces = self._probe_pieces()
        self._default_system = default_system
        if default_system and self._forms["system"] == Forms(False, False):
            raise ConfigError(
                "--default-system-prompt: the model's chat template shows no system message; leave "
                "it out, or give another --chat-template",
                param="default_system_prompt",
            )

    @classmethod
    def load(
        cls,
        path: Path,
        layout: Layout,
        chat_template: str | None = None,
        default_system_prompt: str | None = None,
    ) -> ChatRenderer:
        """From a checkpoint directory; the last arguments are the flags of these names. Raises
        CheckpointError and ConfigError."""
        spelled = placeholders.spellings(path, layout)
        tokenizer = Tokenizer.load(path, spelled.values())
        placeholders.check_spellings(spelled, layout.placeholder_ids, tokenizer)
        source = load_template(path, tokenizer.config, chat_template)
        default_system = _default_system(default_system_prompt or "")
        return cls(tokenizer, ChatTemplate(source, tokenizer.aliases), layout, default_system)

    def with_template(self, template: Renderable) -> ChatRenderer:
        """A renderer with another template. It adds the same default system message if the template
        shows one. Raises what ``template`` raises."""
        made = ChatRenderer(self.tokenizer, template, self.layout)
        if made._forms["system"] != Forms(False, False):
            made._default_system = self._default_system
        return made

    def render(self, asked: ChatPrompt, contexts: int = 1) -> RenderedChat:
        """``contexts``: the longest prompt accepted, in context lengths. Raises InvalidRequest, and
        ContextLengthExceeded for messages that are too long."""
        messages = self._with_system(self.normalise(asked.messages))
        variables = self._variables(asked)
        if characters(messages) + characters(variables) > MAX_PROMPT_CHARACTERS:
            raise self._too_long()
        num_items = _count_items(messages)
        rendering = Rendering(self, messages, variables, asked.continue_final_message, contexts)
        prompt, hidden = rendering.run()
        special = asked.add_special_tokens
        if special is None:
            special = not self._starts_with_bos(hidden)
        hidden = placeholders.rewrite(hidden, self.layout, self.tokenizer)
        ids = self.tokenizer.encode(hidden, add_special_tokens=special)
        placeholders.check_count(self.layout, ids, num_items)
        return RenderedChat(prompt, tuple(ids), num_items, contexts)

    def check_length(self, prompt: str, contexts: int) -> None:
        """Raises ContextLengthExceeded for a prompt that is certainly too long."""
        if self.tokenizer.exceeds(prompt, self.layout.max_positions * contexts):
            raise self._too_long()

    def _too_long(self) -> ContextLengthExceeded:
        return prompt_too_long(ChatPrompt, self.layout.max_positions, "many more")

    def build(self, rendered: RenderedChat, plans: Sequence[Plan]) -> ExpandedPrompt:
        """The prompt with every placeholder expanded; ``plans`` in the order of the items. Raises
        ContextLengthExceeded for a prompt that no worker could take."""
        return placeholders.expand(
            self.layout,
            rendered.prompt,
            rendered.token_ids,
            plans,
            self.layout.max_positions,
            rendered.contexts,
        )

    def _starts_with_bos(self, hidden: str) -> bool:
        """Whether the template wrote BOS. If not, the tokenizer adds special tokens, as in Hugging
        Face's processors."""
        bos = self._named_hidden.get("bos_token")
        return bos is not None and hidden.startswith(bos)

    # ---- content in the template's form

    def normalise(self, messages: Iterable[Message]) -> list[dict[str, Any]]:
        """Messages for the template: plain values, no None, pictures as
        ``{"type": "image"}``. Raises InvalidRequest."""
        return [self._message(message, f"messages[{i}]") for i, message in enumerate(messages)]

    def _with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages, after the default system message if they have none."""
        if not self._default_system or any(each["role"] == "system" for each in messages):
            return messages
        content = self._content(self._default_system, "system")
        return [{"role": "system", "content": content}, *messages]

    def _message(self, message: Message, path: str) -> dict[str, Any]:
        role = "system" if message.role == "developer" else message.role
        plain: dict[str, Any] = {"role": role}
        content = message.content
        if content is None and not message.tool_calls:
            content = ""  # Templates expect every message to have content.
        if content is not None:
            plain["content"] = self._content(content, role)
        for name in ("name", "tool_call_id", "refusal"):
            value = getattr(message, name)
            if value is not None:
                plain[name] = value
        reasoning = message.reasoning_content or message.reasoning
        if reasoning is not None:
            plain |= {"thinking": reasoning, "reasoning_content": reasoning}
        if message.tool_calls:
            plain["tool_calls"] = [
                {
                    "type": "function",
                    **({} if call.id is None else {"id": call.id}),
                    "function": {
                        "name": call.function.name,
                        "arguments": call_arguments(call, f"{path}.tool_calls[{i}]"),
                    },
                }
                for i, call in enumerate(message.tool_calls)
            ]
        return plain

    def _content(self, content: str | Sequence[Any], role: str) -> Any:
        forms = self._forms.get(role, Forms(True, True))
        if isinstance(content, str):
            if forms.parts and not forms.string:
                return [{"type": "text", "text": content}]
            return content
        parts = [_part(part) for part in content]
        if forms.string and not forms.parts and all(part["type"] == "text" for part in parts):
            return "\n".join(part["text"] for part in parts)
        return parts

    def _variables(self, asked: ChatPrompt) -> dict[str, Any]:
        given = asked.chat_template_kwargs or {}
        for name in given:
            taken = RESERVED | self._named.keys() | self.template.reserved_names
            if name in taken or not name.isidentifier():
                param = "chat_template_kwargs"
                raise InvalidRequest(
                    f"{param}: {name[:80]} cannot be set by a request", param=param
                )
        effort: dict[str, Any] = {}
        if asked.reasoning_effort is not None and REASONING_EFFORT in self.template.variables:
            effort[REASONING_EFFORT] = asked.reasoning_effort
        if asked.reasoning_effort == "none" and "enable_thinking" in self.template.variables:
            effort["enable_thinking"] = False
        shown: dict[str, Any] = {DOCUMENTS: asked.documents} if asked.documents else {}
        if asked.tools:
            shown["tools"] = [as_json(tool) for tool in asked.tools]
        return {**effort, **given, **shown, "add_generation_prompt": _wants_prompt(asked)}

    # ---- probing the template

    def _probe(self, role: str) -> Forms:
        """Whether the template writes a text unchanged, given as a string and as parts."""
        text = f"probe{secrets.token_hex(8)}"
        parts = [{"type": "text", "text": text}]
        return Forms(self._shows(role, text, text), self._shows(role, parts, text))

    def _shows(self, role: str, content: Any, text: str) -> bool:
        shown = False
        for messages in _probes(role, content):
            try:
                out = self._plain(messages, {"add_generation_prompt": True})
            except InvalidRequest:
                continue
            shown = shown or (text in out and "'type'" not in out and '"type"' not in out)
        return shown

    def _probe_pieces(self) -> bool:
        """Whether the template builds special tokens from pieces, which are then not aliases."""
        for role in ("user", "system", "assistant"):
            for messages in _probes(role, self._content("x", role)):
                try:
                    values = {"add_generation_prompt": True, **self.shared(hidden=True)}
                    out = self.template.render(
                        self.template.written, {"messages": messages, **values}
                    )
                except InvalidRequest:
                    continue
                if self.aliases.occur_in(out):
                    return True
        return False

    def shared(self, *, hidden: bool) -> dict[str, Any]:
        """The template's variables that do not depend on the request; with ``hidden``, special
        tokens as aliases."""
        names = self._named_hidden if hidden else self._named
        return {**names, "tools": None, "documents": None, "strftime_now": clock(datetime.now())}

    def _plain(self, messages: Any, variables: Mapping[str, Any]) -> str:
        values = {**self.shared(hidden=False), **variables, "messages": messages}
        return self.template.render(self.template.plain, values)


def _default_system(given: str) -> str:
    """The text of ``--default-system-prompt``: read from a file if it begins with @, else the text
    itself. Raises ConfigError."""
    if not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text(encoding="utf-8").rstrip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--default-system-prompt: {given[1:][:200]!r} cannot be read: {error}",
            param="default_system_prompt",
        ) from error


def _wants_prompt(asked: ChatPrompt) -> bool:
    return asked.add_generation_prompt and not asked.continue_final_message


def as_json(tool: Tool) -> dict[str, Any]:
    """A tool in the form in which Hugging Face gives it to templates, which is OpenAI's."""
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters is not None:
        function["parameters"] = dict(tool.parameters)
    return {"type": "function", "function": function}


def _part(part: Any) -> dict[str, str]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if isinstance(part, RefusalPart):
        return {"type": "text", "text": part.refusal}
    return {"type": "image"}


def characters(value: Any) -> int:
    """The number of characters in all strings of plain messages."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(characters, value.values()))
    return sum(map(characters, value)) if isinstance(value, list) else 0


def _count_items(messages: Iterable[Mapping[str, Any]]) -> int:
    contents = (message.get("content") for message in messages)
    return sum(
        part["type"] == "image"
        for content in contents
        if isinstance(content, list)
        for part in content
    )


def _probes(role: str, content: Any) -> list[list[dict[str, Any]]]:
    """Test chats with ``content`` in a message of ``role``. The other messages are tried in each
    form of content, since a template may accept only one."""
    chats = []
    for form in ("x", [{"type": "text", "text": "x"}]):
        user = {"role": "user", "content": form}
        probe = {"role": role, "content": content}
        if role == "user":
            chats.append([probe])
        elif role == "system":
            chats += [[probe, user], [probe]]
        else:
            chats += [[user, probe], [user, probe, user]]
    return chats
