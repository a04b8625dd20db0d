"""Names of media servers to addresses, so that names which never answer stop no others.

The system's resolver is asked, in threads, because it alone knows this machine's hosts file,
search domains and name services. It blocks for many seconds where a name server does not answer,
and cannot be stopped. So a name is waited for a few seconds and then remembered as silent; threads
are many, and what they may be used for is shared out: by site, since whoever owns one silent name
server can make up any number of names, with some kept for names that have answered before.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from gateway.media.places import Places

PATIENCE_S = 4.0  # For one name, from when it is asked for.
SILENCE_S = 15.0  # How long a name that did not answer is not asked for again.
STRANGERS = 96  # Look-ups at once of names that have never answered.
STRANGERS_OF_A_SITE = 4
FRIENDS = 32  # Of names that have.
FRIENDS_OF_A_SITE = 2
REMEMBERED = 4096  # Names of either kind.
# Second labels below which owners register names in many countries.
OF_COUNTRIES = frozenset({"ac", "co", "com", "edu", "go", "gov", "ne", "net", "or", "org"})

LookUp = Callable[..., list[Any]]


class Resolver:
    """Looks names up; one a gateway. What is found is not kept: a name may move."""

    def __init__(self, look_up: LookUp = socket.getaddrinfo) -> None:
        self._look_up = look_up
        self._strangers = Places(STRANGERS, STRANGERS_OF_A_SITE)
        self._friends = Places(FRIENDS, FRIENDS_OF_A_SITE)
        self._asked: dict[str, asyncio.Future[list[str] | OSError]] = {}
        self._silent: OrderedDict[str, float] = OrderedDict()  # Until when.
        self._known: OrderedDict[str, None] = OrderedDict()

    async def __call__(self, host: str, port: int) -> list[str]:
        """The addresses of ``host``, in the system's order. Raises TimeoutError for a name that
        does not answer, and other OSErrors."""
        with contextlib.suppress(ValueError):
            return [str(ipaddress.ip_address(host))]
        name = host.rstrip(".").lower()
        answer = self._asked.get(name) or await self._ask(name, host, port)
        try:
            async with asyncio.timeout(PATIENCE_S):
                found = await asyncio.shield(answer)
        except TimeoutError:
            self._known.pop(name, None)
            _remember(self._silent, name, time.monotonic() + SILENCE_S)
            raise
        if isinstance(found, OSError):
            raise found
        return found

    async def _ask(self, name: str, host: str, port: int) -> asyncio.Future[list[str] | OSError]:
        """The answer of a thread that was sent to look ``name`` up, once there is one for it."""
        self._check_silence(name)
        shares = self._friends if name in self._known else self._strangers
        holder = site(name)
        await shares.take(holder)
        try:
            self._check_silence(name)  # Others may have asked meanwhile.
            if name in self._asked:
                shares.give(holder)
                return self._asked[name]
            loop = asyncio.get_running_loop()
            answer: asyncio.Future[list[str] | OSError] = loop.create_future()

            def end(found: list[str] | OSError) -> None:
                del self._asked[name]
                shares.give(holder)
                if not isinstance(found, OSError):
                    _remember(self._known, name, None)
                answer.set_result(found)

            def run() -> None:
                found = self._find(host, port)
                with contextlib.suppress(RuntimeError):  # The loop has ended.
                    loop.call_soon_threadsafe(end, found)

            # A daemon: a look-up that hangs does not keep the process from ending.
            threading.Thread(target=run, name="resolve", daemon=True).start()
        except (OSError, RuntimeError) as error:
            shares.give(holder)
            raise error if isinstance(error, OSError) else OSError(str(error)) from error
        self._asked[name] = answer
        return answer

    def _find(self, host: str, port: int) -> list[str] | OSError:
        try:
            found = self._look_up(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            return error
        except Exception as error:  # Such as UnicodeError, for what is no name.
            return OSError(str(error))
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))

    def _check_silence(self, name: str) -> None:
        until = self._silent.get(name)
        if until is None:
            return
        if time.monotonic() < until:
            raise TimeoutError("the name did not answer lately")
        del self._silent[name]


def site(name: str) -> str:
    """What one owner has, roughly: the last two labels of a name, or three below the likes of
    ``co.uk``."""
    labels = name.split(".")
    shared = len(labels[-1]) == 2 and labels[-2:-1] and labels[-2] in OF_COUNTRIES
    return ".".join(labels[-3 if shared else -2 :])


def _remember(names: OrderedDict[str, Any], name: str, value: Any) -> None:
    names[name] = value
    names.move_to_end(name)
    if len(names) > REMEMBERED:
        names.popitem(last=False)
