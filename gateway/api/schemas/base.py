"""Base classes of the request models: strict types, null for absent fields, no infinities."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from gateway.edge.limits import MAX_ENTRIES, MAX_FIELDS
from opticnerve.errors import InvalidRequest, UnsupportedFeature

MAX_SHOWN_NAME = 80  # Characters of a field's name that an error message repeats.
BOM = b"\xef\xbb\xbf"  # The byte order mark, with which some editors and clients begin UTF-8.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
LONE_SURROGATE_MESSAGE = (
    "holds half of a surrogate pair, which is no character; send UTF-8, or escape both halves"
)

T = TypeVar("T")
BoundedList = Annotated[list[T], Field(max_length=MAX_ENTRIES, fail_fast=True)]
"""A list whose validation ends at the first invalid entry. A problem takes a kilobyte to describe,
and a body can hold millions of them."""


@dataclass(slots=True)
class ValidationContext:
    """pydantic's context while a body is validated. ``unknown``: names of the unknown fields that
    were dropped, by the ``id`` of the object that had them."""

    ignore_unknown: bool = False  # For the body's own; those of nested objects are always ignored.
    unknown: dict[int, Collection[str]] = field(default_factory=dict)


def _whole(value: Any) -> Any:
    return int(value) if type(value) is float and value.is_integer() else value


INTEGRAL = BeforeValidator(_whole)
"""Turns ``20.0`` into an integer, since JSON does not distinguish it from ``20``. Every ``int`` of
a request has it; ``20.5``, ``"20"`` and ``true`` are refused."""

Unused = Annotated[Any, AfterValidator(lambda _: None)]
"""Any JSON, which is dropped: for fields that clients send and that have no effect here."""


UNSUPPORTED_KIND = "unsupported"
"""The type of PydanticCustomError for features of other servers that this one lacks."""


def fault(name: str, message: str) -> PydanticCustomError:
    """The error of a validator that compares several fields, attributed to the field ``name``."""
    return PydanticCustomError("fault", message, {"field": name})


def at_most(entries: int) -> BeforeValidator:
    """Bounds the number of an object's entries before its values are validated."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > entries:
            raise PydanticCustomError(
                "entries", "should have at most {entries} entries", {"entries": entries}
            )
        return value

    return BeforeValidator(check)


def no_larger(size: int) -> BeforeValidator:
    """Bounds any JSON by the sum of its values and of its strings' characters."""

    def check(value: Any) -> Any:
        if _size(value, size) > size:
            raise PydanticCustomError(
                "size", "should be at most {size} values and characters", {"size": size}
            )
        return value

    return BeforeValidator(check)


def _size(value: Any, enough: int) -> int:
    """Values and characters in ``value``; counting stops beyond ``enough``."""
    total, todo = 0, [value]
    while todo and total <= enough:
        value = todo.pop()
        total += 1
        if isinstance(value, str | dict | list):
            total += len(value)
        if isinstance(value, dict) and total <= enough:
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, list) and total <= enough:
            todo += value
    return total


def join(path: str, step: str) -> str:
    """The path of the field ``step`` of the object at ``path``."""
    name = step if len(step) <= MAX_SHOWN_NAME else step[:MAX_SHOWN_NAME] + "..."
    return f"{path}.{name}" if path else name


def check_strings(value: Any, path: str = "") -> None:
    """Raises InvalidRequest for a string that holds half of a surrogate pair. Python's JSON parser
    accepts such strings, but no encoding and no tokenizer does. ``value``: parsed JSON."""
    if isinstance(value, str) and LONE_SURROGATE.search(value):
        raise _lone_surrogate(path, "")
    if isinstance(value, list):
        for place, entry in enumerate(value):
            check_strings(entry, f"{path}[{place}]")
    elif isinstance(value, dict):
        for name, entry in value.items():
            if LONE_SURROGATE.search(name):
                raise _lone_surrogate(path, "the name of a field ")
            check_strings(entry, join(path, name))


def _lone_surrogate(path: str, where: str) -> InvalidRequest:
    at = f"{path}: " if path else ""
    return InvalidRequest(
        f"{at}{where}{LONE_SURROGATE_MESSAGE}",
        param=path or None,
        code="invalid_json",
    )


class Strict(BaseModel):
    """Nothing is coerced (``"1"`` is no number, ``1`` is no boolean). null stands for an absent
    field, wherever a field may be absent. Unknown fields are ignored."""

    model_config = ConfigDict(
        strict=True,
        extra="ignore",
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )

    closed: ClassVar[bool] = False
    aliases: ClassVar[frozenset[str]] = frozenset()
    """Fields whose attribute has another name, because BaseModel has an attribute of theirs."""

    @property
    def without_effect(self) -> Iterator[str]:
        """Known fields of the request that have no effect on this server, by path."""
        yield from ()

    @model_validator(mode="before")
    @classmethod
    def _fields(cls, value: Any, info: ValidationInfo) -> Any:
        """Drops unknown fields, and lists them in the ``ValidationContext``."""
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_FIELDS:
            raise PydanticCustomError("fields", "has too many fields")
        context: ValidationContext = info.context or ValidationContext()
        unknown = value.keys() - cls.model_fields.keys() - cls.aliases
        if cls.closed and not context.ignore_unknown:
            unknown = set()  # Left in place, so that validation refuses them.
        if unknown:
            context.unknown[id(value)] = unknown
        return {
            name: entry
            for name, entry in value.items()
            if name not in unknown and not (entry is None and cls._may_be_absent(name))
        }

    @classmethod
    def _may_be_absent(cls, name: str) -> bool:
        known = cls.model_fields.get(name)
        return known is not None and not known.is_required()

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Every field that may be absent may be null."""
        schema = handler(core_schema)
        resolved = handler.resolve_ref_schema(schema)
        for name, field_schema in resolved.get("properties", {}).items():
            if cls._may_be_absent(name):
                resolved["properties"][name] = _nullable(field_schema)
        return schema


def unsupported_kind(path: str, what: str, kind: str, instead: str) -> UnsupportedFeature:
    """The error for an object at ``path`` of a type that this server does not support. ``what``:
    its kind of object, such as parts; ``kind``: its type; ``instead``: advice to the client."""
    return UnsupportedFeature(
        f'{path}: {what} of type "{kind}" are not supported by this server; {instead}',
        param=f"{path}.type",
    )


@dataclass(frozen=True, slots=True)
class UnsupportedField:
    """A field that other servers support and this one does not."""

    neutral: tuple[Any, ...]  # Values that ask for nothing, in addition to null.
    instead: str  # Advice to the client.


class Body(Strict):
    """A whole body. Its unknown fields are errors, unless the server is set to ignore them: a
    mistyped setting must not go unnoticed."""

    model_config = ConfigDict(extra="forbid")
    closed: ClassVar[bool] = True
    unsupported: ClassVar[Mapping[str, UnsupportedField]] = {}
    """This route's unsupported fields, besides ``gateway.api.schemas.parsing.UNSUPPORTED``."""


def _nullable(schema: JsonSchemaValue) -> JsonSchemaValue:
    annotations = {"title", "description", "default", "examples"}
    kinds = {key: value for key, value in schema.items() if key not in annotations}
    if not kinds or {"type": "null"} in (kinds, *kinds.get("anyOf", ())):
        return schema
    others = {key: value for key, value in schema.items() if key in annotations}
    return {"anyOf": [kinds, {"type": "null"}], **others}
