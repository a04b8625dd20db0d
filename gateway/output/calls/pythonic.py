"""``[f(a=1), g(b='x')]``: calls as Python writes them, with literals as arguments. The answer is
calls and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from gateway.edge.limits import MAX_TOOL_NAME
from gateway.grammar_bounds import schema_work
from gateway.job import Tool
from gateway.output.calls import python_text
from gateway.output.calls.form import (
    NAME_CHARACTERS,
    CallForm,
    CallReader,
    Mark,
    arguments,
    json_value,
    library_options,
    quoted,
)
from gateway.output.reader import Malformed, Reader, Steps

TAGS = ("<|python_start|>", "<|python_tag|>")
END_TAG = "<|python_end|>"
DEFINITIONS = ("$defs", "definitions")
PLAIN_KEYS = {"type", "properties", "required", "additionalProperties", "title", "description"}
PLAIN_KEYS |= {"$schema", *DEFINITIONS}
MOST_KEYWORDS = 100  # Of all tools together; a grammar of many rules takes long to compile.
MOST_DEFINITIONS = 4_000  # Characters of a schema's definitions, which each keyword repeats.
MOST_REPEATED_WORK = 50_000  # Microseconds of compiling the repeated definitions, for all tools.
REFERENCE = re.compile(r'"\$ref": "(?!#/(?:\$defs|definitions)/)')  # To no definition.


class Pythonic(CallForm):
    name: ClassVar[str] = "pythonic"
    markers: ClassVar[tuple[str, ...]] = (*TAGS, END_TAG)

    def reader(self, names: frozenset[str]) -> Reader:
        return PythonicReader(names)

    def rules(self, tools: list[Tool], mark: Mark, *, several: bool) -> list[str]:
        more = ' (", " call)*' if several else ""
        calls = " | ".join(f"call_{i}" for i in range(len(tools)))
        schemas = {tool.name: tool.parameters or {} for tool in tools}
        plain = {name: schema for name, schema in schemas.items() if _is_plain(schema)}
        if not _is_little(plain.values()):
            plain = {}
        lines = [f'calls: "[" call{more} "]"', f"call: {calls}"]
        for i, tool in enumerate(tools):
            lines.append(f'call_{i}: {quoted(tool.name + "(")} arguments_{i} ")"')
            if tool.name in plain:
                lines += _keywords(tool, i)
            else:  # One dictionary, unpacked.
                lines.append(f'arguments_{i}: "**" {arguments(tool)}')
        return lines


def _is_plain(schema: Mapping[str, Any]) -> bool:
    """Whether the schema constrains its properties one by one, apart from saying which are
    required, so that each property can be a keyword argument."""
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        return False
    return (
        schema.keys() <= PLAIN_KEYS
        and all(isinstance(name, str) and name in properties for name in required)
        and all(map(_is_keyword, properties))
        and all(isinstance(value, Mapping) for value in properties.values())
        and len(json.dumps(_definitions(schema))) <= MOST_DEFINITIONS
        and not REFERENCE.search(json.dumps(schema))
    )


def _is_keyword(name: str) -> bool:
    """Whether a property can be a keyword argument that the reader knows."""
    return name.isascii() and name.isidentifier() and len(name) <= MAX_TOOL_NAME


def _is_little(schemas: Collection[Mapping[str, Any]]) -> bool:
    """Whether keyword arguments for all properties make a grammar that compiles quickly."""
    numbers = [len(schema["properties"]) for schema in schemas]
    works = [schema_work(_definitions(schema), "tools") for schema in schemas]
    repeated = sum(number * work for number, work in zip(numbers, works, strict=True))
    return sum(numbers) <= MOST_KEYWORDS and repeated <= MOST_REPEATED_WORK


def _definitions(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {key: schema[key] for key in DEFINITIONS if key in schema}


def _keywords(tool: Tool, number: int) -> list[str]:
    """Keyword arguments in the order of the schema's properties, whose values are JSON."""
    schema = tool.parameters or {}
    properties, required = schema["properties"], schema.get("required", ())
    names = list(properties)
    shared = _definitions(schema)
    # The rules "first" and "more" stand for the arguments from one property on, without and with
    # others before them.
    lines = [f"arguments_{number}: first_{number}_0"]
    for i, name in enumerate(names):
        of = f"{number}_{i}"
        rest = f"more_{number}_{i + 1}"
        optional = name not in required
        skipped = f" | first_{number}_{i + 1}" if optional else ""
        none = f" | {rest}" if optional else ""
        value = {**shared, **properties[name], **library_options(tool)}
        lines += [
            f"first_{of}: value_{of} {rest}{skipped}",
            f'more_{of}: ", " value_{of} {rest}{none}',
            f"value_{of}: {quoted(name + '=')} {json_value(value)}",
        ]
    end = f"{number}_{len(names)}"
    return [*lines, f'first_{end}: ""', f'more_{end}: ""']


class PythonicReader(CallReader):
    def read(self) -> Steps[None]:
        yield from self.attempt(self._calls())
        yield from self.text()

    def _calls(self) -> Steps[None]:
        yield from self.spaces()
        yield from self._tag()
        yield from self.spaces()
        yield from self.literal("[")
        while True:
            yield from self.spaces()
            yield from self._call()
            yield from self.spaces()
            if self.char != ",":
                break
            yield
        yield from self.literal("]")
        yield from self.spaces()
        if self.char == END_TAG[0]:
            yield from self.literal(END_TAG)

    def _tag(self) -> Steps[None]:
        """One of TAGS, or nothing."""
        common = "<|python_"
        if self.char == common[0]:
            yield from self.literal(common)
            tag = next((tag for tag in TAGS if tag[len(common)] == self.char), "")
            if not tag:
                raise Malformed
            yield from self.literal(tag[len(common) :])

    def _call(self) -> Steps[None]:
        self._begun = self._ended = False
        name = self.name((yield from self.word(NAME_CHARACTERS, MAX_TOOL_NAME)))
        yield from self.literal("(")
        yield from self.spaces()
        if self.char == "*":
            yield from self._dictionary(name)
        else:
            yield from self._keywords(name)
        yield from self.spaces()
        yield from self.literal(")")
        self.end_call()

    def _dictionary(self, name: str) -> Steps[None]:
        """``**{...}``"""
        yield from self.literal("**")
        if self.char != "{":
            raise Malformed
        self.begin_call(name)
        yield from python_text.value(self, self.argue)

    def _keywords(self, name: str) -> Steps[None]:
        separator = "{"
        while self.char != ")":
            key = yield from self.word(NAME_CHARACTERS, MAX_TOOL_NAME)
            yield from self.spaces()
            yield from self.literal("=")
            yield from self.spaces()
            if not self._begun:
                self.begin_call(name)
            self.argue(f"{separator}{json.dumps(key)}: ")
            yield from python_text.value(self, self.argue)
            separator = ", "
            yield from self.spaces()
            if self.char == ",":
                yield
                yield from self.spaces()
            elif self.char != ")":
                raise Malformed
        if not self._begun:
            self.begin_call(name)
            self.argue("{")
        self.argue("}")
