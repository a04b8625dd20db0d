"""What a hostile client does to others: a victim's latencies during an attack.

    python -m bench.attacks [--before COMMIT] [--attack NAME,...] [--quick]

The stack is that of ``bench.load``, with an API key for each of the two. The victim sends short
texts, one after the other, for a few tokens each (in ``scans`` and ``hollow`` with a small new
picture), first alone and then during the attack. It gives a request up after 20 seconds. Attacks:

* ``scans``: progressive JPEGs with 1,000 scans over 16 megapixels, in 0.3 MB each;
* ``hollow``: WebP files of 28 bytes that are 89 megapixels of one colour, four in a request;
* ``percent``: ``data:`` URLs of 10 MB of percent signs;
* ``spaces``: base64 with a space after each character, 10 MB;
* ``words``: 256 long ``bad_words`` in each request;
* ``unread``: more connections than the server takes, which pipeline requests and read no answer;
* ``heads``: heads of requests, with a key, whose bodies never come, on as many connections;
* ``choices``: requests for 128 long choices each;
* ``lists``: requests for many choices with all but a few ids of the vocabulary allowed.

With ``--before``, each attack runs on that commit and on the present code, on a fresh stack each.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import signal
import socket
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

import opticnerve
from bench import commits, load, report
from bench.http_client import Figures, encode, figures
from opticnerve.benchmark.answer import Answer
from opticnerve.benchmark.connection import PATH, LoadTarget
from opticnerve.benchmark.pictures import data_url

KEYS = {"victim": "victim-0123456789abcdef", "attacker": "attacker-0123456789abcdef"}
GIVE_UP_S = 20.0  # After which the victim gives a request up.
GIVEN_UP = "given_up"
LEAD_S = 2.0  # From the attack's start to the victim's first request.
SCANS, SCANS_SIDE = 1000, 4096
HOLLOW_SIDE = 9459  # Its square is just below the gateway's default limit.
MEGABYTE = 1_000_000
PLACES = 64  # The server's connections, in attacks on them.
SOCKETS = 80
MORE_IDS = 20_000


@dataclass(frozen=True)
class Target:
    """A server, as the attacker uses it."""

    url: str

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return str(parts.hostname), int(parts.port or 80)

    async def post(self, body: bytes) -> None:
        """Sends one request and reads the answer, whatever it is."""
        async with client_of(self.url, "attacker") as target:
            await target.ask(body)


def client_of(url: str, who: str) -> LoadTarget:
    return LoadTarget(url, {"authorization": f"Bearer {KEYS[who]}"})


@dataclass(frozen=True)
class Attack:
    run: Callable[[Target], Awaitable[None]]  # Runs until it is cancelled.
    pictures: bool = False  # Whether the victim's requests have a picture.
    crowd: bool = False  # Whether the server takes only PLACES connections.


def scans() -> bytes:
    """A progressive JPEG with its last scan a thousand times, all of which decoders process."""
    file = io.BytesIO()
    flat = Image.new("L", (SCANS_SIDE, SCANS_SIDE), 90)
    flat.save(file, "JPEG", progressive=True, quality=80)
    data = file.getvalue()
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:last] + data[last:end] * SCANS + data[end:]


def hollow() -> bytes:
    """A lossless WebP of one colour: five codes of one symbol each, so that no pixel takes a bit.
    Source: the WebP lossless bitstream specification (RFC 9649), section 3."""
    fields = [(0x2F, 8), (HOLLOW_SIDE - 1, 14), (HOLLOW_SIDE - 1, 14), (0, 1), (0, 3)]
    fields += [(0, 1), (0, 1), (0, 1)]  # No transform, no colour cache, no meta code.
    fields += [(0b0001, 4)] * 5  # A simple code: one symbol, of one bit, 0.
    value = shift = 0
    for number, bits in fields:
        value |= number << shift
        shift += bits
    payload = value.to_bytes((shift + 7) // 8 + (shift + 7) // 8 % 2, "little")
    chunk = b"VP8L" + len(payload).to_bytes(4, "little") + payload
    return b"RIFF" + (4 + len(chunk)).to_bytes(4, "little") + b"WEBP" + chunk


def with_urls(*urls: str, **fields: Any) -> bytes:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": "what is this?"}]
    return with_fields(encode([{"role": "user", "content": content}], 1), **fields)


def with_text(max_tokens: int, **fields: Any) -> bytes:
    return with_fields(encode([{"role": "user", "content": "go on"}], max_tokens), **fields)


def with_fields(body: bytes, **fields: Any) -> bytes:
    return json.dumps(json.loads(body) | fields).encode()


def posts(make: Callable[[int], bytes], clients: int) -> Callable[[Target], Awaitable[None]]:
    """An attack by ``clients`` clients, each of which sends the next body when its last has
    ended."""

    async def run(target: Target) -> None:
        async def client(index: int) -> None:
            number = index
            while True:
                body = await asyncio.to_thread(make, number)
                await target.post(body)
                number += clients
                await asyncio.sleep(0.1)  # Does not flood if requests are refused at once.

        async with asyncio.TaskGroup() as group:
            for index in range(clients):
                group.create_task(client(index))

    return run


def scans_body(number: int) -> bytes:
    # The comment makes it a new file for caches.
    data = scans()
    comment = f"{number}".encode()
    marker = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
    return with_urls(data_url(data[:2] + marker + data[2:], "jpeg"))


def hollow_body(number: int) -> bytes:
    urls = [data_url(hollow() + bytes([number % 256, index]), "webp") for index in range(4)]
    return with_urls(*urls)


def percent_body(number: int) -> bytes:
    return with_urls(f"data:image/png;n={number}," + "%" * (10 * MEGABYTE))


def spaces_body(number: int) -> bytes:
    return with_urls(f"data:image/png;n={number};base64," + "A " * (5 * MEGABYTE))


def words_body(number: int) -> bytes:
    return with_text(1, bad_words=[f"{number} word{index} " * 75 for index in range(256)])


def choices_body(number: int) -> bytes:
    return with_text(2000, n=128, temperature=1, seed=number)


def lists_body(number: int) -> bytes:
    return with_text(256, n=16, temperature=1, allowed_token_ids=list(range(10, MORE_IDS)))


async def unread(target: Target) -> None:
    get = (
        f"GET /v1/models HTTP/1.1\r\nhost: {target.address[0]}\r\n"
        f"authorization: Bearer {KEYS['attacker']}\r\n\r\n"
    )
    await crowd(target, get.encode() * 20_000)


async def heads(target: Target) -> None:
    head = (
        f"POST {PATH} HTTP/1.1\r\nhost: {target.address[0]}\r\ncontent-length: 1000\r\n"
        f"content-type: application/json\r\nauthorization: Bearer {KEYS['attacker']}\r\n\r\n"
    )
    await crowd(target, head.encode())


async def crowd(target: Target, sent: bytes) -> None:
    """Holds many connections that send and never read; reopens those that the server closes."""

    async def hold() -> None:
        loop = asyncio.get_running_loop()
        while True:
            with socket.socket() as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.setblocking(False)
                with contextlib.suppress(OSError):
                    await loop.sock_connect(connection, target.address)
                    await loop.sock_sendall(connection, sent)
                    await _closing(connection)
            await asyncio.sleep(0.5)

    async with asyncio.TaskGroup() as group:
        for _ in range(SOCKETS):
            group.create_task(hold())


async def _closing(connection: socket.socket) -> None:
    """Waits until the server has closed a connection whose answers nobody reads. Asks the kernel,
    since reading would make room for more."""
    established = b"\x01"  # TCP_ESTABLISHED in tcp_info.
    while connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == established:  # noqa: ASYNC110
        await asyncio.sleep(0.5)


ATTACKS = {
    "scans": Attack(posts(scans_body, 2), pictures=True),
    "hollow": Attack(posts(hollow_body, 2), pictures=True),
    "percent": Attack(posts(percent_body, 2)),
    "spaces": Attack(posts(spaces_body, 2)),
    "words": Attack(posts(words_body, 2)),
    "unread": Attack(unread, crowd=True),
    "heads": Attack(heads, crowd=True),
    "choices": Attack(posts(choices_body, 2)),
    "lists": Attack(posts(lists_body, 4)),
}


async def ask(url: str, body: bytes) -> Answer:
    """The victim's request, on its own connection, given up after GIVE_UP_S."""
    async with client_of(url, "victim") as target:
        loop = asyncio.get_running_loop()
        sent = loop.time()
        try:
            async with asyncio.timeout(GIVE_UP_S):
                return await target.ask(body)
        except TimeoutError:
            return Answer(sent, loop.time(), code=GIVEN_UP)


