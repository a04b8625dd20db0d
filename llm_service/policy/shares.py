"""Fair shares of the decoder: prefill order, admission and preemption. No tensors, no clock.

Prefill, slots and KV blocks are shared among *sharers*, by weight: all requests with one ``share``
name are one sharer, and a request without a name is a sharer of its own, with all of its choices. A
sharer that wants less than its share leaves the rest to the others, so that one alone may use all.

* Prefill is shared by weighted fair queueing (Demers, Keshav and Shenker, SIGCOMM 1989): of the
  sharers' next prompts, the one that would finish first if every sharer had its part of each token
  is served first. Service is counted in tokens over weight, and a sharer that was idle is lifted to
  the others' count, as in the Virtual Token Counter (Sheng et al., OSDI 2024): idle time earns no
  credit. Between two sharers that are always busy, the difference is at most the longest prompt.
  Prompts of one length are served in order of arrival.
* Slots (each for one running sequence) and KV blocks are shared max-min. A sharer that runs nothing
  may take a slot from any that runs several. Otherwise slots and blocks are taken only from sharers
  that have more, by weight, than the taker will have, so that nothing is taken back. Each running
  sequence has a token in each step, so shares of slots are shares of decoding.

Requests of one sharer share as well, so that a request with many choices does not delay the others.
Waiting sequences of requests that run nothing come before further choices of running requests;
otherwise the order is priority, then arrival. A request that runs nothing may also take a slot and
blocks from a request of its own sharer that runs several sequences, which keeps one. The first
sequence that a sharer loses is the last one of the request that runs the most.

Lower priority numbers come first and are never preempted for higher ones. The engine does not check
who may use which priority.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import chain

from llm_service.policy.messages import GenerateRequest
from llm_service.policy.sequence import GenerationState, Sequence


@dataclass(slots=True, eq=False)
class Sharer:
    """All requests with one ``share`` name, or one request without a name."""

    number: int  # In order of arrival.
    weight: float = 1.0
    served: float = 0.0  # Prefill tokens divided by weight: its virtual time.
    waiting: list[Sequence] = field(default_factory=list)  # Sorted by ``order``.
    running: list[Sequence] = field(default_factory=list)  # Sorted by ``order``.
    slots: dict[GenerationState, int] = field(default_factory=dict)  # Counts, by running request.

    @property
    def has_multiple_slots(self) -> bool:
        """Whether any of its requests has more than one slot."""
        return len(self.running) > len(self.slots)

    @property
    def prefills(self) -> bool:
        """Whether any of its sequences has prefill left."""
        return bool(self.waiting) or not all(map(decodes, self.running))

    @property
    def blocks(self) -> int:
        """KV blocks that it holds; a block that several sequences share counts for each of them."""
        return sum(len(seq.block_table) for seq in self.running)

    def preemption_order(self) -> list[tuple[int, Sequence]]:
        """(number within its request, from 0; sequence) of each running sequence. The last one is
        preempted first."""
        if not self.has_multiple_slots:
            return [(0, seq) for seq in self.running]
        seen: dict[GenerationState, int] = {}
        numbered = []
        for seq in self.running:
            number = seen.get(seq.generation, 0)
            seen[seq.generation] = number + 1
            numbered.append((number, seq))
        return sorted(numbered, key=lambda each: (each[1].request.priority, each[0]))

    def virtual_finish_time(self, seq: Sequence) -> float:
        """The virtual time at which ``seq``'s prefill would end if it were served next."""
        return self.served + (seq.num_tokens - seq.num_computed) / self.weight


