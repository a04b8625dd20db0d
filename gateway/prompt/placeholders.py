"""Placeholders: the tokens that stand for media items. A template writes one for each item, which
is then expanded to one token for each row of the item's embedding."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from string import Formatter

from gateway.job import ChatPrompt, PromptKind, prompt_too_long
from gateway.prompt.tokenizer import (
    Tokenizer,
    added_tokens,
    make_tokenizer,
    merge_added,
    read_source,
)
from opticnerve.checkpoints.json_files import read_object
from opticnerve.checkpoints.tokenizer_files import named_tokens, read_tokenizer_config
from opticnerve.errors import CheckpointError, InvalidRequest
from opticnerve.media.plan import Modality, Plan, Span
from opticnerve.models.family import Layout, RowRun

_BRACKETED = re.compile(r"<.+>|\[.+\]", re.DOTALL)  # The usual spelling of a placeholder.


@dataclass(frozen=True, slots=True)
class ExpandedPrompt:
    """A prompt for the decoder. A span's ``item`` is the item's index in the request."""

    prompt: str  # Text with one placeholder for each item; empty if only ids are known.
    token_ids: tuple[int, ...]
    spans: tuple[Span, ...] = ()
    starts: tuple[int, ...] | None = None  # Where each token begins in the text, in characters.

    @property
    def num_item_tokens(self) -> int:
        return sum(span.num_tokens for span in self.spans)


def spellings(path: Path, layout: Layout) -> dict[str, str]:
    """The spelling of each placeholder of the checkpoint in ``path``, by name.

    As in Hugging Face's processors, the spelling is the token that the tokenizer's files or
    processor_config.json give under that name, or else the added token with that id. For pictures
    it may also be a token of the vocabulary that is written like a placeholder. Names without a
    spelling are omitted. Raises CheckpointError for files that cannot be read, and if they do not
    name a token of ``layout.rewrite``: without the name, its id cannot be checked against the
    tokenizer.
    """
    ids = layout.placeholder_ids
    config, source = read_tokenizer_config(path), read_source(path)
    named = named_tokens(config)
    by_name = {**named_tokens(read_object(path / "processor_config.json") or {}), **named}
    unnamed = [name for name in _rewritten(layout) if name not in by_name]
    if unnamed:
        raise CheckpointError(
            f"neither the tokenizer nor processor_config.json names the {' or '.join(unnamed)}, "
            "which is written for a picture; fetch tokenizer_config.json again"
        )
    try:
        added = merge_added(added_tokens(source), config, named)
        by_id = {token.id: text for text, token in added.items()}
        found = {name: by_name.get(name) or by_id.get(token_id) for name, token_id in ids.items()}
        if found["image_token"] is None:
            token = make_tokenizer(source, {}).id_to_token(ids["image_token"]) or ""
            found["image_token"] = token if _BRACKETED.fullmatch(token) else None
    except Exception as error:  # The library raises bare Exception for what it cannot read.
        raise CheckpointError(f"tokenizer.json cannot be read: {error}") from error
    return {name: text for name, text in found.items() if text is not None}


def _rewritten(layout: Layout) -> list[str]:
    """The names of the tokens in the text that replaces what a template writes for a picture."""
    if layout.rewrite is None:
        return []
    written = (name for _, name, _, _ in Formatter().parse(layout.rewrite.text) if name)
    return sorted({layout.rewrite.written, *written})


def check_spellings(
    spelled: Mapping[str, str], ids: Mapping[str, int], tokenizer: Tokenizer
) -> None:
    """Raises CheckpointError if the configuration's ``ids`` are not those of the tokenizer."""
    for name, token_id in ids.items():
        if name not in spelled:
            if name == "image_token":
                raise CheckpointError(
                    f"token {token_id} stands for a picture by config.json, and neither the "
                    "tokenizer nor processor_config.json has its spelling; fetch the tokenizer's "
                    'files again, or add "image_token" to processor_config.json'
                )
            continue
        found = tokenizer.id_of(spelled[name])
        if found != token_id:
            raise CheckpointError(
                f"the {name} is {spelled[name]!r} in the files of processor and tokenizer, which "
                f"is token {found}, and token {token_id} in config.json; the files do not "
                "belong to one checkpoint"
            )


def picture_text(layout: Layout, tokenizer: Tokenizer) -> str:
    """The text that stands for a picture before tokenization, with aliases for its tokens."""
    aliases = _aliases(layout, tokenizer)
    text = "{image_token}" if layout.rewrite is None else layout.rewrite.text
    return text.format_map(aliases)


def rewrite(hidden: str, layout: Layout, tokenizer: Tokenizer) -> str:
    """Applies the layout's ``Rewrite`` to a rendered chat in which special tokens are aliases."""
    if layout.rewrite is None:
        return hidden
    written = _aliases(layout, tokenizer)[layout.rewrite.written]
    return hidden.replace(written, picture_text(layout, tokenizer))


def _aliases(layout: Layout, tokenizer: Tokenizer) -> dict[str, str]:
    """The alias of each placeholder that the tokenizer has, by name."""
    names, ids = tokenizer.special_ids, layout.placeholder_ids
    return {name: tokenizer.aliases.of[names[i]] for name, i in ids.items() if i in names}


