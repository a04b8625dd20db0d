"""Secrets that processes share, one to a file: reading one, and making a new one.

A secret is printable ASCII without spaces, so that it can be sent in a header, and at least
``MIN_CHARACTERS`` long. Options and command lines, which every user of a machine can see, hold the
file's path alone; the secret itself is in no log and no message.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import stat
from pathlib import Path

from opticnerve.errors import ConfigError, StartupError

MIN_CHARACTERS = 32
MAX_BYTES = 4096  # Of the file.
RANDOM_BYTES = 32  # Of a new secret, which is written in hex.

_PRINTABLE = re.compile(r"[!-~]+")

log = logging.getLogger(__name__)


def read_secret(path: str, option: str, *, warns: bool = True) -> str:
    """The secret in the file ``path``, which the option named ``option`` gave.

    Raises ConfigError for a file that cannot be read or holds no secret. ``warns``: whether a file
    that other users may open is warned of.
    """
    flag = "--" + option.replace("_", "-")
    try:
        with open(os.path.expanduser(path), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{flag}: cannot read {path}: {error.strerror}", param=option) from error
    secret = data.decode("ascii", "replace").strip()
    fault = _fault(secret) if len(data) <= MAX_BYTES else f"has more than {MAX_BYTES} bytes"
    if fault:
        raise ConfigError(
            f"{flag}: {path} {fault}; make a secret with `openssl rand -hex {RANDOM_BYTES}`",
            param=option,
        )
    if warns and mode & (stat.S_IROTH | stat.S_IWOTH):
        log.warning(
            "%s: every user of this machine may open %s; `chmod o-rwx` keeps the secret", flag, path
        )
    return secret


def make_secret(directory: Path, name: str) -> Path:
    """Writes a new secret to a new file in ``directory``, which only this user may open. Raises
    StartupError."""
    path = directory / name
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(RANDOM_BYTES) + "\n")
    except OSError as error:
        raise StartupError(f"cannot make the secret {path}: {error.strerror}") from error
    return path


def _fault(secret: str) -> str:
    """What is wrong with a secret, without quoting it; empty if nothing is."""
    if not secret:
        return "is empty"
    if not _PRINTABLE.fullmatch(secret):
        return "holds more than one word of printable ASCII"
    if len(secret) < MIN_CHARACTERS:
        return f"holds {len(secret)} characters, and a secret has at least {MIN_CHARACTERS}"
    return ""
