"""A field of a configuration dataclass is a flag, an environment variable and an attribute.

``--max-num-seqs``, ``OPTICNERVE_MAX_NUM_SEQS`` and ``max_num_seqs`` are one thing. A flag wins over
the environment, which wins over the default. Sequences are written with commas. This module knows
what an option is and what its text means; ``opticnerve.flags`` knows command lines.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from opticnerve.errors import ConfigError

PREFIX = "OPTICNERVE_"
TRUE = ("1", "true", "yes", "on")
FALSE = ("0", "false", "no", "off")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([kmgt]?)(i?)(b?)", re.IGNORECASE)
_PASSWORD = re.compile(r"://[^@]*:[^@]*@|[?&]password=")
_IP, _PROTOCOL = r"[0-9A-Fa-f.:\[\]]+", "(?:tcp|udp|sctp)"
_SERVICE_LINK = re.compile(
    rf"{PREFIX}(?:[A-Z0-9_]+_)?(?:"
    rf"SERVICE_HOST={_IP}"
    r"|SERVICE_PORT(?:_[A-Z0-9_]+)?=\d+"
    rf"|PORT(?:_\d+_(?:TCP|UDP|SCTP))?={_PROTOCOL}://{_IP}:\d+"
    rf"|PORT_\d+_(?:TCP|UDP|SCTP)_(?:PROTO={_PROTOCOL}|PORT=\d+|ADDR={_IP})"
    r")"
)

C = TypeVar("C")


@dataclass(frozen=True)
class Spec:
    """What an option is besides its name, type and default."""

    help: str
    group: str  # The title that it stands under in --help.
    metavar: str | None = None
    wanted: str | None = None  # What a text must be, in messages; without one, the metavar.
    choices: tuple[str, ...] | None = None
    secret: bool = False  # Never shown: not in /health, logs or messages.
    hidden: bool = False  # Set by our own processes; not in --help.
    size: bool = False  # Bytes; may be written with a unit.
    least: int = 0  # The smallest value of a number.
    most: int | None = None
    check: Callable[[str], object] | None = None  # Raises ValueError: what is expected.


def option(default: Any, help: str, *, group: str, **kind: Any) -> Any:
    """A dataclass field that is also a flag. ``kind`` has the other fields of ``Spec``."""
    return field(default=default, metadata={"spec": Spec(help, group, **kind)})


@dataclass(frozen=True)
class Option:
    """One leaf field of a configuration, as flag and environment variable."""

    name: str
    path: tuple[str, ...]  # Names of the dataclass fields that lead to it.
    annotation: Any
    default: Any
    spec: Spec

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    @property
    def is_bool(self) -> bool:
        return self.annotation is bool

    @property
    def is_switch(self) -> bool:
        """``--no-x``: a flag without a value and without a negative."""
        return self.is_bool and self.name.startswith("no_")

    def has_password(self, value: Any) -> bool:
        """Whether ``value`` is a URL with a password, which no command line should show. It need
        not be a URL that can be parsed."""
        return self.spec.secret and bool(_PASSWORD.search(str(value)))

    def to_arguments(self, value: Any) -> list[str]:
        """The command-line arguments that give this option ``value``."""
        if self.is_switch:
            return [self.flag] if value else []
        if self.is_bool:
            return [self.flag if value else "--no-" + self.flag[2:]]
        return [self.flag, ",".join(value) if isinstance(value, tuple) else str(value)]

    def parse(self, text: str) -> Any:
        """The value that ``text`` means. Raises ValueError: what is expected, and what came."""
        try:
            return self._parse(text)
        except (ValueError, OverflowError) as error:
            got = "" if self.spec.secret else f", got {text!r}"
            raise ValueError(f"expected {self.expected()}{got}") from error

    def _parse(self, text: str) -> Any:
        kind, spec = _plain_type(self.annotation), self.spec
        if kind is tuple:
            parts = tuple(part.strip() for part in text.split(",") if part.strip())
            return tuple(_checked(part, spec) for part in parts)
        if kind is bool:
            return _truth(text)
        if kind is str:
            return _checked(text, spec)
        value = parse_size(text) if spec.size else kind(text)
        if not math.isfinite(value) or value < spec.least:
            raise ValueError("too small")
        if spec.most is not None and value > spec.most:
            raise ValueError("too large")
        return value

    def expected(self) -> str:
        """What a text must be to be parsed, for messages."""
        kind, spec = _plain_type(self.annotation), self.spec
        if kind is bool:
            return f"true or false ({', '.join((*TRUE, *FALSE))})"
        if spec.choices:
            return f"one of {', '.join(spec.choices)}"
        if kind in (int, float):
            number = "a size such as 512M or 2GiB," if spec.size else "a number"
            number = "a whole number" if kind is int and not spec.size else number
            upper = "up" if spec.most is None else f"to {spec.most}"
            return f"{number} from {spec.least} {upper}"
        wanted = spec.wanted or spec.metavar or "a text"
        return f"{wanted} or several with commas" if kind is tuple else wanted

    def show_default(self) -> str:
        """The default as --help shows it; empty where the help says what happens without."""
        if self.default in (None, "", ()) or self.is_switch:
            return ""
        if self.is_bool:
            return "yes" if self.default else "no"
        if self.spec.size:
            return show_size(self.default)
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)


def _truth(text: str) -> bool:
    lowered = text.strip().lower()
    if lowered not in TRUE + FALSE:
        raise ValueError("neither true nor false")
    return lowered in TRUE


def _checked(text: str, spec: Spec) -> str:
    if spec.choices and text not in spec.choices:
        raise ValueError("none of the choices")
    if spec.check:
        spec.check(text)
    return text


def parse_size(text: str) -> int:
    """Bytes of "1048576", "512M", "2GiB" (1024s) or "2GB" (1000s). Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is no size; write 512M or 2GiB")
    number, unit, binary, byte = match.groups()
    factor = UNITS[unit.upper()]
    if byte and not binary:
        factor = 1000 ** list(UNITS).index(unit.upper())
    return int(float(number) * factor)


