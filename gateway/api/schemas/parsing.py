"""Turns a body's bytes into a request model, and everything that is wrong with them into one clear
InvalidRequest."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from gateway.api.schemas.base import (
    BOM,
    ESCAPED_SURROGATE,
    UNSUPPORTED_KIND,
    Body,
    UnsupportedField,
    ValidationContext,
    check_strings,
    join,
    unsupported_kind,
)
from gateway.api.schemas.long_json import Outline
from opticnerve.errors import InvalidRequest, UnsupportedFeature

M = TypeVar("M", bound=Body)

MAX_NAMED = 5  # Most problems that one error message describes.
MAX_LOOKED_AT = 100  # Most problems, and most ignored fields, that are looked at.
UNKNOWN_FIELD = "unknown field"
MESSAGE_REWRITES = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"^(Input|String|List|Dictionary|Value error,) ", ""),
        (r" after validation, not \d+$", ""),
        (r"a valid dictionary( or instance of \w+)?", "an object"),
        (r"a valid ", "a "),
        (r"\ba integer", "an integer"),
    )
)


# Fields and content parts that other servers support and this one does not. A field with a neutral
# value, which asks for nothing, is dropped; any other value raises UnsupportedFeature, which says
# what to do instead. Tools that the request itself disables (``tool_choice: none``) are dropped
# too.
TOOLS = "send tools and tool_choice, their newer form"
GRAMMAR = "send it in structured_outputs, as json, regex or grammar"
SEARCH = "use sampling with n instead"
NO_PLUGINS = "leave it out: this server has no plugins"
PLACED = "leave it out: the gateway places requests itself"
HEADER_ID = "send it as the header x-request-id"
PIXELS = "use mm_processor_kwargs with min_pixels and max_pixels"

UNSUPPORTED: dict[str, UnsupportedField] = {
    "functions": UnsupportedField(([],), TOOLS),
    "function_call": UnsupportedField(("none", "auto"), TOOLS),
    "json_schema": UnsupportedField((), GRAMMAR),
    "regex": UnsupportedField((), GRAMMAR),
    "ebnf": UnsupportedField((), GRAMMAR),
    "grammar": UnsupportedField((), GRAMMAR),
    "separate_reasoning": UnsupportedField((True,), "send include_reasoning: false to hide it"),
    "stream_reasoning": UnsupportedField((True,), "send include_reasoning: false to hide it"),
    "audio": UnsupportedField((), "ask for text"),
    "modalities": UnsupportedField((["text"],), 'ask for ["text"]'),
    "prediction": UnsupportedField((), "leave it out"),
    "web_search_options": UnsupportedField((), "leave it out"),
    "moderation": UnsupportedField((), "moderate messages and answers yourself"),
    "prompt_cache_options": UnsupportedField((), "leave it out: every prefix is cached"),
    "use_beam_search": UnsupportedField((False,), SEARCH),
    "best_of": UnsupportedField((1,), SEARCH),
    "length_penalty": UnsupportedField((1.0,), SEARCH),
    "early_stopping": UnsupportedField((False,), SEARCH),
    "logits_processors": UnsupportedField(([],), "use logit_bias or allowed_token_ids"),
    "media_io_kwargs": UnsupportedField(({},), "leave it out"),
    "request_id": UnsupportedField((), HEADER_ID),
    "rid": UnsupportedField((), HEADER_ID),
    "input_ids": UnsupportedField((), "send token ids as the prompt of /v1/completions"),
    "prompt_embeds": UnsupportedField((), "send text or token ids"),
    "thinking_token_budget": UnsupportedField((-1,), "bound the answer with max_tokens"),
    "reasoning": UnsupportedField(({},), "use reasoning_effort"),
    "task": UnsupportedField((), "describe the task in a message"),
    "watermarking": UnsupportedField((False,), "leave it out"),
    "logprob_token_ids": UnsupportedField((), "ask for top_logprobs"),
    "repetition_detection": UnsupportedField((), "use repetition_penalty"),
    "stop_regex": UnsupportedField(([],), "use stop, with strings"),
    "no_stop_trim": UnsupportedField((False,), "use include_stop_str_in_output"),
    "stream_interval": UnsupportedField((1,), "leave it out: tokens are sent as they come"),
    "lora_path": UnsupportedField((), "start the server with a merged checkpoint"),
    "custom_logit_processor": UnsupportedField((), "use logit_bias or allowed_token_ids"),
    "custom_params": UnsupportedField(({},), NO_PLUGINS),
    "vllm_xargs": UnsupportedField(({},), NO_PLUGINS),
    "custom_labels": UnsupportedField(({},), "leave it out: metrics have no labels of requests"),
    "extra_key": UnsupportedField((), "use cache_salt"),
    "session_params": UnsupportedField(({},), "send the whole conversation"),
    "ngram_corpus_id": UnsupportedField((), "leave it out"),
    "images_config": UnsupportedField(({},), PIXELS),
    "max_dynamic_patch": UnsupportedField((), PIXELS),
    "min_dynamic_patch": UnsupportedField((), PIXELS),
    "use_audio_in_video": UnsupportedField((False,), "leave it out"),
    "return_prompt_text": UnsupportedField((False,), "see /v1/apply_template"),
    "return_token_offsets": UnsupportedField((False,), "leave it out"),
    "return_prompt_token_ids": UnsupportedField((False,), "use return_token_ids"),
    "return_cached_tokens_details": UnsupportedField((False,), "see usage"),
    "return_meta_info": UnsupportedField((False,), "use timings"),
    "return_mm_kwargs": UnsupportedField((True, False), "leave it out"),
    "return_hidden_states": UnsupportedField((False,), "leave it out"),
    "return_routed_experts": UnsupportedField((False,), "leave it out"),
    "routed_experts_start_len": UnsupportedField((0,), "leave it out"),
    "routed_experts_prompt_start": UnsupportedField((0,), "leave it out"),
    "kv_transfer_params": UnsupportedField(({},), PLACED),
    "ec_transfer_params": UnsupportedField(({},), PLACED),
    "bootstrap_host": UnsupportedField((), PLACED),
    "bootstrap_port": UnsupportedField((), PLACED),
    "bootstrap_room": UnsupportedField((), PLACED),
    "routed_dp_rank": UnsupportedField((), PLACED),
    "disagg_prefill_dp_rank": UnsupportedField((), PLACED),
    "data_parallel_rank": UnsupportedField((), PLACED),
}

PICTURES = "send pictures: image_url, or image"
UNSUPPORTED_PARTS: dict[str, str] = {
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
DISABLED_BY = {"functions": "function_call"}  # Where the latter is "none".


@dataclass(frozen=True, slots=True)
class Ignored:
    """Fields of a request that have no effect, as paths in its body, the first MAX_LOOKED_AT."""

    unknown: tuple[str, ...] = ()  # Fields that this server does not know.
    without_effect: tuple[str, ...] = ()  # Known fields that have no effect.


def parse(
    model: type[M],
    body: bytes | bytearray | str | Outline | Mapping[str, Any],
    *,
    ignore_unknown: bool = False,
) -> tuple[M, Ignored]:
    """A request, and its fields that are ignored: unknown fields of nested objects always, those of
    the body itself with ``ignore_unknown``.

    Raises InvalidRequest, whose ``param`` is the path of the first field at fault, such as
    ``messages[0].content[1].image_url.url``, and UnsupportedFeature. Values are never repeated.
    """
    raw = dict(body) if isinstance(body, Mapping) else decode(body)
    without_effect: list[str] = []
    raw = _drop_unsupported(raw, model, without_effect)
    context = ValidationContext(ignore_unknown)
    try:
        parsed = model.model_validate(raw, context=context)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
    else:
        named = _unknown(raw, context, "") if context.unknown else ()
        without_effect += parsed.without_effect
        return parsed, Ignored(
            *(tuple(islice(each, MAX_LOOKED_AT)) for each in (named, without_effect))
        )
    raise _refusal(problems, raw, {*model.model_fields, *model.unsupported, *UNSUPPORTED})


def _drop_unsupported(
    body: Mapping[str, Any], model: type[Body], left_out: list[str]
) -> dict[str, Any]:
    """``body`` without unsupported fields whose value is neutral. Paths of dropped values that are
    not neutral by themselves are added to ``left_out``. Raises UnsupportedFeature for other values
    of unsupported fields."""
    served: dict[str, Any] = {}
    for name, value in body.items():
        field = model.unsupported.get(name) or UNSUPPORTED.get(name)
        if field is None or name in model.model_fields:
            served[name] = value
        elif value is None or _is_neutral(name, value, field, left_out):
            continue
        elif name in DISABLED_BY and body.get(DISABLED_BY[name]) == "none":
            left_out.append(name)
        else:
            raise UnsupportedFeature(
                f"{name}: not supported by this server; {field.instead}", param=name
            )
    _check_parts(body.get("messages"))
    return served


def _is_neutral(name: str, value: Any, field: UnsupportedField, left_out: list[str]) -> bool:
    """Whether ``value`` asks for nothing. Entries of an object that the neutral object does not
    have are added to ``left_out`` instead of being compared."""
    for neutral in field.neutral:
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
    """Raises UnsupportedFeature for unsupported parts. Malformed ones are left to the models."""
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        for j, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, dict):
                _check_part(part, f"messages[{i}].content[{j}]")


def _check_part(part: Mapping[str, Any], path: str) -> None:
    kind = part.get("type")
    if isinstance(kind, str) and (instead := UNSUPPORTED_PARTS.get(kind)):
        raise unsupported_kind(path, "parts", kind, instead)
    if part.get("uuid") is not None and not any(part.get(name) for name in SOURCES):
        raise UnsupportedFeature(
            f"{path}.uuid: not supported by this server; send the picture itself, whose "
            "embedding is found again by its bytes",
            param=f"{path}.uuid",
        )


def decode(body: bytes | bytearray | str | Outline) -> dict[str, Any]:
    """The JSON object that is a body, or a WebSocket's message. Raises InvalidRequest."""
    if isinstance(body, bytes | bytearray):
        body = body.removeprefix(BOM)
    try:
        raw = body.read() if isinstance(body, Outline) else from_json(body, allow_inf_nan=False)
    except ValueError as error:
        _check_surrogates(body)
        reason = str(error)[:200]
        if isinstance(body, Outline):  # Its line and column numbers are not the body's.
            reason = reason.partition(" at line ")[0]
        raise InvalidRequest(f"not valid JSON: {reason}", code="invalid_json") from error
    if not isinstance(raw, dict):
        raise InvalidRequest("should be a JSON object")
    return raw


