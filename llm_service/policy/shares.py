"""Who has how much of the decoder, and whose turn it is. Policy: no tensors, and no clock.

What is shared is shared among *sharers*, by weight: all requests of one key are one sharer, and a
request without a key is one by itself, with all of its choices. One that wants less than its share
leaves the rest to the others, so that one alone may have everything.

* Prefill is shared by weighted fair queueing (Demers, Keshav and Shenker, SIGCOMM 1989): of the
  sharers' next prompts that one goes first which would end first if every sharer had its part of
  each token. What a sharer was given is counted in tokens by weight, and one that comes back is
  lifted to where the others are, as in the Virtual Token Counter (Sheng et al., OSDI 2024): time
  in which nothing was wanted earns nothing. Between two that always want more, the difference is
  at most the longest prompt. Prompts of one length go in the order in which they came.
* Places among the running sequences and KV pages are shared max-min. A sharer that runs nothing
  may take a place from any that runs several; beyond that, places and pages are taken only from
  those that still have more, by weight, after they have lost them, so that nothing is taken back.
  Each running sequence has a token in each step: who has a place has its share of decoding.

What a sharer has is shared among its requests, so that one of many choices does not keep the others
of its key waiting. Of those that wait, a request that runs nothing comes before further choices of
one that runs; else they go by priority, then in the order in which they came. A request that runs
nothing may also take a place and pages from one of the same sharer that runs several sequences,
which keeps one. Whatever a sharer has to give up is the last of its request that runs most.

Lower numbers of priority come first, and nothing is taken from them. The engine does not check who
may ask for which.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import chain

from llm_service.policy.protocol import GenerateRequest
from llm_service.policy.sequence import GenerationState, Sequence


@dataclass(slots=True, eq=False)
class Sharer:
    """All requests of one key, or one request without a key."""

    number: int  # In order of arrival.
    weight: float = 1.0
    served: float = 0.0  # Prefill tokens by weight, in virtual time.
    waiting: list[Sequence] = field(default_factory=list)  # Both by ``order``.
    running: list[Sequence] = field(default_factory=list)
    places: dict[GenerationState, int] = field(default_factory=dict)  # Of each request that runs.

    @property
    def crowded(self) -> bool:
        """Whether any of its requests has more than one place."""
        return len(self.running) > len(self.places)

    @property
    def prefills(self) -> bool:
        """Whether any of its sequences has prefill left."""
        return bool(self.waiting) or not all(map(decodes, self.running))

    @property
    def pages(self) -> int:
        """KV pages that it holds; one that its sequences share counts for each of them."""
        return sum(len(seq.block_table) for seq in self.running)

    def standing(self) -> list[tuple[int, Sequence]]:
        """Running sequences, each with its number within its request, from 0; the last is preempted
        first."""
        if not self.crowded:
            return [(0, seq) for seq in self.running]
        seen: dict[GenerationState, int] = {}
        numbered = []
        for seq in self.running:
            number = seen.get(seq.generation, 0)
            seen[seq.generation] = number + 1
            numbered.append((number, seq))
        return sorted(numbered, key=lambda each: (each[1].request.priority, each[0]))

    def tag(self, seq: Sequence) -> float:
        """The virtual finish time of ``seq``'s prefill if it were next."""
        return self.served + (seq.num_tokens - seq.num_computed) / self.weight


