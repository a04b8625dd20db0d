"""A checkpoint's tokenizer: text to ids and back, with the ``tokenizers`` library alone.

It is read from tokenizer.json and the tokens that tokenizer_config.json adds, as Hugging Face does
for the supported families. Ids equal Hugging Face's with one difference, see
``gateway.prompt.special_token_guard``: this tokenizer knows special tokens by their aliases, so
they are special only in text that ``Aliases.hide`` has changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from gateway.prompt.special_token_guard import Aliases
from opticnerve.checkpoints.tokenizer_files import (
    added_entries,
    named_tokens,
    read_tokenizer_config,
)
from opticnerve.errors import CheckpointError
from opticnerve.process import return_freed_memory

SLOW_FILES = ("tokenizer.model", "vocab.json", "spiece.model", "tekken.json", "vocab.txt")
CHUNK_CHARACTERS = 2**15  # ``exceeds`` encodes so many at a time, and skips shorter texts.
CUT_TOKENS = 64  # Upper bound on the tokens that a cut through an alias or a long word adds.
# Words that tokenizer.json's format itself may use, such as "vocab", "ByteLevel" and "BPE", but not
# "TILE_1".
PLAIN_WORD = re.compile(r"(?![A-Z]+_[A-Z0-9_]+$)\w+")


@dataclass(frozen=True, slots=True)
class Added:
    """An added token, described by all of the checkpoint's files together."""

    content: str
    special: bool
    id: int | None = None
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False

    @classmethod
    def read(cls, entry: Any, *, special: bool, id: int | None = None) -> Added:
        """From an entry of a tokenizer file: a string or a dictionary."""
        if isinstance(entry, str):
            return cls(entry, special, id)
        flags = {n: bool(entry.get(n, False)) for n in ("single_word", "lstrip", "rstrip")}
        normalized = bool(entry.get("normalized", not special))
        return cls(entry["content"], special, id, **flags, normalized=normalized)

    @property
    def flags(self) -> tuple[bool, ...]:
        return (self.single_word, self.lstrip, self.rstrip, self.normalized)

    def as_backend(self, name: str) -> AddedToken:
        return AddedToken(
            name,
            single_word=self.single_word,
            lstrip=self.lstrip,
            rstrip=self.rstrip,
            normalized=self.normalized,
            special=self.special,
        )


