"""Encoder, LLM worker and gateway in one process, where a debugger stops in all three.

    python -m pdb examples/one_process.py

Set breakpoints (``b gateway/pipeline.py:50``) and go on with ``c``; in an editor, start this file
under its debugger. The services are the real ones, on the built-in checkpoint: they answer HTTP and
gRPC on one event loop, and compute in threads of their own. No deadline passes in less than a day.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import sys
import tempfile
import threading
from collections.abc import AsyncIterator

import httpx2

import encoder_service.service
import llm_service.service
from gateway.edge.auth import Keys
from gateway.service import open_server
from opticnerve.config import EncoderConfig, GatewayConfig, LLMConfig, StoreConfig
from opticnerve.demo.chats import PICTURES

PICTURE, QUESTION = PICTURES / "star.png", "What do you see?"
DAY_S = 86_400.0


@contextlib.asynccontextmanager
async def services() -> AsyncIterator[str]:
    """The URL of a gateway with one encoder and one LLM worker behind it."""
    with tempfile.TemporaryDirectory() as directory:
        store = StoreConfig(store=f"shm://{directory}")
        async with (
            encoder_service.service.open_worker(EncoderConfig(store=store)) as encoder,
            llm_service.service.open_worker(LLMConfig(store=store)) as llm,
        ):
            settings = GatewayConfig(
                port=0,
                encoder_addresses=(encoder.server.address,),
                llm_addresses=(llm.server.address,),
                encode_timeout_s=DAY_S,
                request_timeout_s=DAY_S,
            )
            async with open_server(settings, Keys()) as server, asyncio.TaskGroup() as group:
                group.create_task(server.serve())
                yield server.address
                server.running.stop()


async def main() -> None:
    """Asks one question about one picture, and prints the answer."""
    url = f"data:image/png;base64,{base64.b64encode(PICTURE.read_bytes()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    body = {"model": "model", "messages": [{"role": "user", "content": parts}], "temperature": 0}
    async with services() as address, httpx2.AsyncClient(timeout=DAY_S, trust_env=False) as http:
        answer = await http.post(f"{address}/v1/chat/completions", json=body)
    print(answer.raise_for_status().json()["choices"][0]["message"]["content"])


if __name__ == "__main__":
    if (trace := sys.gettrace()) is not None:
        threading.settrace(trace)  # pdb itself traces the main thread alone.
    asyncio.run(main())