class Shares:
    """The sharers of one engine and what each of them has."""

    def __init__(self) -> None:
        self.num_waiting = 0  # Sequences.
        self._several: dict[Sharer, None] = {}  # Those that have more than one place.
        self._sharers: dict[tuple[str, str], Sharer] = {}
        self._number = 0
        self._now = 0.0  # Virtual time: tokens served to an always busy sharer of weight 1.
        self._weight = 1.0  # Sum over the sharers that could prefill in this step.

    def of(self, seq: Sequence) -> Sharer:
        return self._sharers[_name(seq.request)]

    # ---- what each has

    def wait(self, seq: Sequence) -> None:
        sharer = self._join(seq.request)
        if not sharer.prefills:
            sharer.served = max(sharer.served, self._now)
        insort(sharer.waiting, seq, key=order)
        self.num_waiting += 1

    def wait_no_more(self, seq: Sequence) -> None:
        remove(self.of(seq).waiting, seq)
        self.num_waiting -= 1

    def enter(self, seq: Sequence) -> None:
        """``seq`` runs from now on."""
        sharer = self.of(seq)
        insort(sharer.running, seq, key=order)
        sharer.places[seq.generation] = sharer.places.get(seq.generation, 0) + 1
        if len(sharer.running) > 1:
            self._several[sharer] = None

    def leave(self, seq: Sequence) -> None:
        sharer = self.of(seq)
        remove(sharer.running, seq)
        sharer.places[seq.generation] -= 1
        if not sharer.places[seq.generation]:
            del sharer.places[seq.generation]
        if len(sharer.running) < 2:
            self._several.pop(sharer, None)

    def waiting(self) -> Iterator[Sequence]:
        """Every waiting sequence; those of one sharer in their order."""
        return (seq for sharer in self._sharers.values() for seq in sharer.waiting)

    def _join(self, request: GenerateRequest) -> Sharer:
        """The request's sharer, a new one if there is none of its name."""
        name = _name(request)
        sharer = self._sharers.get(name)
        if sharer is None:
            self._forget()
            self._number += 1
            sharer = self._sharers[name] = Sharer(self._number)
        sharer.weight = request.weight
        return sharer

    def _forget(self) -> None:
        """Drops idle sharers, except named ones that were served ahead of virtual time: they would
        come back with a fresh account."""
        busy = {name: each for name, each in self._sharers.items() if each.waiting or each.running}
        if busy:
            for name, sharer in self._sharers.items():
                if name[0] and sharer.served > self._now:
                    busy[name] = sharer
        else:
            self._now = 0.0
        self._sharers = busy

    # ---- prefill

    def turns(self, prefilling: list[Sequence], admits: bool) -> Turns:
        """The prefilling sequences and, with ``admits``, the waiting ones, in fair order."""
        if not prefilling and not admits:
            return Turns({})
        begun: dict[Sharer, list[Sequence]] = {}
        for seq in prefilling:
            begun.setdefault(self.of(seq), []).append(seq)
        waiting = [sharer for sharer in self._sharers.values() if sharer.waiting]
        able = [sharer for sharer, queue in begun.items() if not all(seq.missing for seq in queue)]
        self._weight = sum(sharer.weight for sharer in dict.fromkeys([*able, *waiting])) or 1.0
        queues: dict[Sharer, Iterable[Sequence]] = {**begun}
        for sharer in waiting if admits else ():
            queues[sharer] = chain(queues.get(sharer, ()), _line([*sharer.waiting], sharer.places))
        return Turns(queues)

    def charge(self, seq: Sequence, tokens: int) -> None:
        """Accounts for ``tokens`` that ``seq`` prefills in this step."""
        sharer = self.of(seq)
        sharer.served += tokens / sharer.weight
        self._now += tokens / self._weight

    # ---- places and pages

    @property
    def crowded(self) -> bool:
        """Whether any sharer has more than one place."""
        return bool(self._several)

    def may_claim_a_place(self, seq: Sequence) -> bool:
        """Whether another sharer has more places, by weight, than that of ``seq`` would have with
        one more; or a request of the same sharer has several while that of ``seq`` runs nothing."""
        mine = self.of(seq)
        if mine.crowded and seq.generation not in mine.places:
            return True
        places = (len(mine.running) + 1) / mine.weight if mine.running else 0.0
        return any(
            len(sharer.running) / sharer.weight > places
            for sharer in self._several
            if sharer is not mine
        )

    def claim(
        self,
        seq: Sequence,
        place: bool,
        pages: int,
        wanted: int,
        freed: Callable[[Sequence], int],
        spared: Collection[Sequence] = (),
    ) -> list[Sequence] | None:
        """Whom to preempt for ``seq``, or None if its sharer is not entitled to so much.

        ``place``: it lacks a place; ``pages``: how many it lacks of the ``wanted`` that it will
        hold. ``freed``: how many pages preempting one sequence would give it; ``spared`` are not
        preempted. If no other sharer has too much, other requests of its own sharer may.
        """
        mine = self.of(seq)
        holders = [_Holder(each, seq, spared) for each in self._several if each is not mine]
        own = _Holder(mine, seq, spared, own=True)
        places = (len(mine.running) + 1) / mine.weight if mine.running else 0.0
        held = (mine.pages + wanted) / mine.weight
        victims: list[Sequence] = []
        while place or pages > 0:
            able = [holder for holder in holders if holder.takeable]
            by_weight = _Holder.places_by_weight if place else _Holder.pages_by_weight
            richest = max(able, key=by_weight, default=None)
            if richest is None or by_weight(richest) <= (places if place else held):
                richest = own
            if not richest.takeable:
                return None
            victims.append(richest.take())
            pages -= freed(victims[-1])
            place = False
        return victims

    def furthest(self, running: list[Sequence]) -> Sequence:
        """Whom to preempt if a running sequence cannot grow: of those with the largest priority
        number, the last of the sharer that holds most pages by weight.

        ``running`` is in order; its first is never chosen, so that it always makes progress.
        """
        highest = running[-1].request.priority
        sharers = dict.fromkeys(map(self.of, running))
        lasts = {sharer.standing()[-1][1]: sharer for sharer in sharers}
        most, victim = 0.0, running[-1]
        for seq, sharer in lasts.items():
            held = sharer.pages / sharer.weight
            if seq is running[0] or seq.request.priority < highest or held < most:
                continue
            if held > most or seq.order > victim.order:
                most, victim = held, seq
        return victim

    def check_integrity(self, running: list[Sequence]) -> None:
        """Raises RuntimeError where the sharers do not have what runs and waits."""
        everyone = self._sharers.values()
        if sorted(order(seq) for each in everyone for seq in each.running) != list(
            map(order, running)
        ):
            raise RuntimeError("sharers do not have the places that are taken")
        if any(each.places != Counter(seq.generation for seq in each.running) for each in everyone):
            raise RuntimeError("requests do not have the places that are taken")
        for queue in (each.waiting for each in everyone):
            if [seq.order for seq in queue] != sorted({seq.order for seq in queue}):
                raise RuntimeError("sequences wait out of order")
        if self.num_waiting != sum(len(each.waiting) for each in everyone):
            raise RuntimeError(f"{self.num_waiting} sequences should wait")


