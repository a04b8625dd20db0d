"""The process in which chat templates of requests are rendered.

A template is a program: it can loop forever or fill the memory, while it holds the GIL. So it runs
in a process that has little memory and can be killed.

A message is JSON: the template's source, the form to render, and the variables. The answer is
``{"done": ...}``, or ``{"error": ...}`` with the error's class name and fields.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gateway.edge.limits import TEMPLATE_MEMORY_BYTES
from gateway.prompt.special_token_guard import Aliases
from gateway.prompt.template import ChatTemplate, clock
from opticnerve.errors import CheckpointError, InvalidRequest
from opticnerve.process import follow_parent, ignore_hangup

NICE = 10  # Niceness: the gateway's own work goes first.
KEPT_TEMPLATES = 8


def main(handle: int, parent_pid: int) -> None:
    """Answers messages until the other end of the socket is closed, or its process is gone."""
    follow_parent(parent_pid, grace_s=0)
    ignore_hangup()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the group; the parent decides.
    os.nice(NICE)
    memory = _address_space() + TEMPLATE_MEMORY_BYTES
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_AS, memory),
    ):
        resource.setrlimit(kind, (most, most))
    with Connection(handle) as pipe, contextlib.suppress(EOFError, ConnectionError):
        aliases = Aliases(**json.loads(pipe.recv_bytes()))
        pipe.send_bytes(b"{}")

        @lru_cache(maxsize=KEPT_TEMPLATES)
        def template(source: str) -> ChatTemplate:
            return ChatTemplate(source, aliases)

        while True:
            pipe.send_bytes(_answer(template, json.loads(pipe.recv_bytes())))


def _address_space() -> int:
    """The bytes of address space in use now; libraries map more on machines with more cores."""
    pages = Path("/proc/self/statm").read_text().split()[0]
    return int(pages) * resource.getpagesize()


def _answer(template: Callable[[str], ChatTemplate], asked: Mapping[str, Any]) -> bytes:
    try:
        answer = {"done": _do(template(asked["source"]), asked)}
    except InvalidRequest as error:
        answer = {"error": _described(error)}
    except CheckpointError as error:  # The template does not parse.
        answer = {"error": _described(InvalidRequest(error.message, param="chat_template"))}
    except Exception as error:  # A template can raise any exception while it is compiled.
        message = f"the chat template cannot be compiled ({type(error).__name__})"
        answer = {"error": _described(InvalidRequest(message, param="chat_template"))}
    return json.dumps(answer).encode()


def _do(template: ChatTemplate, asked: Mapping[str, Any]) -> Any:
    form = asked["form"]
    if form is None:
        return {"variables": [*template.variables], "reserved_names": [*template.reserved_names]}
    now = clock(datetime.fromisoformat(asked["now"]))
    return template.render(getattr(template, form), {**asked["variables"], "strftime_now": now})


def _described(error: InvalidRequest) -> dict[str, Any]:
    fields = {name: getattr(error, name) for name in ("message", "param", "code", "logged")}
    return {"kind": type(error).__name__, **fields}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