class Shares:
    """The sharers of one engine, with their waiting and running sequences."""

    def __init__(self) -> None:
        self.num_waiting = 0  # Sequences.
        self._with_multiple_slots: dict[Sharer, None] = {}  # Sharers with more than one slot.
        self._sharers: dict[tuple[str, str], Sharer] = {}
        self._number = 0
        self._now = 0.0  # Virtual time: tokens served to an always busy sharer of weight 1.
        self._weight = 1.0  # Total weight of the sharers that can prefill in this step.

    def of(self, seq: Sequence) -> Sharer:
        return self._sharers[_name(seq.request)]

    # ---- waiting and running

    def wait(self, seq: Sequence) -> None:
        sharer = self._join(seq.request)
        if not sharer.prefills:
            sharer.served = max(sharer.served, self._now)
        insort(sharer.waiting, seq, key=order)
        self.num_waiting += 1

    def dequeue(self, seq: Sequence) -> None:
        remove(self.of(seq).waiting, seq)
        self.num_waiting -= 1

    def enter(self, seq: Sequence) -> None:
        """Records that ``seq`` runs."""
        sharer = self.of(seq)
        insort(sharer.running, seq, key=order)
        sharer.slots[seq.generation] = sharer.slots.get(seq.generation, 0) + 1
        if len(sharer.running) > 1:
            self._with_multiple_slots[sharer] = None

    def leave(self, seq: Sequence) -> None:
        sharer = self.of(seq)
        remove(sharer.running, seq)
        sharer.slots[seq.generation] -= 1
        if not sharer.slots[seq.generation]:
            del sharer.slots[seq.generation]
        if len(sharer.running) < 2:
            self._with_multiple_slots.pop(sharer, None)

    def waiting(self) -> Iterator[Sequence]:
        """Every waiting sequence; those of one sharer in their order."""
        return (seq for sharer in self._sharers.values() for seq in sharer.waiting)

    def _join(self, request: GenerateRequest) -> Sharer:
        """The request's sharer, created if there is none of its name."""
        name = _name(request)
        sharer = self._sharers.get(name)
        if sharer is None:
            self._forget()
            self._number += 1
            sharer = self._sharers[name] = Sharer(self._number)
        sharer.weight = request.weight
        return sharer

    def _forget(self) -> None:
        """Drops idle sharers, except named ones that are ahead of virtual time: dropped, they would
        return with a fresh count."""
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
            queues[sharer] = chain(
                queues.get(sharer, ()), _admission_order([*sharer.waiting], sharer.slots)
            )
        return Turns(queues)

    def charge(self, seq: Sequence, tokens: int) -> None:
        """Accounts for ``tokens`` that ``seq`` prefills in this step."""
        sharer = self.of(seq)
        sharer.served += tokens / sharer.weight
        self._now += tokens / self._weight

    # ---- slots and blocks

    @property
    def has_multiple_slots(self) -> bool:
        """Whether any sharer has more than one slot."""
        return bool(self._with_multiple_slots)

    def may_claim_a_slot(self, seq: Sequence) -> bool:
        """Whether another sharer has more slots, by weight, than ``seq``'s sharer would have with
        one more; or ``seq``'s request has no slot, and another request of its sharer has several.
        """
        mine = self.of(seq)
        if mine.has_multiple_slots and seq.generation not in mine.slots:
            return True
        slots = (len(mine.running) + 1) / mine.weight if mine.running else 0.0
        return any(
            len(sharer.running) / sharer.weight > slots
            for sharer in self._with_multiple_slots
            if sharer is not mine
        )

    def claim(
        self,
        seq: Sequence,
        lacks_slot: bool,
        blocks: int,
        wanted: int,
        freed: Callable[[Sequence], int],
        spared: Collection[Sequence] = (),
    ) -> list[Sequence] | None:
        """The sequences to preempt so that ``seq`` can run, or None if its sharer is not entitled
        to so much.

        ``lacks_slot``: whether it needs a slot. ``wanted``: KV blocks that it will hold;
        ``blocks``: how many have to be freed. ``freed``: how many of them preempting a sequence
        frees. ``spared``: sequences not to preempt. If no other sharer has too much, other
        requests of the same sharer are preempted.
        """
        mine = self.of(seq)
        holders = [
            _Holder(each, seq, spared) for each in self._with_multiple_slots if each is not mine
        ]
        own = _Holder(mine, seq, spared, own=True)
        slots = (len(mine.running) + 1) / mine.weight if mine.running else 0.0
        held = (mine.blocks + wanted) / mine.weight
        victims: list[Sequence] = []
        while lacks_slot or blocks > 0:
            able = [holder for holder in holders if holder.takeable]
            by_weight = _Holder.slots_by_weight if lacks_slot else _Holder.blocks_by_weight
            richest = max(able, key=by_weight, default=None)
            if richest is None or by_weight(richest) <= (slots if lacks_slot else held):
                richest = own
            if not richest.takeable:
                return None
            victims.append(richest.take())
            blocks -= freed(victims[-1])
            lacks_slot = False
        return victims

    def pick_victim(self, running: list[Sequence]) -> Sequence:
        """The sequence to preempt if a running one cannot grow: among those with the largest
        priority number, the last sequence of the sharer that holds the most blocks by weight.

        ``running`` is sorted by ``order``. The first is never chosen, so it always makes progress.
        """
        highest = running[-1].request.priority
        sharers = dict.fromkeys(map(self.of, running))
        lasts = {sharer.preemption_order()[-1][1]: sharer for sharer in sharers}
        most, victim = 0.0, running[-1]
        for seq, sharer in lasts.items():
            held = sharer.blocks / sharer.weight
            if seq is running[0] or seq.request.priority < highest or held < most:
                continue
            if held > most or seq.order > victim.order:
                most, victim = held, seq
        return victim

    def check_integrity(self, running: list[Sequence]) -> None:
        """Raises RuntimeError if the sharers' sequences are not those that run and wait."""
        everyone = self._sharers.values()
        if sorted(order(seq) for each in everyone for seq in each.running) != list(
            map(order, running)
        ):
            raise RuntimeError("the sharers' running sequences are not those that run")
        if any(each.slots != Counter(seq.generation for seq in each.running) for each in everyone):
            raise RuntimeError("the requests' counts of slots do not match their running sequences")
        for queue in (each.waiting for each in everyone):
            if [seq.order for seq in queue] != sorted({seq.order for seq in queue}):
                raise RuntimeError("sequences wait out of order")
        if self.num_waiting != sum(len(each.waiting) for each in everyone):
            raise RuntimeError(f"num_waiting is {self.num_waiting}, but other sequences wait")


