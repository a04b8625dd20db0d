"""One request's sampling parameters: its fields, the model's defaults and the server's limits.

The LLM worker gets every field explicitly: it knows neither the model's defaults nor the gateway's.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeGuard

from gateway.api.schemas.parsing import parse
from gateway.api.schemas.sampling import DefaultSampling, SamplingFields
from gateway.job import UNLIMITED, GenerationOptions, PromptKind, prompt_too_long
from gateway.prompt.tokenizer import Tokenizer
from opticnerve.checkpoints.json_files import read_object
from opticnerve.errors import (
    CheckpointError,
    ConfigError,
    InvalidRequest,
)
from opticnerve.generation.values import Sampling

LARGEST_MAX_TOKENS = 2**31 - 1

# Fields that a request and Sampling share. resolve_sampling converts those whose types differ.
SHARED_FIELDS = tuple(
    each.name for each in fields(Sampling) if each.name in SamplingFields.model_fields
)


@dataclass(frozen=True, slots=True)
class Defaults:
    """Values of fields that a request omits. ``max_tokens`` None: as many as the context leaves."""

    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0))
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class SamplingLimits:
    """``max_model_len``: prompt and output tokens together; the smallest of all LLM workers."""

    max_model_len: int
    max_logprobs: int = 20
    vocab_size: int = 0  # 0: unknown, so token ids are not checked.


def load_defaults(
    source: str,
    checkpoint_path: Path,
    tokenizer: Tokenizer,
    text_config: Mapping[str, Any],
    default_sampling: str | None = None,
) -> Defaults:
    """``source``: the value of ``--generation-config``: ``auto`` (the checkpoint's), ``neutral``,
    or a directory. ``default_sampling``: the value of ``--default-sampling``, which takes
    precedence. End-of-sequence ids always come from the model: the union of those in its
    generation_config.json, its configuration and its tokenizer. Raises ConfigError."""
    model_config = _read(checkpoint_path / "generation_config.json")
    if source == "auto":
        chosen = model_config
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
    ends = {**text_config, **model_config, **chosen}.get("eos_token_id")
    eos = tuple(dict.fromkeys([*_ids(ends), *_ids(tokenizer.eos_token_id)]))
    limit = chosen.get("max_new_tokens")
    defaults = Defaults(
        replace(_model_sampling(chosen), eos_token_ids=eos),
        limit if _is_integer(limit) and limit > 0 else None,
    )
    return _with_given(defaults, default_sampling) if default_sampling else defaults


def _with_given(defaults: Defaults, text: str) -> Defaults:
    """``defaults`` overridden by the fields of ``--default-sampling``. Raises ConfigError."""
    try:
        given, _ = parse(DefaultSampling, text)
        values = {name: getattr(given, name) for name in given.model_fields_set}
        limit = values.pop("max_tokens", defaults.max_tokens)
        return Defaults(_with_fields(defaults.sampling, values), limit)
    except InvalidRequest as error:
        param = "default_sampling"
        raise ConfigError(f"--default-sampling: {error.message}", param=param) from error


def _model_sampling(config: Mapping[str, Any]) -> Sampling:
    """The sampling fields of a generation_config.json. In Hugging Face, ``do_sample`` absent or
    false means greedy; like other servers, this one ignores it and uses the temperature, or 1 if
    there is none."""
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
    """Reads ``eos_token_id``, which may be an id, a list of ids, or null."""
    values = value if isinstance(value, list) else [value]
    return [each for each in values if _is_integer(each)]


def resolve_sampling(
    options: GenerationOptions,
    *,
    kind: type[PromptKind],
    prompt_tokens: int,
    item_tokens: int,
    defaults: Defaults,
    limits: SamplingLimits,
    tokenizer: Tokenizer,
) -> Sampling:
    """The sampling parameters for the LLM worker. ``kind``: the prompt's, for error messages.

    Raises ContextLengthExceeded if the prompt and the requested output do not fit, and
    InvalidRequest for values that contradict each other or the model.
    """
    asked = options.sampling
    shared = {name: getattr(asked, name) for name in SHARED_FIELDS}
    values = {name: value for name, value in shared.items() if value is not None}
    values |= {
        "max_tokens": output_limit(options, kind, prompt_tokens, item_tokens, defaults, limits),
        "seed": secrets.randbits(64) if asked.seed is None else asked.seed % 2**64,
        "logprobs": num_logprobs(options.top_logprobs, options.top_logprobs_field, limits),
        "prompt_logprobs": prompt_alternatives(options, limits),
        "logit_bias": _bias(asked.logit_bias or {}, limits),
        "bad_words": _bad_words(asked.bad_words or (), tokenizer),
    }
    for name in ("stop_token_ids", "allowed_token_ids"):
        values[name] = tuple(dict.fromkeys(shared[name] or ()))
        check_token_ids(values[name], limits, name)
    sampling = _with_fields(defaults.sampling, values)
    if sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequest(
            f"min_tokens: {sampling.min_tokens} exceeds max_tokens, {sampling.max_tokens}",
            param="min_tokens",
        )
    return sampling


def _with_fields(sampling: Sampling, values: Mapping[str, Any]) -> Sampling:
    """``sampling`` with fields of a request. Raises InvalidRequest."""
    values = dict(values)
    if "top_k" in values:
        values["top_k"] = max(values["top_k"], 0)
    if values.get("top_p") == 0:  # Means the most likely token; to a worker, 0 means off.
        values |= {"temperature": 0.0, "top_p": 1.0}
    return replace(sampling, **values)


def check_choices(options: GenerationOptions, max_n: int) -> None:
    """Raises InvalidRequest for more choices than the server allows."""
    if (options.sampling.n or 1) > max_n:
        raise InvalidRequest(
            f"n: at most {max_n} on this server (--max-n); ask for fewer choices, or "
            "send several requests",
            param="n",
        )


def prompt_limit(options: GenerationOptions, limits: SamplingLimits) -> int | None:
    """The number of the prompt's tokens to keep; None: all. Raises InvalidRequest."""
    truncation = options.truncation
    if truncation is None:
        return None
    if truncation.tokens == UNLIMITED:
        answer = 1 if options.max_tokens in (None, UNLIMITED) else options.max_tokens
        return max(1, limits.max_model_len - (answer or 1))
    if truncation.tokens > limits.max_model_len:
        raise InvalidRequest(
            f"truncate_prompt_tokens: at most {limits.max_model_len}, the model's context length; "
            "-1 keeps as many as fit",
            param="truncate_prompt_tokens",
        )
    return truncation.tokens


def output_limit(
    options: GenerationOptions,
    kind: type[PromptKind],
    prompt_tokens: int,
    item_tokens: int,
    defaults: Defaults,
    limits: SamplingLimits,
) -> int:
    """The most tokens that a choice may have: the request's limit, else the model's default, else
    all that the context leaves. Raises ContextLengthExceeded."""
    room = limits.max_model_len - prompt_tokens
    unlimited = options.max_tokens == UNLIMITED
    asked = None if unlimited else options.max_tokens
    if asked == 0:
        asked = 1  # A worker always samples one token after the prompt; it is not shown.
    if room >= (asked or 1):
        most = LARGEST_MAX_TOKENS if unlimited else defaults.max_tokens or LARGEST_MAX_TOKENS
        return asked or min(most, room)
    if room >= 1 and options.shorten_to_fit:
        return room
    pictures = f" ({item_tokens} of them for pictures)" if item_tokens else ""
    if room < 1:
        remedy = f"send {kind.shorter}" + (", or fewer or smaller pictures" if pictures else "")
    else:
        remedy = f"ask for at most {room}, or send {kind.shorter}"
    wanted = f" and {asked} for the answer" if asked else ""
    needed = f"{prompt_tokens}{pictures}{wanted}"
    error = prompt_too_long(kind, limits.max_model_len, needed, remedy)
    error.param = kind.field if room < 1 else options.max_tokens_field
    raise error


def num_logprobs(wanted: int | None, name: str, limits: SamplingLimits) -> int | None:
    """The number of alternatives to report for each token; None: no log-probabilities. ``name``:
    the request's field, for errors. Raises InvalidRequest."""
    if wanted is not None and wanted > limits.max_logprobs:
        raise InvalidRequest(f"{name}: at most {limits.max_logprobs} on this server", param=name)
    return wanted


def prompt_alternatives(options: GenerationOptions, limits: SamplingLimits) -> int | None:
    """As ``num_logprobs``, for the prompt's tokens."""
    asked = num_logprobs(options.prompt_logprobs, "prompt_logprobs", limits)
    if not options.echo or options.top_logprobs is None:
        return asked
    return max(asked or 0, options.top_logprobs)


def check_token_ids(ids: Collection[int], limits: SamplingLimits, param: str) -> None:
    """Raises InvalidRequest for an id that the model does not have."""
    if limits.vocab_size and max(ids, default=0) >= limits.vocab_size:
        unknown = next(i for i in ids if i >= limits.vocab_size)
        raise InvalidRequest(
            f"{param}: {unknown} is no token id; this model has {limits.vocab_size}", param=param
        )


def _bias(bias: Mapping[str, float], limits: SamplingLimits) -> dict[int, float]:
    """Biases by token id, from JSON, where the ids are strings. Raises InvalidRequest."""
    values: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequest("logit_bias: keys should be token ids", param="logit_bias")
        values[int(key)] = float(value)
    check_token_ids(values.keys(), limits, "logit_bias")
    return values


def _bad_words(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The token ids of each word, both as it is encoded at the start of a text and after a
    space."""
    texts = [text for word in filter(None, words) for text in (word, " " + word.lstrip(" "))]
    if not texts:
        return ()
    return tuple(dict.fromkeys(tuple(ids) for ids in tokenizer.encode_all(texts) if ids))