async def measure(url: str, attack: Attack, asks: int, tokens: int, seed: int) -> Figures:
    """The victim's figures alone (``idle ...``) and during the attack."""
    bodies = victim_bodies(attack, 2 * asks + 1, tokens, seed)
    await ask(url, bodies[0])  # Warms up.
    alone = [await ask(url, body) for body in bodies[1 : asks + 1]]
    going = asyncio.ensure_future(attack.run(Target(url)))
    await asyncio.wait([going], timeout=LEAD_S)
    beside = [await ask(url, body) for body in bodies[asks + 1 :]]
    if going.done():
        raise SystemExit(f"the attack ended by itself: {going.exception()!r}")
    going.cancel()
    await asyncio.wait([going])
    idle = {f"idle {name}": value for name, value in chosen(alone).items()}
    return {**idle, **chosen(beside)}


def victim_bodies(attack: Attack, count: int, tokens: int, seed: int) -> list[bytes]:
    material = load.Material(seed, side=64)
    make = picture if attack.pictures else load.text
    return [encode(make(material), tokens) for _ in range(count)]


def picture(material: load.Material) -> load.Messages:
    part = {"type": "image_url", "image_url": {"url": material.picture()}}
    words = {"type": "text", "text": material.text()}
    return [{"role": "user", "content": [part, words]}]


