"""Which LLM worker probably has most of a prompt in its prefix cache. Policy alone: no sockets, no
tasks.

A prompt is summarised as a chain of hashes, each over everything before its end that decides the
contents of KV blocks: token ids, the identity of every span, and the cache salt. For each worker
the gateway remembers the chains that it sent there, as many tokens as the worker's cache has room
for, least recently used out first. It is an estimate: a worker may have evicted what is remembered,
and has what other gateways sent.

A worker's cost is the number of tokens that it has to compute before this prompt, minus twice the
number of this prompt's tokens in its cache; the cheapest worker is chosen. So a conversation stays
with its worker until the wait there is clearly longer than the recomputation elsewhere. Tokens
stand for time because the workers of a pool are taken as equally fast; a slow one shows by its
backlog.

A prefix that a large part of all prompts have in common, such as a system prompt, is not counted:
every worker has it, or will have it after one computation, and it would pull all traffic to the
worker that had it first. If no worker has more of a prompt than such a prefix, the prompt is a new
conversation, or one that another gateway served before. The worker for it is found by rendezvous
hashing (Thaler and Ravishankar, IEEE/ACM Transactions on Networking, 1998) over what the
conversation keeps from turn to turn: its first picture, or else the first link of the chain that is
its own. So gateways agree without talking to each other, also after a restart, and only the
conversations of a worker that leaves move elsewhere.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from opticnerve.content_keys import hash_parts

if TYPE_CHECKING:
    from gateway.workers.worker import Worker
    from opticnerve.media.plan import Span

UNIT = 16  # Tokens of the first links.
LINKS_PER_DOUBLING = 8  # A later link is at most an eighth as long as the prompt before it.
MAX_TOKENS = 2**22  # The rest of a longer prompt is ignored.
MAX_LINKS = 2**14  # Remembered for one worker, about 2 MiB.
MAX_LINKS_OF_ALL = 2**20  # Shared equally where there are more than 64 workers.
WINDOW = 512  # Number of requests over which a link's share of the traffic is measured.
MIN_USES = 8  # Fewest uses of a link that counts as common.
SEQUENCE_TOKENS = 64
"""The cost of a decoding sequence, in tokens to compute: it takes a part of every step, and a place
in the batch."""
RECOMPUTED_TOKENS = 2
"""The cost of a token that is computed again: this prompt waits for it, and so do those behind it
at its worker."""
_DIGEST_BYTES = 12
_SCHEME = "opticnerve-route-1"


def _link_ends() -> Iterator[int]:
    """The token at which each link ends: the same for all prompts, so that equal prefixes have
    equal chains."""
    end = 0
    while end < MAX_TOKENS:
        end += max(UNIT, (1 << end.bit_length() - 1) // LINKS_PER_DOUBLING if end else UNIT)
        yield end


ENDS = tuple(_link_ends())


@dataclass(frozen=True, eq=False)
class PromptChain:
    """A prompt's summary for routing. ``links``: for each of ``ENDS`` within the prompt, the digest
    of everything before it. ``keys``: content keys, which ``spans`` index. ``reads_cache``: whether
    a worker may use its prefix cache for it."""

    num_tokens: int
    links: tuple[bytes, ...]
    spans: Sequence[Span] = ()
    keys: Sequence[str] = ()
    reads_cache: bool = True

    @classmethod
    def of(
        cls,
        token_ids: Sequence[int],
        spans: Sequence[Span] = (),
        keys: Sequence[str] = (),
        cache_salt: str = "",
        *,
        reads_cache: bool = True,
    ) -> PromptChain:
        """``spans`` are in the order of their tokens."""
        tokens = memoryview(array("I", token_ids))  # In this machine's byte order.
        digest = hashlib.sha256(bytes.fromhex(hash_parts(_SCHEME, cache_salt)))
        links: list[bytes] = []
        start, begun = 0, 0  # ``begun``: spans that begin before ``start``.
        for end in ENDS[: bisect_right(ENDS, len(token_ids))]:
            digest.update(tokens[start:end])
            while begun < len(spans) and spans[begun].token_offset < end:
                span = spans[begun]
                digest.update(span.identity(keys[span.item], start))
                begun += 1
            links.append(digest.copy().digest()[:_DIGEST_BYTES])
            start = end
        return cls(len(token_ids), tuple(links), spans, keys, reads_cache)

    def conversation(self, common: int) -> bytes | None:
        """An id that all turns of the conversation have in common, found after the first ``common``
        links; None if the prompt is too short to tell."""
        start = ENDS[common - 1] if common else 0
        first = bisect_left(self.spans, start, key=lambda span: span.token_offset)
        if first < len(self.spans):
            return self.keys[self.spans[first].item].encode()
        return self.links[common] if common < len(self.links) else None


class Reason(StrEnum):
    """Why a worker was chosen."""

    PREFIX = "prefix"  # It has more of the prompt than the common prefix.
    RENDEZVOUS = "rendezvous"  # No worker has more; the hash assigns the conversation to it.
    LOAD = "load"  # It has the least work.


class Affinity:
    """What the workers of one pool were sent, and the choice among them."""

    def __init__(self) -> None:
        self._sent: WeakKeyDictionary[Worker, _Sent] = WeakKeyDictionary()
        self._traffic = _Traffic()

    def choose(self, prompt: PromptChain, workers: Sequence[Worker]) -> tuple[Worker, Reason]:
        """Chooses one of ``workers``, of which there is at least one. Changes nothing."""
        common = self._traffic.common(prompt, len(workers))
        sent = [self._sent_to(worker) for worker in workers]
        gains = [_gain(prompt, each, common) for each in sent]
        reason = Reason.PREFIX
        if not any(gains):
            reason = Reason.RENDEZVOUS
            favourite = self._favourite(prompt, workers, common)
            if favourite is not None:
                # What a later turn would recompute elsewhere, if another gateway sent it here.
                gains[favourite] = prompt.num_tokens - _tokens(common)

        def wait(place: int) -> tuple[int, int]:
            saved = RECOMPUTED_TOKENS * gains[place]
            return _busy(workers[place], sent[place]) - saved, workers[place].last_picked

        chosen = min(range(len(workers)), key=wait)
        return workers[chosen], reason if gains[chosen] else Reason.LOAD

    def begin(self, prompt: PromptChain, worker: Worker) -> None:
        """``worker`` is sent ``prompt``, and computes the part that it does not have."""
        sent = self._sent_to(worker)
        if sent is None:
            sent = _Sent(worker.description.instance_id, _cache_tokens(worker))
            self._sent[worker] = sent
        known = sent.matched(prompt) if prompt.reads_cache else 0
        sent.begin(prompt, prompt.num_tokens - _tokens(known))
        sent.remember(prompt, min(MAX_LINKS, max(1, MAX_LINKS_OF_ALL // len(self._sent))))
        self._traffic.add(prompt)

    def computed(self, prompt: PromptChain, worker: Worker) -> None:
        """``worker`` has computed ``prompt``, or never will. May be called more than once."""
        if worker in self._sent:
            self._sent[worker].end(prompt)

    def _favourite(self, prompt: PromptChain, workers: Sequence[Worker], common: int) -> int | None:
        """The index of the worker to which the hash assigns the conversation, if any."""
        conversation = prompt.conversation(common)
        caching = [place for place, worker in enumerate(workers) if _cache_tokens(worker)]
        if conversation is None or not prompt.reads_cache or not caching:
            return None
        return max(caching, key=lambda place: _weight(conversation, workers[place]))

    def _sent_to(self, worker: Worker) -> _Sent | None:
        """What the worker's current process was sent; None after a restart."""
        sent = self._sent.get(worker)
        same = sent is not None and sent.instance_id == worker.description.instance_id
        return sent if same else None


