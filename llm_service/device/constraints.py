"""Which tokens a request may choose, and how it shifts their logits: prepared once, by slot.

``logit_bias``, ``allowed_token_ids``, ``bad_words`` and the ids that end a choice before
``min_tokens`` may be long Python lists. When a sequence gets its slot, they become tensors and an
index of the bad words of several tokens, so that no step reads a list. All choices of a request
share one set, which is freed with the last of their slots. It takes four bytes for each token of
the vocabulary if the request has ``allowed_token_ids``, and otherwise no more than the lists.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from llm_service.device.memory import to_device
from opticnerve.generation.values import Sampling

Ints = NDArray[np.int64]
TOKEN = np.dtype(np.uint32)  # Element type of token ids stored as bytes.


def constrains(params: Sampling) -> bool:
    """Whether ``params`` forbid or shift any token."""
    return bool(
        params.logit_bias or params.allowed_token_ids or params.bad_words or params.min_tokens > 0
    )


class BadWords:
    """Finds the tokens that would complete a bad word of several tokens.

    A word's beginning is all of its tokens but the last. Beginnings and the text are kept as bytes,
    newest token first, so a beginning that ends the text is a prefix of the text's bytes. The
    longest such beginning is the text's predecessor among the sorted beginnings, or a prefix of
    that predecessor; each shorter one is a prefix of the next longer one. A step is one binary
    search, then a walk from each beginning to its longest prefix.
    """

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        """``words``: ids of two tokens or more each."""
        tokens = np.fromiter(chain.from_iterable(words), TOKEN, sum(map(len, words)))
        newest_first = tokens[::-1].tobytes()
        ends: dict[bytes, set[int]] = {}
        start = 0
        for word in reversed(words):
            stop = start + len(word) * TOKEN.itemsize
            ends.setdefault(newest_first[start + TOKEN.itemsize : stop], set()).add(word[-1])
            start = stop
        self._beginnings = sorted(ends)
        self._ends = [tuple(ends[each]) for each in self._beginnings]
        self._shorter = _longest_prefixes(self._beginnings)
        self._num_bytes = max(map(len, self._beginnings))

    def tail(self, token_ids: list[int]) -> bytes:
        """The end of a text, newest token first, as long as the longest beginning."""
        last = token_ids[-(self._num_bytes // TOKEN.itemsize) :]
        return np.array(last[::-1], dtype=TOKEN).tobytes()

    def longer(self, tail: bytes, token_id: int) -> bytes:
        """The tail with one more token."""
        return (np.array(token_id, dtype=TOKEN).tobytes() + tail)[: self._num_bytes]

    def ends(self, tail: bytes) -> list[int]:
        """The tokens that would complete a word after a text that ends with ``tail``."""
        at = bisect_right(self._beginnings, tail) - 1
        while at >= 0 and not tail.startswith(self._beginnings[at]):
            at = self._shorter[at]
        found: list[int] = []
        while at >= 0:
            found += self._ends[at]
            at = self._shorter[at]
        return found


def _longest_prefixes(ordered: list[bytes]) -> list[int]:
    """For each of the sorted texts, the index of the longest other one that it starts with; -1 if
    there is none."""
    found: list[int] = []
    for index, each in enumerate(ordered):
        at = index - 1
        while at >= 0 and not each.startswith(ordered[at]):
            at = found[at]
        found.append(at)
    return found


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Prepared:
    """One request's constraints: tensors on the device, and ``words``."""

    params: Sampling  # Kept alive, so that no other object gets its id().
    bias: tuple[torch.Tensor, torch.Tensor] | None  # int64 ids and fp32 values, of one length.
    ceiling: torch.Tensor | None  # fp32 [vocab]: -inf for all but allowed_token_ids, else +inf.
    banned: torch.Tensor | None  # int64: the bad words of one token.
    words: BadWords | None  # The bad words of several tokens.
    ending: torch.Tensor | None  # int64: forbidden before min_tokens.


