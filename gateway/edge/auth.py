"""API keys: several, named, from a file, compared in constant time. Keys are never logged.

A line of the file is ``name: key`` or ``key``, and then attributes::

    ada: sk-1 tenant=acme weight=2 priority=-10 rate=60/m concurrency=8 models=demo,model

``tenant``: keys with the same tenant share cached prefixes and pictures; the key's own name by
default. ``weight``: its share of the decoder, relative to other keys; 1 by default. ``priority``:
the lowest that its requests may ask for, and their default; 0 by default. Lower runs first, so
``priority=5`` is for background work. ``rate``: requests per second, minute or hour (``10/s``,
``60/m``, ``1000/h``), all of which may come at once; unlimited by default. ``concurrency``:
requests in flight; unlimited by default. ``models``: the served names that the key may use; all by
default. Rates are counted by the key's name, so counts survive a reload of the file, even where the
rate has changed. The processes of one gateway (``--workers``) count together; each gateway counts
for itself. A key without a name is named by its line, such as ``key5``. Lines move, so name the
keys of customers who must not share caches.

A key is visible ASCII. Clients send other characters in a header differently: some as UTF-8, some
as Latin-1, and the openai client refuses them.
"""

from __future__ import annotations

import difflib
import hmac
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.types import Scope

from gateway.edge.rates import KeyRates, Rate, SharedPlaces
from opticnerve.errors import ConfigError, InvalidRequest, Unauthenticated
from opticnerve.generation.values import MAX_WEIGHT, MIN_WEIGHT

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/", "/live", "/ready", "/health", "/openapi.json", "/docs"})
OPEN_FILES = "/playground/"  # Scripts and styles of the pages, which hold no secrets.
KEY_PROTOCOL = "openai-insecure-api-key."  # Followed by a key; see ``offered_key``.
MIN_PRIORITY, MAX_PRIORITY = -(2**31), 2**31 - 1
FORM = "'name: key' or 'key', and then attributes such as tenant=acme, weight=2 or priority=-10"
_NAME = r"[A-Za-z0-9_.@-]+"
_LINE = re.compile(rf"(?:({_NAME})\s*:\s+)?(\S+)((?:\s+\S+)*)")
_ASCII = re.compile(r"[\t -~]+")
_COMMENT = re.compile(r"(?:^|\s)#.*")


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request, as the key file describes it. ``tenant`` is empty without a key."""

    name: str
    tenant: str
    weight: float = 1.0
    min_priority: int = 0  # Lower runs first.
    rate: Rate | None = None  # None: unlimited.
    concurrency: int = 0  # Most requests in flight; 0: unlimited.
    models: tuple[str, ...] = ()  # The served names that it may use; empty: all.

    def __str__(self) -> str:
        """For log lines."""
        return self.name

    @property
    def share(self) -> str:
        """The fair-queueing key: requests with the same one are scheduled as one client. Empty
        without an API key."""
        return self.name if self.tenant else ""

    def priority(self, asked: int | None) -> int:
        """The priority of a request with the field ``priority`` set to ``asked``; None: not set.

        Raises InvalidRequest for a priority below this caller's minimum.
        """
        if asked is None:
            return max(0, self.min_priority)
        if asked < self.min_priority:
            raise InvalidRequest(
                f"priority: {asked} is below {self.min_priority}, the lowest that "
                f"{'this key' if self.tenant else 'a caller without a key'} may ask for; lower "
                "runs first, so give less urgent requests a higher one",
                param="priority",
            )
        return asked


ANONYMOUS = Caller("anonymous", "")


@dataclass
class Keys:
    """The accepted keys. While there are none, every caller is ``ANONYMOUS``."""

    callers: Mapping[bytes, Caller] = field(default_factory=dict, repr=False)  # By key.
    path: str | None = None  # The file that they were read from.
    rates: KeyRates = field(default_factory=KeyRates, repr=False)  # By caller's name.
    places: SharedPlaces | None = None  # Counts requests in flight of all processes.

    @classmethod
    def load(cls, path: str | None) -> Keys:
        """Reads a key file, in which ``#`` begins a comment. Raises ConfigError."""
        if path is None:
            return cls()
        try:
            text = Path(path).read_text(encoding="utf-8-sig")  # Some editors write a BOM.
        except OSError as error:
            raise ConfigError(
                f"cannot read the key file {path}: {error.strerror}", param="api_key_file"
            ) from error
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"the key file {path} is not UTF-8 text", param="api_key_file"
            ) from error
        return cls(_parse(text, path), path)

    def reread(self) -> None:
        """Reads the file again, for later requests, and logs how many keys changed. Without a file,
        or if it is invalid, the keys stay as they were; the log says so."""
        if self.path is None:
            log.info("no key file to read again; see --api-key-file")
            return
        try:
            new = Keys.load(self.path)
        except ConfigError as error:
            log.error("the keys stay as they were: %s", error.message)
            return
        old, now = self.callers, new.callers
        self.callers = now
        self.rates.keep({caller.name for caller in now.values()})
        log.info(
            "read %s again: %d keys; %d added, %d removed, %d with changed name or attributes",
            self.path,
            len(now),
            len(now.keys() - old.keys()),
            len(old.keys() - now.keys()),
            sum(now[key] != old[key] for key in now.keys() & old.keys()),
        )

    @property
    def required(self) -> bool:
        return bool(self.callers)

    def rate_headers(self, caller: Caller) -> dict[str, str]:
        """Headers that report what is left of a caller's rate; empty for a caller without one."""
        rate = caller.rate
        return {} if rate is None else self.rates.left(caller.name, rate).headers

    def identify(self, authorization: str | None, api_key: str | None = None) -> Caller:
        """The caller whose key is in a request's Authorization or x-api-key header. If a client
        sends both, one known key is enough. Raises Unauthenticated.

        Every key is compared even after a match, so that the time taken reveals nothing.
        """
        if not self.required:
            return ANONYMOUS
        scheme, _, bearer = (authorization or "").partition(" ")
        given = [bearer if scheme.lower() == "bearer" else "", api_key or ""]
        candidates = [key.strip().encode() for key in given if key.strip()]
        if not candidates:
            raise Unauthenticated(
                "no API key was given; send it as 'Authorization: Bearer KEY' or as 'x-api-key: "
                "KEY'",
                param=None,
            )
        found: Caller | None = None
        for candidate in candidates:
            for key, caller in self.callers.items():
                if hmac.compare_digest(candidate, key):
                    found = caller
        if found is None:
            raise Unauthenticated("the API key is unknown to this server")
        return found


