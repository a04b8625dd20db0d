"""Numbers that a program gives, checked before a message is made of them.

What a message can carry is checked here; what a worker makes of it is the worker's to say.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from numbers import Real

from opticnerve.errors import InvalidRequest

UINT32 = 2**32 - 1
UINT64 = 2**64 - 1


def check_integer(name: str, value: object, most: int = UINT32) -> None:
    """Raises InvalidRequest unless ``value`` is an integer from 0 to ``most``."""
    if not 0 <= _index(name, value) <= most:
        raise InvalidRequest(f"{name} is from 0 to {most}, not {value}", param=name)


def check_number(name: str, value: object) -> None:
    """Raises InvalidRequest for what is no real number."""
    if not isinstance(value, Real):
        raise InvalidRequest(f"{name} is a number, not {type(value).__name__}", param=name)


def read_token_ids(name: str, ids: object) -> tuple[int, ...]:
    """Token ids of any sequence or array of one dimension.

    Raises InvalidRequest unless all are integers that a message carries, and for one integer,
    text, bytes and mappings, which are no sequences of token ids.
    """
    if isinstance(ids, (str, bytes, bytearray, memoryview, Mapping)) or not isinstance(
        ids, Iterable
    ):
        kind = type(ids).__name__
        raise InvalidRequest(f"{name} is a sequence of token ids, not {kind}", param=name)
    try:
        found = tuple(map(operator.index, ids))
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
