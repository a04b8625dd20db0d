"""A whole stack for one program: ``with opticnerve.serve(MODEL) as server``.

Starts ``opticnerve up`` on a free port of loopback, waits until it is ready, and stops it at the
end. For scripts, notebooks and tests; a service that others use is started with the CLI.
"""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import httpx2

from opticnerve.cli import PREFIX
from opticnerve.errors import OpticNerveError, StartupError, Unavailable, from_openai

if TYPE_CHECKING:
    from openai import OpenAI
    from PIL import Image

    Picture = str | bytes | Path | Image.Image

READY = "OpticNerve is ready at "
STOP_S = 40.0


class Stack:
    """A running stack. ``url`` is the gateway's address, ``http://127.0.0.1:<port>``."""

    def __init__(self, url: str, model: str, process: subprocess.Popen[str]) -> None:
        self.url = url
        self.model = model
        self.process = process
        self._http = httpx2.Client(base_url=url, timeout=600.0, trust_env=False)

    @property
    def openai(self) -> OpenAI:
        """A client of the openai package, ready to use. Needs ``opticnerve[openai]``."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def chat(
        self, questions: Sequence[str | tuple[str, *tuple[Picture, ...]]], **parameters: Any
    ) -> list[str]:
        """Answers to many questions, in order, asked at once so that they run as a batch.

        A question is a text, or (text, picture, ...); a picture is a path, a URL, bytes or a
        Pillow image. ``parameters`` are those of a chat completion (max_tokens, temperature...).
        Raises the typed error of the first question that fails, with its ``param`` and ``code``.
        """
        with ThreadPoolExecutor(max_workers=min(64, max(1, len(questions)))) as pool:
            return list(pool.map(lambda question: self._ask(question, parameters), questions))

    def _ask(self, question: str | tuple[Any, ...], parameters: dict[str, Any]) -> str:
        text, *pictures = (question,) if isinstance(question, str) else question
        body = {"model": self.model, "messages": [user_message(text, pictures)], **parameters}
        try:
            answer = self._http.post("/v1/chat/completions", json=body)
        except httpx2.HTTPError as error:
            raise Unavailable(f"no answer from {self.url}: {error!r}") from error
        if answer.status_code != 200:
            raise error_of(answer)
        return str(answer.json()["choices"][0]["message"]["content"])

    def close(self) -> None:
        self._http.close()


def error_of(answer: httpx2.Response) -> OpticNerveError:
    """The typed error that a gateway's answer, read whole, tells of."""
    try:
        body = answer.json()
    except ValueError:  # Of something between the gateway and us.
        body = None
    after = answer.headers.get("retry-after", "")
    return from_openai(body, answer.status_code, float(after) if after.isdecimal() else None)


def user_message(text: str, pictures: Iterable[Picture]) -> dict[str, Any]:
    """A user's message in OpenAI's form, pictures first."""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": picture_url(picture)}} for picture in pictures
    ]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def picture_url(picture: Picture) -> str:
    """A URL as it is; a path, bytes or a Pillow image as a data: URL."""
    from opticnerve.clients.pictures import read_picture  # Here: Pillow is slow to import.

    if isinstance(picture, str) and picture.split(":", 1)[0] in ("http", "https", "data"):
        return picture
    if isinstance(picture, str | Path):
        data = Path(picture).read_bytes()
    elif isinstance(picture, bytes):
        data = picture
    else:
        data = read_picture(picture)
    return "data:application/octet-stream;base64," + base64.b64encode(data).decode()


@contextmanager
def serve(model: str | Path | None = None, **flags: Any) -> Iterator[Stack]:
    """Runs the whole stack while the context lasts.

    ``model``: a checkpoint directory or hub id; None serves the built-in demo checkpoint.
    ``flags``: those of ``opticnerve up``, with underscores: ``encoders=2``, ``dtype="float32"``.
    Raises StartupError when it does not come up: with the one line that says why where that is
    known before anything starts, as of a wrong path, else with the stack's last words. The stack
    ends with this process, however that ends.
    """
    flags = {**flags, "parent_pid": os.getpid()}
    command = [sys.executable, "-m", "opticnerve", "up", *_arguments(model, flags)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        try:
            stack = Stack(_wait_ready(process, log), "model", process)
            try:
                yield stack
            finally:
                stack.close()
        finally:
            _stop(process)


def _arguments(model: str | Path | None, flags: dict[str, Any]) -> list[str]:
    """Flags of ``up``; None is the default, as if the flag were not given."""
    arguments = [str(model)] if model is not None else []
    for name, value in {"port": 0, **flags}.items():
        flag = "--" + name.replace("_", "-")
        if value is None or (value is False and name.startswith("no_")):
            continue
        if isinstance(value, bool):
            arguments.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, list | tuple):
            arguments += [flag, ",".join(str(part) for part in value)]
        else:
            arguments += [flag, str(value)]
    return arguments


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
    if len(lines) == 1 and lines[0].startswith(PREFIX):  # Said before anything was started.
        raise StartupError(lines[0].removeprefix(PREFIX).strip())
    tail = "".join(lines[-15:])
    raise StartupError(f"the stack did not start (status {status}):\n{tail}")


def _stop(process: subprocess.Popen[str]) -> None:
    """Stops the stack. A Ctrl-C meanwhile is passed on to it, where it ends what still runs, and
    raised afterwards."""
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
