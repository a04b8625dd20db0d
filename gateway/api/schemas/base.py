"""What every request model shares: strict types, null for absent, no infinities."""

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
from opticnerve.errors import InvalidRequest

MAX_SHOWN_NAME = 80  # Characters of a field's name that an answer repeats.
BOM = b"\xef\xbb\xbf"  # What some editors and clients begin UTF-8 with.
HALF = re.compile("[\ud800-\udfff]")
HALVES = "holds half of a surrogate pair, which is no character; send UTF-8, or escape both halves"

T = TypeVar("T")
Many = Annotated[list[T], Field(max_length=MAX_ENTRIES, fail_fast=True)]
"""A list of which the first entry at fault is told. A problem takes a kilobyte to tell, and a body
can hold millions of them."""


@dataclass(slots=True)
class Reading:
    """What is noted while a body is read; pydantic's context of it. ``unknown``: fields that were
    left out, by the ``id`` of the object that held them."""

    ignore_unknown: bool = False  # Of the body itself; those of what it holds always are.
    unknown: dict[int, Collection[str]] = field(default_factory=dict)


def _whole(value: Any) -> Any:
    return int(value) if type(value) is float and value.is_integer() else value


INTEGRAL = BeforeValidator(_whole)
"""Makes an integer of ``20.0``, which JSON does not tell from ``20``. Every ``int`` of a request
has it; ``20.5``, ``"20"`` and ``true`` stay what they are, and are refused."""

Unused = Annotated[Any, AfterValidator(lambda _: None)]
"""Any JSON, of which nothing is kept: what clients send for others than this server."""


def fault(name: str, message: str) -> PydanticCustomError:
    """What a model says of one of its fields, once it has looked at several."""
    return PydanticCustomError("fault", message, {"field": name})


def at_most(entries: int) -> BeforeValidator:
    """Bounds an object of free names before its values are looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > entries:
            raise PydanticCustomError(
                "entries", "should have at most {entries} entries", {"entries": entries}
            )
        return value

    return BeforeValidator(check)


def no_larger(size: int) -> BeforeValidator:
    """Bounds free JSON: its values and the characters of its strings, together."""

    def check(value: Any) -> Any:
        if _size(value, size) > size:
            raise PydanticCustomError(
                "size", "should be at most {size} values and characters", {"size": size}
            )
        return value

    return BeforeValidator(check)


def _size(value: Any, enough: int) -> int:
    """No longer counted beyond ``enough``."""
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
    """The path of a field of what is at ``path``."""
    name = step if len(step) <= MAX_SHOWN_NAME else step[:MAX_SHOWN_NAME] + "..."
    return f"{path}.{name}" if path else name


def check_strings(value: Any, path: str = "") -> None:
    """Raises InvalidRequest where a string holds half of a surrogate pair: no encoding of text has
    it, and no tokenizer takes it. ``value``: JSON as Python reads it, which lets it pass."""
    if isinstance(value, str) and HALF.search(value):
        raise _half(path, "")
    if isinstance(value, list):
        for place, held in enumerate(value):
            check_strings(held, f"{path}[{place}]")
    elif isinstance(value, dict):
        for name, held in value.items():
            if HALF.search(name):
                raise _half(path, "the name of a field ")
            check_strings(held, join(path, name))


def _half(path: str, where: str) -> InvalidRequest:
    at = f"{path}: " if path else ""
    return InvalidRequest(
        f"{at}{where}{HALVES}",
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

    @property
    def unheeded(self) -> Iterator[str]:
        """The fields that ask, as far as this model tells, for what this server does not do."""
        yield from ()

    @model_validator(mode="before")
    @classmethod
    def _fields(cls, value: Any, info: ValidationInfo) -> Any:
        """With a ``Reading`` as context, unknown fields that are left out are noted there."""
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_FIELDS:
            raise PydanticCustomError("fields", "has too many fields")
        reading: Reading = info.context or Reading()
        unknown = value.keys() - cls.model_fields.keys()
        if cls.closed and not reading.ignore_unknown:
            unknown = set()  # They stay, and are refused.
        if unknown:
            reading.unknown[id(value)] = unknown
        return {
            name: held
            for name, held in value.items()
            if name not in unknown and not (held is None and cls._may_be_absent(name))
        }

    @classmethod
    def _may_be_absent(cls, name: str) -> bool:
        known = cls.model_fields.get(name)
        return known is not None and not known.is_required()

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Says of every field that may be absent that it may be null."""
        schema = handler(core_schema)
        told = handler.resolve_ref_schema(schema)
        for name, said in told.get("properties", {}).items():
            if cls._may_be_absent(name):
                told["properties"][name] = _nullable(said)
        return schema


@dataclass(frozen=True, slots=True)
class Refused:
    """A field that others serve and this server does not."""

    neutral: tuple[Any, ...]  # Values that ask for nothing, besides null.
    instead: str  # What to do.


class Body(Strict):
    """A whole body. Its unknown fields are errors, unless they are to be ignored: an evaluator's
    typo must not pass for a setting."""

    model_config = ConfigDict(extra="forbid")
    closed: ClassVar[bool] = True
    refused: ClassVar[Mapping[str, Refused]] = {}
    """Besides those of ``gateway.api.schemas.unsupported`` that the model has no field for."""


def _nullable(schema: JsonSchemaValue) -> JsonSchemaValue:
    about = {"title", "description", "default", "examples"}
    kinds = {key: held for key, held in schema.items() if key not in about}
    if not kinds or {"type": "null"} in (kinds, *kinds.get("anyOf", ())):
        return schema
    told = {key: held for key, held in schema.items() if key in about}
    return {"anyOf": [kinds, {"type": "null"}], **told}