@dataclass(slots=True)
class _Sent:
    """The chains that one process was sent lately, at most ``capacity`` tokens. Earlier links of a
    chain are marked as used after later ones, so they are never forgotten before them."""

    instance_id: str
    capacity: int
    links: OrderedDict[bytes, int] = field(default_factory=OrderedDict)  # Tokens of each.
    tokens: int = 0  # Of all links.
    computing: dict[PromptChain, int] = field(default_factory=dict)  # Tokens to compute.
    backlog: int = 0  # Sum of ``computing``.

    def begin(self, prompt: PromptChain, tokens: int) -> None:
        self.computing[prompt] = tokens
        self.backlog += tokens

    def end(self, prompt: PromptChain) -> None:
        self.backlog -= self.computing.pop(prompt, 0)

    def matched(self, prompt: PromptChain) -> int:
        """The number of the prompt's leading links that the process has."""
        return bisect_left(prompt.links, True, key=lambda link: link not in self.links)

    def remember(self, prompt: PromptChain, most: int) -> None:
        """``most``: the number of links to keep."""
        for place in reversed(range(len(prompt.links))):
            link = prompt.links[place]
            if link in self.links:
                self.links.move_to_end(link)
            else:
                self.links[link] = ENDS[place] - _tokens(place)
                self.tokens += self.links[link]
        while self.tokens > self.capacity or len(self.links) > most:
            self.tokens -= self.links.popitem(last=False)[1]


class _Traffic:
    """Which links the prompts of the last one to two windows had."""

    def __init__(self) -> None:
        self._uses: Counter[bytes] = Counter()
        self._uses_before: Counter[bytes] = Counter()  # In the window before this one.
        self._requests = self._requests_before = 0

    def add(self, prompt: PromptChain) -> None:
        if self._requests == WINDOW:
            self._uses_before, self._uses = self._uses, Counter()
            self._requests_before, self._requests = self._requests, 0
        self._uses.update(prompt.links)
        self._requests += 1

    def common(self, prompt: PromptChain, workers: int) -> int:
        """The number of leading links that are too frequent to route by: the prompts with them are
        more than half of one worker's fair share."""
        least = max(MIN_USES, (self._requests + self._requests_before) / (2 * workers))
        uses, before = self._uses, self._uses_before
        return bisect_left(prompt.links, True, key=lambda link: uses[link] + before[link] < least)


def _gain(prompt: PromptChain, sent: _Sent | None, common: int) -> int:
    """Tokens after the ``common`` links that a worker would not have to compute."""
    if sent is None or not prompt.reads_cache or common == len(prompt.links):
        return 0
    if prompt.links[common] not in sent.links:
        return 0
    return _tokens(sent.matched(prompt)) - _tokens(common)


def _busy(worker: Worker, sent: _Sent | None) -> int:
    """Tokens that ``worker`` already has to compute, decoding included."""
    sequences = worker.pending + worker.cost_of_other_gateways
    return sequences * SEQUENCE_TOKENS + (sent.backlog if sent else 0)


def _tokens(links: int) -> int:
    """How many tokens the first ``links`` cover."""
    return ENDS[links - 1] if links else 0


def _cache_tokens(worker: Worker) -> int:
    return worker.description.limits.get("prefix_cache_tokens", 0)


def _weight(conversation: bytes, worker: Worker) -> bytes:
    return hashlib.sha256(conversation + worker.address.encode()).digest()
