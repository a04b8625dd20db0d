"""A key's limits in the key file: requests per period, and requests in flight.

Rates use the generic cell rate algorithm (ITU-T I.371), a token bucket whose state is one number a
key. A key that was idle may send all requests of a period at once; after that they are spaced
evenly. The processes of one gateway share the numbers in a directory. While that fails (because of
a full disk, for example), each process counts for itself, and the log says so.

Requests in flight are counted by file locks, which the system releases when their process ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from opticnerve.errors import RateLimited

PERIODS = {"s": 1.0, "m": 60.0, "h": 3600.0}
log = logging.getLogger(__name__)

HEADERS = tuple(f"x-ratelimit-{name}-requests" for name in ("limit", "remaining", "reset"))


@dataclass(frozen=True, slots=True)
class Rate:
    """At most ``requests`` at once, and as many in each ``period_s`` after that."""

    requests: int
    period_s: float

    @classmethod
    def read(cls, text: str) -> Rate:
        """``60/m``, or with s or h. Raises ValueError."""
        found = re.fullmatch(r"([1-9]\d{0,8})/([smh])", text)
        if found is None:
            raise ValueError("rate: expected requests per second, minute or hour, such as 60/m")
        return cls(int(found[1]), PERIODS[found[2]])

    def __str__(self) -> str:
        unit = next(name for name, seconds in PERIODS.items() if seconds == self.period_s)
        return f"{self.requests}/{unit}"

    @property
    def interval_s(self) -> float:
        return self.period_s / self.requests


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left of a key's rate. ``reset_s``: seconds until it has all of it again."""

    rate: Rate
    reset_s: float

    @property
    def remaining(self) -> int:
        return max(0, int((self.rate.period_s - self.reset_s) / self.rate.interval_s + 1e-6))

    @property
    def headers(self) -> dict[str, str]:
        """The rate limit headers, named as in OpenAI's answers."""
        values = str(self.rate.requests), str(self.remaining), duration(self.reset_s)
        return dict(zip(HEADERS, values, strict=True))


class KeyRates:
    """Counts the requests of every key with a rate, by the key's name: those of this process, or of
    all processes that share ``directory``."""

    def __init__(self, directory: Path | None = None) -> None:
        # For each key, when it has all of its rate again; on ``clock``, which all processes share.
        self._own = OwnTimes()
        self._shared = None if directory is None else SharedTimes(directory)
        self._failing = False  # Whether the last use of ``_shared`` failed.
        self.clock = time.monotonic

    def left(self, name: str, rate: Rate) -> Allowance:
        if self._shared is not None and not self._failing:
            with contextlib.suppress(OSError):
                return self._left(self._shared, name, rate)
        return self._left(self._own, name, rate)

    def take(self, name: str, rate: Rate) -> Allowance:
        """Counts a request, and returns what is left. Raises RateLimited without counting it."""
        if self._shared is None:
            return self._take(self._own, name, rate)
        try:
            allowance = self._take(self._shared, name, rate)
        except OSError as error:
            self._note(error)
            return self._take(self._own, name, rate)
        self._note(None)
        return allowance

    def keep(self, names: set[str]) -> None:
        """Forgets all keys except ``names``. Files in a shared directory stay: names may come back,
        and the files are few, one for each key that ever was."""
        self._own.keep(names)

    def _note(self, error: OSError | None) -> None:
        if error is not None and not self._failing:
            log.error("each process counts the rates of keys for itself: %s", error)
        if error is None and self._failing:
            log.info("the processes count the rates of keys together again")
        self._failing = error is not None

    def _left(self, times: Times, name: str, rate: Rate) -> Allowance:
        reset = max(0.0, times.read(name) - self.clock())
        return Allowance(rate, min(reset, rate.period_s))  # The rate may have changed.

    def _take(self, times: Times, name: str, rate: Rate) -> Allowance:
        with times.locked(name):
            left = self._left(times, name, rate)
            if not left.remaining:
                wait = max(0.0, left.reset_s + rate.interval_s - rate.period_s)
                raise RateLimited(
                    f"this key may send {rate} requests ({rate.requests} at once); try again in "
                    f"{duration(wait)}",
                    retry_after_s=wait,
                )
            reset_s = left.reset_s + rate.interval_s
            times.write(name, self.clock() + reset_s)
        return Allowance(rate, reset_s)


class OwnTimes:
    """A time for each name, 0 at first, in this process."""

    def __init__(self) -> None:
        self._times: dict[str, float] = {}

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Nobody else changes the time of ``name`` while the context lasts."""
        yield

    def read(self, name: str) -> float:
        return self._times.get(name, 0.0)

    def write(self, name: str, at: float) -> None:
        self._times[name] = at

    def keep(self, names: set[str]) -> None:
        """Forgets all names except ``names``."""
        self._times = {name: at for name, at in self._times.items() if name in names}


class SharedTimes:
    """As ``OwnTimes``, in a directory with a file for each name. The lock of a file ends with the
    process that holds it. The methods raise OSError."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        self._directory.mkdir(mode=0o700, exist_ok=True)  # Cleaners of /tmp may have removed it.
        with open(self._path(name), "ab") as file:  # Creates the file if it is missing.
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def read(self, name: str) -> float:
        try:
            return float(self._path(name).read_bytes() or 0.0)
        except FileNotFoundError:
            return 0.0

    def write(self, name: str, at: float) -> None:
        with open(self._path(name), "r+b") as file:
            file.write(b"%20.6f" % at)

    def _path(self, name: str) -> Path:
        return self._directory / hashlib.sha256(name.encode()).hexdigest()


Times: TypeAlias = OwnTimes | SharedTimes


class SharedPlaces:
    """Counts the requests in flight of all processes that share a file.

    Each request locks a byte of the file, its place, beyond the file's end. Such locks belong to a
    process, and end with it, or when it closes any descriptor of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None  # Its descriptor.
        self._taken: defaultdict[str, set[int]] = defaultdict(set)  # By this process.
        self._failing = False

    def take(self, name: str, most: int) -> int | None:
        """Takes one of the key's ``most`` places; None if all are taken. While the file fails, the
        log says so, and only this process's own requests count."""
        taken = self._taken[name]
        for place in range(most):
            if place not in taken and self._lock(name, place):
                taken.add(place)
                return place
        return None

    def give_back(self, name: str, place: int) -> None:
        self._taken[name].remove(place)
        if self._file is not None:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _offset(name, place))

    def _lock(self, name: str, place: int) -> bool:
        try:
            if self._file is None:
                self._file = os.open(self._path, os.O_CREAT | os.O_WRONLY, 0o600)
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _offset(name, place))
        except BlockingIOError:
            return False
        except OSError as error:
            if not self._failing:
                log.error("each process counts the requests of keys for itself: %s", error)
            self._failing = True
        else:
            self._failing = False
        return True


def _offset(name: str, place: int) -> int:
    """A place's offset in the file, below 2**63: there is room for 2**31 names, chosen by hash,
    with 2**32 places each."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1
    return number << 32 | place


def duration(seconds: float) -> str:
    """A duration as in OpenAI's headers: ``80ms``, ``1.5s``, ``6m0s``, ``1h0m0s``."""
    milliseconds = round(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, milliseconds = divmod(milliseconds, 60_000)
    text = f"{milliseconds / 1000:g}s"
    if minutes:
        hours, minutes = divmod(minutes, 60)
        text = f"{hours}h{minutes}m{text}" if hours else f"{minutes}m{text}"
    return text
