"""Policy: which sequences compute how many tokens in the next step. No tensors, no events.

There is no prefill phase and no decode phase. Every step has one budget of tokens; every
sequence asks for those of its tokens that are not computed. Running sequences come first, then
waiting ones, both by (priority, arrival, choice). That order is total and fixed for life, a
sequence only ever preempts those behind it, and whoever is first fits the cache alone: so the
first always gets on, and nobody waits for ever.

While any sequence decodes, the step's prefill tokens are bounded by the time that they are
expected to take, since every decoding sequence waits for the step's end. The first sequence that
prefills gets a page of tokens all the same, or the whole of a bidirectional span. A quarter of a
step's prefill is for prompts without pictures, where there are any: text does not wait for a burst
of pictures to be computed.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from llm_service.block_manager import BlockManager, whole_spans
from llm_service.budget import Budget
from llm_service.cost_model import CostModel
from llm_service.limits import EngineConfig
from llm_service.plan import Segment, StepPlan, Work
from llm_service.rows import RowSource
from llm_service.sequence import Generation, Sequence, Status
from opticnerve.media.plan import SpanAttention

TEXT_SHARE = 4  # One of so many prefill tokens is for prompts without pictures.


class Scheduler:
    """Owns the queues, the slots, the leases and, through ``blocks``, the pages."""

    def __init__(self, config: EngineConfig, blocks: BlockManager, rows: RowSource) -> None:
        self.config = config
        self.blocks = blocks
        self.rows = rows
        self.costs = CostModel()  # Whoever runs the plans teaches it how long they took.
        self.waiting: list[Sequence] = []  # Both by ``order``.
        self.running: list[Sequence] = []
        # Pictures that are slow to come leave room for text.
        self._max_parked = max(1, config.max_num_seqs // 2)
        self.num_preemptions = 0
        self.num_cached_tokens = 0  # Of prompts, taken from the prefix cache.
        self._step = 0
        self._free_slots = list(range(config.max_num_seqs))[::-1]
        self._freed_slots: list[int] = []  # For the next plan to tell.
        self._copies: list[tuple[Sequence, int, int]] = []  # Of forks, for the next plan to make.
        self.copied: list[Sequence] = []  # Forks whose pages the last plan copied.
        self._leases: dict[str, int] = {}  # Holders of each key.
        self._needs: list[tuple[Sequence, tuple[str, ...]]] = []

    # ---- the queue

    def add(self, seq: Sequence) -> None:
        insort(self.waiting, seq, key=_order)

    def remove(self, seq: Sequence) -> None:
        """Ends a sequence in whatever state it is; everything that it held is free."""
        if seq.status is Status.RUNNING:
            self._give_up(seq)
        elif seq.status is Status.WAITING:
            _delete(self.waiting, seq)
        seq.status = Status.FINISHED

    def preempt(self, seq: Sequence) -> None:
        """Back to the queue, to be computed again; it keeps its tokens and its keys."""
        self._give_up(seq)
        seq.suspend()
        seq.preemptions += 1
        self.num_preemptions += 1
        seq.status = Status.WAITING
        self.add(seq)

    def _give_up(self, seq: Sequence) -> None:
        _delete(self.running, seq)
        self.blocks.release(seq)
        self._free_slots.append(seq.slot)
        self._freed_slots.append(seq.slot)
        self._copies = [copy for copy in self._copies if copy[0] is not seq]
        for key in tuple(seq.leases):
            self._release(seq, key)

    # ---- one step

    def schedule(self, now: float) -> StepPlan | None:
        """The next step, or None when no sequence can compute anything."""
        works: list[Work] = []
        preemptions = self.num_preemptions
        budget = self._budget()
        self._schedule_running(works, budget, now)
        if self.waiting and self.num_preemptions == preemptions:
            self._schedule_waiting(works, budget, now)
        if not works:
            return None
        self._step += 1
        plan = StepPlan(
            self._step,
            tuple(works),
            tuple(self._freed_slots),
            tuple((source, destination) for _, source, destination in self._copies),
        )
        self._freed_slots.clear()
        self.copied = [seq for seq, _, _ in self._copies]
        self._copies.clear()
        return plan

    def _budget(self) -> Budget:
        """A token for each sequence that decodes, and the rest for prefill, as far as the step's
        time goes."""
        tokens, block_size = self.config.max_num_batched_tokens, self.blocks.block_size
        decodes = sum(map(_decodes, self.running))
        prefill = max(tokens - decodes, block_size)
        timed = decodes > 0 and self.config.max_step_s > 0
        if timed:
            fitting = self.costs.prefill_tokens(decodes, self.config.max_step_s)
            prefill = min(prefill, max(fitting, block_size))
        text = any(_prefills_text(seq) for seq in (*self.running, *self.waiting))
        kept = min(max(prefill // TEXT_SHARE, block_size), prefill - block_size) if text else 0
        return Budget(tokens, prefill, timed, block_size, for_text=kept)

    def _schedule_running(self, works: list[Work], budget: Budget, now: float) -> None:
        block_size = self.blocks.block_size
        for seq in tuple(self.running):
            if not budget.tokens:
                break
            if seq.status is not Status.RUNNING:
                continue  # Preempted by one ahead of it, in this very loop.
            start = seq.num_computed
            if _decodes(seq):
                tokens = 1
            else:
                tokens = self._chunk(seq, budget, now)
                if not tokens:
                    continue
            if start + tokens > len(seq.block_table) * block_size and not self._make_room(
                seq, start + tokens
            ):
                continue
            works.append(self._work(seq, tokens))
            budget.spend(works[-1])

    def _make_room(self, seq: Sequence, num_tokens: int) -> bool:
        """Grows the sequence's pages, at the cost of those behind it; False: at its own."""
        while not self.blocks.can_grow(seq, num_tokens):
            victim = self.running[-1]
            self.preempt(victim)
            if victim is seq:
                return False
        self.blocks.grow(seq, num_tokens)
        return True

    def _schedule_waiting(self, works: list[Work], budget: Budget, now: float) -> None:
        """Admits in order. Where there is no room for more pictures, sequences without any go
        ahead; once there is, whoever was overtaken is the first in line again."""
        no_pictures = False
        for seq in tuple(self.waiting):
            if not budget.prefill or not budget.tokens or not self._free_slots:
                return
            if seq.request.spans and (no_pictures or not self._has_room_for_pictures(seq)):
                no_pictures = True
                continue
            if not self.blocks.can_allocate(seq, reserve=len(self.running) // 4):
                return
            start = self.blocks.cached_tokens(seq)
            end = budget.chunk_end(seq, start)
            if end == start and seq.request.spans and budget.for_text:
                no_pictures = True  # What is left is for text, which may be behind it.
                continue
            if whole_spans(seq, end) == start:
                return  # Not worth a chunk, or shorter than a bidirectional span that comes first.
            self._admit(seq)
            tokens = self._chunk(seq, budget, now)
            if tokens:
                works.append(self._work(seq, tokens))
                budget.spend(works[-1])

    def _admit(self, seq: Sequence) -> None:
        _delete(self.waiting, seq)
        self.blocks.allocate(seq)
        if seq.generation.first_token_at is None and not seq.preemptions:  # The first choice.
            seq.generation.cached_tokens = min(seq.num_computed, seq.num_prompt)
            self.num_cached_tokens += seq.generation.cached_tokens
        self._enter(seq)

    def _enter(self, seq: Sequence) -> None:
        """Slot, leases and the question for rows that are not here."""
        seq.slot = self._free_slots.pop()
        seq.status = Status.RUNNING
        insort(self.running, seq, key=_order)
        for key, (end, num_bytes) in self._items(seq, seq.num_computed).items():
            seq.leases[key] = end
            self._leases[key] = self._leases.get(key, 0) + 1
            if self._leases[key] == 1:
                self.rows.acquire(key, num_bytes)
        self.ask(seq, tuple(key for key in seq.leases if not self.rows.ready(key)))

    def _work(self, seq: Sequence, tokens: int) -> Work:
        start = seq.num_computed
        end = start + tokens
        table = seq.block_table
        if end < len(seq.token_ids):
            table = table[: self.blocks.pages_for(end)]
        generation = seq.generation
        return Work(
            seq,
            seq.slot,
            start,
            tokens,
            table,
            self._segments(seq, start, end) if start < seq.num_prompt else (),
            1 if end == len(seq.token_ids) else 0,
            start < seq.num_prompt and generation.wants_prompt_logprobs,
            seq.reads_slot,
        )

    def _segments(self, seq: Sequence, start: int, end: int) -> tuple[Segment, ...]:
        segments = []
        spans = seq.request.spans
        for index in range(seq.generation.span_at(start), len(spans)):
            span = spans[index]
            if span.token_offset >= end:
                break
            first = max(start, span.token_offset)
            last = min(end, span.token_offset + span.num_tokens)
            row = span.row_start + first - span.token_offset
            segments.append(Segment(seq.request.items[span.item], first - start, row, last - first))
        return tuple(segments)

    # ---- chunks and rows

    def _chunk(self, seq: Sequence, budget: Budget, now: float) -> int:
        """Tokens that can be computed next: up to the budget, up to the first span whose rows
        are not here, and no part of a bidirectional span."""
        start = seq.num_computed
        end = self._ready_end(seq, start, budget.chunk_end(seq, start))
        generation = seq.generation
        if end > start and generation.first_chunk_at is None:
            generation.first_chunk_at = now
        if end == start and seq.missing:
            if seq.blocked_since is None:
                seq.blocked_since = now
        elif seq.blocked_since is not None:
            generation.embedding_wait_s += now - seq.blocked_since
            seq.blocked_since = None
        return end - start

    def _ready_end(self, seq: Sequence, start: int, end: int) -> int:
        spans = seq.request.spans
        for index in range(seq.generation.span_at(start), len(spans)):
            span = spans[index]
            if span.token_offset >= end:
                break
            if not self._rows_ready(seq, seq.request.items[span.item]):
                return max(start, span.token_offset)
            atomic = span.attention is SpanAttention.BIDIRECTIONAL
            if atomic and end < span.token_offset + span.num_tokens:
                return span.token_offset
        return end

    def _rows_ready(self, seq: Sequence, key: str) -> bool:
        if key in seq.missing:
            return False
        if self.rows.ready(key):
            return True
        self.ask(seq, (key,))
        return False

    def ask(self, seq: Sequence, keys: tuple[str, ...]) -> None:
        """Parks the sequence before the first span of ``keys`` until ``rows_ready``."""
        if keys:
            seq.missing.update(keys)
            self._needs.append((seq, keys))

    def take_needs(self) -> list[tuple[Sequence, tuple[str, ...]]]:
        """Keys that sequences wait for and that nobody was asked for yet."""
        needs, self._needs = self._needs, []
        return needs

    def rows_ready(self, key: str) -> None:
        for seq in self.running:
            seq.missing.discard(key)

    def needs(self, generation: Generation, key: str) -> bool:
        """Whether a choice still has tokens to compute from rows of ``key``."""
        return any(
            seq.status is not Status.FINISHED and key in self._items(seq, seq.num_computed)
            for seq in generation.sequences
        )

    # ---- leases

    def _items(self, seq: Sequence, computed: int) -> dict[str, tuple[int, int]]:
        """Of each item with tokens past ``computed``: the end of its last span, its bytes."""
        request = seq.request
        items: dict[str, tuple[int, int]] = {}
        for index in range(seq.generation.span_at(computed), len(request.spans)):
            span = request.spans[index]
            key = request.items[span.item]
            size = (span.row_start + span.num_tokens) * self.config.row_bytes
            known = items.get(key, (0, 0))[1]
            items[key] = (span.token_offset + span.num_tokens, max(known, size))
        return items

    def _has_room_for_pictures(self, seq: Sequence) -> bool:
        """Whether the sequence's items fit the tier, and one more may wait for its rows. One that
        would hold the only lease may always try."""
        if not self._leases:
            return True
        items = self._items(seq, self.blocks.cached_tokens(seq))
        fresh = {key: size for key, (_, size) in items.items() if key not in self._leases}
        if fresh and not self.rows.can_acquire(sum(fresh.values())):
            return False
        parked = sum(1 for other in self.running if other.missing)
        return parked < self._max_parked or all(self.rows.ready(key) for key in items)

    def _release(self, seq: Sequence, key: str) -> None:
        del seq.leases[key]
        self._leases[key] -= 1
        if not self._leases[key]:
            del self._leases[key]
            self.rows.release(key)

    # ---- after a step

    def advance(self, seq: Sequence, num_computed: int) -> None:
        """The keys and values of the first ``num_computed`` tokens are in pages now."""
        seq.num_computed = num_computed
        if num_computed // self.blocks.block_size > seq.num_shared:
            self.blocks.commit(seq)
        if seq.leases:
            for key in [key for key, end in seq.leases.items() if end <= num_computed]:
                self._release(seq, key)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Starts another choice on what its parent has computed of their prompt.

        It computes its own output, if it continues one, else the prompt's last token again, to
        sample from it on its own. Without room it waits like a new sequence.
        """
        start = whole_spans(child, min(child.num_prompt, child.num_tokens - 1))
        if not self._free_slots or not self.blocks.can_fork(parent, child, start):
            self.add(child)
            return
        copies = self.blocks.fork(parent, child, start)
        self._copies += [(child, source, destination) for source, destination in copies]
        self._enter(child)

    def check_integrity(self) -> None:
        """Raises RuntimeError where queues, slots, pages or leases do not agree."""
        self.blocks.check_integrity([*self.running, *self.waiting])
        for queue, status in ((self.running, Status.RUNNING), (self.waiting, Status.WAITING)):
            if any(seq.status is not status for seq in queue):
                raise RuntimeError(f"a sequence that is not {status.value} is in that queue")
            if [seq.order for seq in queue] != sorted({seq.order for seq in queue}):
                raise RuntimeError(f"the {status.value} queue is out of order")
        slots = [*self._free_slots, *(seq.slot for seq in self.running)]
        if sorted(slots) != list(range(self.config.max_num_seqs)):
            raise RuntimeError(f"slots are lost or doubled: {sorted(slots)}")
        held: dict[str, int] = {}
        for seq in self.running:
            for key in seq.leases:
                held[key] = held.get(key, 0) + 1
        if held != self._leases:
            raise RuntimeError(f"leases held {held}, counted {self._leases}")


def _order(seq: Sequence) -> tuple[int, int, int]:
    return seq.order


def _decodes(seq: Sequence) -> bool:
    """Whether the sequence's next step is one token, the next of its output."""
    return seq.num_computed + 1 == len(seq.token_ids) and seq.num_computed >= seq.num_prompt


def _prefills_text(seq: Sequence) -> bool:
    return not seq.request.spans and not _decodes(seq)


def _delete(queue: list[Sequence], seq: Sequence) -> None:
    index = bisect_left(queue, seq.order, key=_order)
    assert queue[index] is seq
    del queue[index]
