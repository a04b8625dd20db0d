"""Renders one chat with special tokens as aliases, so that those in a user's text stay text."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from gateway.prompt.special_token_guard import Marks
from gateway.prompt.template import clock
from opticnerve.errors import ContextLengthExceeded, InvalidRequest

if TYPE_CHECKING:
    from gateway.prompt.renderer import ChatRenderer

CONTINUE = "\ue0fd"  # Begins the tag that marks the end of a message to be continued.


class Rendering:
    """Renders the messages of one chat two or three times; ``special_token_guard`` says why."""

    def __init__(
        self,
        renderer: ChatRenderer,
        messages: list[dict[str, Any]],
        variables: Mapping[str, Any],
        continue_final: bool,
        contexts: int,
    ) -> None:
        self._renderer = renderer
        self._template = renderer.template
        self._aliases = renderer.aliases
        self._messages = messages
        self._variables = variables
        self._tag = f"{CONTINUE}{secrets.randbelow(10**18):018d}{CONTINUE} "
        self._final = _final_text(messages) if continue_final else None
        self._contexts = contexts
        self._now = clock(datetime.now())

    def run(self) -> tuple[str, str]:
        """(the prompt as Hugging Face renders it, the same with aliases for special tokens).

        Raises InvalidRequest, also if the template mixes user text and special tokens so that
        their provenance cannot be found.
        """
        prompt = self._render(self._template.plain, self._messages, self._variables, hidden=False)
        if self._aliases.head in prompt:
            raise InvalidRequest("the messages contain reserved characters", param="messages")
        if not _is_text(prompt):
            raise InvalidRequest(
                "the chat template wrote half a surrogate pair, which is no text; it has to write "
                "whole characters",
                param="messages",
            )
        # Checked here because the steps below take several times as long.
        self._renderer.check_length(prompt, self._contexts)
        template, hidden = self._aliased(prompt)
        if hidden is not None and not self._aliases.occur_in(hidden):
            return prompt, hidden
        marked = self._marked(template, prompt)
        if marked is not None:
            return prompt, marked
        if hidden is not None and not self._renderer.builds_pieces:
            return prompt, hidden  # All special tokens are aliases.
        raise InvalidRequest(
            "the messages contain text that spells this model's special tokens, and its chat "
            "template changes text so that the two cannot be told apart; spell them differently",
            param="messages",
        )

    def _aliased(self, prompt: str) -> tuple[Any, str | None]:
        """The first template with aliases whose rendering reveals the same prompt, and that
        rendering."""
        for template in (self._template.written, self._template.everywhere):
            try:
                hidden = self._render(template, self._messages, self._variables, hidden=True)
            except ContextLengthExceeded:
                raise
            except InvalidRequest:
                continue
            if self._aliases.reveal(hidden) == prompt:
                return template, hidden
        return self._template.plain, None

    def _marked(self, template: Any, prompt: str) -> str | None:
        """The prompt with an alias for every special token that is still whole when user text is
        interrupted; None if the template treats interrupted text differently."""
        specials = self._aliases.of
        given = json.dumps([self._messages, self._variables], ensure_ascii=False, default=str)
        marks = Marks(specials, prompt + self._template.source + given)
        hidden_names = template is not self._template.plain
        try:
            out = self._render(
                template,
                marks.put(self._messages),
                marks.put_values(self._variables),
                hidden=hidden_names,
            )
        except ContextLengthExceeded:
            raise
        except InvalidRequest:
            return None
        hidden = marks.remove(self._aliases.hide(out))
        return hidden if self._aliases.reveal(hidden) == prompt else None

    def _render(
        self,
        template: Any,
        messages: list[dict[str, Any]],
        variables: Mapping[str, Any],
        *,
        hidden: bool,
    ) -> str:
        if self._final is not None:
            messages = _tagged(messages, self._tag)
        values = {
            **self._renderer.shared(hidden=hidden),
            "strftime_now": self._now,
            **variables,
            "messages": messages,
        }
        out = self._template.render(template, values)
        return out if self._final is None else self._cut(out)

    def _cut(self, out: str) -> str:
        """The text up to the end of the message to be continued. White space at its end is kept
        only if the template keeps it."""
        at = out.rfind(self._tag.strip())
        if at < 0:
            raise InvalidRequest(
                "continue_final_message: the model's chat template does not show the last message",
                param="continue_final_message",
            )
        return out[:at] if out[at : at + len(self._tag)] == self._tag else out[:at].rstrip()


def _is_text(written: str) -> bool:
    """Whether it can be encoded: templates may write what JSON and files cannot hold."""
    try:
        written.encode()
    except UnicodeEncodeError:
        return False
    return True


def _final_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text that continue_final_message continues. Raises InvalidRequest when there is none."""
    content = messages[-1].get("content")
    if isinstance(content, list):
        content = next((p["text"] for p in reversed(content) if p["type"] == "text"), None)
    if not content:
        raise InvalidRequest(
            "continue_final_message: the last message has no text to continue",
            param="continue_final_message",
        )
    return str(content)


def _tagged(messages: list[dict[str, Any]], tag: str) -> list[dict[str, Any]]:
    """The messages with ``tag`` at the end of the last one's text."""
    last = dict(messages[-1])
    content = last["content"]
    if isinstance(content, str):
        last["content"] = content + tag
    else:
        at = max(i for i, part in enumerate(content) if part["type"] == "text")
        part = {**content[at], "text": content[at]["text"] + tag}
        last["content"] = [*content[:at], part, *content[at + 1 :]]
    return [*messages[:-1], last]
