"""The reference in docs/api.md: every route, what it takes, refuses and answers.

    python -m tests.api_docs

writes it anew from the OpenAPI document and from the lists of what is not served; a test holds the
file to it.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastapi.routing import APIRoute

from gateway.api import openapi
from gateway.api.anthropic.blocks import UNSUPPORTED_BLOCKS
from gateway.api.anthropic.errors import anthropic_type
from gateway.api.anthropic.request import ConversationFields
from gateway.api.http import REF
from gateway.api.schemas.base import Body, UnsupportedField
from gateway.api.schemas.generate import GenerateFields
from gateway.api.schemas.parsing import UNSUPPORTED, UNSUPPORTED_PARTS
from gateway.api.schemas.template_fields import TemplateFields
from gateway.api.unserved import UNSERVED
from gateway.app import APIS
from gateway.edge.auth import needs_key
from opticnerve.errors import StartupError, by_name

DOCUMENT = Path(__file__).parents[1] / "docs" / "api.md"
START, END = "<!-- reference: python -m tests.api_docs -->\n", "<!-- end of reference -->\n"
SHARED: dict[type[Body], str] = {
    GenerateFields: "Fields of generations",
    TemplateFields: "Fields of chats",
    ConversationFields: "Fields of Anthropic's conversations",
}
"""Fields that several routes share, by their heading."""
NAMES = {"array": "list", "object": "object", "null": "null"}
Schema = Mapping[str, Any]


# ---- Markdown


def table(*columns: str, rows: Iterable[Iterable[str]]) -> str:
    """A table; empty without rows."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    if not lines:
        return ""
    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*head, *lines]) + "\n"


def anchor(heading: str) -> str:
    kept = "".join(char for char in heading.lower() if char.isalnum() or char in " -_")
    return kept.replace(" ", "-")


def link(heading: str, text: str = "") -> str:
    """A link to a heading, or an object, of this document."""
    return f"[{text or heading}](#{anchor(heading)})"


def either(texts: Iterable[str]) -> str:
    """``a, b or c``"""
    *others, last = dict.fromkeys(texts)
    return f"{', '.join(others)} or {last}" if others else last


def plain(text: str) -> str:
    """A docstring, or its part, as one line of Markdown."""
    return " ".join(text.split()).replace("``", "`")


def code(value: Any) -> str:
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


# ---- types


def number(value: float) -> str:
    """A bound; a large one as a power of two."""
    whole = int(value)
    for offset, sign in ((0, ""), (1, "-1")):
        size = abs(whole) + offset
        if size >= 2**24 and size & (size - 1) == 0:
            return f"{'-' if whole < 0 else ''}2^{size.bit_length() - 1}{sign}"
    return str(whole) if whole == value else f"{value:g}"


def between(low: float | None, high: float | None, unit: str = "") -> list[str]:
    """A range in words; none without bounds."""
    if unit and low == 1 and high is None:
        return ["not empty"]
    unit = f" {unit}" if unit else ""
    if low is not None and low == high:
        return [f"{number(low)}{unit}"]
    if low is not None and high is not None:
        return [f"{number(low)} to {number(high)}{unit}"]
    if low is not None:
        return [f"≥ {number(low)}{unit}"]
    return [f"≤ {number(high)}{unit}"] if high is not None else []


def bounds(schema: Schema) -> str:
    """The bounds of a value, in brackets."""
    found = between(schema.get("minimum"), schema.get("maximum"))
    if "exclusiveMinimum" in schema:
        found.append(f"> {number(schema['exclusiveMinimum'])}")
    if "exclusiveMaximum" in schema:
        found.append(f"< {number(schema['exclusiveMaximum'])}")
    found += between(schema.get("minLength"), schema.get("maxLength"), "characters")
    found += between(schema.get("minItems"), schema.get("maxItems"), "entries")
    if "pattern" in schema:
        found.append(code(schema["pattern"]))
    if "type" in schema and "anyOf" in schema:  # Further bounds, of which one holds.
        found.append(" or ".join(bounds(each).strip(" ()") for each in schema["anyOf"]))
    if "const" in schema and "type" not in schema:
        found.append(json.dumps(schema["const"]))
    return f" ({', '.join(found)})" if found else ""


