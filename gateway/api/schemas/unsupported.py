"""Fields and parts that others serve and this server does not (yet).

A field here may hold its neutral value, the one that asks for nothing; then it is dropped. Any
other value is UnsupportedFeature, which says what to do instead. Tools that a request offers, and
forbids the model to call, are dropped too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.api.schemas.base import Body, Refused, join
from opticnerve.errors import UnsupportedFeature

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
    "json_schema": Refused((), GRAMMAR),
    "regex": Refused((), GRAMMAR),
    "ebnf": Refused((), GRAMMAR),
    "grammar": Refused((), GRAMMAR),
    "include_reasoning": Refused((True, False), "leave it out"),
    "separate_reasoning": Refused((True, False), "leave it out"),
    "stream_reasoning": Refused((True, False), "leave it out"),
    "return_token_ids": Refused((False,), "see /v1/apply_template for the prompt's"),
    "return_tokens_as_token_ids": Refused((False,), "leave it out"),
    "audio": Refused((), "ask for text"),
    "modalities": Refused((["text"],), 'ask for ["text"]'),
    "prediction": Refused((), "leave it out"),
    "web_search_options": Refused((), "leave it out"),
    "moderation": Refused((), "moderate messages and answers yourself"),
    "prompt_cache_options": Refused((), "leave it out: every prefix is cached"),
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


SOURCES = ("image_url", "image", "url", "base64")
OFFERS = {"tools": "tool_choice", "functions": "function_call"}  # An offer, and what forbids it.


def take_out(body: Mapping[str, Any], model: type[Body], left_out: list[str]) -> dict[str, Any]:
    """``body`` without fields that ``model`` does not serve and that ask for nothing; what they
    hold besides is named in ``left_out``, by path. Raises UnsupportedFeature for others."""
    served: dict[str, Any] = {}
    for name, value in body.items():
        refused = model.refused.get(name) or FIELDS.get(name)
        if refused is None or name in model.model_fields:
            served[name] = value
        elif value is None or _is_neutral(name, value, refused, left_out):
            continue
        elif name in OFFERS and body.get(OFFERS[name]) == "none":
            left_out.append(name)
        else:
            raise UnsupportedFeature(
                f"{name}: not supported by this server; {refused.instead}", param=name
            )
    _check_parts(body.get("messages"))
    return served


def _is_neutral(name: str, value: Any, refused: Refused, left_out: list[str]) -> bool:
    """Whether ``value`` asks for nothing. Of an object with a type, other fields do not count."""
    for neutral in refused.neutral:
        if isinstance(value, dict) and isinstance(neutral, dict):
            given = {key: entry for key, entry in value.items() if entry is not None}
            more = given.keys() - neutral.keys() if neutral else set()
            if {key: entry for key, entry in given.items() if key not in more} == neutral:
                left_out += [join(name, key) for key in given if key in more]
                return True
        elif _same(value, neutral):
            return True
    return False


def _same(value: Any, neutral: Any) -> bool:
    """Equality that keeps booleans and numbers apart."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _check_parts(messages: Any) -> None:
    """Checks well-formed parts only: the models report what is malformed."""
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
    if part.get("uuid") is not None and not any(part.get(name) for name in SOURCES):
        raise UnsupportedFeature(
            f"{path}.uuid: not supported by this server; send the picture itself, whose "
            "embedding is found again by its bytes",
            param=f"{path}.uuid",
        )
