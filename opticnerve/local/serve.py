"""A whole stack for one program: ``with opticnerve.serve(MODEL) as server``.

Starts ``opticnerve up`` on a free port of loopback, waits until it is ready, and stops it at the
end. For scripts, notebooks and tests; a service that others use is started with the CLI.
"""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, overload

import httpx2

from opticnerve.certificates import context_trusting
from opticnerve.cli.chat_client import TIMEOUT_S, error_of, user_message
from opticnerve.cli.commands import PREFIX
from opticnerve.config.gateway import HttpsConfig
from opticnerve.config.options import build, to_command_line
from opticnerve.config.up import up_options
from opticnerve.errors import ConfigError, InvalidRequest, StartupError, Unavailable, did_you_mean
from opticnerve.extras import require_extra
from opticnerve.media.load import Picture, is_picture, is_url

if TYPE_CHECKING:
    from openai import OpenAI

Question: TypeAlias = str | tuple[str, *tuple[Picture | list[Any] | tuple[Any, ...], ...]]
"""A text, or (text, picture, ...). Strings among the pictures are paths or URLs."""

FORM = (
    'a question is "text", or a tuple ("text", picture, ...) whose pictures are paths, URLs, bytes '
    "or Pillow images; several questions are a list of these"
)
READY = "OpticNerve is ready at "
STOP_S = 40.0


class Stack:
    """A running stack. ``url``: the gateway's address, ``http://127.0.0.1:<port>``. ``trust``:
    verifies the gateway's certificate, if it has one."""

    def __init__(
        self,
        url: str,
        model: str,
        process: subprocess.Popen[str],
        log: IO[str] | None = None,
        trust: ssl.SSLContext | None = None,
    ) -> None:
        self.url = url
        self.model = model
        self.process = process
        self.trust = trust
        self._log = log
        self._http = httpx2.Client(
            base_url=url, verify=trust or True, timeout=TIMEOUT_S, trust_env=False
        )

    @property
    def openai(self) -> OpenAI:
        """A client of the openai package, ready to use. Raises StartupError without it."""
        require_extra("openai", "server.openai")
        from openai import OpenAI

        http = None if self.trust is None else httpx2.Client(verify=self.trust, timeout=TIMEOUT_S)
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, http_client=http)

    @overload
    def chat(self, questions: Question, **parameters: Any) -> str: ...

    @overload
    def chat(self, questions: list[Any], **parameters: Any) -> list[str]: ...

    def chat(self, questions: Question | list[Any], **parameters: Any) -> str | list[str]:
        """The answer to one question, or the answers to a list of them.

        A question is a text, or a tuple (text, picture, ...). A picture is a path, a URL, bytes or
        a Pillow image; a list of pictures may stand in a picture's place. The questions of a list
        are asked concurrently, so that they run as a batch; the answers are in the same order.
        ``parameters`` are those of a chat completion (max_tokens, temperature...).

        All questions are checked before any is asked: raises TypeError for a malformed question,
        and InvalidRequest for a picture's path that does not exist. After that, raises the typed
        error of the first question that fails, with its ``param`` and ``code``. To stream, use
        ``openai``.
        """
        if parameters.get("stream"):
            raise TypeError(
                "chat() returns whole answers; for a stream use "
                "server.openai.chat.completions.create(..., stream=True)"
            )
        several = questions if isinstance(questions, list) else [questions]
        read = [read_question(question) for question in several]
        with ThreadPoolExecutor(max_workers=min(64, max(1, len(read)))) as pool:
            answers = list(pool.map(lambda question: self._ask(question, parameters), read))
        return answers if isinstance(questions, list) else answers[0]

    def _ask(self, question: tuple[str, list[Picture]], parameters: dict[str, Any]) -> str:
        body = {"model": self.model, "messages": [user_message(*question)], **parameters}
        try:
            answer = self._http.post("/v1/chat/completions", json=body)
        except httpx2.HTTPError as error:
            raise Unavailable(f"no answer from {self.url}: {error!r}") from error
        if answer.status_code != 200:
            raise error_of(answer)
        return str(answer.json()["choices"][0]["message"]["content"])

    def log(self) -> str:
        """What the stack's processes have logged so far."""
        if self._log is None:
            return ""
        number = self._log.fileno()  # Not seek(): the processes share the file's position.
        return os.pread(number, os.fstat(number).st_size, 0).decode("utf-8", "replace")

    def close(self) -> None:
        self._http.close()


