"""Prompts of text or token ids, which need no chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gateway.job import TextPrompt, TokenPrompt, prompt_too_long
from gateway.prompt.placeholders import ExpandedPrompt, expand, expand_starts, picture_text
from gateway.prompt.tokenizer import Tokenizer
from opticnerve.errors import InvalidRequest
from opticnerve.media.plan import Plan
from opticnerve.models.family import Layout


def read_plain(
    prompt: TextPrompt | TokenPrompt,
    tokenizer: Tokenizer,
    layout: Layout,
    contexts: int = 1,
    plans: Sequence[Plan] = (),
    *,
    locate: bool = False,
) -> ExpandedPrompt:
    """The prompt's token ids, at most ``contexts`` context lengths. ``plans``: one for each
    picture, in order. ``locate``: also find where each token begins in the text.

    Raises InvalidRequest for ids that stand for pictures, and ContextLengthExceeded for a prompt
    that no worker could take.
    """
    if isinstance(prompt, TokenPrompt):
        _check_ids(prompt.token_ids, layout, contexts)
        return ExpandedPrompt("", prompt.token_ids)
    most = layout.max_positions
    if tokenizer.exceeds(prompt.text, most * contexts):  # Cheaper than encoding all of it.
        raise prompt_too_long(TextPrompt, most, "many more")
    hidden, marked = _hide(prompt, tokenizer, layout)
    add = prompt.add_special_tokens
    if not locate:
        ids = tokenizer.encode(hidden, add_special_tokens=add)
        return expand(layout, prompt.text, ids, plans, most, contexts, TextPrompt)
    ids, starts = tokenizer.locate(hidden, marked, add_special_tokens=add)
    found = expand(layout, prompt.text, ids, plans, most, contexts, TextPrompt)
    return replace(found, starts=expand_starts(layout, ids, plans, starts))


def encode_text(prompt: TextPrompt, tokenizer: Tokenizer, layout: Layout) -> list[int]:
    """The ids of a text of any length, without pictures."""
    hidden, _ = _hide(prompt, tokenizer, layout)
    return tokenizer.encode(hidden, add_special_tokens=prompt.add_special_tokens)


def _hide(
    prompt: TextPrompt, tokenizer: Tokenizer, layout: Layout
) -> tuple[str, Mapping[str, str]]:
    """The text with aliases for its special tokens and for its pictures' marks; and a mapping from
    each picture's aliases, with the text between them, to its mark. Placeholders of pictures in the
    text stay plain text. The tokens that the model expects around a picture are special only if
    there are pictures."""
    names, aliases = tokenizer.special_ids, tokenizer.aliases
    ids = layout.item_token_ids if prompt.sources else layout.placeholder_ids
    plain = frozenset(names[i] for i in ids.values() if i in names)
    if not prompt.sources:
        return aliases.hide(prompt.text, plain), {}
    mark = picture_text(layout, tokenizer)
    parts = prompt.text.split(prompt.marker)
    return mark.join(aliases.hide(part, plain) for part in parts), {mark: prompt.marker}


def _check_ids(ids: Sequence[int], layout: Layout, contexts: int) -> None:
    if len(ids) > layout.max_positions * contexts:
        raise prompt_too_long(TokenPrompt, layout.max_positions, str(len(ids)))
    pictures = set(layout.placeholder_ids.values())
    found = next((token_id for token_id in ids if token_id in pictures), None)
    if found is not None:
        raise InvalidRequest(
            f"prompt: {found} stands for a picture, which token ids cannot contain; send a text "
            "with images, or messages to /v1/chat/completions",
            param="prompt",
        )
