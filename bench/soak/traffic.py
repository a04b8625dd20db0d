"""Mixed load: clients that draw a question and a manner, ask one of the gateways, and record how it
ended."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bench.soak.cases import Case, Questions, Right
from bench.soak.client import Ending, Manner, ask

CLIENTS = 6
NOBODY_S = 0.1  # Between attempts to connect.

PLAIN = Manner()
MANNERS = {
    PLAIN: 60,
    Manner("reads slowly", read_bytes=1, pause_s=0.0005): 8,
    Manner("writes slowly", write_bytes=2048, pause_s=0.05): 8,
    Manner("leaves while it writes", leaves_at=0.7): 8,
    Manner("leaves before the answer", leaves_after=0): 8,
    Manner("leaves within the answer", leaves_after=600): 8,
}


@dataclass(frozen=True)
class Asked:
    """One request: its question, manner and gateway, and how it ended."""

    case: Case
    nonce: str  # Of its pictures.
    manner: Manner
    gateway: int  # 0 or 1.
    right: Right
    ending: Ending


class Traffic:
    """CLIENTS clients, each of which sends its next request when its last has ended. ``asked``: all
    requests, in the order in which they ended."""

    def __init__(self, gateways: Sequence[str], rights: dict[Case, Right], seed: int) -> None:
        self.asked: list[Asked] = []
        self._gateways = gateways
        self._questions = Questions(rights, seed)
        self._random = random.Random(seed)

    async def run(self, until: asyncio.Event) -> None:
        """Returns when every request has ended that began before ``until`` was set."""

        async def client() -> None:
            while not until.is_set():
                self.asked.append(await self._ask())

        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(client())

    async def _ask(self) -> Asked:
        case, nonce, body, right = self._questions.draw()
        (manner,) = self._random.choices(list(MANNERS), list(MANNERS.values()))
        gateway = self._random.randrange(len(self._gateways))
        began = time.monotonic()
        while True:
            ending = await ask(self._gateways[gateway], body, manner)
            if ending.kind != "refused" or time.monotonic() - began > 60.0:
                return Asked(case, nonce, manner, gateway, right, ending)
            gateway = 1 - gateway  # As a load balancer does.
            await asyncio.sleep(NOBODY_S)


async def quiet_answers(url: str, cases: Sequence[Case]) -> dict[Case, Right]:
    """The right ending of each case: the answer of the gateway at ``url`` without other load.
    Leaves out pictures that are answered like another one."""
    rights: dict[Case, Right] = {}
    for number, case in enumerate(cases):
        body = case.body(f"quiet {number}", stream=number % 2 == 0)
        rights[case] = Right.of(await ask(url, body, PLAIN))
    described = Counter(right.texts for case, right in rights.items() if case.kind == "picture")
    return {
        case: right
        for case, right in rights.items()
        if case.kind != "picture" or described[right.texts] == 1
    }


async def answered_otherwise(url: str, rights: dict[Case, Right]) -> list[Case]:
    """The cases that the gateway at ``url`` does not answer rightly; asks a few at a time."""
    places = asyncio.Semaphore(CLIENTS)

    async def check(case: Case, right: Right) -> bool:
        async with places:
            return right.allows(await ask(url, case.body("afterwards", stream=True), PLAIN))

    answers = await asyncio.gather(*(check(case, right) for case, right in rights.items()))
    return [case for case, fine in zip(rights, answers, strict=True) if not fine]
