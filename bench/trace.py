"""Records which functions of the product a chat request runs.

    python -P bench/trace.py TREE OUTPUT.json

``bench.measure`` runs this file, with the code of TREE on PYTHONPATH. Therefore it imports nothing
of its own package, and uses only the product's command line and HTTP API, which stay when modules
move. An encoder, an LLM worker and a gateway run as threads of this process, under a profile
function. Requests are streamed, with at most 24 tokens. A function counts if all of several
requests of a kind ran it, after a warm-up; this leaves out imports, and background work that
happens to run during one of them.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import io
import json
import logging
import os
import socket
import sys
import tempfile
import threading
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType

import httpx2
from PIL import Image

REQUESTS = 10  # Of each kind, after the one that warms up.
SETTLE_S = 0.1  # For the services' work after the last byte, such as releasing resources.
PAUSE_S = 0.37  # Between requests, so that polling once a second hits few of them.
START_S = 120.0


class Recorder:
    """Records the code objects of the tree that run in threads started after ``install``."""

    def __init__(self, tree: Path) -> None:
        self._tree = tree
        self._ran: set[CodeType] = set()

    def install(self) -> None:
        threading.setprofile(self._on_event)

    def take(self) -> set[tuple[str, str, int]]:
        """(file, name, line) of each function that ran since the last call."""
        ran, self._ran = self._ran, set()
        found = set()
        for code in ran:
            path = Path(code.co_filename)
            if path.is_relative_to(self._tree):
                name = str(path.relative_to(self._tree))
                found.add((name, code.co_qualname, code.co_firstlineno))
        return found

    def _on_event(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            self._ran.add(frame.f_code)


def start(tree: Path, store: str) -> str:
    """Runs the three services as threads. Returns the gateway's URL once it can use both
    workers."""
    command = entry_point(tree)
    encoder, llm, gateway = (f"127.0.0.1:{port}" for port in free_ports(3))
    url = f"http://{gateway}"
    worker = ["--store", f"shm://{store}", "--threads", "1"]
    workers = ["--encoder-addresses", encoder, "--llm-addresses", llm]

    def run(service: str, address: str, flags: list[str]) -> None:
        arguments = [service, *flags, "--port", address.rpartition(":")[2]]
        threading.Thread(target=command, args=(arguments,), daemon=True).start()

    run("gateway", gateway, workers)
    # One after the other: two threads that import transformers at once break it.
    run("encoder", encoder, worker)
    wait_serving(url, "encoders")
    run("llm", llm, worker)
    wait_serving(url, "llms")
    return url


def entry_point(tree: Path) -> Callable[[list[str]], int]:
    """The command line of the tree, which pyproject.toml names."""
    project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["opticnerve"].partition(":")
    command: Callable[[list[str]], int] = getattr(importlib.import_module(module), name)
    return command


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_serving(url: str, pool: str) -> None:
    """Returns once the gateway's /health counts a serving worker in ``pool``."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx2.TransportError):
            if httpx2.get(f"{url}/health", trust_env=False).json()[pool]["serving"]:
                return
        time.sleep(0.1)
    raise RuntimeError(f"none of the {pool} was ready within {START_S:g} s; see above")


def ask(http: httpx2.Client, text: str, picture: str | None) -> None:
    parts: list[dict[str, object]] = [{"type": "text", "text": text}]
    if picture is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": picture}})
    body = {
        "model": "model",
        "messages": [{"role": "user", "content": parts}],
        "temperature": 0,
        "stream": True,
        "max_tokens": 24,
    }
    answer = http.post("/v1/chat/completions", json=body)
    if "data: [DONE]" not in answer.text:
        raise RuntimeError(f"status {answer.status_code}: {answer.text}")


def pictures() -> Iterator[str]:
    """Data URLs of PNGs, each of another color."""
    for shade in range(256):
        buffer = io.BytesIO()
        Image.new("RGB", (112, 84), (shade, 90, 200)).save(buffer, "PNG")
        yield "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def record(http: httpx2.Client, recorder: Recorder) -> dict[str, dict[str, int]]:
    """The number of functions that every request of a kind runs, by file, including files of a
    virtual environment within the tree."""
    source = pictures()
    known = next(source)
    ask(http, "What do you see?", known)
    kinds: dict[str, Callable[[], str | None]] = {
        "text request": lambda: None,
        "new picture": lambda: next(source),
        "same picture again": lambda: known,
    }
    found = {}
    for kind, picture in kinds.items():
        ran = []
        for index in range(1 + REQUESTS):
            time.sleep(PAUSE_S)
            recorder.take()
            ask(http, f"Tell me about number {index}.", picture())
            time.sleep(SETTLE_S)
            ran.append(recorder.take())
        common = set.intersection(*ran[1:])
        found[kind] = dict(sorted(Counter(file for file, _, _ in common).items()))
    return found


def main() -> None:
    tree, output = Path(sys.argv[1]), Path(sys.argv[2])
    # gRPC wakes all event loops of the process, and those without its work log errors.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    recorder = Recorder(tree)
    recorder.install()
    status = 1
    try:
        with (
            tempfile.TemporaryDirectory(dir="/dev/shm", prefix="opticnerve-trace-") as store,
            httpx2.Client(base_url=start(tree, store), timeout=60, trust_env=False) as http,
        ):
            output.write_text(json.dumps(record(http, recorder)))
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)  # The services' threads get no signals, so nothing could stop them.


if __name__ == "__main__":
    main()
