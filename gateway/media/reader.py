"""The pictures of one request: fetched, looked into, planned, named. No pixel is decoded."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gateway.api.schemas.messages import ImageSource
from gateway.edge.deadline import Deadline
from gateway.edge.lanes import off_loop
from gateway.media.dataurl import is_data_url, read_data_url
from gateway.media.fetch import MediaFetcher
from opticnerve.config import GatewayConfig
from opticnerve.errors import InvalidRequest, OpticNerveError
from opticnerve.media.keys import content_key
from opticnerve.media.plan import Overrides, Plan, parse_background
from opticnerve.media.structure import parse_structure
from opticnerve.models.family import Layout

OFF_LOOP_BYTES = 2**13  # Larger items are decoded, parsed and hashed in a thread.
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fetched:
    """One picture's bytes, and how the request names it."""

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

    def check_count(self, sources: Sequence[ImageSource]) -> None:
        """Raises InvalidRequest where there are too many."""
        if len(sources) > self.config.max_images:
            raise InvalidRequest(
                f"the messages bring {len(sources)} pictures, and at most "
                f"{self.config.max_images} are accepted in one request",
                param="messages",
                code="too_many_images",
            )

    async def fetch(
        self, sources: Sequence[ImageSource], hold: Callable[[int], None], deadline: Deadline
    ) -> list[Fetched]:
        """The bytes of all pictures, read at once; ``hold`` counts them.

        Raises InvalidRequest, MediaFetchFailed, PayloadTooLarge, DeadlineExceeded.
        """
        async with deadline.timeout():
            return await all_of(*(self._fetch(source, hold) for source in sources))

    async def plan(self, items: Sequence[Fetched]) -> list[Plan]:
        """Sizes of all pictures, from their structure. Raises InvalidMedia."""
        return [await _where_it_belongs(item, self._plan, item) for item in items]

    async def keys(
        self, items: Sequence[Fetched], fingerprint: str, cache_salt: str = ""
    ) -> list[str]:
        """Content keys under an encoder's fingerprint."""
        settings = self.layout.settings()
        return [
            await _where_it_belongs(
                item,
                content_key,
                item.data,
                settings,
                item.overrides,
                fingerprint,
                cache_salt,
            )
            for item in items
        ]

    async def _fetch(self, source: ImageSource, hold: Callable[[int], None]) -> Fetched:
        url, param = source.url, source.param
        if is_data_url(url) and len(url) > OFF_LOOP_BYTES:
            limit = self.config.max_media_bytes
            data = await off_loop(len(url), read_data_url, url, limit, param)
            hold(len(data))
        else:
            data = await self.fetcher.fetch(url, param=param, hold=hold)
        return Fetched(param, self._overrides(source), data)

    def _overrides(self, source: ImageSource) -> Overrides:
        """The item's own bounds within the server's, and the server's background."""
        least, most = self.config.min_pixels or None, self.config.max_pixels or None
        models_own: int | None = self.layout.settings().get("max_pixels")
        asked = source.overrides(models_own)
        low = asked.min_pixels if asked.min_pixels is not None else least
        high = asked.max_pixels if asked.max_pixels is not None else most
        if most is not None and high is not None:
            high = min(high, most)
        if low is not None and high is not None:
            low = min(low, high)
        return Overrides(low, high, self._background)

    def _plan(self, item: Fetched) -> Plan:
        try:
            limits = self.config.max_image_pixels, self.config.max_decode_passes
            structure = parse_structure(item.data, *limits)
            return self.layout.plan(structure, item.overrides)
        except OpticNerveError as error:
            raise located(error, item.param) from error


def located(error: OpticNerveError, param: str | None) -> OpticNerveError:
    """``error``, saying which part of the request it is about, if it does not say so yet."""
    if error.param is not None:
        return error
    found = copy.copy(error)  # Other requests may hold the same one.
    found.param = param
    return found


async def _where_it_belongs(item: Fetched, work: Callable[..., T], *arguments: Any) -> T:
    if len(item.data) > OFF_LOOP_BYTES:
        return await off_loop(len(item.data), work, *arguments)
    return work(*arguments)


async def all_of(*work: Coroutine[Any, Any, T]) -> list[T]:
    """The results of all, in order. The first failure cancels the rest, and waits for their end."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
