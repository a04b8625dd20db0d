"""Fields and parts that others serve and this server does not (yet).

A field here may hold its neutral value, the one that asks for nothing; then it is dropped. Any
other value is UnsupportedFeature, which says what to do instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opticnerve.errors import UnsupportedFeature


@dataclass(frozen=True, slots=True)
class Refused:
    neutral: tuple[Any, ...]  # Besides null.
    instead: str


TOOLS = "describe the tools in a system message and parse the answer yourself"
GRAMMAR = "ask for the format in a message and check the answer"
SEARCH = "use sampling with n instead"

FIELDS: dict[str, Refused] = {
    "tools": Refused(([],), TOOLS),
    "tool_choice": Refused(("none", "auto"), TOOLS),
    "parallel_tool_calls": Refused((True, False), TOOLS),
    "functions": Refused(([],), TOOLS),
    "function_call": Refused(("none", "auto"), TOOLS),
    "response_format": Refused(({"type": "text"},), GRAMMAR),
    "structured_outputs": Refused(({},), GRAMMAR),
    "guided_json": Refused((), GRAMMAR),
    "guided_regex": Refused((), GRAMMAR),
    "guided_choice": Refused((), GRAMMAR),
    "guided_grammar": Refused((), GRAMMAR),
    "audio": Refused((), "ask for text"),
    "modalities": Refused((["text"],), 'ask for ["text"]'),
    "store": Refused((False,), "keep the answer yourself"),
    "service_tier": Refused(("auto", "default"), "use priority"),
    "reasoning_effort": Refused(("none",), "use chat_template_kwargs where the template has it"),
    "verbosity": Refused(("medium",), "ask for it in a message"),
    "prediction": Refused((), "leave it out"),
    "web_search_options": Refused((), "leave it out"),
    "prompt_cache_retention": Refused(("in_memory",), "leave it out"),
    "use_beam_search": Refused((False,), SEARCH),
    "best_of": Refused((1,), SEARCH),
    "length_penalty": Refused((1.0,), SEARCH),
    "early_stopping": Refused((False,), SEARCH),
    "echo": Refused((False,), "prepend the prompt yourself"),
    "prompt_logprobs": Refused((0,), "leave it out"),
    "add_special_tokens": Refused((False,), "leave it out: the template decides"),
    "spaces_between_special_tokens": Refused((True,), "leave it out"),
    "truncate_prompt_tokens": Refused((), "shorten the messages"),
    "documents": Refused(([],), "put the documents in a message"),
    "chat_template": Refused((), "start the server with --chat-template"),
    "logits_processors": Refused(([],), "use logit_bias or allowed_token_ids"),
    "media_io_kwargs": Refused(({},), "leave it out"),
}

PICTURES = "send pictures: image_url, or image"
PARTS: dict[str, str] = {
    "video_url": PICTURES,
    "video": PICTURES,
    "audio": "send a transcript as text",
    "audio_url": "send a transcript as text",
    "input_audio": "send a transcript as text",
    "file": "send its text, or its pages as pictures",
    "image_embeds": PICTURES,
    "image_pil": "send the picture as image_url with a data: URL",
    "input_image": "use image_url",
    "input_text": "use text",
}


def take_out(body: Mapping[str, Any]) -> dict[str, Any]:
    """``body`` without neutral unsupported fields. Raises UnsupportedFeature for others."""
    kept: dict[str, Any] = {}
    for name, value in body.items():
        refused = FIELDS.get(name)
        if refused is None:
            kept[name] = value
        elif value is not None and not any(_same(value, neutral) for neutral in refused.neutral):
            raise UnsupportedFeature(
                f"{name}: not supported by this server; {refused.instead}", param=name
            )
    _check_parts(body.get("messages"))
    return kept


def _same(value: Any, neutral: Any) -> bool:
    """Equality that keeps booleans and numbers apart."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _check_parts(messages: Any) -> None:
    """Looks at well-shaped parts only: the models report what is not well shaped."""
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        for j, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, dict):
                _check_part(part, f"messages[{i}].content[{j}]")


def _check_part(part: Mapping[str, Any], path: str) -> None:
    kind = part.get("type")
    if isinstance(kind, str) and kind in PARTS:
        raise UnsupportedFeature(
            f'{path}: parts of type "{kind}" are not supported by this server; {PARTS[kind]}',
            param=f"{path}.type",
        )
    if part.get("uuid") is not None:
        raise UnsupportedFeature(
            f"{path}.uuid: not supported by this server; send the picture itself, whose "
            "embedding is found again by its bytes",
            param=f"{path}.uuid",
        )