def read_question(question: object) -> tuple[str, list[Picture]]:
    """(text, pictures) of one question of ``Stack.chat``; does not read the pictures.

    Raises TypeError, which shows the form, and InvalidRequest for a path that does not exist.
    """
    parts = question if isinstance(question, tuple) and question else (question,)
    text, *given = parts
    if not isinstance(text, str):
        raise TypeError(f"{FORM}; {type(text).__name__} is no text")
    pictures = [
        one for part in given for one in (part if isinstance(part, list | tuple) else [part])
    ]
    for picture in pictures:
        if not is_picture(picture):
            raise TypeError(f"{FORM}; {type(picture).__name__} is no picture")
        if is_url(picture) or not isinstance(picture, str | Path):
            continue
        if not os.path.exists(os.path.expanduser(picture)):
            if os.path.isfile(text):
                raise TypeError(f"the text comes before its pictures: {FORM}")
            raise InvalidRequest(f"there is no picture {picture}: {FORM}")
    return text, pictures


@contextmanager
def serve(model: str | Path | None = None, **flags: Any) -> Iterator[Stack]:
    """Runs the whole stack while the context lasts.

    ``model``: a checkpoint directory or hub id; None serves the built-in demo checkpoint.
    ``flags``: those of ``opticnerve up``, with underscores: ``encoders=2``, ``dtype="float32"``.
    Raises StartupError if the stack does not start: with a one-line reason if that is known before
    any process starts, as for a wrong path, else with the end of the stack's log. The stack ends
    with this process, however it ends.
    """
    arguments, variables = _up_command(model, {**flags, "parent_pid": os.getpid()})
    command = [sys.executable, "-m", "opticnerve", "up", *arguments]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
            env={**os.environ, **variables},
        )
        try:
            url = _wait_ready(process, log)
            stack = Stack(url, "model", process, log, _trust_for(flags))
            try:
                yield stack
            finally:
                stack.close()
        finally:
            _stop(process)


def _trust_for(flags: Mapping[str, Any]) -> ssl.SSLContext | None:
    """A context that trusts the certificate in the flags, whichever host it names: its host is not
    loopback. None for a stack that speaks plain HTTP."""
    certificate = build(HttpsConfig, flags).https_certificate
    return None if certificate is None else context_trusting(certificate)


def _up_command(
    model: str | Path | None, flags: Mapping[str, Any]
) -> tuple[list[str], dict[str, str]]:
    """(arguments, environment variables) for ``up``. A flag of None keeps its default. Raises
    ConfigError for a flag that ``up`` does not have."""
    known = {item.name: item for item in up_options()}
    for name in flags:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ConfigError(f"opticnerve up has no flag {name}{hint}", param=name)
    return to_command_line(known.values(), {"model": model, "port": 0, **flags})


def _wait_ready(process: subprocess.Popen[str], log: IO[str]) -> str:
    assert process.stdout
    for line in process.stdout:
        if line.startswith(READY):
            drain = threading.Thread(target=process.stdout.read, daemon=True)
            drain.start()
            return line.removeprefix(READY).strip()
    status = process.wait()
    log.seek(0)
    lines = log.readlines()
    if len(lines) == 1 and lines[0].startswith(PREFIX):  # An error before anything was started.
        raise StartupError(lines[0].removeprefix(PREFIX).strip())
    tail = "".join(lines[-15:])
    raise StartupError(f"the stack did not start (status {status}):\n{tail}")


def _stop(process: subprocess.Popen[str]) -> None:
    """Stops the stack. A Ctrl-C meanwhile makes it abort running work, and is raised again at the
    end."""
    interrupted = False
    if process.poll() is None:
        process.terminate()
    deadline = time.monotonic() + STOP_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            time.sleep(0.02)
        except KeyboardInterrupt:
            interrupted = True
            process.send_signal(signal.SIGINT)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout:
        process.stdout.close()
    if interrupted:
        raise KeyboardInterrupt
