"""Accounting of KV blocks: reference counts and the prefix cache. No tensors.

A block is free; or held by one or more sequences (its reference count); or idle: held by none, but
kept in the prefix cache until its room is needed (least recently used first). The prefix cache maps
a hash to a block. The hash covers everything that decides the block's contents: all tokens up to
its end, the items whose spans overlap them, and the request's salt. Only full blocks whose tokens
are all computed are cached.

Hashes are chained over units of 16 tokens, whatever the block size, so that workers with different
block sizes compute the same hashes for a prefix. A block's hash is that of its last unit.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable

from llm_service.policy.messages import GenerateRequest
from llm_service.policy.sequence import Sequence, Status
from opticnerve.content_keys import hash_parts
from opticnerve.media.plan import SpanAttention

UNIT = 16  # Tokens per link of the hash chain.
_DIGEST_BYTES = 16
_SCHEME = "opticnerve-prefix-3"


class BlockManager:
    """Blocks of ``block_size`` tokens (a multiple of 16), numbered from 0."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        if num_blocks < 1 or block_size < UNIT or block_size % UNIT:
            raise ValueError(
                f"{num_blocks} blocks of {block_size} tokens; use at least one block, and a size "
                f"that is a multiple of {UNIT}"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.num_evicted = 0  # Cached blocks that were taken for new contents.
        self._references = [0] * num_blocks
        self._free: deque[int] = deque(range(num_blocks))
        self._idle: OrderedDict[int, None] = OrderedDict()  # Cached, held by none; oldest first.
        self._cached: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._free) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks in the prefix cache, held by a sequence or not."""
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # ---- a sequence's life: allocate, grow, commit, release

    def lacking(self, seq: Sequence, reserve: int = 0) -> int:
        """How many blocks are missing to ``allocate`` the sequence and leave ``reserve`` free; 0 or
        less if it fits."""
        hit = self._match(seq)
        idle_hits = sum(1 for block in hit if not self._references[block])
        needed = self.blocks_for(seq.num_tokens) - len(hit)
        return needed + reserve - (self.num_free - idle_hits)

    def freed_for(self, seq: Sequence) -> Callable[[Sequence], int]:
        """A function that counts the blocks that preempting a running sequence would free for
        ``seq``: those that no other sequence holds, except blocks of ``seq``'s prefix hit, which
        ``lacking`` has counted already."""
        hit = set(self._match(seq))

        def count(victim: Sequence) -> int:
            table, references = victim.block_table, self._references
            return sum(1 for block in table if references[block] == 1 and block not in hit)

        return count

    def allocate(self, seq: Sequence) -> int:
        """Takes blocks for all tokens of a waiting sequence, cached ones for its prefix. Returns
        the length of that prefix in tokens. The caller has checked ``lacking``."""
        hit = self._match(seq)
        for block in hit:
            self._add_reference(block)
        fresh = [self._take() for _ in range(self.blocks_for(seq.num_tokens) - len(hit))]
        seq.block_table = (*hit, *fresh)
        seq.num_cached_blocks = len(hit)
        seq.num_computed = len(hit) * self.block_size
        return seq.num_computed

    def can_grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Whether the sequence's blocks can be made to hold ``num_tokens``."""
        return self.blocks_for(num_tokens) - len(seq.block_table) <= self.num_free

    def grow(self, seq: Sequence, num_tokens: int) -> None:
        """Makes the sequence's blocks hold ``num_tokens``. The caller has checked ``can_grow``."""
        fresh = self.blocks_for(num_tokens) - len(seq.block_table)
        if fresh > 0:
            seq.block_table += tuple(self._take() for _ in range(fresh))

    def commit(self, seq: Sequence) -> None:
        """Adds the sequence's computed full blocks to the prefix cache."""
        whole = seq.num_computed // self.block_size
        if not self.prefix_caching or seq.request.skip_prefix_cache:
            return
        extend_hashes(seq, whole, self.block_size)
        for index in range(seq.num_cached_blocks, whole):
            block, name = seq.block_table[index], seq.hashes[index]
            if name not in self._cached and block not in self._hash_of:
                self._cached[name] = block
                self._hash_of[block] = name
        seq.num_cached_blocks = max(seq.num_cached_blocks, whole)

    def release(self, seq: Sequence) -> None:
        """Releases the sequence's blocks, the last one first, so that the end of a cached prefix is
        evicted before its start."""
        for block in reversed(seq.block_table):
            self._references[block] -= 1
            if self._references[block]:
                continue
            if block in self._hash_of:
                self._idle[block] = None
            else:
                self._free.append(block)
        seq.block_table = ()

    # ---- forks

    def can_fork(self, parent: Sequence, child: Sequence, num_tokens: int) -> bool:
        """Whether ``child`` can start with the first ``num_tokens`` that ``parent`` computed."""
        own = self.blocks_for(child.num_tokens) - num_tokens // self.block_size
        return num_tokens <= parent.num_computed and own <= self.num_free

    def fork(self, parent: Sequence, child: Sequence, num_tokens: int) -> list[tuple[int, int]]:
        """Starts ``child`` with the first ``num_tokens`` that ``parent`` computed. They share full
        blocks; of a partial one, returns (source, destination) for the runner to copy."""
        whole = num_tokens // self.block_size
        shared = parent.block_table[:whole]
        for block in shared:
            self._add_reference(block)
        fresh = [self._take() for _ in range(self.blocks_for(child.num_tokens) - whole)]
        child.block_table = (*shared, *fresh)
        child.num_cached_blocks = min(parent.num_cached_blocks, whole)
        child.hashes = parent.hashes[:whole]
        child.num_computed = num_tokens
        return [(parent.block_table[whole], fresh[0])] if num_tokens % self.block_size else []

    # ---- prefix cache

    def cached_tokens(self, seq: Sequence) -> int:
        """Length in tokens of the cached prefix that ``allocate`` would use."""
        return len(self._match(seq)) * self.block_size

    def evict_from_prefix_cache(self, seq: Sequence) -> None:
        """Removes a running sequence's blocks from the prefix cache: their contents may be bad."""
        for block in seq.block_table:
            name = self._hash_of.pop(block, None)
            if name is not None:
                del self._cached[name]

    def _match(self, seq: Sequence) -> list[int]:
        """The cached blocks that ``seq`` can start with. At least one token is left to compute, and
        no bidirectional span is cut, since all of its tokens attend to each other."""
        request = seq.request
        if not self.prefix_caching or request.skip_prefix_cache:
            return []
        if seq.generation.wants_prompt_logprobs:
            return []
        limit = (seq.num_tokens - 1) // self.block_size
        hit: list[int] = []
        for index in range(limit):
            extend_hashes(seq, index + 1, self.block_size)
            block = self._cached.get(seq.hashes[index])
            if block is None:
                break
            hit.append(block)
        while (cut := whole_spans(seq, len(hit) * self.block_size)) < len(hit) * self.block_size:
            del hit[cut // self.block_size :]
        return hit

    # ---- single blocks

    def _take(self) -> int:
        """Takes a block with one reference; callers have checked that there is one."""
        if self._free:
            block = self._free.popleft()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._cached[self._hash_of.pop(block)]
            self.num_evicted += 1
        self._references[block] = 1
        return block

    def _add_reference(self, block: int) -> None:
        if not self._references[block]:
            del self._idle[block]
        self._references[block] += 1

    def check_integrity(self, sequences: Iterable[Sequence] = ()) -> None:
        """Raises RuntimeError if the counts do not match the blocks that ``sequences`` hold."""
        held: Counter[int] = Counter()
        for seq in sequences:
            self._check_sequence(seq)
            held.update(seq.block_table)
        for block, references in enumerate(self._references):
            _require(references == held[block], f"block {block}: {references} != {held[block]}")
        free = [*self._free, *self._idle]
        _require(len(free) == len(set(free)), "a block is free twice")
        _require(
            set(free) == {block for block in range(self.num_blocks) if not held[block]},
            "free blocks are not those without a holder",
        )
        _require(
            {block: name for name, block in self._cached.items()} == self._hash_of,
            "cache and hashes differ",
        )
        _require(set(self._idle) <= set(self._hash_of), "an idle block is not cached")
        _require(not set(self._free) & set(self._hash_of), "a free block is cached")

    def _check_sequence(self, seq: Sequence) -> None:
        table = seq.block_table
        _require(len(table) == len(set(table)), f"{seq}: a block twice")
        _require(seq.num_computed <= len(table) * self.block_size, f"{seq}: too few blocks")
        _require(seq.num_computed <= seq.num_tokens, f"{seq}: computed more than there is")
        _require(seq.num_cached_blocks <= len(table), f"{seq}: shares blocks that it does not hold")
        if seq.status is not Status.RUNNING:
            _require(not table, f"{seq}: blocks without running")
        cut = whole_spans(seq, seq.num_computed)
        _require(cut == seq.num_computed, f"{seq}: half a bidirectional span")


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise RuntimeError(problem)


def whole_spans(seq: Sequence, end: int) -> int:
    """``end``, or the start of the bidirectional span that it would cut."""
    spans = seq.request.spans
    index = seq.generation.span_at(end)
    if index == len(spans):
        return end
    span = spans[index]
    if span.attention is SpanAttention.BIDIRECTIONAL and span.token_offset < end:
        return span.token_offset
    return end


# ---- hashes


def extend_hashes(seq: Sequence, num_blocks: int, block_size: int) -> None:
    """Makes ``seq.hashes`` cover the first ``num_blocks`` blocks, all of whose tokens are known."""
    hashes = seq.hashes
    while len(hashes) < num_blocks:
        parent = hashes[-1] if hashes else _root(seq.request)
        start = len(hashes) * block_size
        for unit in range(start, start + block_size, UNIT):
            parent = _unit_hash(parent, seq, unit)
        hashes.append(parent)


def _unit_hash(parent: bytes, seq: Sequence, start: int) -> bytes:
    tokens = array("q", seq.token_ids[start : start + UNIT])
    digest = hashlib.blake2b(parent, digest_size=_DIGEST_BYTES)
    digest.update(tokens.tobytes())
    request = seq.request
    for index in range(seq.generation.span_at(start), len(request.spans)):
        span = request.spans[index]
        if span.token_offset >= start + UNIT:
            break
        digest.update(span.identity(request.items[span.item], start))
    return digest.digest()


def _root(request: GenerateRequest) -> bytes:
    """The parent hash of the first unit. Requests with different salts share no prefix."""
    return bytes.fromhex(hash_parts(_SCHEME, request.cache_salt))
