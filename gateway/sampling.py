"""What a request asks for, the model's defaults and the server's limits, resolved to one value.

The decoder gets every field explicitly: it knows neither the model's defaults nor the gateway's.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Defaults:
    """What applies where a request says nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Limits:
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
    eos = dict.fromkeys([*_ids(ends), *_ids(tokenizer.eos_token_id)])
    return Defaults(**_sampling_defaults(chosen), eos_token_ids=tuple(eos))


def _sampling_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The usable part of a generation_config.json. ``do_sample`` absent or false means greedy in
    Hugging Face; servers take temperature as it stands, and 1 without one."""
    found: dict[str, Any] = {}
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        value = config.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
    if found.get("temperature", 1.0) < 0 or not 0 < found.get("top_p", 1.0) <= 1:
        raise ConfigError("generation_config.json: temperature or top_p is out of range")
    top_k, limit = config.get("top_k"), config.get("max_new_tokens")
    if isinstance(top_k, int) and not isinstance(top_k, bool):
        found["top_k"] = max(top_k, 0)
    if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0:
        found["max_tokens"] = limit
    return found


def _read(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``; empty without the file. Raises ConfigError."""
    try:
        return read_object(file) or {}
    except CheckpointError as error:
        raise ConfigError(error.message) from error


def _ids(value: Any) -> list[int]:
    """``eos_token_id`` as files hold it: an id, a list of ids, or null."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def resolve(
    request: ChatRequest,
    *,
    prompt_tokens: int,
    image_tokens: int,
    defaults: Defaults,
    limits: Limits,
    tokenizer: Tokenizer,
) -> Sampling:
    """Raises ContextLengthExceeded for a prompt (with the output that was asked for) that does not
    fit, and InvalidRequest for values that contradict each other or the model."""
    fields: SamplingFields = request
    max_tokens = output_limit(request, prompt_tokens, image_tokens, defaults, limits)
    min_tokens = fields.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens: {min_tokens} exceeds max_tokens, {max_tokens}", param="min_tokens"
        )
    top_k = defaults.top_k if fields.top_k is None else max(fields.top_k, 0)
    temperature, top_p = _nucleus(fields, defaults)
    return Sampling(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        seed=secrets.randbits(64) if fields.seed is None else fields.seed % 2**64,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=_or(fields.min_p, defaults.min_p),
        frequency_penalty=_or(fields.frequency_penalty, 0.0),
        presence_penalty=_or(fields.presence_penalty, 0.0),
        repetition_penalty=_or(fields.repetition_penalty, defaults.repetition_penalty),
        n=fields.n or 1,
        stop_token_ids=_known(fields.stop_token_ids or (), limits, "stop_token_ids"),
        ignore_eos=fields.ignore_eos,
        eos_token_ids=defaults.eos_token_ids,
        logprobs=num_logprobs(request, limits),
        logit_bias=_bias(fields.logit_bias or {}, limits),
        bad_words=_bad_words(fields.bad_words or (), tokenizer),
        allowed_token_ids=_known(fields.allowed_token_ids or (), limits, "allowed_token_ids"),
    )


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
    limits: Limits,
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


def num_logprobs(request: ChatRequest, limits: Limits) -> int | None:
    """None without log-probabilities. Raises InvalidRequest beyond the server's limit."""
    if not request.logprobs:
        return None
    wanted = request.top_logprobs or 0
    if wanted > limits.max_logprobs:
        raise InvalidRequest(
            f"top_logprobs: at most {limits.max_logprobs} on this server", param="top_logprobs"
        )
    return wanted


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _nucleus(fields: SamplingFields, defaults: Defaults) -> tuple[float, float]:
    """(temperature, top_p). A top_p of 0 leaves the likeliest token alone; to the worker it would
    be no bound."""
    top_p = _or(fields.top_p, defaults.top_p)
    return (0.0, 1.0) if top_p == 0.0 else (_or(fields.temperature, defaults.temperature), top_p)


def _known(ids: Sequence[int], limits: Limits, param: str) -> tuple[int, ...]:
    unknown = next((i for i in ids if limits.vocab_size and i >= limits.vocab_size), None)
    if unknown is not None:
        raise InvalidRequest(
            f"{param}: {unknown} is no token id; this model has {limits.vocab_size}", param=param
        )
    return tuple(dict.fromkeys(ids))


def _bias(bias: Mapping[str, float], limits: Limits) -> dict[int, float]:
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