class Reference:
    """The OpenAPI document as Markdown."""

    def __init__(self) -> None:
        routes = [route for router in APIS for route in router.routes]
        self.routes = [route for route in routes if isinstance(route, APIRoute)]
        self.document = json.loads(openapi.describe(routes, lambda _: False))
        self.schemas: dict[str, Schema] = self.document["components"]["schemas"]
        self.bodies = {route.path_format: self._body(route) for route in self.routes}

    @staticmethod
    def _body(route: APIRoute) -> type[Body] | None:
        found: type[Body] | None = typing.get_type_hints(route.endpoint).get("body")
        return found

    # ---- types

    def kind(self, schema: Schema, *, null: bool) -> str:
        """A type in words. ``null``: whether it is told that a value may be null."""
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            target = self.schemas[name]
            return link(name) if "properties" in target else self.kind(target, null=null)
        if "const" in schema:
            return code(json.dumps(schema["const"]))
        if "enum" in schema:
            return either(code(json.dumps(value)) for value in schema["enum"])
        union = schema.get("anyOf") or schema.get("oneOf")
        if union and "type" not in schema:
            parts = [each for each in union if null or each != {"type": "null"}]
            return either(self.kind(each, null=null) for each in parts)
        name = str(schema.get("type", "any"))
        text = NAMES.get(name, name) + bounds(schema)
        inner = schema.get("items") or schema.get("additionalProperties")
        if isinstance(inner, dict) and inner:
            told = self.kind(inner, null=null)
            several = "anyOf" in inner or "oneOf" in inner
            return f"{text} of ({told})" if several else f"{text} of {told}"
        return text

    def rows(
        self, properties: Mapping[str, Schema], schema: Schema, *, request: bool = True
    ) -> Iterator[tuple[str, ...]]:
        """A row for each field of an object: name, type, default, description."""
        for name, field in properties.items():
            required, default = name in schema.get("required", ()), field.get("default")
            if request:
                state = "required" if required else "" if default is None else code(default)
            else:
                state = "" if required else "may be absent"
            kind = self.kind(field, null=not request)
            yield code(name), kind, state, plain(field.get("description", ""))

    # ---- sections

    def text(self) -> str:
        return "\n".join(part for part in self._parts() if part)

    def _parts(self) -> Iterator[str]:
        yield "## Routes\n"
        apart = {path for method, path, each in self._operations() if self._is_long(method, each)}
        rows = []
        for method, path, operation in self._operations():
            shown, told = f"{method} {path}", plain(operation["summary"])
            if not needs_key(path, public_models=False):
                told += " (no key)"
            title = link(shown, code(shown)) if path in apart else code(shown)
            rows.append((title, told, self._answer(operation, streamed=False)))
        yield table("route", "what", "answers", rows=rows)
        for method, path, operation in self._operations():
            if path in apart:
                yield from self._route(method, path, operation)
        yield from self._shared()
        yield from self._refused()
        yield from self._errors()
        yield from self._objects()

    @staticmethod
    def _is_long(method: str, operation: Schema) -> bool:
        """Whether a route has a section of its own."""
        return method == "POST" or "parameters" in operation or "description" in operation

    def _operations(self) -> Iterator[tuple[str, str, Schema]]:
        for path, item in self.document["paths"].items():
            for method, operation in item.items():
                yield method.upper(), path, operation

    def _route(self, method: str, path: str, operation: Schema) -> Iterator[str]:
        yield f"## {method} {path}\n\n{operation['summary']}. Answers {self._answer(operation)}.\n"
        if "description" in operation:
            yield f"{operation['description'].strip()}\n"
        yield table(
            "parameter",
            "in",
            "type",
            "",
            rows=map(self._parameter, operation.get("parameters", ())),
        )
        body = self.bodies[path]
        if body is None:
            return
        shared = [each for each in SHARED if issubclass(body, each)]
        schema = self.schemas[body.__name__]
        yield self._fields(self._own(schema, shared), schema)
        if shared:
            links = (link(SHARED[each], f"the f{SHARED[each][1:]}") for each in shared)
            yield f"All of {' and '.join(links)}.\n"
        if all(each.unsupported != body.unsupported for each in shared):
            yield from self._also_refused(body)

    def _parameter(self, parameter: Schema) -> tuple[str, ...]:
        kind = self.kind(parameter["schema"], null=False)
        return code(parameter["name"]), parameter["in"], kind, parameter.get("description", "")

    def _answer(self, operation: Schema, *, streamed: bool = True) -> str:
        status, response = next(iter(operation["responses"].items()))
        content = response.get("content", {})
        if not content:
            return f"{status}: {plain(response['description'])}".rstrip(".")
        kinds = {media: self.kind(each["schema"], null=True) for media, each in content.items()}
        told = kinds.pop("application/json", "text")
        if streamed and "text/event-stream" in kinds:
            told += f"; with `stream`, events of {kinds['text/event-stream']}"
        return told

    def _own(self, schema: Schema, shared: Iterable[type[Body]]) -> dict[str, Schema]:
        """The fields of a body that are not those of a shared part of it."""
        common: dict[str, Schema] = {}
        for each in shared:
            common |= self._properties(each)
        fields: Mapping[str, Schema] = schema["properties"]
        return {name: field for name, field in fields.items() if common.get(name) != field}

    @staticmethod
    def _properties(body: type[Body]) -> dict[str, Schema]:
        """A body's fields as the document has them: without defaults that are null."""
        found = body.model_json_schema(ref_template=REF)["properties"]
        for field in found.values():
            if field.get("default", 0) is None:
                del field["default"]
        return dict(found)

    def _fields(self, properties: Mapping[str, Schema], schema: Schema) -> str:
        return table("field", "type", "default", "", rows=self.rows(properties, schema))

    def _shared(self) -> Iterator[str]:
        for part, heading in SHARED.items():
            yield f"## {heading}\n"
            schema = part.model_json_schema(ref_template=REF)
            yield self._fields(self._properties(part), schema)
            yield from self._also_refused(part)

    def _also_refused(self, body: type[Body]) -> Iterator[str]:
        if body.unsupported:
            yield f"Refused, besides {link('Refused fields', 'what every route refuses')}:\n"
            yield self._unsupported(body.unsupported)

    @staticmethod
    def _unsupported(fields: Mapping[str, UnsupportedField]) -> str:
        rows = (
            (code(name), ", ".join(map(code, map(json.dumps, field.neutral))), field.instead)
            for name, field in fields.items()
        )
        return table("field", "accepted values", "what to do instead", rows=rows)

    def _refused(self) -> Iterator[str]:
        yield "## Refused fields\n"
        yield (
            "Known fields that no route serves, unless it lists them above. null, and the values "
            "that are accepted, ask for nothing.\n"
        )
        yield self._unsupported(UNSUPPORTED)
        yield "Parts of messages, and blocks of Anthropic's, by their type:\n"
        refused = {**UNSUPPORTED_PARTS, **UNSUPPORTED_BLOCKS}.items()
        yield table("type", "what to do instead", rows=((code(k), v) for k, v in refused))
        yield "Paths, and those below them; where `/...` is at the end, those alone:\n"
        served = {route.path_format for route in self.routes}
        unserved = (
            (code(f"{path}/..." if path in served else path), advice)
            for path, advice in UNSERVED.items()
        )
        yield table("path", "a 404 that says", rows=unserved)

    @staticmethod
    def _errors() -> Iterator[str]:
        yield "## Errors\n"
        yield (
            f"{link('ErrorAnswer')}, and under `/v1/messages` {link('AnthropicError')}. Further "
            "codes name particular causes, such as `unknown_field` and `invalid_json`.\n"
        )
        found: dict[int, dict[str, set[str]]] = {}
        for error in by_name().values():
            if not issubclass(error, StartupError):
                codes = found.setdefault(error.http_status, {}).setdefault(error.type, set())
                if error.default_code is not None:
                    codes.add(error.default_code)
        rows = (
            (
                str(status),
                ", ".join(map(code, sorted(types))),
                code(anthropic_type(status)),
                ", ".join(map(code, sorted(set().union(*types.values())))),
            )
            for status, types in sorted(found.items())
        )
        yield table("status", "type", "Anthropic's type", "codes", rows=rows)

    def _objects(self) -> Iterator[str]:
        bodies = [body.__name__ for body in self.bodies.values() if body is not None]
        asked = self._reached(bodies)
        for heading, request in (("Objects of requests", True), ("Objects of answers", False)):
            yield f"## {heading}\n"
            if request:
                yield "null stands for an absent field. Further fields are ignored.\n"
            rows: list[tuple[str, ...]] = []
            for name, schema in sorted(self.schemas.items()):
                if name in bodies or "properties" not in schema or (name in asked) != request:
                    continue
                title = f'<a id="{anchor(name)}"></a>**{name}**'
                rows.append((title, "", "", plain(schema.get("description", ""))))
                rows += self.rows(schema["properties"], schema, request=request)
            yield table("field", "type", "default" if request else "", "", rows=rows)

    def _reached(self, names: Iterable[str]) -> set[str]:
        """The schemas to which these refer, at any depth."""
        reached: set[str] = set()
        todo = list(names)
        while todo:
            for name in _references(self.schemas[todo.pop()]):
                if name not in reached:
                    reached.add(name)
                    todo.append(name)
        return reached


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"].rpartition("/")[2]
        for each in value.values():
            yield from _references(each)
    elif isinstance(value, list):
        for each in value:
            yield from _references(each)


def with_reference(text: str) -> str:
    """The document with the reference between its marks."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return before + START + "\n" + Reference().text() + "\n" + END + after


if __name__ == "__main__":
    DOCUMENT.write_text(with_reference(DOCUMENT.read_text()))