def chosen(answers: list[Answer]) -> Figures:
    """The number of answers, and latencies. A request that was given up counts with the time it
    waited; refused and lost ones do not count."""
    found = figures(answers)
    waits = [1000 * a.ttft for a in answers if a.ttft is not None]
    waits += [1000 * GIVE_UP_S for a in answers if a.code == GIVEN_UP]
    worst = {"TTFT p50, ms": statistics.median(waits), "TTFT max, ms": max(waits)} if waits else {}
    gaps = [1000 * gap for answer in answers for gap in answer.gaps]
    steady = {"ITL p50, ms": statistics.median(gaps), "ITL max, ms": max(gaps)} if gaps else {}
    return {"asked": len(answers), "answered": found["answered"], **worst, **steady}


def compare(
    trees: dict[str, Path], model: str, keys: str, name: str, args: argparse.Namespace
) -> dict[str, Figures]:
    attack = ATTACKS[name]
    flags = {"max_connections": PLACES} if attack.crowd else {}
    asks, tokens = (1, 4) if args.quick else (4, 24)
    found = {}
    for side, tree in trees.items():
        print(f"\r{f'{name} {side}':70}", end="", file=sys.stderr, flush=True)
        with (
            commits.code_of(tree),
            opticnerve.serve(model, api_key_file=keys, host="127.0.0.1", **flags) as stack,
        ):
            found[side] = asyncio.run(measure(stack.url, attack, asks, tokens, seed=len(name)))
    print(f"\r{'':70}\r", end="", file=sys.stderr)
    return found


def show(results: dict[str, dict[str, Figures]]) -> None:
    """A row for each attack and side."""
    names = ["answered", "TTFT p50, ms", "TTFT max, ms", "ITL p50, ms", "ITL max, ms"]
    rows = []
    for name, sides in results.items():
        for side, found in sides.items():
            idle = [load.number(found.get(f"idle {figure}")) for figure in names[1:4:2]]
            cells = [load.number(found.get(figure)) for figure in names]
            cells[0] += f" of {found['asked']:.0f}"
            rows.append([name, side, *idle, *cells])
    header = ["attack", "side", "idle TTFT p50, ms", "idle ITL p50, ms", *names]
    print(report.table(header, rows), end="\n\n", flush=True)


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # Temporary files are removed.
    with commits.trees(args.before) as trees, tempfile.TemporaryDirectory() as directory:
        model = load.make_model(f"{directory}/model")
        keys = Path(directory) / "keys"
        keys.write_text("".join(f"{name}: {key}\n" for name, key in KEYS.items()))
        results: dict[str, dict[str, Figures]] = {}
        for name in args.attack:
            results[name] = compare(trees, model, str(keys), name, args)
            show({name: results[name]})
            if not args.quick:  # After each attack, so that an interrupted run keeps results.
                document = {**commits.describe(args.before), "attacks": results}
                report.save("attacks", document, file=args.out)
        if len(results) > 1:
            show(results)
    print("nothing is kept of a quick run" if args.quick else f"kept in {args.out}.json")


def parse() -> argparse.Namespace:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.attacks", description=summary)
    parser.add_argument("--before", metavar="COMMIT", help="compare with this commit")
    parser.add_argument(
        "--attack",
        type=commits.some_of(ATTACKS),
        default=list(ATTACKS),
        metavar="NAME,...",
        help=f"some of {', '.join(ATTACKS)}; default: all",
    )
    parser.add_argument("--quick", action="store_true", help="one request each, not kept")
    parser.add_argument("--out", default="attacks", metavar="NAME", help="name of the JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
