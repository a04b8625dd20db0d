"""Scripted devices: forward passes that take a fixed time, one after the other on each device.

    python -m bench.scale.devices SOCKET

A pass asks for some seconds of a device and is answered when they are over, in the order of asking,
as on a GPU that runs the kernels of all processes one after the other. Nothing is computed
meanwhile, so many devices fit a machine with few cores.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
import time
from collections import defaultdict

_ASK = struct.Struct("<Id")  # Device, seconds; the seconds ``BUSY`` only ask how long it was busy.
_TOLD = struct.Struct("<d")
BUSY = -1.0


class Device:
    """A client of one scripted device. Used from one thread."""

    def __init__(self, path: str, number: int) -> None:
        self._number = number
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)

    def begin(self, seconds: float) -> None:
        """Puts a pass on the device's queue."""
        self._socket.sendall(_ASK.pack(self._number, seconds))

    def end(self) -> float:
        """Waits until the pass is over. Returns the seconds that the device was busy so far."""
        data = self._socket.recv(_TOLD.size, socket.MSG_WAITALL)
        return float(_TOLD.unpack(data)[0])

    def busy_s(self) -> float:
        self.begin(BUSY)
        return self.end()

    def close(self) -> None:
        self._socket.close()


class Devices:
    """The server's side, which knows when each device is free again."""

    def __init__(self) -> None:
        self._free_at: dict[int, float] = defaultdict(float)
        self._busy_s: dict[int, float] = defaultdict(float)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.readexactly(_ASK.size):
                number, seconds = _ASK.unpack(data)
                if seconds != BUSY:
                    await self._occupy(number, seconds)
                writer.write(_TOLD.pack(self._busy_s[number]))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def _occupy(self, number: int, seconds: float) -> None:
        now = time.monotonic()
        over = self._free_at[number] = max(now, self._free_at[number]) + seconds
        self._busy_s[number] += seconds
        await asyncio.sleep(over - now)


async def serve(path: str) -> None:
    server = await asyncio.start_unix_server(Devices().answer, path)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