class Tokenizer:
    """Encodes, decodes, and knows which ids are special. Thread-safe after construction."""

    def __init__(
        self, source: str, config: Mapping[str, Any], placeholders: Iterable[str] = ()
    ) -> None:
        """``source``: the text of tokenizer.json; ``config``: tokenizer_config.json, merged with
        special_tokens_map.json where there is one. ``placeholders``: tokens that user
        text cannot spell, like special tokens. Raises CheckpointError."""
        self.config = config
        self.named = named_tokens(config)
        try:
            listed = added_tokens(source)
            self._added = merge_added(listed, config, self.named)
            specials = [a.content for a in self._added.values() if a.special]
            for text in placeholders:
                known = text in self._added or occurs(source, text)
                if known and text not in specials:
                    specials.append(text)
                    self._added.setdefault(text, Added(text, special=True))
            self.aliases = Aliases(specials, self._added)
            self._backend = make_tokenizer(source, self.aliases.of)
        except CheckpointError:
            raise
        except Exception as error:  # The library raises bare Exception for what it cannot read.
            raise CheckpointError(f"tokenizer.json cannot be read: {error}") from error
        self._apply_config(listed)

    @classmethod
    def load(cls, path: Path, placeholders: Iterable[str] = ()) -> Tokenizer:
        """The tokenizer of a checkpoint directory. Raises CheckpointError."""
        tokenizer = cls(read_source(path), read_tokenizer_config(path), placeholders)
        return_freed_memory()
        return tokenizer

    def _apply_config(self, listed: Mapping[str, Added]) -> None:
        """Makes the changes that Hugging Face makes after it has read tokenizer.json."""
        backend = self._backend
        backend.no_truncation()
        backend.no_padding()
        for token in self._added.values():
            name = self.aliases.of.get(token.content, token.content)
            before = listed.get(token.content)
            if before is None or before.flags != token.flags:
                add = backend.add_special_tokens if token.special else backend.add_tokens
                add([token.as_backend(name)])
        self._special_ids: dict[int, str] = {}
        for text, alias in self.aliases.of.items():
            token_id = backend.token_to_id(alias)
            if token_id is None:
                raise CheckpointError(f"the tokenizer has no token {text!r}")
            self._special_ids[token_id] = text
        known = backend.get_added_tokens_decoder()
        self._skipped_ids = frozenset(i for i, token in known.items() if token.special)

    # ---- vocabulary

    @property
    def vocab_size(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def added(self) -> Collection[Added]:
        """All added tokens."""
        return self._added.values()

    @property
    def special_ids(self) -> Mapping[int, str]:
        """Special tokens and placeholders: id -> text. No user text becomes one."""
        return self._special_ids

    @property
    def skipped_ids(self) -> frozenset[int]:
        """The ids that ``skip_special_tokens`` omits. As in Hugging Face, a token that only the
        configuration declares special is not among them."""
        return self._skipped_ids

    @property
    def eos_token_id(self) -> int | None:
        return self.id_of(self.named.get("eos_token", ""))

    @cached_property
    def decoder_spec(self) -> Mapping[str, Any] | None:
        """The decoder's description in tokenizer.json."""
        decoder = self._backend.decoder
        if decoder is None:
            return None
        state = decoder.__getstate__()
        spec: Mapping[str, Any] = json.loads(state)
        return spec

    def id_of(self, token: str) -> int | None:
        found = self._backend.token_to_id(self.aliases.of.get(token, token))
        return None if found is None else int(found)

    def token_of(self, token_id: int) -> str | None:
        """A token as the vocabulary spells it (``Ġthe``, ``▁the``); None for an unknown id."""
        text = self._special_ids.get(token_id)
        return text if text is not None else self._backend.id_to_token(token_id)

    # ---- text to ids

    def encode(self, hidden: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of text in which special tokens are written as aliases."""
        return self.encode_all([hidden], add_special_tokens=add_special_tokens)[0]

    def encode_all(
        self, texts: Sequence[str], *, add_special_tokens: bool = False
    ) -> list[list[int]]:
        """Ids of each text. Releases the GIL, so that a thread that encodes long texts does not
        stop others."""
        found = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in found]

    def exceeds(self, text: str, limit: int) -> bool:
        """Whether ``text`` certainly has more than ``limit`` tokens. Takes about as long as
        encoding ``limit`` tokens; encoding megabytes would take seconds.

        Special tokens may be aliases or have their own names. Each name counts as one token, though
        in user text it is several. A cut between two chunks can add a few tokens, so CUT_TOKENS are
        subtracted for each.
        """
        if len(text) <= max(limit, CHUNK_CHARACTERS):
            return False
        tokens = specials = 0
        for start in range(0, len(text), CHUNK_CHARACTERS):
            piece, count = self.aliases.without(text[start : start + CHUNK_CHARACTERS])
            specials += count
            tokens += len(self.encode(piece)) - CUT_TOKENS
            if max(tokens, specials) > limit:
                return True
        return False

    def locate(
        self, hidden: str, spelled: Mapping[str, str], *, add_special_tokens: bool
    ) -> tuple[list[int], list[int]]:
        """The ids of text in which special tokens are written as aliases, and the position at which
        each begins, in characters of the revealed text; see ``Aliases.places``. A token begins
        where the one before it ends, even if the tokenizer assigns the space between them to
        neither."""
        encoding = self._backend.encode(hidden, add_special_tokens=add_special_tokens)
        starts, end = [], 0
        for first, last in encoding.offsets:
            starts.append(min(first, end) if last > first else end)
            end = max(end, last)
        return encoding.ids, self.aliases.places(hidden, starts, spelled)

    # ---- ids to text

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Decodes with the library; ``gateway.output.detokenizer`` does the same for a stream."""
        special = self._special_ids
        if skip_special_tokens:
            ids = [i for i in ids if i not in self._skipped_ids]
        if not any(i in special for i in ids):
            return str(self._backend.decode(list(ids), skip_special_tokens=False))
        decoder = self._backend.decoder
        tokens = [token for token in map(self.token_of, ids) if token is not None]
        return str(decoder.decode(tokens)) if decoder is not None else " ".join(tokens)


def read_source(path: Path) -> str:
    """The text of the directory's tokenizer.json. Raises CheckpointError, which says how to convert
    a checkpoint that only has a slow tokenizer."""
    file = path / "tokenizer.json"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    slow = [name for name in SLOW_FILES if (path / name).is_file()]
    found = f"only {', '.join(slow)}" if slow else "no tokenizer at all"
    raise CheckpointError(
        f"{path} has {found}, but the gateway needs tokenizer.json; create it once with "
        f"AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})"
    )


def added_tokens(source: str) -> dict[str, Added]:
    """The ``added_tokens`` of a tokenizer.json, without parsing the vocabulary after it."""
    return {
        entry["content"]: Added.read(entry, special=bool(entry["special"]), id=entry["id"])
        for entry in added_entries(source)
    }


def merge_added(
    listed: Mapping[str, Added], config: Mapping[str, Any], named: Mapping[str, str]
) -> dict[str, Added]:
    """All added tokens by content, those of tokenizer.json first. Flags in the configuration take
    precedence; tokens that it names (``bos_token``, extra special tokens) are special."""
    merged = dict(listed)
    for number, entry in (config.get("added_tokens_decoder") or {}).items():
        token = Added.read(entry, special=bool(entry.get("special", False)), id=int(number))
        if token.content not in listed or not listed[token.content].special or token.special:
            merged[token.content] = token
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    entries = list(extra.values()) if isinstance(extra, Mapping) else list(extra)
    for entry in [*named.values(), *entries]:
        content = entry if isinstance(entry, str) else entry["content"]
        before = merged.get(content)
        if before is None:
            merged[content] = Added.read(entry, special=True)
        elif not before.special:
            merged[content] = replace(before, special=True)
    return merged


def make_tokenizer(source: str, names: Mapping[str, str]) -> Backend:
    """The library's tokenizer with special tokens renamed. Merges of ordinary tokens that would
    spell a special one are dropped, so that ordinary text never becomes one."""
    try:
        return Backend.from_str(rename_tokens(source, names))
    except Exception:  # The library raises bare Exception; others are raised again below.
        spec = json.loads(source)
        model = spec.get("model", {})
        merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", [])]
        ordinary = [m for m in merges if not names.keys() & {*m, "".join(m)}]
        if len(ordinary) == len(merges):
            raise
        model["merges"] = ordinary
        return Backend.from_str(rename_tokens(json.dumps(spec), names))


def occurs(source: str, name: str) -> bool:
    """Whether ``name`` is a string of the JSON text ``source``."""
    return any(json.dumps(name, ensure_ascii=ascii) in source for ascii in (True, False))


def rename_tokens(source: str, names: Mapping[str, str]) -> str:
    """tokenizer.json with special tokens renamed wherever a JSON string is one of ``names``:
    among the added tokens, in the vocabulary, as ``unk_token``.

    The text is edited, not parsed: a vocabulary of 150,000 tokens as Python objects would cost
    the gateway more memory than everything else.
    """
    words = [name for name in names if PLAIN_WORD.fullmatch(name)]
    if words:
        raise CheckpointError(
            f"the special token or placeholder {words[0]!r} is an ordinary word, which cannot be "
            "told from the words that tokenizer.json itself uses; it is not supported"
        )
    literals = {
        json.dumps(name, ensure_ascii=ascii): json.dumps(alias)
        for name, alias in names.items()
        for ascii in (True, False)
    }
    if not literals:
        return source
    longest = sorted(literals, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest)))
    return pattern.sub(lambda match: literals[match.group()], source)
