"""How models write calls of tools: what the forms share."""

from __future__ import annotations

import json
import string
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from gateway.edge.limits import MAX_TOOL_NAME
from gateway.grammar_bounds import check_schema
from gateway.job import CallMode, Tool, ToolUse
from gateway.output.calls import json_text
from gateway.output.reader import SPACES, Malformed, Reader, SectionKind, Steps

NAME_CHARACTERS = frozenset(string.ascii_letters + string.digits + "_-.:/")
STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""The spacing of constrained arguments: as templates write earlier calls."""
OPENING_KEYS = {"additionalProperties", "unevaluatedProperties", "patternProperties", "$ref"}
OPENING_KEYS |= {"allOf", "anyOf", "oneOf"}

Mark = Callable[[str], str]
"""Makes a grammar's reference to a marker: a token, or text."""


class CallForm(ABC):
    """One form of calls. Its grammar is Lark in llguidance's dialect."""

    name: ClassVar[str]
    markers: ClassVar[tuple[str, ...]] = ()  # Shown to the reader even if they are special tokens.
    trigger: ClassVar[str] = ""  # The marker that begins a call within text; empty: none.

    @abstractmethod
    def reader(self, names: frozenset[str]) -> Reader:
        """A reader of one choice. ``names``: the tools' names."""

    @abstractmethod
    def rules(self, tools: list[Tool], mark: Mark, *, several: bool) -> list[str]:
        """A grammar's rules, in which ``calls`` is one call, or with ``several`` any number. They
        may refer to ``begin``, the rule of the trigger."""

    def call_id(self) -> str:
        return f"call_{uuid.uuid4().hex[:24]}"

    def grammar(self, use: ToolUse, mark: Mark) -> str:
        """The grammar of calls and nothing else; with CallMode.AUTO, of text in which each call is
        to a tool of ``use``, with any arguments unless the tool is strict. Raises InvalidRequest
        for schemas that are too large."""
        free = use.mode is CallMode.AUTO
        tools = [
            tool for tool in use.tools if use.mode is not CallMode.NAMED or tool.name == use.name
        ]
        tools = [Tool(tool.name) if free and not tool.strict else tool for tool in tools]
        several = use.parallel and use.mode is not CallMode.NAMED
        check_schema([tool.parameters for tool in tools], "tools")
        rules = self.rules(tools, mark, several=several)
        trigger = mark(self.trigger) if self.trigger else '""'
        if not free:
            return "\n".join(["start: calls", f"begin: {trigger}", *rules])
        lazy = "[lazy]" if trigger == quoted(self.trigger) else ""
        text = ["start: calls* TEXT", "TEXT: /(?s:.*)/", f"begin{lazy}: TEXT {trigger}"]
        return "\n".join([*text, *rules])


def quoted(text: str) -> str:
    """``text`` as a literal in a grammar."""
    return json.dumps(text, ensure_ascii=False)


def arguments(tool: Tool) -> str:
    """A tool's arguments, in a grammar. If the schema lists properties without saying whether
    others are allowed, none are: functions rarely take any."""
    schema = tool.parameters or {}
    closed = {} if schema.keys() & OPENING_KEYS else {"additionalProperties": False}
    closed = closed if "properties" in schema else {}
    return json_value({"type": "object", **closed, **schema, **library_options(tool)})


def json_value(schema: Mapping[str, Any]) -> str:
    """A value of a schema, in a grammar."""
    return f"%json {json.dumps(schema, ensure_ascii=False)}"


def library_options(tool: Tool) -> Mapping[str, Any]:
    """How the grammar library reads a tool's schema. Keywords that it does not know are errors of a
    strict tool, and have no effect on others."""
    return {"x-guidance": {**STYLE, "lenient": not tool.strict}}


