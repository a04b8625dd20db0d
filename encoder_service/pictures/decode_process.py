"""Decoding in a separate process, which can be killed while it decodes; a thread cannot.

The process holds Python, Pillow and numpy: no torch, no gRPC, no model. It is started for its first
task, takes one task after the other, and ends with the process that started it. Tasks and errors
cross a socket pair; pixels come back in shared memory without a name, so that nothing is left
behind whichever process ends first.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from opticnerve.errors import EngineFailure, OpticNerveError
from opticnerve.media.decode import decode
from opticnerve.media.plan import Plan
from opticnerve.process import follow_parent, ignore_hangup

if TYPE_CHECKING:
    from opticnerve.models.family import Preprocessor

NICE = 10  # Lower CPU priority than the threads that decode light pictures.
# Makes glibc allocate each picture as its own mapping, which is returned to the system when freed.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True, slots=True)
class DecodeTask:
    """One picture to be decoded, and the limits of decoding it."""

    data: bytes
    plan: Plan
    background: int | None
    max_pixels: int
    max_passes: int


@dataclass(frozen=True, slots=True)
class Pixels:
    """A decoded picture."""

    values: NDArray[np.uint8]  # The tower's input, as the family's preprocessor returns it.
    began: float  # When decoding began, on the monotonic clock, which all processes share.
    seconds: float  # Decode time.


class DecoderDied(Exception):
    """The process ended before its task was done. ``by_task``: it ended during the task, and this
    process did not kill it. ``out_of_time``: the task exceeded its limit of CPU time."""

    def __init__(self, status: int, by_task: bool) -> None:
        super().__init__(f"the decoder process ended with status {status}")
        self.by_task = by_task
        self.out_of_time = status == -signal.SIGXCPU


def decode_and_cut(preprocess: Preprocessor, task: DecodeTask) -> Pixels:
    """Decode, orient, resize, cut into patches. Raises InvalidMedia, EngineFailure."""
    started = time.monotonic()
    try:
        image = decode(task.data, task.plan, task.max_pixels, task.background, task.max_passes)
        values = preprocess(image, task.plan)
    except MemoryError as error:
        raise EngineFailure("the encoder ran out of memory decoding this picture") from error
    return Pixels(values, started, time.monotonic() - started)


class DecoderProcess:
    """Owns one process, which the first ``run`` starts. It does one task at a time, each within
    ``timeout_s`` seconds of CPU time. After DecoderDied, ``kill`` or ``close`` it cannot be used
    again."""

    def __init__(self, preprocess: Preprocessor, timeout_s: float) -> None:
        self._preprocess = preprocess
        self._timeout_s = timeout_s
        self._lock = threading.Lock()  # Guards the process's start and its end.
        self._busy = threading.RLock()  # Guards the pipe.
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._killed = False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def run(self, task: DecodeTask) -> Pixels:
        """Blocks until the task is done. Raises DecoderDied and what ``decode_and_cut`` raises."""
        sent = False
        with self._busy:
            try:
                pipe = self._pipe or self._start()
                sent = True
                pipe.send(task)
                answer = pipe.recv()
                if isinstance(answer, OpticNerveError):
                    raise answer
                shape, began, seconds = answer
                return Pixels(_map(recv_handle(pipe), shape), began, seconds)
            except (EOFError, OSError) as error:
                by_task = sent and not self._killed
                raise DecoderDied(self.close(), by_task) from error

    def kill(self) -> None:
        """Ends the process at once, from any thread; a ``run`` under way raises DecoderDied."""
        with self._lock:
            self._killed = True
            if self._process is not None:
                self._process.kill()

    def close(self) -> int:
        """Kills the process, waits for it and returns its exit status."""
        self.kill()
        with self._busy:
            if self._pipe is not None:
                self._pipe.close()
            return -signal.SIGKILL if self._process is None else self._process.wait()

    def _start(self) -> Connection:
        """Starts the process; returns when it is ready for a task. Raises OSError, EOFError."""
        ours, theirs = socket.socketpair()
        arguments = theirs.fileno(), os.getpid(), self._timeout_s
        with theirs, self._lock:
            self._pipe = Connection(ours.detach())
            if self._killed:
                raise EOFError
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "encoder_service.pictures.decode_process",
                    *map(str, arguments),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **MALLOC},
            )
        self._pipe.send(self._preprocess)
        self._pipe.recv()
        return self._pipe


def _map(handle: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The pixels in the shared memory of ``handle``, which stays mapped as long as the array lives.
    Closes ``handle``."""
    try:
        memory = mmap.mmap(handle, 0)
    finally:
        os.close(handle)
    return np.frombuffer(memory, dtype=np.uint8).reshape(shape)


# ---- in the process


def main(handle: int, parent_pid: int, timeout_s: float) -> None:
    """Does tasks until the other end of the socket is closed, or its process is gone."""
    follow_parent(parent_pid, grace_s=0)
    ignore_hangup()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the group; the parent decides.
    os.nice(NICE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # If memory runs out, this process is killed first.
        Path("/proc/self/oom_score_adj").write_text("500")
    with Connection(handle) as pipe, contextlib.suppress(EOFError, ConnectionError):
        preprocess = pipe.recv()
        pipe.send(None)
        while True:
            _serve(pipe, preprocess, parent_pid, timeout_s)


def _serve(pipe: Connection, preprocess: Preprocessor, parent_pid: int, timeout_s: float) -> None:
    """Does one task. The system ends the process if it takes too much CPU time. A limit on wall
    time would be unfair to a process that yields to others."""
    task = pipe.recv()
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + timeout_s), most))
    try:
        pixels = decode_and_cut(preprocess, task)
    except OpticNerveError as error:
        pipe.send(error)
    except Exception:
        traceback.print_exc()
        pipe.send(EngineFailure("the encoder failed on this picture; its log has the details"))
    else:
        handle = _write_memfd(pixels.values)
        pipe.send((pixels.values.shape, pixels.began, pixels.seconds))
        send_handle(pipe, handle, parent_pid)
        os.close(handle)


def _write_memfd(values: NDArray[np.uint8]) -> int:
    """A descriptor of an unnamed shared-memory file that holds ``values``."""
    handle = os.memfd_create("pixels")
    os.ftruncate(handle, values.nbytes)
    with mmap.mmap(handle, values.nbytes) as memory:
        memory.write(np.ascontiguousarray(values).data.cast("B"))
    return handle


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
