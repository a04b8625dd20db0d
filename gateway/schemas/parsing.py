"""Bytes to a request model, and what is wrong with them to one clear InvalidRequest."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from gateway.schemas import unsupported
from gateway.schemas.base import Ignored, Strict
from opticnerve.errors import InvalidRequest

M = TypeVar("M", bound=Strict)

MAX_NAMED = 5  # Problems told at once.
MAX_LOOKED_AT = 100  # Of problems, and of fields that were ignored.
MAX_NAME = 80  # Characters of a field's name that an answer repeats.
PLAINER = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"^(Input|String|List|Dictionary|Value error,) ", ""),
        (r" after validation, not \d+$", ""),
        (r"a valid dictionary( or instance of \w+)?", "an object"),
        (r"a valid ", "a "),
        (r"\ba integer", "an integer"),
    )
)


def parse(
    model: type[M], body: bytes | str | Mapping[str, Any], *, ignore_unknown: bool = False
) -> tuple[M, tuple[str, ...]]:
    """A request and the paths of unknown fields that were ignored (none unless asked for; the
    first of many).

    Raises InvalidRequest, whose ``param`` is the path of the first field at fault, such as
    ``messages[0].content[1].image_url.url``, and UnsupportedFeature. Values are never repeated.
    """
    raw = dict(body) if isinstance(body, Mapping) else _decode(body)
    raw = unsupported.take_out(raw)
    ignored: Ignored | None = {} if ignore_unknown else None
    try:
        parsed = model.model_validate(raw, context=ignored)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
    else:
        named = _named(raw, ignored, "") if ignored else ()
        return parsed, tuple(itertools.islice(named, MAX_LOOKED_AT))
    raise _refusal(problems, raw)


def _decode(body: bytes | str) -> dict[str, Any]:
    try:
        raw = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        reason = str(error)[:200]
        raise InvalidRequest(
            f"the body is not valid JSON: {reason}", code="invalid_json"
        ) from error
    if not isinstance(raw, dict):
        raise InvalidRequest("the body should be a JSON object")
    return raw


def _refusal(problems: Sequence[ErrorDetails], raw: Mapping[str, Any]) -> InvalidRequest:
    """One error for all problems: those of a union's branches at one place are told together."""
    found: dict[str, tuple[int, list[str]]] = {}
    for problem in problems[:MAX_LOOKED_AT]:
        path, depth = _path(problem, raw)
        texts = found.setdefault(path, (depth, []))[1]
        text = _text(problem)
        if text not in texts:
            texts.append(text)
    kept = [path for path in found if not _explained(path, found)]
    lines = [f"{path}: {_either(found[path][1])}" if path else found[path][1][0] for path in kept]
    if len(lines) > MAX_NAMED:
        more = "many" if len(problems) > MAX_LOOKED_AT else str(len(lines) - MAX_NAMED)
        lines[MAX_NAMED:] = [f"and {more} more"]
    code = "unknown_field" if all(p["type"] == "extra_forbidden" for p in problems) else None
    return InvalidRequest("; ".join(lines), param=kept[0] or None, code=code)


def _explained(path: str, found: Mapping[str, Any]) -> bool:
    """Whether a deeper problem says it better: of ``str | list``, the branch that went in."""
    return any(other != path and other.startswith((path + ".", path + "[")) for other in found)


def _text(problem: ErrorDetails) -> str:
    kind, message = problem["type"], problem["msg"]
    if kind == "extra_forbidden":
        return "unknown field"
    if kind == "missing":
        return "required"
    if kind == "union_tag_not_found":
        return "should have a type: text, image_url or image"
    if kind == "union_tag_invalid":
        return "should be of type text, image_url or image"
    for pattern, plain in PLAINER:
        message = pattern.sub(plain, message)
    return message


def _either(texts: Sequence[str]) -> str:
    """``should be a string or a list``"""
    same = "should be "
    if not all(text.startswith(same) for text in texts):
        return " or ".join(texts)
    return same + " or ".join(text.removeprefix(same) for text in texts)


def _path(problem: ErrorDetails, raw: Any) -> tuple[str, int]:
    """Where a problem is, as a path in the body, and its depth. pydantic names union branches in
    ``loc`` too: what the body does not hold there is no field of it, unless just that is the
    problem."""
    loc = problem["loc"]
    if problem["type"] == "fault":
        loc = (*loc, problem["ctx"]["field"])
    absent = problem["type"] in ("missing", "fault")
    path, depth = "", 0
    for place, step in enumerate(loc):
        last = place == len(loc) - 1
        if isinstance(step, int) and isinstance(raw, list) and 0 <= step < len(raw):
            path, raw = f"{path}[{step}]", raw[step]
        elif isinstance(step, str) and isinstance(raw, Mapping) and step in raw:
            path, raw = _join(path, step), raw[step]
        elif last and absent and isinstance(step, str) and isinstance(raw, Mapping):
            path = _join(path, step)
        else:
            continue
        depth += 1
    return path, depth


def _join(path: str, step: str) -> str:
    name = step if len(step) <= MAX_NAME else step[:MAX_NAME] + "..."
    return f"{path}.{name}" if path else name


def _named(raw: Any, ignored: Ignored, path: str) -> Iterator[str]:
    """The paths of the fields that were ignored."""
    if isinstance(raw, dict):
        unknown = ignored.get(id(raw), ())
        for name, value in raw.items():
            if name in unknown:
                yield _join(path, name)
            else:
                yield from _named(value, ignored, _join(path, name))
    elif isinstance(raw, list):
        for place, value in enumerate(raw):
            yield from _named(value, ignored, f"{path}[{place}]")
