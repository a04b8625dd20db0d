"""Scripted workers in a registry, for tests."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass

from opticnerve.registry.entry import State, WorkerEntry
from opticnerve.registry.membership import joined
from opticnerve.registry.redis_registry import Registry
from tests.fakes import FakeEncoder, FakeServer


@dataclass
class Member:
    """A scripted worker's entry, which says what the test sets."""

    fake: FakeServer
    instance_id: str
    address: str
    state: State = "serving"

    def entry(self) -> WorkerEntry:
        return WorkerEntry(
            instance_id=self.instance_id,
            kind="encoder" if isinstance(self.fake, FakeEncoder) else "llm",
            address=self.address,
            state=self.state,
        )


@contextlib.asynccontextmanager
async def member(
    url: str, fake: FakeServer, address: str = "", token: str | None = None
) -> AsyncIterator[Member]:
    """``fake`` in the registry while the context lasts; known by another ``address`` if given."""
    if not fake.instance_id:
        fake.instance_id = secrets.token_hex(16)
        await fake.set_serving(True)  # Its health check knows the id.
    made = Member(fake, fake.instance_id, address or fake.address)
    async with joined(Registry(url, token), made.entry):
        yield made
