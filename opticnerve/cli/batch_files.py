"""A batch's files, in OpenAI's format. Requests are checked line by line, and answers appended line
by line, so that a batch that was killed can go on where it was.

Files are read a line at a time. Beyond that line, only a digest of each id is kept in memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from opticnerve.errors import StartupError

MAX_NAMED = 10  # Invalid lines that one error message describes.
MAX_SHOWN = 80  # Characters of an id that an error message quotes.
SYNC_S = 1.0  # If the machine crashes, at most the last second of answers is lost.
PATH = re.compile(r"/[A-Za-z0-9_./-]*")
ID_PREFIX = "batch_req_"
LINE_START = f'{{"id":"{ID_PREFIX}'.encode()  # Begins every line of answers that we write.


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A line of the input. ``url``: the path of a route."""

    custom_id: str
    url: str
    body: Mapping[str, Any]

    @property
    def digest(self) -> bytes:
        return digest_of(self.custom_id)


def digest_of(custom_id: str) -> bytes:
    """A digest of an id, 16 bytes."""
    return hashlib.blake2b(custom_id.encode("utf-8", "replace"), digest_size=16).digest()


# ---- requests


def parse_request(line: bytes) -> BatchRequest:
    """The request in a line. Raises ValueError, which says what is wrong."""
    asked = _object(line)
    custom_id, url, body = asked.get("custom_id"), asked.get("url"), asked.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise ValueError("custom_id should be a text")
    try:
        custom_id.encode()
    except UnicodeEncodeError as error:
        raise ValueError("custom_id holds half of a surrogate pair") from error
    if asked.get("method", "POST") != "POST":
        raise ValueError("method should be POST")
    if not isinstance(url, str) or not PATH.fullmatch(url):
        raise ValueError("url should be a route's path, such as /v1/chat/completions")
    if not isinstance(body, dict):
        raise ValueError("body should be an object")
    if body.get("stream"):
        raise ValueError("body.stream should be false: the answers of a batch are whole")
    return BatchRequest(custom_id, url, body)


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except RecursionError as error:
        raise ValueError("not valid JSON: too many levels") from error
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError("should be an object")
    return value


def check_requests(path: Path) -> dict[bytes, int]:
    """The line number of each request, by the digest of its id. Raises StartupError, which names
    lines that are invalid or repeat an id."""
    numbers: dict[bytes, int] = {}
    wrong: list[str] = []
    for number, line in _lines(path):
        try:
            request = parse_request(line)
            first = numbers.setdefault(request.digest, number)
            if first != number:
                shown = request.custom_id[:MAX_SHOWN]
                raise ValueError(f"custom_id {shown!r} is that of line {first}; ids are unique")
        except ValueError as error:
            wrong.append(f"line {number}: {error}")
            if len(wrong) > MAX_NAMED:
                wrong[-1] = "there are more"
                break
    if wrong:
        raise StartupError(f"{path} is no batch:\n" + "\n".join(wrong))
    if not numbers:
        raise StartupError(f"{path} holds no requests; a line of it is one request, as JSON")
    return numbers


def read_requests(path: Path) -> Iterator[BatchRequest]:
    """The requests of a file that ``check_requests`` has read. Raises StartupError if it has
    changed since."""
    for number, line in _lines(path):
        try:
            yield parse_request(line)
        except ValueError as error:
            raise StartupError(f"{path} has changed: line {number}: {error}") from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1. Raises StartupError."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not text.isspace():
                    yield number, text
    except OSError as error:
        raise StartupError(f"{path} cannot be read: {error.strerror}") from error


# ---- answers


def answer_line(
    custom_id: str,
    response: Mapping[str, Any] | None,
    error: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A line of the output. ``response``: status_code, request_id and body; None if there was no
    answer, or one that is not JSON, which ``error`` describes."""
    identity = f"{ID_PREFIX}{uuid.uuid4().hex}"
    return {"id": identity, "custom_id": custom_id, "response": response, "error": error}


def has_failed(answer: Mapping[str, Any]) -> bool:
    """Whether a line of the output has no successful answer."""
    response = answer.get("response")
    status = response.get("status_code") if isinstance(response, dict) else None
    return answer.get("error") is not None or not isinstance(status, int) or status >= 300


class AnswerFile:
    """A file of answers, locked so that only this process appends to it."""

    def __init__(self, path: Path) -> None:
        """Raises StartupError."""
        self.path = path
        self._synced = time.monotonic()
        try:
            self._file = path.open("ab")
        except OSError as error:
            raise StartupError(f"{path} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise StartupError(f"another process writes {path}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._sync()
        self._file.close()

    def recover(self, numbers: Mapping[bytes, int]) -> Iterator[tuple[bytes, bool]]:
        """Yields the digest of each request that is answered here, and whether it failed. An
        incomplete last line is cut off. ``numbers``: the result of ``check_requests``.

        Raises StartupError for a line that does not answer one of these requests.
        """
        end = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n") and _is_torn(line):
                    os.truncate(self.path, end)
                    return
                try:
                    answer = _object(line)
                    digest = digest_of(str(answer["custom_id"]))
                    _ = numbers[digest]
                except (ValueError, KeyError) as error:
                    raise StartupError(
                        f"{self.path}, line {number}: no answer to a request of this batch; name "
                        "another file, or remove this one"
                    ) from error
                yield digest, has_failed(answer)
                end += len(line)
                if not line.endswith(b"\n"):  # An editor may have removed the last newline.
                    self._write(b"\n")
                    return

    def append(self, answer: Mapping[str, Any]) -> None:
        """Adds a line. It survives a crash of this process at once, and of the machine after
        SYNC_S."""
        text = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
        # Half of a surrogate pair becomes its escape, which JSON may contain.
        self._write(text.encode("utf-8", "backslashreplace") + b"\n")
        if time.monotonic() - self._synced > SYNC_S:
            self._sync()

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise StartupError(f"{self.path} cannot be written: {error.strerror}") from error

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()


def _is_torn(line: bytes) -> bool:
    """Whether a line without a newline is only the beginning of an answer."""
    start = min(len(line), len(LINE_START))
    if line[:start] != LINE_START[:start]:
        return False
    try:
        json.loads(line)
    except ValueError:
        return True
    return False
