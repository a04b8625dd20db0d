"""The rows that one request needs: fetches them by reference, and asks the caller if that fails."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from llm_service.engine.client import EngineClient
from llm_service.policy.messages import NeedRowsEvent
from llm_service.rows.fetcher import Fetcher
from opticnerve.embeddings.ref import EmbeddingRef
from opticnerve.errors import (
    EmbeddingCorrupt,
    EmbeddingNotFound,
    EmbeddingUnavailable,
    InvalidRequest,
    OpticNerveError,
)
from opticnerve.telemetry import traces

MAX_REENCODES = 2  # How often the caller is asked for one key before the request fails.
MAX_REPEATS = 8  # How often a choice may need rows again that were reported as loaded.

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AskCaller(NeedRowsEvent):
    """Asks the caller for these keys, for which no usable rows were found. ``reason``: a name of
    NeededReason in ``llm.proto``, without its prefix."""

    reason: str = "NOT_FOUND"


@dataclass(slots=True)
class _NeededItem:
    """One item of the request."""

    min_rows: int  # Rows that its spans use.
    ref: EmbeddingRef | None
    wanted: bool = False  # Chunks in the engine wait for it.
    preempted: bool = False
    asked: int = 0
    repeats: int = 0
    error: OpticNerveError | None = None  # Why the last reference failed.
    task: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None


class NeededRows:
    """Answers the engine's NeedRowsEvents from references, and asks the caller if they fail.

    ``refs``: references by key; None if EmbeddingReady will bring it. ``rows``: the number of rows
    that spans use, by key. ``choices``: the number of choices, each of which may need the rows
    again. The request fails if rows are not loaded within ``wait_s``, or are still missing after
    the caller was asked ``MAX_REENCODES`` times. Belongs to one event loop; ``close`` ends its
    tasks.
    """

    def __init__(
        self,
        request_id: str,
        refs: Mapping[str, EmbeddingRef | None],
        rows: Mapping[str, int],
        wait_s: float,
        engine: EngineClient,
        fetcher: Fetcher,
        ask: Callable[[AskCaller], None],
        choices: int = 1,
    ) -> None:
        self.get_s = 0.0  # Time spent on fetching rows.
        self._request_id = request_id
        self._wait_s = wait_s
        self._engine = engine
        self._fetcher = fetcher
        self._ask_caller = ask
        self._max_repeats = MAX_REPEATS * choices
        self._items = {key: _NeededItem(rows.get(key, 0), None) for key in refs}
        for ref in refs.values():
            if ref is not None:
                self._accept(ref)
        self._look = asyncio.create_task(self._report_found()) if refs else None

    # ---- from the engine

    def wanted(self, keys: Iterable[str], preempted: bool) -> None:
        """Chunks in the engine wait for ``rows_ready`` or ``rows_failed`` of each key."""
        for key in keys:
            item = self._items[key]
            item.wanted = True
            item.preempted = preempted
            item.repeats += not preempted
            if item.repeats > self._max_repeats:
                error = EmbeddingNotFound(
                    "the embedding was evicted from the LLM worker's host repeatedly; give its "
                    "store more memory",
                    param=key,
                )
                self._fail(key, error)
            else:
                if item.ref is None:
                    self._start_timer(key)
                self._start(key)

    # ---- from the caller

    def ready(self, ref: EmbeddingRef) -> None:
        """Takes a reference. Raises InvalidRequest if it does not match the request."""
        if self._accept(ref).wanted:
            self._start(ref.key)
        else:
            self._engine.rows_available(self._request_id, (ref.key,))

    def _accept(self, ref: EmbeddingRef) -> _NeededItem:
        item = self._items.get(ref.key)
        if item is None:
            raise InvalidRequest("the reference's key is not an item of the request", param="ref")
        if ref.num_rows < item.min_rows:
            raise InvalidRequest(
                f"spans use {item.min_rows} rows of an embedding that has {ref.num_rows}",
                param="spans",
            )
        item.ref = ref
        return item

    def failed(self, key: str, error: OpticNerveError) -> None:
        """The caller cannot get the item: fails the request unless it no longer needs the item."""
        if key not in self._items:
            raise InvalidRequest("the failure's key is not an item of the request", param="key")
        self._fail(key, error)

    def close(self) -> None:
        if self._look is not None:
            self._look.cancel()
        for item in self._items.values():
            if item.timer is not None:
                item.timer.cancel()
            if item.task is not None:
                item.task.cancel()

    async def _report_found(self) -> None:
        """Reports to the engine which rows are on this host when the request begins."""
        if found := await self._fetcher.present(self._items):
            self._engine.rows_available(self._request_id, found)

    # ---- one key

    def _start(self, key: str) -> None:
        item = self._items[key]
        if item.task is None or item.task.done():
            item.task = asyncio.create_task(self._bring(key))

    async def _bring(self, key: str) -> None:
        """Fetches by the latest reference until one succeeds or none is left to try; without any,
        looks for the rows on this host."""
        item = self._items[key]
        ref = item.ref
        try:
            while not await self._attempt(key, ref):
                if item.ref is ref:
                    item.ref = None
                    if ref is not None:
                        self._ask(key)
                    return
                ref = item.ref  # A newer one arrived meanwhile.
        except InvalidRequest as error:  # The caller's own rows are at fault.
            self._fail(key, error)
            return
        self._ready(key)

    async def _attempt(self, key: str, ref: EmbeddingRef | None) -> bool:
        """Tries to load the rows; returns whether they are loaded. Raises InvalidRequest."""
        item = self._items[key]
        started = time.perf_counter()
        try:
            with traces.span("get"):
                if ref is None:
                    return await self._fetcher.find(key)
                await self._fetcher.ensure(ref)
                return True
        except EmbeddingUnavailable as error:
            item.error = error
        except InvalidRequest:
            raise
        except Exception:
            log.exception("fetching rows of a request failed")
            item.error = EmbeddingNotFound("reading the embedding failed", param=key)
        finally:
            self.get_s += time.perf_counter() - started
        return False

    def _ready(self, key: str) -> None:
        item = self._items[key]
        item.wanted = False
        self._stop_timer(item)
        # For sequences that are preempted, now or later: their rows need no encoder.
        self._engine.rows_available(self._request_id, (key,))
        self._engine.rows_ready(key)

    def _ask(self, key: str) -> None:
        item = self._items[key]
        error = item.error or EmbeddingNotFound("the embedding is missing", param=key)
        item.asked += 1
        if item.asked > MAX_REENCODES:
            self._fail(key, error)
            return
        reason = error.needed_reason if isinstance(error, EmbeddingUnavailable) else "NOT_FOUND"
        if item.preempted and not isinstance(error, EmbeddingCorrupt):
            reason = "PREEMPTED"
        self._start_timer(key)
        self._ask_caller(AskCaller(self._request_id, (key,), item.preempted, reason))

    def _fail(self, key: str, error: OpticNerveError) -> None:
        self._stop_timer(self._items[key])
        self._engine.rows_failed(self._request_id, key, error)

    def _start_timer(self, key: str) -> None:
        item = self._items[key]
        if item.timer is None:
            loop = asyncio.get_running_loop()
            item.timer = loop.call_later(self._wait_s, self._expire, key)

    def _stop_timer(self, item: _NeededItem) -> None:
        if item.timer is not None:
            item.timer.cancel()
            item.timer = None

    def _expire(self, key: str) -> None:
        cls = type(self._items[key].error or EmbeddingNotFound(""))
        text = f"a picture's embedding did not come within {self._wait_s:g} s; retry later"
        self._fail(key, cls(text, param=key, retry_after_s=1.0))
