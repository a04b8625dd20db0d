"""API keys: several, named, from a file, compared in constant time. Keys are never logged.

``reread`` takes what the file holds by then, for requests that begin from then on.

A key is visible ASCII. Clients do not agree on how anything else travels in a header: some send
UTF-8, some Latin-1, and the openai client refuses to.
"""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from opticnerve.errors import ConfigError, Unauthenticated

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/", "/live", "/ready", "/health", "/openapi.json", "/docs"})
_NAMED = re.compile(r"([A-Za-z0-9_.@-]+)\s*:\s+(\S+)")
_ASCII = re.compile(r"[\t -~]+")
_COMMENT = re.compile(r"(?:^|\s)#.*")


@dataclass
class Keys:
    """The keys that may call. With none, every caller is ``anonymous``."""

    by_name: Mapping[str, bytes]
    path: str | None = None  # The file that they are from.

    @classmethod
    def load(cls, path: str | None) -> Keys:
        """Reads ``name: key`` or ``key`` lines; ``#`` begins a comment. Raises ConfigError."""
        if path is None:
            return cls({})
        try:
            text = Path(path).read_text(encoding="utf-8-sig")  # Some editors begin with a mark.
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the key file {path}", param="api_key_file") from error
        return cls(_parse(text, path), path)

    def reread(self) -> None:
        """Takes what the file holds now, and logs how many keys that changes. Where there is no
        file, or it is wrong, all stays as it was, and the log says so."""
        if self.path is None:
            log.info("there is no key file to read again; see --api-key-file")
            return
        try:
            new = Keys.load(self.path).by_name
        except ConfigError as error:
            log.error("the keys stay as they were: %s", error.message)
            return
        old, self.by_name = set(self.by_name.values()), new
        now = set(new.values())
        log.info(
            "read %s again: %d keys, %d of them new, and %d are gone",
            self.path, len(now), len(now - old), len(old - now),
        )  # fmt: skip

    @property
    def required(self) -> bool:
        return bool(self.by_name)

    def identify(self, authorization: str | None) -> str:
        """The name of the key in an Authorization header. Raises Unauthenticated.

        Every key is compared whatever matched before, so that time tells nothing.
        """
        if not self.required:
            return "anonymous"
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise Unauthenticated(
                "no API key was given; send it as 'Authorization: Bearer KEY'", param=None
            )
        candidate = given.strip().encode()
        found: str | None = None
        for name, key in self.by_name.items():
            if hmac.compare_digest(candidate, key):
                found = name
        if found is None:
            raise Unauthenticated("the API key is not known here")
        return found


def _parse(text: str, path: str) -> dict[str, bytes]:
    keys: dict[str, bytes] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        line = _COMMENT.sub("", raw).strip()
        if not line:
            continue
        try:
            name, key = _read_line(line)
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: {error}", param="api_key_file") from error
        name = name or f"key{number}"
        if name in keys:
            raise ConfigError(f"{path}:{number}: {name} is there twice", param="api_key_file")
        keys[name] = key.encode()
    if not keys:
        raise ConfigError(f"{path} holds no key", param="api_key_file")
    return keys


def _read_line(line: str) -> tuple[str, str]:
    """Name ("" where there is none) and key. Raises ValueError, whose text never holds a key."""
    if not _ASCII.fullmatch(line):
        raise ValueError(
            "a character that is not printable ASCII; not every client can send such a key, so "
            "none is taken"
        )
    named = _NAMED.fullmatch(line)
    name, key = (named[1], named[2]) if named else ("", line)
    if any(character.isspace() for character in key):
        raise ValueError("expected 'name: key' or 'key'")
    if not named and ":" in key:  # Name and key, or a key with a colon: only its owner knows.
        raise ValueError("a colon without a space; write 'name: key', also for a key with colons")
    return name, key


def needs_key(path: str, *, public_models: bool) -> bool:
    """Whether a path (without trailing slash) is behind the keys."""
    if path in OPEN_PATHS:
        return False
    is_models = path == "/v1/models" or path.startswith("/v1/models/")
    return not (public_models and is_models)
