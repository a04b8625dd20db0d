"""A gateway on a free port with scripted workers behind it, and what tests ask of it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import io
import json

import httpx2
from PIL import Image

from gateway import service
from gateway.edge.auth import Caller, Keys
from gateway.prompt.tokenizer import Tokenizer
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.config import GatewayConfig
from tests.fakes import FakeEncoder, FakeLLM, until

PAIR_ID = Checkpoint.open(None).pair_id
END = 629  # <|im_end|> of the demo checkpoint.
# Of requests that are to come to their first token, and not to their end. A busy machine may need
# a longer one than the first.
DEADLINES_S = (0.5, 3.0, 20.0)


@functools.cache
def tokenizer():
    return Tokenizer.load(Checkpoint.open(None).path)


def ids(text):
    """Token ids of plain text."""
    return tokenizer().encode(text)


def keys_of(**keys):
    """API keys by the name of their caller."""
    return Keys({key.encode(): Caller(name, tenant=name) for name, key in keys.items()})


def data_url(color="red", size=(56, 56)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def user(text, *urls):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def body(*messages, **fields):
    return {"model": "model", "messages": list(messages) or [user("Hello")], **fields}


class Stack:
    """A gateway on a free port, and the workers behind it."""

    def __init__(self, gateway, server, client, encoders, llms):
        self.gateway = gateway
        self.server = server
        self.client = client
        self.encoders = encoders
        self.llms = llms

    @property
    def encoder(self):
        return self.encoders[0]

    @property
    def llm(self):
        return self.llms[0]

    async def chat(self, *messages, headers=None, **fields):
        return await self.client.post(
            "/v1/chat/completions", json=body(*messages, **fields), headers=headers
        )

    def idle(self):
        admission = self.gateway.admission
        workers = [
            *self.gateway.pipeline.llms.workers,
            *self.gateway.pipeline.encoders.pool.workers,
        ]
        return (
            admission.requests.held == admission.bytes.held == 0
            and not self.gateway.pipeline.encoders._flights
            and not self.gateway.pipeline.encoders._runs
            and not self.gateway.pipeline.encoders._admitted
            and all(worker.pending == worker.heavy == 0 for worker in workers)
            and all(llm.running == 0 for llm in self.llms)
        )


@contextlib.asynccontextmanager
async def serving(config, keys=None):
    """A gateway's server, which serves, and a client of it."""
    limits = httpx2.Limits(max_connections=None)
    async with (
        service.open_server(config, keys or Keys()) as server,
        httpx2.AsyncClient(
            base_url=server.address, timeout=60, trust_env=False, limits=limits
        ) as client,
    ):
        running = asyncio.create_task(server.serve())
        try:
            yield server, client
        finally:
            server.running.stop()
            await running


@contextlib.asynccontextmanager
async def stack(
    encoders=1, llms=1, tokens=None, keys=None, ready=True, encoders_serve=True, **settings
):
    tokens = [*ids("Hello there."), END] if tokens is None else tokens
    async with contextlib.AsyncExitStack() as exits:
        fake_encoders = [
            await exits.enter_async_context(FakeEncoder(pair_id=PAIR_ID)) for _ in range(encoders)
        ]
        for fake in fake_encoders:
            await fake.set_serving(encoders_serve)
        fake_llms = [
            await exits.enter_async_context(FakeLLM(tokens, pair_id=PAIR_ID)) for _ in range(llms)
        ]
        config = GatewayConfig(
            port=0,
            **{
                "llm_addresses": tuple(fake.address for fake in fake_llms),
                "encoder_addresses": tuple(fake.address for fake in fake_encoders),
                "drain_timeout_s": 1.0,
                **settings,
            },
        )
        server, client = await exits.enter_async_context(serving(config, keys))
        gateway = server.gateway
        if ready:
            await until(lambda: not gateway.pipeline.pairing.missing())
            await until(lambda: len(gateway.pipeline.llms.serving()) == llms)
        yield Stack(gateway, server, client, fake_encoders, fake_llms)


@contextlib.asynccontextmanager
async def connected(s, address="127.0.0.1"):
    """(reader, writer) of a connection of one's own, from an address of this machine."""
    url = s.client.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port, local_addr=(address, 0))
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def rest(reader):
    """What comes until the connection is closed, from either side."""
    told = b""
    with contextlib.suppress(OSError):
        while piece := await reader.read(2**16):
            told += piece
    return told


@contextlib.asynccontextmanager
async def over(encoder_address, llm_address, keys=None, **settings):
    """A client of a gateway over these two workers, once it serves pictures."""
    config = GatewayConfig(
        port=0,
        host="127.0.0.1",
        encoder_addresses=(encoder_address,),
        llm_addresses=(llm_address,),
        **{"drain_timeout_s": 1.0, **settings},
    )
    async with serving(config, keys) as (server, client):
        await until(lambda: not server.gateway.pipeline.pairing.missing())
        yield client


def events(text):
    """The JSON of every event; the last is "[DONE]" where it was sent."""
    lines = [block.removeprefix("data: ") for block in text.split("\n\n") if block]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
