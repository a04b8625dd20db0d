"""Special tokens from a checkpoint's files, read without a tokenizer; and ``encode_texts``, for the
few texts that layouts need encoded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opticnerve.checkpoints.json_files import read_object
from opticnerve.errors import CheckpointError

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_tokenizer_config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json of the directory ``path``; if it lists no added tokens,
    special_tokens_map.json overrides it. Raises CheckpointError."""
    config = read_object(path / "tokenizer_config.json") or {}
    if "added_tokens_decoder" not in config:
        config.update(read_object(path / "special_tokens_map.json") or {})
    return config


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Name -> text of ``bos_token`` and the other named tokens, which templates may use."""
    extra = config.get("extra_special_tokens")
    entries = {**(extra if isinstance(extra, Mapping) else {}), **config}
    found: dict[str, str] = {}
    for name, entry in entries.items():
        if name not in NAMED and not name.endswith("_token"):
            continue
        content = token_text(entry)
        if content:
            found[name] = content
    return found


def token_text(entry: Any) -> str | None:
    """A token as tokenizer files hold it: its text, or a mapping with it."""
    text = entry.get("content") if isinstance(entry, Mapping) else entry
    return text if isinstance(text, str) else None


def added_entries(source: str) -> list[Any]:
    """``added_tokens`` of a tokenizer.json's text, without parsing the vocabulary after it. Raises
    ValueError, or RecursionError."""
    place = re.search(r'"added_tokens"\s*:\s*', source)
    if place is None:
        return []
    entries, _ = json.JSONDecoder().raw_decode(source, place.end())
    return list(entries)


def eos_token_id(path: Path) -> int | None:
    """The id of the tokenizer's ``eos_token``; None if the files do not say. Raises
    CheckpointError."""
    name = named_tokens(read_tokenizer_config(path)).get("eos_token")
    return None if name is None else added_token_id(path, name)


def added_token_id(path: Path, text: str) -> int | None:
    """The id of the added token that is spelled ``text``; None if the files have no such token.
    Raises CheckpointError."""
    listed = read_tokenizer_config(path).get("added_tokens_decoder")
    for number, entry in listed.items() if isinstance(listed, dict) else ():
        if token_text(entry) == text and number.isdecimal():
            return int(number)
    try:
        source = (path / "tokenizer.json").read_text(encoding="utf-8")
        added = added_entries(source)
        return next((int(entry["id"]) for entry in added if token_text(entry) == text), None)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise _unreadable(path) from error


def encode_texts(path: Path, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """The ids of each text by the tokenizer.json in the directory ``path``, without special tokens
    around it. Loads the tokenizer and drops it again, which takes a second for a large vocabulary.
    Raises CheckpointError."""
    from tokenizers import Tokenizer  # Not at the top: encoders and LLM workers do without.

    try:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        found = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    except Exception as error:  # The library raises bare Exception for what it cannot read.
        raise _unreadable(path) from error
    return [tuple(ids) for ids in found]


def _unreadable(path: Path) -> CheckpointError:
    return CheckpointError(f"{path / 'tokenizer.json'} cannot be read; fetch it again")