def expand(
    layout: Layout,
    prompt: str,
    token_ids: Sequence[int],
    plans: Sequence[Plan],
    max_tokens: int,
    contexts: int = 1,
    kind: type[PromptKind] = ChatPrompt,
) -> ExpandedPrompt:
    """Replaces the i-th placeholder by the tokens of the i-th item. ``kind``: the prompt's kind,
    for errors.

    Raises InvalidRequest if there are more or fewer placeholders than items, or one is of another
    modality; and ContextLengthExceeded, before the ids are built, for a prompt of more than
    ``contexts`` times ``max_tokens``.
    """
    check_count(layout, token_ids, len(plans))
    rows = [plan.num_tokens for plan in plans]  # A lower bound on each item's tokens.
    check_length(len(token_ids), rows, max_tokens, contexts, kind)
    expansions = [layout.expand(plan) for plan in plans]
    sizes = [len(expansion.token_ids) for expansion in expansions]
    check_length(len(token_ids), sizes, max_tokens, contexts, kind)
    placeholders = frozenset(layout.item_token_ids.values())
    ids: list[int] = []
    spans: list[Span] = []
    items = enumerate(plans)
    for token_id in token_ids:
        if token_id not in placeholders:
            ids.append(token_id)
            continue
        item, plan = next(items)
        if token_id != layout.item_token_ids.get(plan.modality):
            raise InvalidRequest(
                f"the model's chat template has no placeholder for {_a(plan.modality)} where the "
                "messages contain one",
                param="messages",
            )
        expansion = expansions[item]
        spans += [_span(len(ids), run, item, plan) for run in expansion.runs]
        ids += expansion.token_ids
    return ExpandedPrompt(prompt, tuple(ids), tuple(spans))


def expand_starts(
    layout: Layout, token_ids: Sequence[int], plans: Sequence[Plan], starts: Sequence[int]
) -> tuple[int, ...]:
    """Where each token of an expanded prompt begins; ``starts``: where each of ``token_ids`` does.
    The tokens of an item begin at its placeholder."""
    placeholders = frozenset(layout.item_token_ids.values())
    sizes = (len(layout.expand(plan).token_ids) for plan in plans)
    return tuple(
        place
        for token_id, start in zip(token_ids, starts, strict=True)
        for place in repeat(start, next(sizes) if token_id in placeholders else 1)
    )


def _span(start: int, run: RowRun, item: int, plan: Plan) -> Span:
    """The span of ``run``, in an expansion that begins at token ``start`` of the prompt."""
    return Span(
        token_offset=start + run.offset,
        num_tokens=run.num_tokens,
        item=item,
        row_start=run.row_start,
        modality=plan.modality,
        grid_thw=plan.grid,
        seconds_per_grid=plan.seconds_per_grid,
        attention=plan.attention,
    )


def truncated(prompt: ExpandedPrompt, tokens: int, *, first: bool) -> ExpandedPrompt:
    """Keeps at most the last ``tokens`` tokens of ``prompt``, or with ``first`` the first ones.
    Raises InvalidRequest if that drops any part of a picture."""
    total = len(prompt.token_ids)
    start, end = (0, tokens) if first else (max(0, total - tokens), total)
    cut = [s for s in prompt.spans if s.token_offset < start or s.token_offset + s.num_tokens > end]
    if cut:
        raise InvalidRequest(
            f"truncate_prompt_tokens: {tokens} of the prompt's {total} tokens do not include all "
            "of its pictures; send fewer pictures, or keep more tokens",
            param="truncate_prompt_tokens",
        )
    spans = (replace(span, token_offset=span.token_offset - start) for span in prompt.spans)
    kept = prompt.token_ids[start:end]
    return ExpandedPrompt("", kept, tuple(spans))


def _a(modality: Modality) -> str:
    """The modality as a noun with its article: ``an image``, ``a video``."""
    return f"{'an' if modality[0] in 'aeiou' else 'a'} {modality}"


def check_count(layout: Layout, token_ids: Sequence[int], pictures: int) -> None:
    """Raises InvalidRequest unless ``token_ids`` have a placeholder for each item."""
    counted = Counter(token_ids)
    places = sum(counted[token_id] for token_id in layout.item_token_ids.values())
    if places == pictures:
        return
    wrote = f"{places} placeholder{'' if places == 1 else 's'} for pictures"
    given = f"{pictures} picture{'' if pictures == 1 else 's'}"
    raise InvalidRequest(
        f"the model's chat template wrote {wrote}, and the messages contain {given}; put each "
        "picture in a message whose role may contain pictures, such as user",
        param="messages",
    )


def check_length(
    num_ids: int,
    sizes: Sequence[int],
    max_tokens: int,
    contexts: int = 1,
    kind: type[PromptKind] = ChatPrompt,
) -> None:
    """Raises ContextLengthExceeded for a prompt longer than ``contexts`` times ``max_tokens``.
    ``num_ids``: its ids before expansion, one placeholder for each item. ``sizes``: the number of
    tokens that each item expands to."""
    picture_tokens = sum(sizes)
    needed = num_ids - len(sizes) + picture_tokens
    if needed <= max_tokens * contexts:
        return
    if not sizes:
        raise prompt_too_long(kind, max_tokens, str(needed))
    raise prompt_too_long(
        kind,
        max_tokens,
        f"{needed} ({picture_tokens} of them for pictures)",
        f"send {kind.shorter}, fewer pictures, or pictures with lower min_pixels and max_pixels",
    )
