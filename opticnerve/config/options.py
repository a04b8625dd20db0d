"""Options: fields of a configuration dataclass that are also flags and environment variables.

``--max-num-seqs``, ``OPTICNERVE_MAX_NUM_SEQS`` and ``max_num_seqs`` are one option. A flag wins
over the environment, which wins over the default. Lists are separated by commas; sizes
may have a unit: ``512M``, ``2GiB``. Variables that Kubernetes sets in a pod are not options.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from opticnerve.errors import ConfigError

PREFIX = "OPTICNERVE_"
_IP, _PROTOCOL = r"[0-9A-Fa-f.:\[\]]+", "(?:tcp|udp|sctp)"
_SERVICE_LINK = re.compile(
    rf"{PREFIX}(?:[A-Z0-9_]+_)?(?:"
    rf"SERVICE_HOST={_IP}"
    r"|SERVICE_PORT(?:_[A-Z0-9_]+)?=\d+"
    rf"|PORT(?:_\d+_(?:TCP|UDP|SCTP))?={_PROTOCOL}://{_IP}:\d+"
    rf"|PORT_\d+_(?:TCP|UDP|SCTP)_(?:PROTO={_PROTOCOL}|PORT=\d+|ADDR={_IP})"
    r")"
)

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([kmgt]?)(i?)(b?)", re.IGNORECASE)

TRUE = ("1", "true", "yes", "on")
FALSE = ("0", "false", "no", "off")
_PASSWORD = re.compile(r"://[^@]*:[^@]*@|[?&]password=")

C = TypeVar("C")


class Group(StrEnum):
    """Titles in ``--help``, in its order."""

    PROCESSES = "Processes"
    MODEL = "Model"
    ADDRESS = "Address"
    WORKERS = "Workers"
    HTTPS = "HTTPS"
    TLS = "TLS between services"
    STORE = "Embedding store"
    TOWER = "Vision tower"
    BATCHES = "Batches and queues"
    ENGINE = "Engine"
    API = "API"
    PICTURES = "Pictures"
    URLS = "Media from URLs"
    LIMITS = "Limits of requests"
    TELEMETRY = "Logs, metrics and traces"


@dataclass(frozen=True)
class Spec:
    """An option's properties other than its name, type and default."""

    help: str
    group: str  # Its title in --help.
    metavar: str | None = None  # See ``Option.metavar`` for the default.
    expects: str | None = None  # Describes valid values in messages; the metavar by default.
    choices: tuple[str, ...] | None = None
    secret: bool = False  # Never shown: not in /health, logs or messages.
    hidden: bool = False  # Set by our own processes; not in --help.
    size: bool = False  # Bytes; may be written with a unit.
    minimum: int = 0  # Of a number.
    maximum: int | None = None
    check: Callable[[str], object] | None = None  # Raises ValueError for a wrong text.


def option(default: Any, help: str, *, group: str, **spec: Any) -> Any:
    """A dataclass field that is an option. ``spec`` has the other fields of ``Spec``."""
    return field(default=default, metadata={"spec": Spec(help, group, **spec)})


@dataclass(frozen=True)
class Option:
    """One field of a configuration, as flag and environment variable."""

    name: str
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
    def metavar(self) -> str | None:
        """The value's placeholder in --help; for a number it follows from the unit in the name."""
        if self.spec.metavar or self.kind not in (int, float):
            return self.spec.metavar
        if self.spec.size:
            return "BYTES"
        units = {"_port": "PORT", "_ms": "MS", "_s": "SECONDS"}
        ending = (unit for end, unit in units.items() if f"_{self.name}".endswith(end))
        return next(ending, "N")

    @property
    def kind(self) -> Any:
        """The type without ``None`` and element types: int, float, bool, str or tuple."""
        annotation = self.annotation
        if isinstance(annotation, types.UnionType):
            annotation = next(
                part for part in typing.get_args(annotation) if part is not types.NoneType
            )
        return typing.get_origin(annotation) or annotation

    @property
    def is_positional(self) -> bool:
        return self.name == "model"

    @property
    def is_switch(self) -> bool:
        """``--no-x``: a flag without a value and without a negative."""
        return self.kind is bool and self.name.startswith("no_")

    def has_password(self, value: Any) -> bool:
        """Whether ``value`` looks like a URL with a password, which command lines must not show."""
        return self.spec.secret and bool(_PASSWORD.search(str(value)))

    def to_arguments(self, value: Any) -> list[str]:
        """The command-line arguments that give this option ``value``."""
        if self.is_positional:
            return [str(value)]
        if self.is_switch:
            return [self.flag] if value else []
        if self.kind is bool:
            return [self.flag if value else "--no-" + self.flag[2:]]
        several = isinstance(value, list | tuple)
        return [self.flag, ",".join(map(str, value)) if several else str(value)]

    def read(self, given: Mapping[str, Any], environment: Mapping[str, str]) -> Any:
        """The value of the flag, else that of the variable, else None. Raises ConfigError."""
        value, text = given.get(self.name), environment.get(self.variable)
        if value is not None or text is None:
            return value
        try:
            return self.parse(text)
        except ValueError as error:
            raise ConfigError(f"{self.variable}: {error}", param=self.variable) from error

    def parse(self, text: str) -> Any:
        """The value of ``text``. Raises ValueError that names the expected form and the text."""
        try:
            return self._parse(text)
        except (ValueError, OverflowError) as error:
            got = "" if self.spec.secret else f", got {text!r}"
            raise ValueError(f"expected {self.expected()}{got}") from error

    def _parse(self, text: str) -> Any:
        kind, spec = self.kind, self.spec
        if kind is tuple:
            parts = (part.strip() for part in text.split(","))
            return tuple(_checked(part, spec) for part in parts if part)
        if kind is bool:
            return _truth(text)
        if kind is str:
            return _checked(text, spec)
        value = parse_size(text) if spec.size else kind(text)
        if not math.isfinite(value) or value < spec.minimum:
            raise ValueError("too small")
        if spec.maximum is not None and value > spec.maximum:
            raise ValueError("too large")
        return value

    def expected(self) -> str:
        """Describes valid texts, for messages."""
        kind, spec = self.kind, self.spec
        if kind is bool:
            return f"true or false ({', '.join((*TRUE, *FALSE))})"
        if spec.choices:
            return f"one of {', '.join(spec.choices)}"
        if kind in (int, float):
            number = "a size such as 512M or 2GiB," if spec.size else "a number"
            number = "a whole number" if kind is int and not spec.size else number
            upper = "up" if spec.maximum is None else f"to {spec.maximum}"
            return f"{number} from {spec.minimum} {upper}"
        expects = spec.expects or self.metavar or "a text"
        return f"{expects} or several with commas" if kind is tuple else expects

    def default_text(self) -> str:
        """The default as --help shows it; empty if the help text describes it."""
        if self.default in (None, "", ()) or self.is_switch:
            return ""
        if self.kind is bool:
            return "yes" if self.default else "no"
        if self.spec.size:
            return format_size(self.default)
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