def show_size(num_bytes: int) -> str:
    """``20MiB``: as ``parse_size`` reads it, in the largest unit that divides it."""
    fits = [unit for unit, factor in UNITS.items() if num_bytes % factor == 0 < num_bytes]
    unit = fits[-1] if fits else ""
    return f"{num_bytes // UNITS[unit]}{unit + 'iB' if unit else ''}"


def _plain_type(annotation: Any) -> Any:
    """``int`` for ``int | None``; ``tuple`` for ``tuple[str, ...]``."""
    if isinstance(annotation, types.UnionType):
        annotation = next(arg for arg in typing.get_args(annotation) if arg is not type(None))
    return typing.get_origin(annotation) or annotation


def options(cls: type, path: tuple[str, ...] = ()) -> Iterator[Option]:
    """Every leaf option of a configuration dataclass, in order."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        annotation = hints[item.name]
        place = (*path, item.name)
        if dataclasses.is_dataclass(annotation):
            yield from options(typing.cast(type, annotation), place)
        else:
            yield Option(item.name, place, annotation, item.default, item.metadata["spec"])


def is_service_link(name: str, value: str) -> bool:
    """Whether a variable is one that Kubernetes sets in every pod to tell of a Service whose name
    begins with ``opticnerve``, and so none of ours: ``OPTICNERVE_PORT=tcp://10.0.0.1:80``.

    Name and value both count, so that ``OPTICNERVE_PORT=8000`` is ours.
    Source: https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
    """
    return bool(_SERVICE_LINK.fullmatch(f"{name}={value}"))


def build(
    cls: type[C], given: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> C:
    """A configuration from parsed flags (None: not given) and the environment, in which service
    links count for nothing.

    Raises ConfigError for a variable that does not parse.
    """
    environment = os.environ if environment is None else environment
    values: dict[tuple[str, ...], Any] = {}
    for item in options(cls):
        value = given.get(item.name)
        text = environment.get(item.variable)
        if value is None and text is not None and not is_service_link(item.variable, text):
            try:
                value = item.parse(text)
            except ValueError as error:
                raise ConfigError(f"{item.variable}: {error}", param=item.variable) from error
        if value is not None:
            values[item.path] = value
    return _assemble(cls, values)


def _assemble(cls: type[C], values: Mapping[tuple[str, ...], Any]) -> C:
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        mine = {path[1:]: value for path, value in values.items() if path[0] == item.name}
        if () in mine:
            arguments[item.name] = mine[()]
        elif mine:
            arguments[item.name] = _assemble(hints[item.name], mine)
    return cls(**arguments)


def public_view(config: Any) -> dict[str, Any]:
    """Effective settings without secrets, flat, for /health and start-up logs."""
    shown: dict[str, Any] = {}
    for item in options(type(config)):
        value = config
        for name in item.path:
            value = getattr(value, name)
        if not item.spec.hidden:
            shown[item.name] = "***" if item.spec.secret and value != item.default else value
    return shown
