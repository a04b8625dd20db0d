"""A server with OpenAI's API whose answers take known times: what a load generator measures comes
out by construction."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

END = b"0\r\n\r\n"


@dataclass
class FakeOpenAI:
    """``refuse``: 7 answers each seventh chat with a 429; ``cut``: its stream breaks off after the
    first text; 0: none."""

    first_s: float = 0.0  # To the first text.
    gap_s: float = 0.0  # Between two.
    refuse: int = 0
    cut: int = 0
    close: bool = False  # The connection, after each answer, without saying so.
    key: str = ""
    cached: int | None = None
    usage: bool = True  # Whether its streams say how many tokens there were.
    bodies: list[Any] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        """Its URL, while the context lasts."""
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=2**24)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await self._request(reader, writer):
                pass
        writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answers one request; whether another may follow."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = next((h for h in head.split("\r\n") if h.startswith("content-length")), ":0")
        body = await reader.readexactly(int(length.partition(":")[2]))
        self.heads.append(head)
        if self.key and f"authorization: bearer {self.key}" not in head:
            return await self._json(writer, 401, {"error": {"message": "no", "code": "no_key"}})
        if head.startswith("get "):
            return await self._json(writer, 200, {"data": [{"id": "fake"}]})
        self.bodies.append(json.loads(body))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self._chat(writer, self.bodies[-1], len(self.bodies))
        finally:
            self.at_once -= 1

    async def _json(self, writer: asyncio.StreamWriter, status: int, value: Any) -> bool:
        data = json.dumps(value).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        await writer.drain()
        return not self.close

    async def _chat(self, writer: asyncio.StreamWriter, body: Any, number: int) -> bool:
        if self.refuse and number % self.refuse == 0:
            return await self._json(writer, 429, {"error": {"message": "no", "code": "overloaded"}})
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        await asyncio.sleep(self.first_s)
        for index in range(body["max_tokens"]):
            if index:
                await asyncio.sleep(self.gap_s)
                if self.cut and number % self.cut == 0:
                    return False
            self._event(writer, {"choices": [{"delta": {"content": f"t{index} "}}]})
            await writer.drain()
        usage: dict[str, Any] = {"prompt_tokens": 10, "completion_tokens": body["max_tokens"]}
        if self.cached is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached}
        if self.usage:
            self._event(writer, {"choices": [], "usage": usage})
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n" + END)
        await writer.drain()
        return not self.close

    def _event(self, writer: asyncio.StreamWriter, value: Any) -> None:
        data = b"data: " + json.dumps(value).encode() + b"\n\n"
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))
