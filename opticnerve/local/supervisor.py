"""The local supervisor: encoders, LLM workers and one gateway as children of one process.

Start: encoders and LLM workers together, until the gRPC health of each is SERVING; then the
gateway, until it says that it is ready. A child that ends is restarted at its old port. Stop:
gateway, LLM workers, encoders, in this order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from opticnerve.local.child import Child, Role
from opticnerve.local.keeper import Keeper, run_all
from opticnerve.rpc.channel import is_serving, open_channel
from opticnerve.rpc.tls import ChannelTls

POLL_S = 0.1


class Supervisor(Keeper):
    """Owns the children of one stack."""

    def __init__(
        self,
        workers: Sequence[Child],
        gateway: Callable[[list[str], list[str]], Child],
        *,
        start_timeout_s: float,
        stop_timeout_s: float,
        max_restarts: int,
        tls: ChannelTls | None = None,
    ) -> None:
        """``gateway`` makes the gateway's child from the addresses of encoders and LLM workers.
        ``tls``: for the workers' health checks."""
        super().__init__(
            workers,
            start_timeout_s=start_timeout_s,
            stop_timeout_s=stop_timeout_s,
            max_restarts=max_restarts,
        )
        self._workers = list(workers)
        self._make_gateway = gateway
        self._tls = tls
        self.url = ""

    async def start_and_watch(self) -> None:
        await run_all(self.start(child) for child in self._workers)
        encoders = [child.address for child in self._workers if child.role == Role.ENCODER]
        llms = [child.address for child in self._workers if child.role == Role.LLM]
        gateway = self._make_gateway(encoders, llms)
        self.children.append(gateway)
        await self.start(gateway)
        self.url = gateway.address
        print(f"OpticNerve is ready at {self.url}", flush=True)
        await run_all(self.watch(child) for child in self.children)

    async def until_started(self, child: Child) -> None:
        """Waits until the child serves, and fixes its port for restarts."""
        address = await child.listening()
        child.port = int(address.rsplit(":", 1)[1].rstrip("/"))
        if child.role == Role.GATEWAY:
            await child.ready()
            return
        while not await self._is_worker_ready(address):  # noqa: ASYNC110 (another process's state)
            await asyncio.sleep(POLL_S)

    async def _is_worker_ready(self, address: str) -> bool:
        channel = open_channel(address, tls=self._tls)
        try:
            return await is_serving(channel)
        finally:
            await channel.close()
