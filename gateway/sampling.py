"""What a request asks for, the model's defaults and the server's limits, resolved to one value.

The decoder gets every field explicitly: it knows neither the model's defaults nor the gateway's.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeGuard

from gateway.api.schemas.chat import UNLIMITED, ChatRequest
from gateway.api.schemas.sampling import SamplingFields
from gateway.prompt.tokenizer import Tokenizer
from opticnerve.checkpoints.settings import read_object
from opticnerve.errors import (
    CheckpointError,
    ConfigError,
    ContextLengthExceeded,
    InvalidRequest,
)
from opticnerve.generation.values import Sampling

LARGEST_MAX_TOKENS = 2**31 - 1

# What a request says in the words of Sampling; resolve_sampling reads the rest of it.
SHARED_FIELDS = tuple(
    each.name for each in fields(Sampling) if each.name in SamplingFields.model_fields
)


@dataclass(frozen=True, slots=True)
class Defaults:
    """What applies where a request says nothing. ``max_tokens`` None: what the context leaves."""

    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0))
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class SamplingLimits:
    """``max_model_len``: prompt and output tokens together, the least of all LLM workers'."""

    max_model_len: int
    max_logprobs: int = 20
    vocab_size: int = 0  # Of the model; 0: unknown, ids are not checked.


def load_defaults(
    source: str, checkpoint_path: Path, tokenizer: Tokenizer, text_config: Mapping[str, Any]
) -> Defaults:
    """``source`` is ``--generation-config``: ``auto`` (the checkpoint's), ``neutral``, or a
    directory. End-of-sequence ids always come from the model: its generation_config.json, its
    configuration and its tokenizer, together. Raises ConfigError."""
    own = _read(checkpoint_path / "generation_config.json")
    if source == "auto":
        chosen = own
    elif source == "neutral":
        chosen = {}
    else:
        directory = Path(source)
        file = directory if directory.is_file() else directory / "generation_config.json"
        if not file.is_file():
            raise ConfigError(
                f"--generation-config: {source} is neither auto, neutral nor a directory that "
                "holds generation_config.json",
                param="generation_config",
            )
        chosen = _read(file)
    ends = chosen.get("eos_token_id", own.get("eos_token_id", text_config.get("eos_token_id")))
    eos = tuple(dict.fromkeys([*_ids(ends), *_ids(tokenizer.eos_token_id)]))
    limit = chosen.get("max_new_tokens")
    return Defaults(
        replace(_model_sampling(chosen), eos_token_ids=eos),
        limit if _is_integer(limit) and limit > 0 else None,
    )


