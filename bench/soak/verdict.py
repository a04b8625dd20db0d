"""Judges endings: right, excused by a fault, or wrong."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from bench.soak.faults import Fault
from bench.soak.traffic import Asked
from gateway.edge.limits import MAX_ENCODER_DEATHS
from gateway.workers.encode import DEATHS_REMEMBERED_S

# The error for a picture that two encoders had when they died; it lasts a while.
POISONOUS = "unprocessable_media"
DEATHS = {"encoder killed": 1, "all encoders killed": 2}  # Of encoders.
RETRYABLE = (429, 503, 504)  # Statuses after which a client may retry.
KILLED_S = 0.5  # A connection may break this much later than its gateway is killed.


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
        deadly = [f for f in faults if f.kind in DEATHS and f.began < ending.ended]
        if sum(DEATHS[fault.kind] for fault in deadly) >= MAX_ENCODER_DEATHS:
            last = deadly[-1]
            if ending.ended - last.began < DEATHS_REMEMBERED_S:
                return Verdict("excused", last.kind)
        return Verdict("wrong")
    prefix = all(map(str.startswith, asked.right.texts, ending.texts))
    if ending.kind == "error" and ending.status in (200, *RETRYABLE) and ending.code and prefix:
        for fault in present:
            if not fault.kind.startswith("gateway"):
                return Verdict("excused", fault.kind)
    return Verdict("wrong")


def refused_too_many(asked: Sequence[Asked], faults: Sequence[Fault]) -> list[str]:
    """A line about each gateway that refused as many pictures for the deaths of encoders as there
    were deaths, or more.

    A picture that an encoder died with is alone at the next one, among such pictures of a gateway:
    each death but the first leads to the refusal of one picture at most. Refused requests that have
    no picture in common are counted; each of them has at least one that was refused.
    """
    deaths = sum(DEATHS.get(fault.kind, 0) for fault in faults)
    refused: defaultdict[int, list[frozenset[str]]] = defaultdict(list)  # By gateway.
    for each in asked:
        if each.ending.code == POISONOUS and not each.right.allows(each.ending):
            pictures, others = each.case.pictures(each.nonce), refused[each.gateway]
            if all(map(pictures.isdisjoint, others)):
                others.append(pictures)
    return [
        f"gateway-{gateway + 1} refused {len(pictures)} pictures after {deaths} deaths of encoders"
        for gateway, pictures in sorted(refused.items())
        if len(pictures) >= deaths
    ]


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
    """The number of requests by kind, and by manner, and by verdict."""
    found: dict[str, Counter[str]] = {}
    for each in asked:
        word = judge(each, faults).word
        for name in (each.case.kind, each.manner.name):
            found.setdefault(name, Counter())[word] += 1
    return found
