"""Bounds on the cost of a grammar, checked on its text before it is compiled.

The library expands exact repetitions: ``(a{1000}){1000}`` becomes a million characters, and each
step over them takes seconds. Compile time also grows with the square of the length of a schema's
list or of a rule, and with the value of ``multipleOf``. The library's own limits bound the rest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from graphlib import CycleError, TopologicalSorter
from typing import Any

from gateway.edge.limits import (
    MAX_GRAMMAR_EXPANSION,
    MAX_GRAMMAR_RULES,
    MAX_REGEX_CHARACTERS,
    MAX_SCHEMA_CHARACTERS,
    MAX_SCHEMA_WORK,
)
from opticnerve.errors import InvalidRequest

# Microseconds of compiling, by the schema's key: SQUARED per squared length of its list, FIXED per
# use of the key, INTERSECTION per intersected schema, MULTIPLE per unit of multipleOf.
SQUARED = {
    "properties": 0.25,
    "anyOf": 0.1,
    "oneOf": 0.1,
    "enum": 0.1,
    "patternProperties": 1000.0,
    "$defs": 0.3,
    "definitions": 0.3,
}
FIXED = {"minimum": 350.0, "maximum": 350.0, "format": 400.0, "pattern": 100.0}
FIXED |= {"exclusiveMinimum": 350.0, "exclusiveMaximum": 350.0}
INTERSECTED = {"allOf"}
INTERSECTION = 10_000.0
MULTIPLE = 12.0
PATTERN_KEYS = ("pattern", "whitespace_pattern", "item_separator", "key_separator")
_REGEX = re.compile(
    r"\\[pPxuU]\{[^}\\]*\}|\\.|\(\?P?<\w*>|\(\?(?P<flags>[\w-]*)[:)]|\{(?P<least>\d+)(?:,\d*)?\}|.",
    re.DOTALL,
)
RULE = 0.003  # Microseconds per squared number of a rule's tokens.
# The library's tokens. An opening sign that nothing closes is "other"; no text is scanned twice.
_LARK = re.compile(
    r"""(?P<comment>(?://|\#)[^\n]*)
      | (?P<string>"(?:\\.|[^"\\\n])*+"i?)
      | (?P<regex>/(?:\\.|[^/\\])++/[imslux]*)
      | (?P<directive>%(?:json|regex|llguidance)\b\s*)
      | (?P<rule>^[ \t]*[?!]?(?P<name>[A-Za-z_][\w-]*)(?:\.-?\d+)?(?:\[[^\]\n]*\])?[ \t]*:)
      | (?:\{\s*(?P<least>\d+)\s*(?:,\s*+\d*\s*)?\} | ~\s*(?P<times>\d+)(?:\s*\.\.\s*\d+)?)
      | (?P<special><[^<>\s]+>)
      | (?P<reference>[A-Za-z_][\w-]*)
      | (?P<other>[()\[\]]|\S)""",
    re.VERBOSE | re.MULTILINE,
)


def check_regex(regex: str, param: str) -> None:
    """Raises InvalidRequest for a regular expression that is too long, as written or expanded."""
    check_length(regex, MAX_REGEX_CHARACTERS, param)
    _check_expansion(_regex_size(regex, param), param)


def check_schema(schema: Any, param: str) -> str:
    """The schema as JSON. Raises InvalidRequest if it is too large, as written or expanded."""
    text = json.dumps(schema, ensure_ascii=False)
    check_length(text, MAX_SCHEMA_CHARACTERS, param)
    _check_work(schema_work(schema, param), param)
    return text


def schema_work(schema: Any, param: str) -> float:
    """Estimated microseconds to compile a schema. Raises InvalidRequest for patterns and texts in
    it that are too long."""
    work, todo = 0.0, [schema]
    while todo:
        value = todo.pop()
        if isinstance(value, str):
            _check_expansion(len(value), param)
        elif isinstance(value, list):
            todo += value
        elif isinstance(value, Mapping):
            todo += value.values()
            work += _work(value)
            for pattern in _patterns(value):
                check_regex(pattern, param)
    return work


def check_lark(grammar: str, param: str) -> None:
    """Raises InvalidRequest for a grammar that is too long, as written or expanded."""
    check_length(grammar, MAX_SCHEMA_CHARACTERS, param)
    rules = list(_rules(grammar, param))
    if len(rules) > MAX_GRAMMAR_RULES:
        raise InvalidRequest(f"{param}: at most {MAX_GRAMMAR_RULES} rules", param=param)
    _check_work(sum(rule.work for rule in rules), param)
    by_name = {rule.name: rule for rule in rules}
    graph = {rule.name: {*rule.terminals} & by_name.keys() for rule in rules}
    sizes: dict[str, int] = {}
    try:
        for name in TopologicalSorter(graph).static_order():
            rule = by_name[name]
            uses = rule.terminals.items()
            sizes[name] = rule.size + sum(n * sizes.get(used, 1) for used, n in uses)
            _check_expansion(sizes[name], param)
    except CycleError as error:
        raise InvalidRequest(f"{param}: a terminal refers to itself", param=param) from error


def check_length(text: str, most: int, param: str) -> None:
    """Raises InvalidRequest for a text of more than ``most`` characters."""
    if len(text) > most:
        raise InvalidRequest(f"{param}: at most {most} characters", param=param)


def _check_expansion(size: int, param: str) -> None:
    if size > MAX_GRAMMAR_EXPANSION:
        raise InvalidRequest(
            f"{param}: its exact repetitions make a text of more than {MAX_GRAMMAR_EXPANSION} "
            "characters; repeat less",
            param=param,
        )


def _check_work(work: float, param: str) -> None:
    if work > MAX_SCHEMA_WORK:
        raise InvalidRequest(
            f"{param}: it takes too long to compile: send one with fewer alternatives or "
            "properties in one place, fewer ranges, formats and patterns, smaller multiples",
            param=param,
        )


def _work(schema: Mapping[str, Any]) -> float:
    """Estimated microseconds to compile one object of a schema, without the objects in it; measured
    on one core of a server."""
    work = 10.0
    for key, cost in SQUARED.items():
        listed = schema.get(key)
        if isinstance(listed, list | Mapping):
            work += cost * len(listed) ** 2
    work += sum(cost for key, cost in FIXED.items() if key in schema)
    for key in INTERSECTED & schema.keys():
        intersected = schema[key]
        work += INTERSECTION * (len(intersected) if isinstance(intersected, list) else 1)
    divisor = schema.get("multipleOf")
    if isinstance(divisor, int | float) and not isinstance(divisor, bool):
        digits = "".join(map(str, Decimal(str(divisor)).as_tuple().digits))
        work += MULTIPLE * _number(digits)
    return work


def _patterns(schema: Mapping[str, Any]) -> Iterator[str]:
    by_pattern = schema.get("patternProperties")
    if isinstance(by_pattern, Mapping):
        yield from by_pattern
    for key in PATTERN_KEYS:
        if isinstance(schema.get(key), str):
            yield schema[key]


# ---- sizes


@dataclass(slots=True)
class _Rule:
    """A rule or terminal. ``size``: its characters, without the terminals that it refers to;
    ``terminals``: how often it refers to each. ``work``: microseconds to compile it."""

    name: str = ""
    size: int = 0
    work: float = 0.0
    terminals: dict[str, int] = field(default_factory=dict)

    def add(self, other: _Rule, times: int = 1) -> None:
        self.size += times * other.size
        for name, count in other.terminals.items():
            self.terminals[name] = self.terminals.get(name, 0) + times * count


class _Nesting:
    """Sums up a text with groups, alternatives and repetitions, which multiply the last item."""

    def __init__(self) -> None:
        self._groups = [_Rule()]
        self._longest = [0]  # For each open group: its longest alternative so far.
        self._last = _Rule()

    def item(self, item: _Rule) -> None:
        self._groups[-1].add(self._last)
        self._last = item

    def alternative(self) -> None:
        """A ``|``: begins the next alternative of the current group."""
        self.item(_Rule())
        self._longest[-1] = max(self._longest[-1], self._groups[-1].size)
        self._groups[-1].size = 0

    def open(self) -> None:
        self.item(_Rule())
        self._groups.append(_Rule())
        self._longest.append(0)

    def close(self) -> None:
        self.alternative()
        if len(self._groups) > 1:
            self._last = self._groups.pop()
            self._last.size = self._longest.pop()

    def repeat(self, times: int) -> None:
        repeated = _Rule()
        repeated.add(self._last, max(times, 1))
        self._last = repeated

    def total(self) -> _Rule:
        while len(self._groups) > 1:  # Groups that nothing closes.
            self.close()
        self.alternative()
        self._groups[0].size = self._longest[0]
        return self._groups[0]


def _regex_size(regex: str, param: str) -> int:
    """The number of characters of an expanded regular expression: its longest alternatives, each
    repetition at its minimum. Raises InvalidRequest for the flag x, which allows comments."""
    nesting, depth, opened = _Nesting(), 0, -1
    for found in _REGEX.finditer(regex):
        token, at = found.group(), found.start()
        if depth:  # In a character class, where a leading ] is literal.
            if token == "[":
                depth, opened = depth + 1, at
            elif token == "]" and regex[opened + 1 : min(at, opened + 3)] not in ("", "^"):
                depth -= 1
        elif token == "[":
            nesting.item(_Rule(size=1))
            depth, opened = 1, at
        elif found["flags"] is not None:
            if "x" in found["flags"]:
                raise InvalidRequest(f"{param}: the flag x is not supported", param=param)
            if token.endswith(":"):
                nesting.open()
        elif token.startswith("("):
            nesting.open()
        elif token == ")":
            nesting.close()
        elif found["least"] is not None:
            nesting.repeat(_number(found["least"]))
        elif token == "|":
            nesting.alternative()
        elif token not in "?*+":
            nesting.item(_Rule(size=1))
    return nesting.total().size


def _number(digits: str) -> int:
    return int(digits or 0) if len(digits) < 10 else 10**9


def _rules(grammar: str, param: str) -> Iterator[_Rule]:
    """The rules and terminals of a Lark grammar. Raises InvalidRequest."""
    rule, nesting, tokens, place = _Rule(), _Nesting(), 0, 0
    while found := _LARK.search(grammar, place):
        place = found.end()
        tokens += 1
        match found.lastgroup:
            case "rule" | "name":
                yield _summed(rule, nesting, tokens)
                rule, nesting, tokens = _Rule(found["name"]), _Nesting(), 0
            case "string":
                nesting.item(_Rule(size=len(found["string"])))
            case "regex":
                nesting.item(_Rule(size=_lark_regex_size(found["regex"], param)))
            case "directive":
                value, place = _json_at(grammar, place, param)
                rule.work += schema_work(value, param)
                nesting.item(_Rule(size=1))
            case "reference":
                used = found["reference"]
                counted = {used: 1} if used.isupper() else {}
                nesting.item(_Rule(size=1, terminals=counted))
            case "least" | "times":
                nesting.repeat(_number(found["least"] or found["times"]))
            case "special":
                nesting.item(_Rule(size=1))
            case "other":
                _punctuation(found["other"], nesting, param)
    yield _summed(rule, nesting, tokens)


def _punctuation(sign: str, nesting: _Nesting, param: str) -> None:
    """Raises InvalidRequest for an opening sign that nothing closes."""
    if sign in '"/<':
        raise InvalidRequest(f"{param}: a {sign} in the grammar is not closed", param=param)
    if sign == "|":
        nesting.alternative()
    elif sign in "([":
        nesting.open()
    elif sign in ")]":
        nesting.close()


def _summed(rule: _Rule, nesting: _Nesting, tokens: int) -> _Rule:
    rule.add(nesting.total())
    if not rule.name.isupper():  # The work of terminals is bounded by their size.
        rule.work += RULE * tokens**2
    return rule


def _lark_regex_size(token: str, param: str) -> int:
    """Raises InvalidRequest."""
    regex, _, flags = token[1:].rpartition("/")
    check_length(regex, MAX_REGEX_CHARACTERS, param)
    if "x" in flags:
        raise InvalidRequest(f"{param}: the flag x is not supported", param=param)
    return _regex_size(regex, param)


def _json_at(grammar: str, start: int, param: str) -> tuple[Any, int]:
    """The JSON in a grammar, and its end. Raises InvalidRequest."""
    try:
        return json.JSONDecoder(object_pairs_hook=_unique).raw_decode(grammar, start)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{param}: JSON in the grammar cannot be read", param=param) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found
