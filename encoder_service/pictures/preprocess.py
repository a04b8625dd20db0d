"""The CPU side of encoding: which picture is decoded when, and where.

Compressed items wait cheaply, decoded ones do not: ``staging`` bounds how many patches may be
decoded ahead of the device, in order of arrival. What decoding takes is known from a picture's
structure. Light pictures are decoded on threads, which Pillow and numpy use without the
interpreter's lock; heavy ones in processes that can be ended, since a decoder on a thread cannot.
Each kind has places and memory of its own, so that no light picture waits for a heavy one; within
a kind, requests share the places.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from encoder_service import metrics
from encoder_service.pictures.decode_process import Decoder, DecoderDied, Pixels, Work, prepare
from encoder_service.pictures.turns import Gate, Turns
from encoder_service.poison import PoisonRecord
from opticnerve.errors import EngineFailure, InvalidMedia, OpticNerveError
from opticnerve.media.plan import Structure
from opticnerve.models.family import Preprocessor

log = logging.getLogger(__name__)

LIGHT_SHARE = 4  # Light pictures have one part in so many of the memory.
ITEM_PASSES = 2**20  # What an item takes beside its decoding: it is resized and cut.
WORKER_MEMORY = 2**28  # For each worker, where no flag says how much.
LEAST_MEMORY = 2**31
IDLE_S = 30.0  # After which a process without work is ended.

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Job:
    """One picture to be decoded."""

    owner: str  # The request that brought it.
    key: str
    work: Work
    patches: int
    structure: Structure
    suspect: bool  # A worker has died in its name.

    @property
    def is_heavy(self) -> bool:
        return self.suspect or self.structure.is_heavy


class Lane:
    """Places and memory of one kind of picture."""

    def __init__(self, places: int, memory: int) -> None:
        self.turns = Turns(places)
        self.memory = Gate(memory)

    @contextlib.asynccontextmanager
    async def hold(self, job: Job) -> AsyncIterator[None]:
        """While this picture is decoded."""
        cost, memory = job.structure.passes + ITEM_PASSES, job.structure.memory
        async with self.turns.hold(job.owner, cost), self.memory.hold(memory):
            yield


class PreprocessPool:
    """Owns threads and decoder processes. ``close`` waits for what runs on threads, ends the
    processes, and drops what has not begun. Belongs to one event loop."""

    def __init__(
        self,
        preprocess: Preprocessor,
        poison: PoisonRecord,
        workers: int,
        max_staged_patches: int,
        max_decode_bytes: int = 0,
        decode_timeout_s: float = 30.0,
    ) -> None:
        """``max_decode_bytes``: 0 sizes it from the number of workers. ``decode_timeout_s``: of a
        core's time, for a heavy picture."""
        self.workers = workers
        self.staging = Gate(max_staged_patches)
        self.decode_timeout_s = decode_timeout_s
        memory = max_decode_bytes or max(LEAST_MEMORY, workers * WORKER_MEMORY)
        self.light = Lane(workers, memory // LIGHT_SHARE)
        self.heavy = Lane(workers, memory - memory // LIGHT_SHARE)
        self._preprocess = preprocess
        self._poison = poison
        self._idle: dict[Decoder, asyncio.TimerHandle] = {}
        self._decoders: set[Decoder] = set()
        self._closed = False
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="preprocess")
        self._waits = ThreadPoolExecutor(workers, thread_name_prefix="decoder")

    async def run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs ``work`` on a thread; cancelling drops it if it has not started."""
        return await asyncio.wrap_future(self._threads.submit(work, *args, **kwargs))

    @contextlib.asynccontextmanager
    async def prepared(self, job: Job) -> AsyncIterator[Pixels]:
        """The job's pixels, which hold their place ahead of the device while the context lasts.

        Cancelling takes the job out of its queue, or ends its decoding, where it is heavy.
        Raises InvalidMedia, EngineFailure.
        """
        async with contextlib.AsyncExitStack() as staged:
            async with (self.heavy if job.is_heavy else self.light).hold(job):
                decode = self._in_process if job.is_heavy else self._on_thread
                pixels = await decode(job)
                await staged.enter_async_context(self.staging.hold(job.patches))
            yield pixels

    def close(self) -> None:
        self._closed = True
        for timer in self._idle.values():
            timer.cancel()
        for decoder in self._decoders:
            decoder.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._waits.shutdown(wait=True, cancel_futures=True)
        for decoder in self._decoders:
            decoder.close()

    # ---- light pictures

    async def _on_thread(self, job: Job) -> Pixels:
        return await self.run(self._marked, job)

    def _marked(self, job: Job) -> Pixels:
        with self._poison.working_on([job.key]):
            return prepare(self._preprocess, job.work)

    # ---- heavy pictures

    async def _in_process(self, job: Job) -> Pixels:
        decoder = self._take()
        try:
            pixels = await asyncio.wrap_future(self._waits.submit(decoder.run, job.work))
        except asyncio.CancelledError:
            metrics.DECODES_ENDED.labels(why="cancelled").inc()
            raise
        except DecoderDied as died:
            raise self._failure(job, died) from died
        except (InvalidMedia, EngineFailure):  # An answer: the process goes on.
            self._give_back(decoder)
            raise
        else:
            self._give_back(decoder)
            return pixels
        finally:
            if decoder not in self._idle:
                self._discard(decoder)

    def _failure(self, job: Job, died: DecoderDied) -> OpticNerveError:
        """What the caller hears of a process's end, which counts against the item where it is its
        doing."""
        if died.out_of_time:
            metrics.DECODES_ENDED.labels(why="timeout").inc()
            return InvalidMedia(
                f"decoding this picture took longer than {self.decode_timeout_s:g} s and was "
                "ended; send a smaller one, a JPEG as baseline",
                code="decode_timeout",
            )
        metrics.DECODES_ENDED.labels(why="died").inc()
        log.error("while it decoded %s: %s", job.key, died)
        if not died.at_work:
            return EngineFailure("the encoder could not start a process to decode in")
        self._poison.blame(job.key)
        return EngineFailure(
            "the process that decoded this picture ended, perhaps for lack of memory; send a "
            "smaller one"
        )

    def _take(self) -> Decoder:
        if self._idle:
            decoder, timer = self._idle.popitem()
            timer.cancel()
            return decoder
        decoder = Decoder(self._preprocess, self.decode_timeout_s)
        self._decoders.add(decoder)
        return decoder

    def _give_back(self, decoder: Decoder) -> None:
        loop = asyncio.get_running_loop()
        self._idle[decoder] = loop.call_later(IDLE_S, self._retire, decoder)

    def _retire(self, decoder: Decoder) -> None:
        del self._idle[decoder]
        self._discard(decoder)

    def _discard(self, decoder: Decoder) -> None:
        """Ends a process at once; a thread waits for its end."""
        decoder.kill()
        if not self._closed:
            self._decoders.discard(decoder)
            self._waits.submit(decoder.close)