class Constraints:
    """Token constraints of every slot."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._by_slot: dict[int, Prepared] = {}
        self._tails: dict[int, bytes] = {}  # Ends of texts, by slot with words of several tokens.
        # By id() of the parameters, which all choices of a request share.
        self._shared: WeakValueDictionary[int, Prepared] = WeakValueDictionary()

    # ---- slots

    def admit(self, slot: int, params: Sampling, token_ids: list[int]) -> None:
        """Assigns the slot to a sequence with these parameters and this text."""
        prepared = self._shared.get(id(params))
        if prepared is None:
            prepared = self._shared[id(params)] = self._prepare(params)
        self._by_slot[slot] = prepared
        if prepared.words is not None:
            self._tails[slot] = prepared.words.tail(token_ids)

    def release(self, slot: int) -> None:
        """Frees the slot's constraints, unless another slot shares them."""
        self._by_slot.pop(slot, None)
        self._tails.pop(slot, None)

    def _prepare(self, params: Sampling) -> Prepared:
        # A word with a token outside of the vocabulary cannot occur.
        last = self._vocab_size - 1
        words = [word for word in params.bad_words if word and 0 <= min(word) <= max(word) <= last]
        single = [word[0] for word in words if len(word) == 1]
        several = [word for word in words if len(word) > 1]
        return Prepared(
            params,
            self._bias(params.logit_bias) if params.logit_bias else None,
            self._ceiling(params.allowed_token_ids) if params.allowed_token_ids else None,
            self._ids(single) if single else None,
            BadWords(several) if several else None,
            self._ids(params.ending_ids) if params.min_tokens > 0 else None,
        )

    def _known(self, ids: Ints) -> Ints:
        return ids[(ids >= 0) & (ids < self._vocab_size)]

    def _ids(self, ids: Sequence[int]) -> torch.Tensor:
        return to_device(np.unique(self._known(np.array(ids, dtype=np.int64))), self._device)

    def _ceiling(self, allowed: Sequence[int]) -> torch.Tensor:
        ceiling = np.full(self._vocab_size, -np.inf, dtype=np.float32)
        ceiling[self._known(np.array(allowed, dtype=np.int64))] = np.inf
        return to_device(ceiling, self._device)

    def _bias(self, bias: Mapping[int, float]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, values = np.array([*bias]), np.array([*bias.values()])
        known = (ids >= 0) & (ids < self._vocab_size)
        return (
            to_device(ids[known].astype(np.int64), self._device),
            to_device(values[known].astype(np.float32), self._device),
        )

    # ---- one step

    def apply(
        self, logits: torch.Tensor, slots: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> None:
        """Changes ``logits``, fp32 [rows, vocab]: adds biases, then sets forbidden tokens to minus
        infinity. ``positions``: output position of each row."""
        held = {
            row: self._by_slot[slot]
            for row, slot in enumerate(slots.tolist())
            if slot in self._by_slot
        }
        biases = {row: each.bias for row, each in held.items() if each.bias is not None}
        if biases:
            where = self._pairs({row: ids for row, (ids, _) in biases.items()})
            added = torch.cat([values for _, values in biases.values()])
            logits.index_put_(where, added, accumulate=True)
        for row, each in held.items():
            if each.ceiling is not None:  # Several times faster than a mask, on a CPU.
                torch.minimum(logits[row], each.ceiling, out=logits[row])
        single = {row: each.banned for row, each in held.items() if each.banned is not None}
        if single:
            logits[self._pairs(single)] = -torch.inf
        early = {
            row: each.ending
            for row, each in held.items()
            if each.ending is not None and positions[row] < each.params.min_tokens
        }
        if early:
            logits[self._pairs(early)] = -torch.inf
        self._forbid_ends(logits, slots, held)

    def observe(self, slots: NDArray[np.int64], token_ids: list[int]) -> None:
        """Records the sampled tokens, for words of several tokens."""
        if not self._tails:
            return
        for slot, token in zip(slots.tolist(), token_ids, strict=True):
            words = self._by_slot[slot].words if slot in self._tails else None
            if words is not None:
                self._tails[slot] = words.longer(self._tails[slot], token)

    def _forbid_ends(
        self, logits: torch.Tensor, slots: NDArray[np.int64], held: dict[int, Prepared]
    ) -> None:
        """Forbids the tokens that would complete a bad word of several tokens."""
        rows: list[int] = []
        ends: list[int] = []
        for row, each in held.items():
            if each.words is not None:
                found = each.words.ends(self._tails[int(slots[row])])
                rows += [row] * len(found)
                ends += found
        if ends:
            pairs = to_device(np.array([rows, ends], dtype=np.int64), self._device)
            logits[pairs[0], pairs[1]] = -torch.inf

    def _pairs(self, ids_by_row: dict[int, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column indices of all (row, id)."""
        counts = [len(ids) for ids in ids_by_row.values()]
        rows = to_device(np.array([*ids_by_row], dtype=np.int64), self._device)
        repeats = to_device(np.array(counts, dtype=np.int64), self._device)
        where = torch.repeat_interleave(rows, repeats, output_size=sum(counts))
        return where, torch.cat([*ids_by_row.values()])
