"""Prompts of text or token ids: without a chat template, and without pictures."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.job import TextPrompt, TokenPrompt, prompt_too_long
from gateway.prompt.placeholders import ExpandedPrompt
from gateway.prompt.tokenizer import Tokenizer
from opticnerve.errors import InvalidRequest
from opticnerve.models.family import Layout


def read_plain(
    prompt: TextPrompt | TokenPrompt, tokenizer: Tokenizer, layout: Layout, contexts: int = 1
) -> ExpandedPrompt:
    """The prompt's token ids, at most ``contexts`` context lengths.

    Raises InvalidRequest for ids that stand for pictures, and ContextLengthExceeded for a prompt
    that no worker could take.
    """
    if isinstance(prompt, TokenPrompt):
        _check_ids(prompt.token_ids, layout, contexts)
        return ExpandedPrompt("", prompt.token_ids)
    most = layout.max_positions
    if tokenizer.exceeds(prompt.text, most * contexts):  # Cheaper than encoding all of it.
        raise prompt_too_long(TextPrompt, most, "many more")
    names = tokenizer.special_ids
    pictures = frozenset(names[i] for i in layout.placeholder_ids.values() if i in names)
    ids = tokenizer.encode_prompt(
        prompt.text, add_special_tokens=prompt.add_special_tokens, plain=pictures
    )
    if len(ids) > most * contexts:
        raise prompt_too_long(TextPrompt, most, str(len(ids)))
    return ExpandedPrompt(prompt.text, tuple(ids))


def _check_ids(ids: Sequence[int], layout: Layout, contexts: int) -> None:
    if len(ids) > layout.max_positions * contexts:
        raise prompt_too_long(TokenPrompt, layout.max_positions, str(len(ids)))
    pictures = set(layout.placeholder_ids.values())
    found = next((token_id for token_id in ids if token_id in pictures), None)
    if found is not None:
        raise InvalidRequest(
            f"prompt: {found} stands for a picture, which a prompt cannot contain; send pictures "
            "in messages, to /v1/chat/completions",
            param="prompt",
        )
