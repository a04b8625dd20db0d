"""Schedules the decoding of pictures on threads and in processes.

Waiting compressed items are cheap, decoded ones are not, so ``staging`` bounds the patches that are
decoded ahead of the device, in order of arrival. The cost of decoding is known from a picture's
structure. Light pictures are decoded on threads, where Pillow and numpy release the GIL; heavy ones
in processes, which can be killed. Each kind has its own places and memory, so that no light picture
waits for a heavy one; within a kind, places are shared fairly between requests.
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
from encoder_service.crash_record import CrashRecord
from encoder_service.fair_queue import FairQueue
from encoder_service.pictures.decode_process import (
    DecoderDied,
    DecoderProcess,
    DecodeTask,
    Pixels,
    decode_and_cut,
)
from opticnerve.errors import EngineFailure, InvalidMedia, OpticNerveError
from opticnerve.media.plan import Structure
from opticnerve.models.family import Preprocessor

log = logging.getLogger(__name__)

LIGHT_MEMORY_FRACTION = 1 / 4  # Part of the memory that light pictures may use.
ITEM_PASSES = 2**20  # Cost of resizing and cutting an item, added to its decoding passes.
WORKER_MEMORY = 2**28  # Bytes for each worker, if no flag sets the memory.
MIN_MEMORY = 2**31
IDLE_S = 30.0  # Time after which an idle process is ended.

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """One picture in the pool."""

    sharer: str  # The request that it belongs to; places are shared fairly between sharers.
    key: str
    task: DecodeTask
    structure: Structure
    is_suspect: bool  # A worker has died while it processed this item.

    @property
    def is_heavy(self) -> bool:
        return self.is_suspect or self.structure.is_heavy


class DecodeCapacity:
    """The places and the memory for one kind of picture, light or heavy."""

    def __init__(self, places: int, memory: int) -> None:
        self.places = FairQueue(places)
        self.memory = FairQueue(memory)

    @contextlib.asynccontextmanager
    async def hold(self, job: DecodeJob) -> AsyncIterator[None]:
        """Holds a place and the picture's memory while the context lasts."""
        cost, memory = job.structure.decode_cost + ITEM_PASSES, job.structure.memory
        async with self.places.hold(1, job.sharer, cost), self.memory.hold(memory):
            yield


class PreprocessPool:
    """Owns threads and decoder processes. ``close`` drops waiting work, ends the processes, and
    waits for the threads. Belongs to one event loop."""

    def __init__(
        self,
        preprocess: Preprocessor,
        record: CrashRecord,
        workers: int,
        max_staged_patches: int,
        max_decode_bytes: int = 0,
        decode_timeout_s: float = 30.0,
    ) -> None:
        """``max_decode_bytes``: 0 sizes it from the number of workers. ``decode_timeout_s``: CPU
        time for a heavy picture."""
        self.workers = workers
        self.staging = FairQueue(max_staged_patches)
        self.decode_timeout_s = decode_timeout_s
        memory = max_decode_bytes or max(MIN_MEMORY, workers * WORKER_MEMORY)
        light_memory = int(memory * LIGHT_MEMORY_FRACTION)
        self.light = DecodeCapacity(workers, light_memory)
        self.heavy = DecodeCapacity(workers, memory - light_memory)
        self._preprocess = preprocess
        self._record = record
        self._idle: dict[DecoderProcess, asyncio.TimerHandle] = {}
        self._decoders: set[DecoderProcess] = set()
        self._closed = False
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="preprocess")
        self._waiters = ThreadPoolExecutor(workers, thread_name_prefix="decoder")

    async def run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs ``work`` on a thread; cancelling drops it if it has not started."""
        return await asyncio.wrap_future(self._threads.submit(work, *args, **kwargs))

    @contextlib.asynccontextmanager
    async def prepared(self, job: DecodeJob) -> AsyncIterator[Pixels]:
        """The job's pixels, counted as staged ahead of the device while the context lasts.

        Cancelling takes the job out of its queue, and ends the decoding of a heavy picture.
        Raises InvalidMedia, EngineFailure.
        """
        async with contextlib.AsyncExitStack() as staged:
            async with (self.heavy if job.is_heavy else self.light).hold(job):
                decode = self._in_process if job.is_heavy else self._on_thread
                pixels = await decode(job)
                await staged.enter_async_context(self.staging.hold(job.task.plan.num_patches))
            yield pixels

    def close(self) -> None:
        self._closed = True
        for timer in self._idle.values():
            timer.cancel()
        for decoder in self._decoders:
            decoder.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._waiters.shutdown(wait=True, cancel_futures=True)
        for decoder in self._decoders:
            decoder.close()

    # ---- light pictures

    async def _on_thread(self, job: DecodeJob) -> Pixels:
        def work() -> Pixels:
            with self._record.working_on([job.key]):
                return decode_and_cut(self._preprocess, job.task)

        return await self.run(work)

    # ---- heavy pictures

    async def _in_process(self, job: DecodeJob) -> Pixels:
        decoder = self._take()
        try:
            pixels = await asyncio.wrap_future(self._waiters.submit(decoder.run, job.task))
        except asyncio.CancelledError:
            metrics.DECODES_ENDED.labels(why="cancelled").inc()
            raise
        except DecoderDied as died:
            raise self._failure(job, died) from died
        except (InvalidMedia, EngineFailure):  # The process answered, and can be used again.
            self._give_back(decoder)
            raise
        else:
            self._give_back(decoder)
            return pixels
        finally:
            if decoder not in self._idle:
                self._discard(decoder)

    def _failure(self, job: DecodeJob, died: DecoderDied) -> OpticNerveError:
        """The caller's error for a process that ended. If the task caused it, the item gets a
        crash."""
        if died.out_of_time:
            metrics.DECODES_ENDED.labels(why="timeout").inc()
            return InvalidMedia(
                f"decoding this picture took longer than {self.decode_timeout_s:g} s and was "
                "ended; send a smaller picture, or a baseline JPEG instead of a progressive one",
                code="decode_timeout",
            )
        metrics.DECODES_ENDED.labels(why="died").inc()
        log.error("decoding %s: %s", job.key, died)
        if not died.by_task:
            return EngineFailure(
                "the encoder could not start a process to decode this picture; its log has the "
                "details"
            )
        self._record.add(job.key)
        return EngineFailure(
            "the process that decoded this picture ended, perhaps for lack of memory; send a "
            "smaller one"
        )

    def _take(self) -> DecoderProcess:
        if self._idle:
            decoder, timer = self._idle.popitem()
            timer.cancel()
            return decoder
        decoder = DecoderProcess(self._preprocess, self.decode_timeout_s)
        self._decoders.add(decoder)
        return decoder

    def _give_back(self, decoder: DecoderProcess) -> None:
        loop = asyncio.get_running_loop()
        self._idle[decoder] = loop.call_later(IDLE_S, self._retire, decoder)

    def _retire(self, decoder: DecoderProcess) -> None:
        del self._idle[decoder]
        self._discard(decoder)

    def _discard(self, decoder: DecoderProcess) -> None:
        """Kills a process; a thread waits for its exit."""
        decoder.kill()
        if not self._closed:
            self._decoders.discard(decoder)
            self._waiters.submit(decoder.close)