def _members(cls: type) -> Iterator[tuple[str, Option | type]]:
    """(field name, its option or the configuration that it holds), in order."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        annotation = hints[item.name]
        if dataclasses.is_dataclass(annotation):
            yield item.name, typing.cast(type, annotation)
        else:
            yield item.name, Option(item.name, annotation, item.default, item.metadata["spec"])


def options(cls: type) -> Iterator[Option]:
    """Every option of a configuration dataclass and of those that it holds, in order."""
    for _, member in _members(cls):
        if isinstance(member, Option):
            yield member
        else:
            yield from options(member)


def build(
    cls: type[C], given: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> C:
    """A configuration from parsed flags (None: not given) and the environment without Kubernetes'
    service links. Raises ConfigError for a variable that does not parse."""
    environment = without_service_links(os.environ if environment is None else environment)
    values = {}
    for name, member in _members(cls):
        if isinstance(member, Option):
            value = member.read(given, environment)
        else:
            value = build(member, given, environment)
        if value is not None:
            values[name] = value
    return cls(**values)


def to_command_line(
    known: Iterable[Option], given: Mapping[str, Any]
) -> tuple[list[str], dict[str, str]]:
    """(arguments, environment variables) that pass the ``known`` options among ``given`` to another
    process. Passwords go into variables: every user of the machine can read command lines."""
    arguments: list[str] = []
    variables: dict[str, str] = {}
    by_name = {item.name: item for item in known}
    for name, value in given.items():
        item = by_name.get(name)
        if item is None or value is None:
            continue
        if item.has_password(value):
            variables[item.variable] = value
        elif item.is_positional:
            arguments[:0] = item.to_arguments(value)
        else:
            arguments += item.to_arguments(value)
    return arguments, variables


def public_view(config: Any) -> dict[str, Any]:
    """Effective settings without secrets, flat, for /health."""
    shown: dict[str, Any] = {}
    for name, member in _members(type(config)):
        value = getattr(config, name)
        if not isinstance(member, Option):
            shown |= public_view(value)
        elif not member.spec.hidden:
            secret = member.spec.secret and value != member.default
            shown[name] = "***" if secret else value
    return shown


# ---- sizes


def parse_size(text: str) -> int:
    """Bytes of "1048576", "512M", "2GiB" (1024s) or "2GB" (1000s). Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a size; write 512M or 2GiB")
    number, unit, binary, byte = match.groups()
    factor = UNITS[unit.upper()]
    if byte and not binary:
        factor = 1000 ** list(UNITS).index(unit.upper())
    return int(float(number) * factor)


def format_size(num_bytes: int) -> str:
    """The size in the largest unit that divides it, such as ``20MiB``; ``parse_size`` reads it."""
    fits = [unit for unit, factor in UNITS.items() if num_bytes % factor == 0 < num_bytes]
    unit = fits[-1] if fits else ""
    return f"{num_bytes // UNITS[unit]}{unit + 'iB' if unit else ''}"


# ---- the environment


def is_service_link(name: str, value: str) -> bool:
    """Whether a variable is a service link, which Kubernetes sets in every pod for a Service whose
    name begins with ``opticnerve``, such as ``OPTICNERVE_PORT=tcp://10.0.0.1:80``.

    Name and value must both match, so ``OPTICNERVE_PORT=8000`` is an option. Source:
    https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
    """
    return bool(_SERVICE_LINK.fullmatch(f"{name}={value}"))


def without_service_links(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not is_service_link(name, value)}