def _check_surrogates(body: bytes | bytearray | str | Outline) -> None:
    """Raises InvalidRequest if JSON did not parse because a string holds half of a surrogate pair;
    any other fault is in the parser's own message."""
    text = body.text if isinstance(body, Outline) else body
    text = text.encode("utf-8", "replace") if isinstance(text, str) else text
    if ESCAPED_SURROGATE.search(text):
        with contextlib.suppress(ValueError, RecursionError):
            check_strings(json.loads(text))


def _refusal(
    problems: Sequence[ErrorDetails], raw: Mapping[str, Any], known: Collection[str]
) -> InvalidRequest:
    """One error for all problems. Problems of one field, from a union's branches, are joined.
    ``known``: the names that fields of the body may have."""
    found: dict[str, dict[str, str]] = {}  # By path: problem types, by their texts.
    for problem in problems[:MAX_LOOKED_AT]:
        found.setdefault(_path(problem, raw), {})[problem_text(problem)] = problem["type"]
    paths = [path for path in found if not _explained(path, found)]
    lines = [_line(path, list(found[path]), known) for path in paths[:MAX_NAMED]]
    if len(paths) > MAX_NAMED:
        more = "many" if len(problems) > MAX_LOOKED_AT else str(len(paths) - MAX_NAMED)
        lines.append(f"and {more} more")
    kinds = {kind for path in paths for kind in found[path].values()}
    error = UnsupportedFeature if kinds == {UNSUPPORTED_KIND} else InvalidRequest
    code = "unknown_field" if kinds == {"extra_forbidden"} else None
    return error("; ".join(lines), param=paths[0] or None, code=code)