def _model_sampling(config: Mapping[str, Any]) -> Sampling:
    """The usable part of a generation_config.json. ``do_sample`` absent or false means greedy in
    Hugging Face; servers take temperature as it stands, and 1 without one."""
    found: dict[str, Any] = {"temperature": 1.0}
    for each in fields(Sampling):
        value = config.get(each.name)
        if not each.metadata.get("model_default"):
            continue
        if isinstance(each.default, float) and (_is_integer(value) or isinstance(value, float)):
            found[each.name] = float(value)
        elif isinstance(each.default, int) and _is_integer(value):
            found[each.name] = max(value, 0)
    if found.get("top_p") == 0:
        raise ConfigError("generation_config.json: top_p is out of range")
    try:
        return Sampling(**found)
    except InvalidRequest as error:
        raise ConfigError(f"generation_config.json: {error.message}") from error


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _read(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``; empty without the file. Raises ConfigError."""
    try:
        return read_object(file) or {}
    except CheckpointError as error:
        raise ConfigError(error.message) from error


def _ids(value: Any) -> list[int]:
    """``eos_token_id`` as files hold it: an id, a list of ids, or null."""
    values = value if isinstance(value, list) else [value]
    return [each for each in values if _is_integer(each)]


def resolve_sampling(
    request: ChatRequest,
    *,
    prompt_tokens: int,
    image_tokens: int,
    defaults: Defaults,
    limits: SamplingLimits,
    tokenizer: Tokenizer,
) -> Sampling:
    """Raises ContextLengthExceeded for a prompt (with the output that was asked for) that does not
    fit, and InvalidRequest for values that contradict each other or the model."""
    said = {name: getattr(request, name) for name in SHARED_FIELDS}
    values = {name: value for name, value in said.items() if value is not None}
    values |= {
        "max_tokens": output_limit(request, prompt_tokens, image_tokens, defaults, limits),
        "seed": secrets.randbits(64) if request.seed is None else request.seed % 2**64,
        "logprobs": num_logprobs(request, limits),
        "logit_bias": _bias(request.logit_bias or {}, limits),
        "bad_words": _bad_words(request.bad_words or (), tokenizer),
    }
    for name in ("stop_token_ids", "allowed_token_ids"):
        values[name] = _known(said[name] or (), limits, name)
    if request.top_k is not None:
        values["top_k"] = max(request.top_k, 0)
    if values.get("top_p") == 0:  # The likeliest token alone; a worker reads 0 as no bound.
        values |= {"temperature": 0.0, "top_p": 1.0}
    sampling = replace(defaults.sampling, **values)
    if sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequest(
            f"min_tokens: {sampling.min_tokens} exceeds max_tokens, {sampling.max_tokens}",
            param="min_tokens",
        )
    return sampling


def check_choices(request: ChatRequest, max_n: int) -> None:
    """Raises InvalidRequest for more choices than the server allows."""
    if (request.n or 1) > max_n:
        raise InvalidRequest(
            f"n: at most {max_n} on this server, which --max-n says; ask for fewer choices, or "
            "send several requests",
            param="n",
        )


def output_limit(
    request: ChatRequest,
    prompt_tokens: int,
    image_tokens: int,
    defaults: Defaults,
    limits: SamplingLimits,
) -> int:
    """How many tokens a choice may have: what was asked for, the model's default, or all that the
    context leaves. Raises ContextLengthExceeded."""
    room = limits.max_model_len - prompt_tokens
    unlimited = request.output_limit == UNLIMITED
    asked = None if unlimited else request.output_limit
    if room >= (asked or 1):
        most = LARGEST_MAX_TOKENS if unlimited else defaults.max_tokens or LARGEST_MAX_TOKENS
        return asked or min(most, room)
    pictures = f" ({image_tokens} of them for pictures)" if image_tokens else ""
    if room < 1:
        remedy = "send shorter messages" + (", or fewer or smaller pictures" if pictures else "")
    else:
        remedy = f"ask for at most {room}, or shorten the messages"
    wanted = f" and {asked} for the answer" if asked else ""
    raise ContextLengthExceeded(
        f"{ContextLengthExceeded.lead}: this model takes {limits.max_model_len} tokens; the "
        f"messages need {prompt_tokens}{pictures}{wanted}; {remedy}",
        param="messages" if room < 1 else _limit_name(request),
    )


def _limit_name(request: ChatRequest) -> str:
    return "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"


def num_logprobs(request: ChatRequest, limits: SamplingLimits) -> int | None:
    """None without log-probabilities. Raises InvalidRequest beyond the server's limit."""
    if not request.logprobs:
        return None
    wanted = request.top_logprobs or 0
    if wanted > limits.max_logprobs:
        raise InvalidRequest(
            f"top_logprobs: at most {limits.max_logprobs} on this server", param="top_logprobs"
        )
    return wanted


def _known(ids: Sequence[int], limits: SamplingLimits, param: str) -> tuple[int, ...]:
    unknown = next((i for i in ids if limits.vocab_size and i >= limits.vocab_size), None)
    if unknown is not None:
        raise InvalidRequest(
            f"{param}: {unknown} is no token id; this model has {limits.vocab_size}", param=param
        )
    return tuple(dict.fromkeys(ids))


def _bias(bias: Mapping[str, float], limits: SamplingLimits) -> dict[int, float]:
    """Keys are token ids, written as JSON writes keys: as strings."""
    values: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequest("logit_bias: keys should be token ids", param="logit_bias")
        values[int(key)] = float(value)
    _known(tuple(values), limits, "logit_bias")
    return values


def _bad_words(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as it is encoded at the start of a text and after a space."""
    texts = [text for word in filter(None, words) for text in (word, " " + word.lstrip(" "))]
    if not texts:
        return ()
    return tuple(dict.fromkeys(tuple(ids) for ids in tokenizer.encode_all(texts) if ids))
