"""Checks of a caller's numbers and token ids, before a message is made from them."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from opticnerve.errors import InvalidRequest

UINT32 = 2**32 - 1
UINT64 = 2**64 - 1
MAX_BIAS = 1e30  # Dividing it by any temperature stays within fp32.


def check_integer(name: str, value: object, most: int = UINT32) -> None:
    """Raises InvalidRequest unless ``value`` is an integer from 0 to ``most``."""
    if not 0 <= _index(name, value) <= most:
        raise InvalidRequest(f"{name} is from 0 to {most}, not {value}", param=name)


def check_number(
    name: str,
    value: object,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    or_zero: bool = False,
) -> None:
    """Raises InvalidRequest unless ``value`` is a real number from ``low`` to ``high``; NaN is in
    no range."""
    if not isinstance(value, (int, float, Real)):
        raise InvalidRequest(f"{name} is a number, not {type(value).__name__}", param=name)
    number: Any = value
    if not (low <= number <= high or (or_zero and number == 0)):
        raise InvalidRequest(f"{name} must be between {low:g} and {high:g}", param=name)


def check_biases(name: str, biases: object) -> None:
    """Raises InvalidRequest unless ``biases`` are numbers within MAX_BIAS of 0, by token id."""
    if not isinstance(biases, Mapping):
        raise InvalidRequest(f"{name} is {{id: bias}}, not {type(biases).__name__}", param=name)
    check_token_ids(name, list(biases))
    for bias in biases.values():
        check_number(name, bias, -MAX_BIAS, MAX_BIAS)


def check_words(name: str, words: Iterable[object]) -> None:
    """Raises InvalidRequest unless each of ``words`` is a sequence of one token id or more."""
    for word in words:
        if not _token_ids(name, word):
            raise InvalidRequest(f"a word of {name} has at least one token", param=name)


def check_token_ids(name: str, ids: object) -> None:
    """Raises InvalidRequest like ``read_token_ids``."""
    _token_ids(name, ids)


def read_token_ids(name: str, ids: object) -> tuple[int, ...]:
    """Token ids of any sequence or array of one dimension.

    Raises InvalidRequest unless all are integers that a message can carry, and for a single
    integer, text, bytes and mappings, which are not sequences of token ids.
    """
    return tuple(_token_ids(name, ids))


def _token_ids(name: str, ids: object) -> list[int]:
    if isinstance(ids, (str, bytes, bytearray, memoryview, Mapping)) or not isinstance(
        ids, Iterable
    ):
        kind = type(ids).__name__
        raise InvalidRequest(f"{name} is a sequence of token ids, not {kind}", param=name)
    try:
        found = list(map(operator.index, ids))
    except TypeError as error:
        raise InvalidRequest(f"{name} holds token ids, which are integers", param=name) from error
    for extreme in (min(found, default=0), max(found, default=0)):
        if not 0 <= extreme <= UINT32:
            raise InvalidRequest(f"{extreme} in {name} is no token id", param=name)
    return found


def _index(name: str, value: object) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        kind = type(value).__name__
        raise InvalidRequest(f"{name} is an integer, not {kind}", param=name) from error