# ---- the file; error messages never quote a line, since its key may be in the wrong place


def _parse(text: str, path: str) -> dict[bytes, Caller]:
    callers: dict[bytes, Caller] = {}
    names: set[str] = set()
    numbers: dict[bytes, int] = {}  # Line numbers, by key.
    for number, raw in enumerate(text.splitlines(), 1):
        written = _COMMENT.sub("", raw).strip()
        if not written:
            continue
        try:
            key, caller = _read_line(written, number)
            if caller.name in names:
                raise ValueError(f"the name {caller.name} is used twice")
            if key in numbers:
                raise ValueError(f"the same key as in line {numbers[key]}")
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: {error}", param="api_key_file") from error
        callers[key] = caller
        names.add(caller.name)
        numbers[key] = number
    if not callers:
        raise ConfigError(f"{path} contains no key", param="api_key_file")
    return callers


def _read_line(line: str, number: int) -> tuple[bytes, Caller]:
    """A key and its caller. Raises ValueError, whose text never holds a key."""
    if not _ASCII.fullmatch(line):
        raise ValueError(
            "a character that is not printable ASCII; not every client can send such a key, so "
            "none is taken"
        )
    found = _LINE.fullmatch(line)
    if found is None:
        raise ValueError(f"expected {FORM}")
    name, key, rest = found.groups()
    if "=" in key and key.partition("=")[0] in ATTRIBUTES:
        raise ValueError(f"an attribute where the key should be; expected {FORM}")
    if name is None and ":" in key:  # A name and a key, or a key that contains a colon.
        raise ValueError("a colon without a space; write 'name: key', also for a key with colons")
    name = name or f"key{number}"
    fields = {"tenant": name, **_attributes(rest.split())}
    return key.encode(), Caller(name, **fields)


def _attributes(words: list[str]) -> dict[str, Any]:
    """``tenant=acme weight=2`` as fields of Caller. Raises ValueError."""
    fields: dict[str, Any] = {}
    for place, word in enumerate(words, 1):
        name, _, value = word.partition("=")
        if name not in ATTRIBUTES:
            near = difflib.get_close_matches(name, ATTRIBUTES, 1)
            hint = f"did you mean {near[0]}=?" if near and "=" in word else f"expected {FORM}"
            raise ValueError(f"what follows the key, in place {place}, is no attribute; {hint}")
        attribute, read = ATTRIBUTES[name]
        if attribute in fields:
            raise ValueError(f"{name} is there twice")
        fields[attribute] = read(value)
    return fields


def _read_tenant(text: str) -> str:
    if not re.fullmatch(_NAME, text):
        raise ValueError("tenant: expected a name of letters, digits and any of _ . @ -")
    return text


def _read_weight(text: str) -> float:
    weight = float(text) if re.fullmatch(r"\d+(?:\.\d+)?", text) else 0.0
    if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
        raise ValueError(f"weight: expected a number from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}")
    return weight


def _read_priority(text: str) -> int:
    priority = int(text) if re.fullmatch(r"-?\d{1,10}", text) else MAX_PRIORITY + 1
    if not MIN_PRIORITY <= priority <= MAX_PRIORITY:
        raise ValueError(
            f"priority: expected a whole number from {MIN_PRIORITY} to {MAX_PRIORITY}, the "
            "lowest that requests with this key may ask for"
        )
    return priority


def _read_concurrency(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise ValueError("concurrency: expected a number of requests in flight, at least 1")
    return int(text)


def _read_models(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if not all(names):
        raise ValueError("models: expected served names with commas and no spaces between them")
    return names


ATTRIBUTES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "tenant": ("tenant", _read_tenant),
    "weight": ("weight", _read_weight),
    "priority": ("min_priority", _read_priority),
    "rate": ("rate", Rate.read),
    "concurrency": ("concurrency", _read_concurrency),
    "models": ("models", _read_models),
}
"""By name in a key file: the field of Caller, and the function that reads its text."""


def offered_key(scope: Scope) -> str | None:
    """The key that a browser's WebSocket offers as a subprotocol: pages cannot set headers."""
    for offered in scope.get("subprotocols", ()):
        if offered.startswith(KEY_PROTOCOL):
            return str(offered).removeprefix(KEY_PROTOCOL)
    return None


def needs_key(path: str, *, public_models: bool) -> bool:
    """Whether requests for a path (without trailing slash) need a key."""
    if path in OPEN_PATHS or path.startswith(OPEN_FILES):
        return False
    is_models = path == "/v1/models" or path.startswith("/v1/models/")
    return not (public_models and is_models)