class Turns:
    """Iterates over sequences: each time the next one of the sharer whose virtual finish time is
    earliest."""

    def __init__(self, queues: Mapping[Sharer, Iterable[Sequence]]) -> None:
        self._heap: list[tuple[int, float, int, Sequence, Iterator[Sequence], Sharer]] = []
        self._stays = True
        for sharer, queue in queues.items():
            self._push(sharer, iter(queue))

    def __iter__(self) -> Iterator[Sequence]:
        while self._heap:
            *_, seq, rest, sharer = heappop(self._heap)
            self._stays = True
            yield seq
            if self._stays:
                self._push(sharer, rest)

    def skip_sharer(self) -> None:
        """Leaves out the rest of the sharer whose turn it is."""
        self._stays = False

    def _push(self, sharer: Sharer, rest: Iterator[Sequence]) -> None:
        seq = next(rest, None)
        if seq is not None:
            tag = sharer.tag(seq)
            heappush(self._heap, (seq.request.priority, tag, sharer.number, seq, rest, sharer))


class _Holder:
    """What a sharer would have left, and which of its sequences may be preempted for ``seq``.

    Another sharer keeps its first place. Of ``seq``'s ``own`` sharer, each request keeps its first,
    and nothing is taken if the request of ``seq`` runs.
    """

    def __init__(
        self, sharer: Sharer, seq: Sequence, spared: Collection[Sequence], own: bool = False
    ) -> None:
        self._weight = sharer.weight
        self._places = len(sharer.running)
        self._pages = sharer.pages
        if not own:
            places = [each for _, each in sharer.standing()[1:]]
        elif sharer.crowded and seq.generation not in sharer.places:
            places = [each for number, each in sharer.standing() if number]
        else:
            places = []
        self.takeable = [
            each
            for each in places
            if each.request.priority >= seq.request.priority and each not in spared
        ]

    def places_by_weight(self) -> float:
        return self._places / self._weight

    def pages_by_weight(self) -> float:
        return self._pages / self._weight

    def take(self) -> Sequence:
        """The last takeable one, in the order of ``standing``."""
        seq = self.takeable.pop()
        self._places -= 1
        self._pages -= len(seq.block_table)
        return seq


def _line(waiting: list[Sequence], places: Collection[GenerationState]) -> Iterator[Sequence]:
    """A sharer's waiting sequences in order of admission: within a priority, first those whose
    request has none of ``places``."""
    further: list[Sequence] = []
    for seq in waiting:
        if further and further[0].request.priority < seq.request.priority:
            yield from further
            further = []
        if seq.generation in places:
            further.append(seq)
        else:
            yield seq
    yield from further


def _name(request: GenerateRequest) -> tuple[str, str]:
    """(the sharer's name, "") or, without one, ("", the request's id)."""
    return request.share, "" if request.share else request.request_id


def decodes(seq: Sequence) -> bool:
    """Whether the sequence's next step is one token, the next of its output."""
    return seq.num_computed + 1 == len(seq.token_ids) and seq.num_computed >= seq.num_prompt


def order(seq: Sequence) -> tuple[int, int, int]:
    return seq.order


def remove(queue: list[Sequence], seq: Sequence) -> None:
    """Removes a sequence from a queue that is sorted by ``order``."""
    index = bisect_left(queue, seq.order, key=order)
    assert queue[index] is seq
    del queue[index]
