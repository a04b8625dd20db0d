"""Decides which sequences compute how many tokens in the next step. No tensors, no events.

There is no prefill phase and no decode phase. Every step has one budget of tokens, and every
sequence wants to compute those of its tokens that are not computed yet. ``Shares`` decides whose
turn it is to prefill and who is preempted for whom. Within one sharer, running sequences come
before waiting ones, in the order of (priority, arrival, choice), which is total and never changes.
The first running sequence in that order is never preempted, and the cache has room for any one
sequence, so it always makes progress, and no sequence waits for ever.

While any sequence decodes, the step's prefill tokens are bounded by the time that they are
expected to take, since every decoding sequence waits for the step's end. The first sequence that
prefills gets at least a block of tokens, or a whole bidirectional span. A quarter of a step's
prefill is reserved for prompts without pictures, if there are any, so that text does not wait for
a burst of pictures.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain

from llm_service.policy.block_manager import BlockManager, whole_spans
from llm_service.policy.budget import Budget, CostModel
from llm_service.policy.engine_config import EngineConfig
from llm_service.policy.row_source import Leases, RowSource
from llm_service.policy.sequence import GenerationState, Sequence, Status
from llm_service.policy.shares import Sharer, Shares, Turns, decodes, order, remove
from llm_service.policy.step_plan import StepPlan, Work, work_on
from opticnerve.media.plan import SpanAttention

TEXT_FRACTION = 1 / 4  # Part of a step's prefill tokens reserved for prompts without pictures.
MAX_REFUSALS = 32  # Sharers that may be refused before a step stops admitting.


class Scheduler:
    """Owns the sequences, the slots, the leases and, through ``blocks``, the blocks."""

    def __init__(self, config: EngineConfig, blocks: BlockManager, rows: RowSource) -> None:
        self.config = config
        self.blocks = blocks
        self.rows = rows
        self.costs = CostModel()  # The engine reports to it how long steps took.
        self.shares = Shares()  # Holds the waiting sequences.
        self.running: list[Sequence] = []  # By ``order``.
        self.num_preemptions = 0
        self.num_cached_tokens = 0  # Prompt tokens taken from the prefix cache.
        self._step = 0
        # Each step has a token for every decoding sequence, and a block of tokens for prefill.
        most = max(1, config.max_num_batched_tokens - blocks.block_size)
        self._num_slots = min(config.max_num_seqs, most)
        self._free_slots = list(range(self._num_slots))[::-1]
        self._max_waiting_for_rows = max(1, self._num_slots // 2)  # Slots that may wait for rows.
        self._freed_slots: list[int] = []  # Since the last plan.
        self._copies: list[tuple[Sequence, int, int]] = []  # Blocks of forks, for the next plan.
        self.copied: list[Sequence] = []  # Forks whose blocks the last plan copied.
        self._leases = Leases(rows, config.row_bytes)
        self._needs: list[tuple[Sequence, tuple[str, ...]]] = []

    # ---- the queue

    @property
    def num_waiting_for_first_chunk(self) -> int:
        """Waiting sequences of requests that have not had any chunk scheduled."""
        return sum(1 for seq in self.shares.waiting() if seq.generation.first_chunk_at is None)

    def sequences(self) -> Iterator[Sequence]:
        """Running, then waiting."""
        return chain(self.running, self.shares.waiting())

    def add(self, seq: Sequence) -> None:
        self.shares.wait(seq)

    def remove(self, seq: Sequence) -> None:
        """Ends a sequence in any state and frees everything that it holds."""
        if seq.status is Status.RUNNING:
            self._release_resources(seq)
        elif seq.status is Status.WAITING:
            self.shares.dequeue(seq)
        seq.status = Status.FINISHED

    def preempt(self, seq: Sequence) -> None:
        """Puts a running sequence back into the queue, to be computed again from its tokens."""
        self._release_resources(seq)
        seq.suspend()
        seq.preemptions += 1
        self.num_preemptions += 1
        seq.status = Status.WAITING
        self.add(seq)

    def _release_resources(self, seq: Sequence) -> None:
        remove(self.running, seq)
        self.shares.leave(seq)
        self.blocks.release(seq)
        self._free_slots.append(seq.slot)
        self._freed_slots.append(seq.slot)
        self._copies = [copy for copy in self._copies if copy[0] is not seq]
        self._leases.release(seq)

    # ---- one step

    def schedule(self, now: float) -> StepPlan | None:
        """The next step, or None when no sequence can compute anything."""
        preemptions = self.num_preemptions
        decoding = [seq for seq in self.running if decodes(seq)]
        budget = self._budget(len(decoding))
        preempted = self._grow(decoding)
        prefills = self._schedule_prefill(budget, now, preempted)
        if self.num_preemptions > preemptions:  # Preempted ones wait, or run again and prefill.
            stay = (seq for seq in decoding if seq.slot >= 0 and seq not in prefills)
            decoding = [seq for seq in stay if decodes(seq)]
        decoding = decoding[: budget.tokens]
        works = [work_on(seq, 1, self.blocks.block_size) for seq in decoding]
        works += prefills.values()
        if not works:
            return None
        self._step += 1
        copies = tuple((source, destination) for _, source, destination in self._copies)
        plan = StepPlan(self._step, tuple(works), tuple(self._freed_slots), copies)
        self._freed_slots.clear()
        self.copied = [seq for seq, _, _ in self._copies]
        self._copies.clear()
        return plan

    def _budget(self, decoding: int) -> Budget:
        """A token for each decoding sequence; the rest for prefill, within the step's time."""
        tokens, block_size = self.config.max_num_batched_tokens, self.blocks.block_size
        prefill = max(tokens - decoding, block_size)
        timed = decoding > 0 and self.config.max_step_s > 0
        if timed:
            fitting = self.costs.prefill_tokens(decoding, self.config.max_step_s)
            prefill = min(prefill, max(fitting, block_size))
        text = any(not seq.request.spans and not decodes(seq) for seq in self.sequences())
        reserved = max(int(prefill * TEXT_FRACTION), block_size) if text else 0
        for_text = min(reserved, prefill - block_size)
        return Budget(tokens, prefill, timed, block_size, for_text, for_decoding=decoding)

    # ---- decoding

    def _grow(self, decoding: list[Sequence]) -> set[Sharer]:
        """Allocates a block for the next token if one is needed; returns the sharers of sequences
        that were preempted for it."""
        preempted: set[Sharer] = set()
        for seq in decoding:
            if seq.num_tokens <= len(seq.block_table) * self.blocks.block_size:
                continue
            while seq.status is Status.RUNNING and not self.blocks.can_grow(seq, seq.num_tokens):
                victim = self.shares.pick_victim(self.running)
                preempted.add(self.shares.of(victim))
                self.preempt(victim)
            if seq.status is Status.RUNNING:
                self.blocks.grow(seq, seq.num_tokens)
        return preempted

    # ---- prefill

    def _schedule_prefill(
        self, budget: Budget, now: float, preempted: set[Sharer]
    ) -> dict[Sequence, Work]:
        """Gives prefill tokens to sequences in fair order, and admits waiting ones."""
        works: dict[Sequence, Work] = {}
        prefilling = [seq for seq in self.running if not decodes(seq)]
        admits = bool(self._free_slots) or self.shares.has_multiple_slots
        turns = self.shares.turns(prefilling, admits)
        admission = _Admission(turns, preempted)
        for seq in turns:
            if not budget.prefill or not budget.tokens:
                break
            if seq.status is Status.RUNNING:
                end = budget.chunk_end(seq, seq.num_computed)
            else:
                end = self._try_to_admit(seq, budget, admission, works)
            tokens = self._chunk(seq, end, now) if seq.status is Status.RUNNING else 0
            if tokens:
                works[seq] = work_on(seq, tokens, self.blocks.block_size)
                budget.spend(works[seq])
                self.shares.charge(seq, tokens)
        return works

    def _try_to_admit(
        self, seq: Sequence, budget: Budget, admission: _Admission, works: Collection[Sequence]
    ) -> int:
        """Admits a waiting sequence if there is room; returns where its first chunk may end.

        If there is no room for more pictures, sequences without pictures go ahead; the sequence
        that they overtake stays first in its queue.
        """
        pictures = bool(seq.request.spans)
        if pictures and not self._has_room_for_pictures(seq, admission.no_pictures):
            admission.no_pictures = True
            return 0
        victims = self._claim(seq, admission, works)
        if victims is None:
            admission.turns.skip_sharer()
            return 0
        start = self.blocks.cached_tokens(seq)
        end = budget.chunk_end(seq, start)
        if end == start and pictures and budget.for_text:
            admission.no_pictures = True  # What is left is reserved for text, later in the queue.
        elif whole_spans(seq, end) == start:
            # The budget is too small for a chunk, or for the bidirectional span that comes first.
            admission.refusals = MAX_REFUSALS
            admission.turns.skip_sharer()
        else:
            for victim in victims:
                self.preempt(victim)
            self._admit(seq)
        return end

    def _claim(
        self, seq: Sequence, admission: _Admission, works: Collection[Sequence]
    ) -> list[Sequence] | None:
        """The sequences to preempt to admit a waiting one; None: it has to wait.

        Once a sequence was refused for lack of blocks, the free blocks are reserved for it:
        sequences behind it may only claim what their sharers are entitled to.
        """
        lacks_slot = not self._free_slots
        if admission.refusals >= MAX_REFUSALS:
            return None
        if lacks_slot and not self.shares.may_claim_a_slot(seq):
            admission.refusals += 1
            return None
        reserve = max(admission.reserve, len(self.running) // 4)
        lacking = self.blocks.lacking(seq, reserve)
        victims: list[Sequence] | None = None
        if self.shares.of(seq) not in admission.preempted:  # Otherwise it would be preempted again.
            if not lacks_slot and lacking <= 0:
                return []
            wanted = self.blocks.blocks_for(seq.num_tokens)
            freed = self.blocks.freed_for(seq)
            victims = self.shares.claim(seq, lacks_slot, lacking, wanted, freed, works)
        if victims is None:
            admission.refusals += 1
            if not lacks_slot:
                admission.reserve = max(reserve, self.blocks.num_free)
        return victims

    def _admit(self, seq: Sequence) -> None:
        self.shares.dequeue(seq)
        self.blocks.allocate(seq)
        if seq.generation.first_token_at is None and not seq.preemptions:  # The first choice.
            seq.generation.cached_tokens = min(seq.num_computed, seq.num_prompt)
            self.num_cached_tokens += seq.generation.cached_tokens
        self._enter(seq)

    def _enter(self, seq: Sequence) -> None:
        """Gives the sequence a slot and leases, and asks for rows that are not loaded."""
        seq.slot = self._free_slots.pop()
        seq.status = Status.RUNNING
        insort(self.running, seq, key=order)
        self.shares.enter(seq)
        self._leases.take(seq)
        self.ask(seq, tuple(key for key in seq.leases if not self.rows.ready(key)))

    # ---- chunks and rows

    def _chunk(self, seq: Sequence, end: int, now: float) -> int:
        """The number of tokens to compute next: up to ``end``, or to the first span whose rows are
        not loaded, without cutting a bidirectional span."""
        start = seq.num_computed
        end = self._ready_end(seq, start, end)
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
            key = seq.request.items[span.item]
            if key not in seq.missing and not self.rows.ready(key):
                self.ask(seq, (key,))
            if key in seq.missing:
                return max(start, span.token_offset)
            atomic = span.attention is SpanAttention.BIDIRECTIONAL
            if atomic and end < span.token_offset + span.num_tokens:
                return span.token_offset
        return end

    def ask(self, seq: Sequence, keys: tuple[str, ...]) -> None:
        """Makes the sequence wait before the first span of ``keys`` until ``rows_ready``."""
        if keys:
            seq.missing.update(keys)
            self._needs.append((seq, keys))

    def take_needs(self) -> list[tuple[Sequence, tuple[str, ...]]]:
        """Sequences and the keys that they wait for, since the last call."""
        needs, self._needs = self._needs, []
        return needs

    def rows_ready(self, key: str) -> None:
        for seq in self.running:
            seq.missing.discard(key)

    def needs(self, generation: GenerationState, key: str) -> bool:
        """Whether a choice still has tokens to compute from rows of ``key``."""
        unfinished = (seq for seq in generation.sequences if seq.status is not Status.FINISHED)
        return any(key in self._leases.items(seq, seq.num_computed) for seq in unfinished)

    def _has_room_for_pictures(self, seq: Sequence, behind: bool) -> bool:
        """Whether the sequence's items fit the tier, and one more sequence may wait for its rows.

        ``behind``: a sequence with pictures ahead of it was refused. Then there is room only if no
        sequence of its sharer waits for rows and several of another sharer do.
        """
        items = self._leases.items(seq, self.blocks.cached_tokens(seq))
        if not self._leases.fit(items):
            return False
        waiting_for_rows = [self.shares.of(other) for other in self.running if other.missing]
        if not behind and len(waiting_for_rows) < self._max_waiting_for_rows:
            return True
        if self.shares.of(seq) not in waiting_for_rows and len(set(waiting_for_rows)) < len(
            waiting_for_rows
        ):
            return True
        return not behind and items.keys() <= seq.generation.available_keys

    # ---- after a step

    def advance(self, seq: Sequence, num_computed: int) -> None:
        """Records that the keys and values of the first ``num_computed`` tokens are in blocks."""
        seq.num_computed = num_computed
        if num_computed // self.blocks.block_size > seq.num_cached_blocks:
            self.blocks.commit(seq)
        if seq.leases:
            self._leases.release(seq, num_computed)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Starts another choice from the prompt that ``parent`` has computed.

        If the choice continues an output, it computes that; otherwise it computes the prompt's last
        token again, to draw a sample of its own. Without room it waits like a new sequence.
        """
        start = whole_spans(child, min(child.num_prompt, child.num_tokens - 1))
        if not self._free_slots or not self.blocks.can_fork(parent, child, start):
            self.add(child)
            return
        copies = self.blocks.fork(parent, child, start)
        self._copies += [(child, source, destination) for source, destination in copies]
        self._enter(child)

    def check_integrity(self) -> None:
        """Raises RuntimeError if queues, slots, blocks or leases do not agree."""
        waiting = list(self.shares.waiting())
        self.blocks.check_integrity([*self.running, *waiting])
        for queue, status in ((self.running, Status.RUNNING), (waiting, Status.WAITING)):
            if any(seq.status is not status for seq in queue):
                raise RuntimeError(f"a sequence that is not {status.value} is in that queue")
        self.shares.check_integrity(self.running)
        slots = [*self._free_slots, *(seq.slot for seq in self.running)]
        if sorted(slots) != list(range(self._num_slots)):
            raise RuntimeError(f"slots are missing or held twice: {sorted(slots)}")
        self._leases.check_integrity(self.running)


@dataclass(slots=True)
class _Admission:
    """The admission of waiting sequences in one step."""

    turns: Turns
    preempted: set[Sharer]  # Sharers whose decoding sequences were preempted in this step.
    no_pictures: bool = False  # A sequence with pictures was refused.
    refusals: int = 0  # For lack of slots or blocks.
    reserve: int = 0  # Free blocks that are kept for the first refused sequence.
