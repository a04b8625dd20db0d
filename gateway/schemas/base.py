"""What every request model shares: strict types, no unknown fields, no infinities."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

MAX_FIELDS = 256  # Of one object; no model here has a quarter of them.
MAX_ENTRIES = 2**12  # Of one list of objects.

Ignored = dict[int, Collection[str]]
"""Unknown fields that were left out, by the ``id`` of the object that held them."""

T = TypeVar("T")
Many = Annotated[list[T], Field(max_length=MAX_ENTRIES, fail_fast=True)]
"""A list of which the first entry at fault is told. A problem takes a kilobyte to tell, and a body
can hold millions of them."""


def fault(field: str, message: str) -> PydanticCustomError:
    """What a model says of one of its fields, once it has looked at several."""
    return PydanticCustomError("fault", message, {"field": field})


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


class Strict(BaseModel):
    """Nothing is coerced (``"1"`` is no number, ``1`` is no boolean); unknown fields are errors."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _fields(cls, value: Any, info: ValidationInfo) -> Any:
        """With an ``Ignored`` as context, unknown fields are noted there and left out."""
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_FIELDS:
            raise PydanticCustomError("fields", "has too many fields")
        ignored: Ignored | None = info.context
        unknown = value.keys() - cls.model_fields.keys()
        if ignored is None or not unknown:
            return value
        ignored[id(value)] = unknown
        return {name: held for name, held in value.items() if name not in unknown}
