"""How much work the gateway holds at once: requests and the bytes they bring.

Beyond either bound a request is refused at once with 429 and Retry-After, so that what was
accepted keeps its pace and memory stays bounded. A request takes its place when its body is
there: clients that send slowly, or nothing more, keep nobody out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from gateway.memory import Trimmer
from opticnerve.errors import Overloaded

RETRY_AFTER_S = 1.0
PICTURES_SHARE = 0.75  # Of all places, for requests with new pictures: they may wait for long.


class Admission:
    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self.max_requests = max_requests
        self.max_bytes = max_bytes
        self.max_with_pictures = max(1, int(PICTURES_SHARE * max_requests))
        self.requests = 0
        self.with_pictures = 0  # Of these, those whose pictures had to be encoded.
        self.bytes = 0
        self._trimmer = Trimmer()

    @contextlib.contextmanager
    def arrive(self) -> Iterator[Ticket]:
        """One request, from its head on; whatever it holds is given back at the end.

        Raises Overloaded where every place is taken: then its body need not come.
        """
        self._check_place()
        ticket = Ticket(self)
        try:
            yield ticket
        finally:
            ticket.release()
            self._trimmer.ended(ticket.peak)

    def _check_place(self) -> None:
        if self.requests >= self.max_requests:
            raise Overloaded(
                f"{self.requests} requests are being served, which is as many as this server "
                "takes; retry later",
                retry_after_s=RETRY_AFTER_S,
            )


class Ticket:
    """What one request holds; ``Admission.arrive`` releases it."""

    def __init__(self, owner: Admission) -> None:
        self._owner = owner
        self._places = 0
        self._with_pictures = 0
        self.bytes = 0
        self.peak = 0

    def enter(self) -> None:
        """Takes the place of a request that is served. Raises Overloaded."""
        self._owner._check_place()
        self._owner.requests += 1
        self._places += 1

    def enter_with_pictures(self) -> None:
        """Takes one of the places that requests with new pictures may have, so that such as wait
        for an encoder leave some to others. Raises Overloaded."""
        owner = self._owner
        if owner.with_pictures >= owner.max_with_pictures:
            raise Overloaded(
                f"{owner.with_pictures} requests with new pictures are being served, which is as "
                "many as this server takes; retry later",
                retry_after_s=RETRY_AFTER_S,
            )
        owner.with_pictures += 1
        self._with_pictures += 1

    def hold(self, num_bytes: int) -> None:
        """Counts bytes that the request keeps in memory. Raises Overloaded."""
        owner = self._owner
        if owner.bytes + num_bytes > owner.max_bytes:
            raise Overloaded(
                "the requests being served hold as many bytes as this server takes; retry later",
                retry_after_s=RETRY_AFTER_S,
            )
        self.bytes += num_bytes
        self.peak = max(self.peak, self.bytes)
        owner.bytes += num_bytes

    def drop(self, num_bytes: int) -> None:
        """The request let go of ``num_bytes``."""
        num_bytes = min(num_bytes, self.bytes)
        self.bytes -= num_bytes
        self._owner.bytes -= num_bytes

    def release(self) -> None:
        self.drop(self.bytes)
        self._owner.requests -= self._places
        self._owner.with_pictures -= self._with_pictures
        self._with_pictures = 0
        self._places = 0