def json_rules(tools: list[Tool], arguments_key: str) -> list[str]:
    """The rule ``call``: a call as a JSON object."""
    lines = ["call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
    for i, tool in enumerate(tools):
        head = quoted(f'{{"name": {quoted(tool.name)}, "{arguments_key}": ')
        lines.append(f'call_{i}: {head} arguments_{i} "}}"')
        lines.append(f"arguments_{i}: {arguments(tool)}")
    return lines


class CallReader(Reader):
    """Reads text and calls. What turns out not to be a call is text."""

    arguments_keys: ClassVar[frozenset[str]] = frozenset({"arguments", "parameters"})

    def __init__(self, known: frozenset[str] | None = None) -> None:
        """``known``: names of tools; text with another name is no call. None: any name."""
        super().__init__()
        self._known = known
        self._begun = self._ended = False  # Of the call that is being read.
        self._after_call = False  # Only white space has come since a call.

    def show(self, text: str) -> None:
        super().show(text)
        if self._after_call and text.strip(SPACES):
            self._after_call = False

    def attempt(self, steps: Steps[None]) -> Steps[None]:
        """Reads calls. If the text departs from their form, it counts as text: from the attempt's
        beginning, or, if a call has been shown already, from that point on, and the call stays
        incomplete."""
        self._begun = self._ended = False
        self.hold()
        try:
            yield from steps
        except Malformed:
            held = self.release()
            shown = self._begun and not self._ended  # As the beginning of a call.
            closes = self._ended and not self.char  # The text ended within what closes the call.
            if not shown and not closes:
                self.show(held)
        else:
            self.release()

    def begin_call(self, name: str) -> None:
        self.drop_spaces()
        self.release()
        self.emit(SectionKind.CALL, name)
        self._begun, self._ended = True, False
        self._after_call = True

    def argue(self, text: str) -> None:
        self.emit(SectionKind.ARGUMENTS, text)

    def end_call(self) -> None:
        """The arguments are complete; holds what closes the call in its form."""
        self.emit(SectionKind.CALL_END)
        self._ended = True
        self.hold()

    @property
    def is_done(self) -> bool:
        return super().is_done and not self._after_call

    def show_spaces(self) -> None:
        if self._after_call:
            self.drop_spaces()
        super().show_spaces()

    def name(self, name: str) -> str:
        """Returns ``name``. Raises Malformed if it is not the name of a tool."""
        right = self._known is None or name in self._known
        if not right or not 0 < len(name) <= MAX_TOOL_NAME or not NAME_CHARACTERS.issuperset(name):
            raise Malformed
        return name

    # ---- a call as a JSON object

    def json_call(self) -> Steps[None]:
        """``{"name": ..., "arguments": {...}}``, the keys in any order."""
        self._begun = self._ended = False
        name, early = "", ""  # Arguments that come before the name.
        yield from self.literal("{")
        yield from self.spaces()
        while True:
            key = yield from json_text.captured(self)
            yield from self.spaces()
            yield from self.literal(":")
            yield from self.spaces()
            if key == "name" and not name:
                name = self.name((yield from json_text.captured(self)))
                self._whole(name, early)
            elif key in self.arguments_keys and not early and not self._begun:
                early = yield from self.json_arguments(name)
            else:
                self.other_key(key)
                yield from json_text.value(self, len)
            yield from self.spaces()
            if self.char != ",":
                break
            yield
            yield from self.spaces()
        if not self._ended:
            raise Malformed
        if self.char == "}":  # Models may leave the arguments out.
            yield

    def other_key(self, key: str) -> None:
        """Raises Malformed for a key that a call does not have."""

    def json_arguments(self, name: str) -> Steps[str]:
        """Arguments as an object, as JSON in a string, or null. Returns them if the name is not
        known yet."""
        if self.char == "{" and name:
            self.begin_call(name)
            yield from json_text.value(self, self.argue)
            self.end_call()
            return ""
        if self.char == '"':
            text = yield from json_text.captured(self)
        else:
            pieces: list[str] = []
            yield from json_text.value(self, pieces.append)
            text = "".join(pieces)
        text = _object(text)
        self._whole(name, text)
        return text

    def _whole(self, name: str, arguments: str) -> None:
        """A call whose arguments are all there."""
        if name and arguments:
            self.begin_call(name)
            self.argue(arguments)
            self.end_call()


def _object(text: str) -> str:
    """The text of an object; null and nothing stand for an empty one. Raises Malformed."""
    try:
        found = json.loads(text or "null")
    except (ValueError, RecursionError):
        raise Malformed from None
    if found is None:
        return "{}"
    if not isinstance(found, dict):
        raise Malformed
    return text
