"""Files of a tier whose memory is there before it is needed.

Most of what a put costs is the kernel's: finding pages for a new file takes several times as long
as copying bytes into pages that are there. So a writer keeps one spare file, as large as what it
wrote last, allocated (a full tmpfs is an error here, never a SIGBUS later) and mapped by a thread
of its own, while the caller is busy making the next embedding. The file is a
temporary like any other until it is published: invisible, counted, swept with its holder.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

import numpy as np

from opticnerve.embeddings.ledger import Ledger, Temporary
from opticnerve.embeddings.pages import Pages
from opticnerve.errors import StoreError

MIN_BYTES = 256 * 2**10  # Below, a plain write is as quick.
MAX_BYTES = 64 * 2**20
ROUND = 2**20
QUIET_S = 0.003  # Without a put, before the next spare is made.
SHARE = 16  # A spare takes at most so small a part of the tier's capacity.


class Spare:
    """One allocated file and the memory it is mapped at. ``unmap`` releases the memory, publishing
    or abandoning ``temporary`` the file."""

    def __init__(self, ledger: Ledger, num_bytes: int) -> None:
        reserved = ledger.reserve(num_bytes)
        assert reserved is not None  # Without a key there is no entry that it could be.
        self.temporary: Temporary = reserved
        try:
            self._pages = Pages(reserved.fd, num_bytes)
        except OSError:
            ledger.abandon(reserved)
            raise

    def fill(self, pieces: Sequence[memoryview]) -> None:
        """Copies a file's pieces in, from the first byte on."""
        offset = 0
        for piece in pieces:
            source = np.frombuffer(piece, dtype=np.uint8)
            self._pages.memory[offset : offset + piece.nbytes] = source
            offset += piece.nbytes

    def unmap(self) -> None:
        self._pages.unmap()


class SpareKeeper:
    """Keeps one spare ready for a writer. Thread-safe; ``close`` gives it up."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._condition = threading.Condition()  # Guards all below.
        self._wanted = 0  # Bytes of the next spare; 0: none is asked for.
        self._ready: Spare | None = None
        self._used: list[Spare] = []  # Published, still mapped.
        self._closed = False
        self._thread: threading.Thread | None = None

    def take(self, num_bytes: int) -> Spare | None:
        """A spare of at least ``num_bytes``, if there is one; another is made meanwhile."""
        limit = min(MAX_BYTES, self._ledger.capacity // SHARE)
        if not MIN_BYTES <= num_bytes <= limit:
            return None
        with self._condition:
            if self._closed:
                return None
            taken = None
            if self._ready is not None and self._ready.temporary.num_bytes >= num_bytes:
                taken, self._ready = self._ready, None
            self._wanted = -(-num_bytes // ROUND) * ROUND
            return taken

    def done(self, spare: Spare | None = None) -> None:
        """After a put: unmaps ``spare`` and prepares the next, in the background."""
        with self._condition:
            if spare is not None:
                self._used.append(spare)
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="store-spares", daemon=True)
                self._thread.start()
            self._condition.notify_all()

    def settle(self, timeout_s: float = 5.0) -> bool:
        """Waits until nothing is left to do in the background; for measurements and tests."""
        with self._condition:
            return self._condition.wait_for(lambda: not self._wanted and not self._used, timeout_s)

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join()
        if self._ready is not None:
            self._ready.unmap()
            self._ledger.abandon(self._ready.temporary)
            self._ready = None

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._closed or self._wanted or self._used)
                while not self._closed and self._condition.wait(QUIET_S):
                    pass  # Another put: writers first.
                used, wanted = self._used[:], self._wanted
                old = self._ready
                if self._closed and not used:
                    return
                if old is not None and (self._closed or old.temporary.num_bytes >= wanted):
                    old, wanted = None, 0
                elif old is not None:
                    self._ready = None
            self._refill(used, old, 0 if self._closed else wanted)

    def _refill(self, used: list[Spare], old: Spare | None, wanted: int) -> None:
        made = None
        for spare in used:
            spare.unmap()
        if old is not None:
            old.unmap()
            self._ledger.abandon(old.temporary)
        if wanted:
            with contextlib.suppress(StoreError, OSError):  # Puts write plainly then.
                made = Spare(self._ledger, wanted)
        with self._condition:
            del self._used[: len(used)]
            self._wanted = 0
            if made is not None:
                self._ready = made
            self._condition.notify_all()