class Turns:
    """Iterates over the sharers' queues: by priority, then by the earliest virtual finish time of
    their next sequences."""

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
        """Skips the remaining sequences of the sharer whose turn it is."""
        self._stays = False

    def _push(self, sharer: Sharer, rest: Iterator[Sequence]) -> None:
        seq = next(rest, None)
        if seq is not None:
            finish = sharer.virtual_finish_time(seq)
            heappush(self._heap, (seq.request.priority, finish, sharer.number, seq, rest, sharer))


class _Holder:
    """A sharer's slots and blocks, less those taken so far, and the sequences that may be preempted
    for ``seq``.

    Another sharer keeps one slot. In ``seq``'s ``own`` sharer each request keeps one slot, and
    nothing is taken if ``seq``'s request has a slot already.
    """

    def __init__(
        self, sharer: Sharer, seq: Sequence, spared: Collection[Sequence], own: bool = False
    ) -> None:
        self._weight = sharer.weight
        self._slots = len(sharer.running)
        self._blocks = sharer.blocks
        if not own:
            slots = [each for _, each in sharer.preemption_order()[1:]]
        elif sharer.has_multiple_slots and seq.generation not in sharer.slots:
            slots = [each for number, each in sharer.preemption_order() if number]
        else:
            slots = []
        self.takeable = [
            each
            for each in slots
            if each.request.priority >= seq.request.priority and each not in spared
        ]

    def slots_by_weight(self) -> float:
        return self._slots / self._weight

    def blocks_by_weight(self) -> float:
        return self._blocks / self._weight

    def take(self) -> Sequence:
        """Removes and returns the takeable sequence that is last in ``preemption_order``."""
        seq = self.takeable.pop()
        self._slots -= 1
        self._blocks -= len(seq.block_table)
        return seq


def _admission_order(
    waiting: list[Sequence], slots: Collection[GenerationState]
) -> Iterator[Sequence]:
    """A sharer's waiting sequences in order of admission: within a priority, those of requests
    without a slot come first. ``slots``: the requests that have one."""
    further: list[Sequence] = []
    for seq in waiting:
        if further and further[0].request.priority < seq.request.priority:
            yield from further
            further = []
        if seq.generation in slots:
            further.append(seq)
        else:
            yield seq
    yield from further


def _name(request: GenerateRequest) -> tuple[str, str]:
    """(the sharer's name, "") or, without one, ("", the request's id)."""
    return request.share, "" if request.share else request.request_id


def decodes(seq: Sequence) -> bool:
    """Whether the sequence decodes: all that is left to compute is the last token of its output."""
    return seq.num_computed + 1 == len(seq.token_ids) and seq.num_computed >= seq.num_prompt


def order(seq: Sequence) -> tuple[int, int, int]:
    return seq.order


def remove(queue: list[Sequence], seq: Sequence) -> None:
    """Removes a sequence from a queue that is sorted by ``order``."""
    index = bisect_left(queue, seq.order, key=order)
    assert queue[index] is seq
    del queue[index]
