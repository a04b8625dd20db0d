"""Chat templates of requests (``chat_template``), rendered in a process that can be killed."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from gateway.edge.limits import MAX_TEMPLATES_WAITING, RETRY_AFTER_S, TEMPLATE_TIMEOUT_S
from gateway.job import ChatPrompt
from gateway.prompt.renderer import ChatRenderer, RenderedChat
from gateway.prompt.special_token_guard import Aliases
from opticnerve.errors import InvalidRequest, Overloaded, Unavailable, by_name

START_TIMEOUT_S = 60.0
PASSED_ON = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")  # No secrets.


class RequestTemplates:
    """Renders chats that bring their own template, one at a time, with one thread and one process,
    which the first such chat starts."""

    def __init__(self, renderer: ChatRenderer) -> None:
        self._renderer = renderer
        self._process = TemplateProcess(renderer.aliases)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="template")
        self._waiting = 0

    async def render(self, asked: ChatPrompt, contexts: int) -> RenderedChat:
        """As ``ChatRenderer.render``. Also raises InvalidRequest for a template that takes too much
        time or memory, Overloaded, and Unavailable if the process cannot be started."""
        if self._waiting >= MAX_TEMPLATES_WAITING:
            raise Overloaded(
                "too many requests with a chat_template at once; retry later",
                retry_after_s=RETRY_AFTER_S,
            )
        context = contextvars.copy_context()  # Carries the request's id into the log's lines.
        work = self._thread.submit(context.run, self._render, asked, contexts)
        self._waiting += 1
        loop = asyncio.get_running_loop()
        work.add_done_callback(lambda _: loop.call_soon_threadsafe(self._leave))
        return await asyncio.wrap_future(work)

    def _leave(self) -> None:
        self._waiting -= 1

    def _render(self, asked: ChatPrompt, contexts: int) -> RenderedChat:
        assert asked.chat_template is not None
        self._process.begin()
        template = RemoteTemplate(asked.chat_template, self._process)
        return self._renderer.with_template(template).render(asked, contexts)

    def close(self) -> None:
        self._process.kill()
        self._thread.shutdown(cancel_futures=True)


class RemoteTemplate:
    """A ``ChatTemplate`` that lives in the template process."""

    plain, written, everywhere = "plain", "written", "everywhere"

    def __init__(self, source: str, process: TemplateProcess) -> None:
        """Raises InvalidRequest for a template that does not parse."""
        self.source = source
        self._process = process
        told = process.ask({"source": source, "form": None})
        self.variables = frozenset(told["variables"])
        self.reserved_names = frozenset(told["reserved_names"])

    def render(self, template: Any, variables: Mapping[str, Any]) -> str:
        values = dict(variables)
        now = values.pop("strftime_now").__self__  # See ``clock``.
        asked = {"source": self.source, "form": template, "variables": values}
        return str(self._process.ask({**asked, "now": now.isoformat()}))


class TemplateProcess:
    """Owns the template process. Not thread-safe, except for ``kill``."""

    def __init__(self, aliases: Aliases) -> None:
        self._aliases = aliases
        self._deadline = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def begin(self) -> None:
        """Call this before the questions of a request, which have TEMPLATE_TIMEOUT_S together.
        Raises Unavailable."""
        if self._process is not None and self._process.poll() is not None:
            self._end()  # It has ended by itself or was killed from outside.
        if self._pipe is None:
            self._start()
        self._deadline = time.monotonic() + TEMPLATE_TIMEOUT_S

    def ask(self, question: Mapping[str, Any]) -> Any:
        """The process's answer to ``question``. Raises InvalidRequest."""
        pipe = self._pipe
        if pipe is None:  # An earlier question of this request has ended the process.
            raise _too_much()
        try:
            pipe.send_bytes(json.dumps(question).encode())
            if not pipe.poll(max(0.0, self._deadline - time.monotonic())):
                raise EOFError
            answer = json.loads(pipe.recv_bytes())
        except (EOFError, OSError) as error:
            self._end()
            raise _too_much() from error
        if "error" in answer:
            told = answer["error"]
            raise by_name()[told.pop("kind")](**told)
        return answer["done"]

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def _end(self) -> None:
        self.kill()
        if self._process is not None:
            self._process.wait()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._pipe = Connection(ours.detach())
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "gateway.prompt.template_process",
                    str(theirs.fileno()),
                    str(os.getpid()),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={name: os.environ[name] for name in PASSED_ON if name in os.environ},
            )
        with contextlib.suppress(EOFError, OSError):
            self._pipe.send_bytes(json.dumps(self._aliases.arguments).encode())
            if self._pipe.poll(START_TIMEOUT_S):
                self._pipe.recv_bytes()
                return
        self._end()
        raise Unavailable("the process that renders chat templates did not start; try again")


def _too_much() -> InvalidRequest:
    return InvalidRequest(
        "chat_template: it took too much time or memory; simplify it, or send a shorter "
        "conversation",
        param="chat_template",
    )
