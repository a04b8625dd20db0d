"""Secrets that processes share, each in a file of its own: made here, and read.

A file holds one secret: printable ASCII without spaces (it may travel in a header), at least
``LEAST_CHARACTERS`` of it; what is read of the file is a secret and no path, so it is in no log, no
message and on no command line, which every user of a machine can see.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import stat
from pathlib import Path

from opticnerve.errors import ConfigError, StartupError

LEAST_CHARACTERS = 32
MAX_BYTES = 4096  # Of the file.
RANDOM_BYTES = 32  # Of a secret that is made here; twice as many hex digits.

_PRINTABLE = re.compile(r"[!-~]+")

log = logging.getLogger(__name__)


def read_secret(path: str, option: str) -> str:
    """The secret in the file that ``option`` (a field of a configuration) names.

    Raises ConfigError where there is none. Warns where other users may read the file.
    """
    flag = "--" + option.replace("_", "-")
    try:
        with open(os.path.expanduser(path), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{flag}: cannot read {path}: {error.strerror}", param=option) from error
    secret = data.decode("ascii", "replace").strip()
    wrong = _fault(secret) if len(data) <= MAX_BYTES else f"has more than {MAX_BYTES} bytes"
    if wrong:
        raise ConfigError(
            f"{flag}: {path} {wrong}; make a secret with `openssl rand -hex {RANDOM_BYTES}`",
            param=option,
        )
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        log.warning(
            "%s: every user of this machine may open %s; `chmod o-rwx` keeps the secret", flag, path
        )
    return secret


def make_secret(directory: Path, name: str) -> Path:
    """A new file in ``directory``, for this user alone, with a new secret. Raises StartupError."""
    path = directory / name
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(RANDOM_BYTES) + "\n")
    except OSError as error:
        raise StartupError(f"cannot make the secret {path}: {error.strerror}") from error
    return path


def _fault(secret: str) -> str:
    """What is wrong with a text as a secret; nothing where it is one. Tells nothing of it."""
    if not secret:
        return "is empty"
    if not _PRINTABLE.fullmatch(secret):
        return "holds more than one word of printable ASCII"
    if len(secret) < LEAST_CHARACTERS:
        return f"holds {len(secret)} characters, and a secret has at least {LEAST_CHARACTERS}"
    return ""