def _line(path: str, texts: Sequence[str], known: Collection[str]) -> str:
    """A problem with its path, and for an unknown field the most similar known name."""
    if not path:
        return texts[0]
    line = f"{path}: {_either(texts)}"
    near = difflib.get_close_matches(path.lower(), known, 1) if texts == [UNKNOWN_FIELD] else ()
    return f"{line} (did you mean {near[0]}?)" if near else line


def _explained(path: str, found: Mapping[str, Any]) -> bool:
    """Whether a deeper path describes the problem better, such as an entry of a list where the
    field may be a string or a list."""
    return any(other != path and other.startswith((path + ".", path + "[")) for other in found)


def problem_text(problem: ErrorDetails) -> str:
    """pydantic's message in plainer words."""
    kind, message = problem["type"], problem["msg"]
    if kind == "extra_forbidden":
        return UNKNOWN_FIELD
    if kind == "missing":
        return "required"
    if kind == "union_tag_not_found":
        return "should have a type: text, image_url or image"
    if kind == "union_tag_invalid":
        return "should be of type text, image_url or image"
    for pattern, plain in MESSAGE_REWRITES:
        message = pattern.sub(plain, message)
    return message


def _either(texts: Sequence[str]) -> str:
    """``should be a string or a list``"""
    same = "should be "
    if not all(text.startswith(same) for text in texts):
        return " or ".join(texts)
    return same + " or ".join(text.removeprefix(same) for text in texts)


def _path(problem: ErrorDetails, raw: Any) -> str:
    """The path of a problem in the body. pydantic's ``loc`` also contains names of unions'
    branches: any step that the body does not have, unless the problem is a missing field."""
    loc = problem["loc"]
    if problem["type"] == "fault":
        loc = (*loc, problem["ctx"]["field"])
    absent = problem["type"] in ("missing", "fault")
    path = ""
    for place, step in enumerate(loc):
        last = place == len(loc) - 1
        if isinstance(step, int) and isinstance(raw, list) and 0 <= step < len(raw):
            path, raw = f"{path}[{step}]", raw[step]
        elif isinstance(step, str) and isinstance(raw, Mapping) and step in raw:
            path, raw = join(path, step), raw[step]
        elif last and absent and isinstance(step, str) and isinstance(raw, Mapping):
            path = join(path, step)
    return path


def _unknown(raw: Any, context: ValidationContext, path: str) -> Iterator[str]:
    """The paths of the unknown fields that were dropped."""
    if isinstance(raw, dict):
        unknown = context.unknown.get(id(raw), ())
        for name, value in raw.items():
            if name in unknown:
                yield join(path, name)
            else:
                yield from _unknown(value, context, join(path, name))
    elif isinstance(raw, list):
        for place, value in enumerate(raw):
            yield from _unknown(value, context, f"{path}[{place}]")
