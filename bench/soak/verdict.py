"""Which endings are right, which a fault excuses, and what is neither."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bench.soak.faults import Fault
from bench.soak.traffic import Asked
from gateway.workers.encode import DEATHS_REMEMBERED_S

# Of a picture that two encoders had when they died, for a while.
POISONOUS = "unprocessable_media"
BLAMING = ("encoder killed", "all encoders killed")
RETRYABLE = (429, 503, 504)  # Statuses of errors that a client may ask again after.
KILLED_S = 0.5  # A connection may break so much later than its gateway was killed.


@dataclass(frozen=True)
class Verdict:
    """``word``: ``right``, ``left`` (the client, by itself), ``excused`` by ``fault``, or
    ``wrong``."""

    word: str
    fault: str = ""


def judge(asked: Asked, faults: Sequence[Fault]) -> Verdict:
    ending = asked.ending
    if asked.right.allows(ending):
        return Verdict("left" if ending.kind == "left" else "right")
    present = [fault for fault in faults if fault.overlaps(ending.sent, ending.ended)]
    if ending.kind == "lost":
        name = f"gateway-{asked.gateway + 1}"
        for fault in present:
            if fault.victim == name and ending.sent <= fault.began + KILLED_S:
                return Verdict("excused", fault.kind)
    if ending.code == POISONOUS:
        for fault in faults:
            if fault.kind in BLAMING and 0 < ending.ended - fault.began < DEATHS_REMEMBERED_S:
                return Verdict("excused", fault.kind)
    prefix = all(map(str.startswith, asked.right.texts, ending.texts))
    if ending.kind == "error" and ending.status in (200, *RETRYABLE) and ending.code and prefix:
        for fault in present:
            if not fault.kind.startswith("gateway"):
                return Verdict("excused", fault.kind)
    return Verdict("wrong")


def describe(asked: Asked, faults: Sequence[Fault], began: float) -> str:
    """One line about a request that ended wrongly."""
    ending = asked.ending
    present = [f.kind for f in faults if f.overlaps(ending.sent, ending.ended)]
    return (
        f"{asked.case.kind}, {asked.manner.name}, gateway-{asked.gateway + 1}, "
        f"{ending.sent - began:.1f} to {ending.ended - began:.1f} s: {ending.kind} {ending.status} "
        f"{ending.code} {ending.detail} {ending.texts!r} instead of {asked.right}; faults: "
        f"{', '.join(present) or 'none'}"
    )


def count(asked: Sequence[Asked], faults: Sequence[Fault]) -> dict[str, Counter[str]]:
    """How many requests of each kind, and of each manner, ended in which way."""
    found: dict[str, Counter[str]] = {}
    for each in asked:
        word = judge(each, faults).word
        for name in (each.case.kind, each.manner.name):
            found.setdefault(name, Counter())[word] += 1
    return found
