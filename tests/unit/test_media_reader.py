"""What a gateway's reader of pictures asks of encoders."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.api.schemas.messages import ItemSource
from gateway.media.reader import MediaReader


class Fetcher:
    async def fetch(self, url: str, *, param: str, hold: Any) -> bytes:
        return b"picture"


async def one_of_several(settings: dict[str, Any], pictures: int) -> set[bool]:
    """What is told of each picture of a prompt with so many."""
    config: Any = SimpleNamespace(image_background="white", min_pixels=0, max_pixels=0)
    layout: Any = SimpleNamespace(settings=lambda: settings)
    fetcher: Any = Fetcher()
    reader = MediaReader(config, layout, fetcher)
    deadline: Any = SimpleNamespace(timeout=contextlib.AsyncExitStack)
    sources = [ItemSource("https://example.com/1.png", f"messages[{i}]") for i in range(pictures)]
    items = await reader.fetch(sources, lambda size: None, deadline)
    return {item.overrides.one_of_several for item in items}


@pytest.mark.parametrize(("pictures", "told"), [(1, {False}), (2, {True}), (3, {True})])
def test_pictures_are_one_of_several_where_that_matters(pictures: int, told: set[bool]) -> None:
    assert asyncio.run(one_of_several({"several_pictures": "squares"}, pictures)) == told
    assert asyncio.run(one_of_several({}, pictures)) == {False}
