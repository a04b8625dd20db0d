"""``[TOOL_CALLS]``, after which Mistral's models write a list of calls in JSON, or since their
tokenizer's version 11 each call as ``[TOOL_CALLS]name[ARGS]{...}``."""

from __future__ import annotations

import secrets
import string
from typing import ClassVar

from gateway.edge.limits import MAX_TOOL_NAME
from gateway.job import Tool
from gateway.output.calls import json_text
from gateway.output.calls.form import (
    NAME_CHARACTERS,
    CallForm,
    CallReader,
    Mark,
    arguments,
    json_rules,
    quoted,
)
from gateway.output.reader import Malformed, Reader, Steps

CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
ID_LENGTH = 9  # These models' templates refuse ids of another form.
ALPHANUMERIC = string.ascii_letters + string.digits


class Mistral(CallForm):
    """The list of calls."""

    name: ClassVar[str] = "mistral"
    markers: ClassVar[tuple[str, ...]] = (CALLS, ARGS, CALL_ID)
    trigger: ClassVar[str] = CALLS

    def reader(self, names: frozenset[str]) -> Reader:
        return MistralReader()

    def rules(self, tools: list[Tool], mark: Mark, *, several: bool) -> list[str]:
        more = ' (", " call)*' if several else ""
        return [f'calls: begin " "? "[" call{more} "]"', *json_rules(tools, "arguments")]

    def call_id(self) -> str:
        return "".join(secrets.choice(ALPHANUMERIC) for _ in range(ID_LENGTH))


class MistralNamed(Mistral):
    """A marker for each call, and for its arguments."""

    def rules(self, tools: list[Tool], mark: Mark, *, several: bool) -> list[str]:
        lines = [
            f"calls: call{'+' if several else ''}",
            "call: begin (" + " | ".join(f"call_{i}" for i in range(len(tools))) + ")",
        ]
        for i, tool in enumerate(tools):
            lines.append(f"call_{i}: {quoted(tool.name)} {mark(ARGS)} arguments_{i}")
            lines.append(f"arguments_{i}: {arguments(tool)}")
        return lines


class MistralReader(CallReader):
    def read(self) -> Steps[None]:
        while self.char:
            yield from self.text(CALLS[0])
            yield from self.attempt(self._calls())

    def _calls(self) -> Steps[None]:
        yield from self.literal(CALLS)
        yield from self.spaces()
        if self.char == "[":
            yield
            yield from self._list()
        elif self.char == "{":
            yield from self.json_call()
        else:
            yield from self._named()

    def _list(self) -> Steps[None]:
        while True:
            yield from self.spaces()
            yield from self.json_call()
            yield from self.spaces()
            if self.char != ",":
                break
            yield
        yield from self.literal("]")

    def _named(self) -> Steps[None]:
        name = self.name((yield from self.word(NAME_CHARACTERS, MAX_TOOL_NAME)))
        if self.char == "[":
            yield
            if self.char == CALL_ID[1]:
                yield from self.literal(CALL_ID[1:])
                yield from self.word(NAME_CHARACTERS, MAX_TOOL_NAME)
                yield from self.literal("[")
            yield from self.literal(ARGS[1:])
        yield from self.spaces()
        if self.char != "{":
            raise Malformed
        self.begin_call(name)
        yield from json_text.value(self, self.argue)
        self.end_call()
