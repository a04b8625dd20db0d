"""Reads the pictures of a request: fetches, parses and plans them, and computes their content keys.
No pixels are decoded."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gateway.api.schemas.messages import ItemSource
from gateway.clock import Deadline
from gateway.edge.threads import off_loop_above
from gateway.media.fetch import MediaFetcher
from opticnerve.config import GatewayConfig
from opticnerve.content_keys import content_key
from opticnerve.errors import InvalidRequest, OpticNerveError
from opticnerve.media.plan import Overrides, Plan, parse_background, planned_as_several
from opticnerve.media.probe import parse_structure
from opticnerve.models.family import Layout

OFF_LOOP_BYTES = 2**13  # Larger items are parsed and hashed in a thread.
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fetched:
    """One picture's bytes. ``param``: the path of its field in the request, for errors."""

    param: str
    overrides: Overrides
    data: bytes = field(repr=False)


class MediaReader:
    """Reads and plans pictures for one checkpoint, within the gateway's limits."""

    def __init__(self, config: GatewayConfig, layout: Layout, fetcher: MediaFetcher) -> None:
        self.config = config
        self.layout = layout
        self.fetcher = fetcher
        self._background = parse_background(config.image_background)

    def check_count(self, sources: Sequence[ItemSource]) -> None:
        """Raises InvalidRequest for more pictures than --max-images."""
        if len(sources) > self.config.max_images:
            raise InvalidRequest(
                f"there are {len(sources)} pictures, and at most {self.config.max_images} are "
                "accepted in one request",
                param=sources[0].param.partition("[")[0],
                code="too_many_images",
            )

    async def fetch(
        self, sources: Sequence[ItemSource], hold: Callable[[int], None], deadline: Deadline
    ) -> list[Fetched]:
        """The bytes of all pictures, fetched concurrently; ``hold`` counts them.

        Raises InvalidRequest, MediaFetchFailed, PayloadTooLarge, DeadlineExceeded.
        """
        async with deadline.timeout():
            several = planned_as_several(len(sources), self.layout.settings())
            return await all_of(*(self._fetch(source, several, hold) for source in sources))

    async def plan(self, items: Sequence[Fetched]) -> list[Plan]:
        """Sizes of all pictures, from their structure. Raises InvalidMedia."""
        return [
            await off_loop_above(OFF_LOOP_BYTES, len(item.data), self._plan, item) for item in items
        ]

    async def keys(
        self, items: Sequence[Fetched], fingerprint: str, cache_salt: str = ""
    ) -> list[str]:
        """Content keys under an encoder's fingerprint."""
        settings = self.layout.settings()

        def key(item: Fetched) -> str:
            return content_key(item.data, settings, item.overrides, fingerprint, cache_salt)

        return [await off_loop_above(OFF_LOOP_BYTES, len(item.data), key, item) for item in items]

    async def _fetch(
        self, source: ItemSource, several: bool, hold: Callable[[int], None]
    ) -> Fetched:
        data = await self.fetcher.fetch(source.url, param=source.param, hold=hold)
        return Fetched(source.param, self._overrides(source, several), data)

    def _overrides(self, source: ItemSource, several: bool) -> Overrides:
        """The item's own pixel bounds, limited by the server's, and the server's background.
        ``several``: whether the request has several pictures."""
        least, most = self.config.min_pixels or None, self.config.max_pixels or None
        default_most: int | None = self.layout.settings().get("max_pixels")
        asked = source.overrides(default_most)
        low = asked.min_pixels if asked.min_pixels is not None else least
        high = asked.max_pixels if asked.max_pixels is not None else most
        if most is not None and high is not None:
            high = min(high, most)
        if low is not None and high is not None:
            low = min(low, high)
        return Overrides(low, high, self._background, several)

    def _plan(self, item: Fetched) -> Plan:
        try:
            limits = self.config.max_image_pixels, self.config.max_decode_passes
            structure = parse_structure(item.data, *limits)
            return self.layout.plan(structure, item.overrides)
        except OpticNerveError as error:
            raise located(error, item.param) from error


def located(error: OpticNerveError, param: str | None) -> OpticNerveError:
    """``error`` with ``param``, the path of the field at fault, unless it has one already."""
    if error.param is not None:
        return error
    found = copy.copy(error)  # Other requests may share it.
    found.param = param
    return found


async def all_of(*work: Coroutine[Any, Any, T]) -> list[T]:
    """The results of all, in order. If one fails, cancels the others and waits for them to end."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
