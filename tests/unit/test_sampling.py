"""Request, model defaults and limits become one explicit value, or one clear refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.api.chat import ChatRequest
from gateway.api.schemas.parsing import parse
from gateway.job import ChatPrompt
from gateway.prompt.tokenizer import Tokenizer
from gateway.sampling import (
    Defaults,
    SamplingLimits,
    check_choices,
    load_defaults,
    resolve_sampling,
)
from opticnerve.errors import ConfigError, ContextLengthExceeded, InvalidRequest
from opticnerve.generation.values import Sampling
from tests import vocabularies as v

LIMITS = SamplingLimits(max_model_len=100, max_logprobs=5, vocab_size=640)


def defaults_of(max_tokens: int | None = None, **fields: Any) -> Defaults:
    return Defaults(Sampling(**{"temperature": 1.0, **fields}), max_tokens)


EOS = defaults_of(eos_token_ids=(629,))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(v.DEMO)


def resolved(
    tokenizer: Tokenizer, defaults: Defaults = EOS, prompt: int = 40, images: int = 0, **fields: Any
) -> Sampling:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    return resolve_sampling(
        parse(ChatRequest, body)[0].options,
        kind=ChatPrompt,
        prompt_tokens=prompt,
        item_tokens=images,
        defaults=defaults,
        limits=LIMITS,
        tokenizer=tokenizer,
    )


def test_a_bare_request(tokenizer: Tokenizer) -> None:
    first, second = resolved(tokenizer), resolved(tokenizer)
    assert first.max_tokens == 60  # What the context leaves.
    assert (first.temperature, first.top_p, first.top_k, first.repetition_penalty) == (1, 1, 0, 1)
    assert first.eos_token_ids == (629,)
    assert (first.n, first.logprobs, first.min_tokens) == (1, None, 0)
    assert first.seed != second.seed
    assert 0 <= first.seed < 2**64


def test_more_choices_than_the_server_allows_are_refused_by_the_flag() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    for n, max_n in ((None, 1), (4, 4), (128, 128)):
        check_choices(parse(ChatRequest, {**body, "n": n})[0].options, max_n)
    with pytest.raises(InvalidRequest, match=r"n: at most 4 .*--max-n") as caught:
        check_choices(parse(ChatRequest, {**body, "n": 5})[0].options, 4)
    assert caught.value.param == "n"


def test_the_request_wins_over_the_model(tokenizer: Tokenizer) -> None:
    defaults = defaults_of(
        temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05, max_tokens=30
    )
    silent = resolved(tokenizer, defaults)
    assert (silent.temperature, silent.top_p, silent.top_k) == (0.7, 0.8, 20)
    assert (silent.repetition_penalty, silent.max_tokens) == (1.05, 30)
    loud = resolved(
        tokenizer, defaults, temperature=0, top_p=1, top_k=-1, repetition_penalty=1, max_tokens=50
    )
    assert (loud.temperature, loud.top_p, loud.top_k) == (0, 1, 0)
    assert (loud.repetition_penalty, loud.max_tokens) == (1, 50)
    assert resolved(tokenizer, defaults, prompt=90).max_tokens == 10  # A default bends to the room.


def test_a_nucleus_of_nothing_is_greedy(tokenizer: Tokenizer) -> None:
    value = resolved(tokenizer, defaults_of(temperature=0.7), top_p=0, temperature=1.5)
    assert (value.temperature, value.top_p) == (0, 1)  # A worker reads top_p 0 as no bound.
    assert resolved(tokenizer, defaults_of(temperature=0.7), top_p=0.0).temperature == 0
    assert resolved(tokenizer, temperature=1.5, top_p=1e-9).temperature == 1.5


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("value", [-1, -1.0])
def test_no_limit_is_what_the_context_leaves(
    tokenizer: Tokenizer, field: str, value: float
) -> None:
    fields = {field: value}
    assert resolved(tokenizer, prompt=40, **fields).max_tokens == 60
    assert resolved(tokenizer, defaults_of(max_tokens=30), prompt=40, **fields).max_tokens == 60
    with pytest.raises(ContextLengthExceeded) as caught:
        resolved(tokenizer, prompt=100, **fields)
    assert caught.value.param == "messages" and "-1" not in caught.value.message


def test_seeds(tokenizer: Tokenizer) -> None:
    assert resolved(tokenizer, seed=42).seed == 42
    assert resolved(tokenizer, seed=-1).seed == 2**64 - 1


def test_log_probabilities(tokenizer: Tokenizer) -> None:
    assert resolved(tokenizer, logprobs=True).logprobs == 0
    assert resolved(tokenizer, logprobs=True, top_logprobs=5).logprobs == 5
    assert resolved(tokenizer, logprobs=False).logprobs is None
    with pytest.raises(InvalidRequest, match="at most 5") as caught:
        resolved(tokenizer, logprobs=True, top_logprobs=6)
    assert caught.value.param == "top_logprobs"


@pytest.mark.parametrize(
    ("fields", "prompt", "images", "param", "texts"),
    [
        ({"max_tokens": 61}, 40, 0, "max_tokens", ["100 tokens", "needs 40", "61", "at most 60"]),
        ({"max_completion_tokens": 61}, 40, 0, "max_completion_tokens", ["at most 60"]),
        ({}, 100, 0, "messages", ["needs 100", "a shorter conversation"]),
        ({"max_tokens": 5}, 150, 90, "messages", ["90 of them for pictures", "smaller pictures"]),
    ],
)
def test_what_does_not_fit(
    tokenizer: Tokenizer, fields: Any, prompt: int, images: int, param: str, texts: list[str]
) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        resolved(tokenizer, prompt=prompt, images=images, **fields)
    assert caught.value.param == param
    assert caught.value.code == "context_length_exceeded"
    for text in texts:
        assert text in caught.value.message


def test_the_last_token_fits(tokenizer: Tokenizer) -> None:
    assert resolved(tokenizer, prompt=99).max_tokens == 1
    assert resolved(tokenizer, max_tokens=60).max_tokens == 60


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"stop_token_ids": [640]}, "stop_token_ids"),
        ({"allowed_token_ids": [1, 999]}, "allowed_token_ids"),
        ({"logit_bias": {"640": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"\u0661": 1}}, "logit_bias"),
    ],
)
def test_contradictions(tokenizer: Tokenizer, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolved(tokenizer, **fields)
    assert caught.value.param == param


def test_ids_and_words(tokenizer: Tokenizer) -> None:
    value = resolved(
        tokenizer, stop_token_ids=[5, 5, 6], logit_bias={"7": 2}, bad_words=["cat", ""], n=3
    )
    assert value.stop_token_ids == (5, 6)
    assert value.logit_bias == {7: 2.0}
    assert value.n == 3
    spelled = {tokenizer.decode(ids) for ids in value.bad_words}
    assert spelled == {"cat", " cat"}


def test_defaults_of_the_demo(tokenizer: Tokenizer) -> None:
    config = json.loads((v.DEMO / "config.json").read_text())["text_config"]
    defaults = load_defaults("auto", v.DEMO, tokenizer, config)
    assert defaults == defaults_of(eos_token_ids=(629,))


def test_where_defaults_come_from(tokenizer: Tokenizer, tmp_path: Path) -> None:
    own = {"eos_token_id": [1, 2], "temperature": 0.6, "top_k": 20, "max_new_tokens": 9}
    other = {"top_p": 0.5, "top_k": None, "temperature": True}
    for name, config in (("own", own), ("other", other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "generation_config.json").write_text(json.dumps(config))
    auto = load_defaults("auto", tmp_path / "own", tokenizer, {})
    assert auto == defaults_of(temperature=0.6, top_k=20, max_tokens=9, eos_token_ids=(1, 2, 629))
    neutral = load_defaults("neutral", tmp_path / "own", tokenizer, {})
    assert neutral == defaults_of(eos_token_ids=(1, 2, 629))
    elsewhere = load_defaults(str(tmp_path / "other"), tmp_path / "own", tokenizer, {})
    assert elsewhere == defaults_of(top_p=0.5, eos_token_ids=(1, 2, 629))
    configured = load_defaults("auto", tmp_path, tokenizer, {"eos_token_id": 3})
    assert configured == defaults_of(eos_token_ids=(3, 629))


def test_defaults_that_cannot_be_used(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither auto"):
        load_defaults(str(tmp_path / "missing"), v.DEMO, tokenizer, {})
    for text in ("{", "[]", '{"temperature": -1}', '{"top_p": 0}'):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(ConfigError):
            load_defaults("auto", tmp_path, tokenizer, {})


def test_defaults_of_the_flag_win(tokenizer: Tokenizer, tmp_path: Path) -> None:
    own = {"temperature": 0.6, "top_k": 20, "max_new_tokens": 9}
    (tmp_path / "generation_config.json").write_text(json.dumps(own))

    def loaded(**given: Any) -> Defaults:
        return load_defaults("auto", tmp_path, tokenizer, {}, json.dumps(given))

    asked = loaded(temperature=0.2, frequency_penalty=1, max_tokens=5, top_p=None)
    expected = {"temperature": 0.2, "top_k": 20, "frequency_penalty": 1.0, "eos_token_ids": (629,)}
    assert asked == defaults_of(**expected, max_tokens=5)
    greedy = defaults_of(temperature=0.0, top_p=1.0, top_k=0, max_tokens=9, eos_token_ids=(629,))
    assert loaded(top_p=0, top_k=-1) == greedy
    value = resolved(tokenizer, defaults=asked, temperature=0.9)
    assert (value.temperature, value.frequency_penalty, value.max_tokens) == (0.9, 1.0, 5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "a JSON object"),
        ('{"temperature": 3}', "temperature: should be less than or equal to 2"),
        ('{"top_k": 1.5}', "top_k: should be an integer"),
        ('{"max_tokens": 0}', "max_tokens"),
        ('{"temprature": 1}', "unknown field (did you mean temperature?)"),
        ('{"n": 2}', "n: unknown field"),
        ('{"stop": "x"}', "stop: unknown field"),
    ],
)
def test_a_flag_of_defaults_that_is_wrong(text: str, said: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError) as caught:
        load_defaults("auto", v.DEMO, tokenizer, {}, text)
    assert caught.value.message.startswith("--default-sampling: ") and said in caught.value.message


def test_words_are_encoded_all_at_once(tokenizer: Tokenizer) -> None:
    """As each is by itself; in a step that lets other threads go on."""
    words = ["cat", " dog", "", "cat", "b" * 1024, "\n"]
    found = set(resolved(tokenizer, bad_words=words).bad_words)
    one_by_one = {
        tuple(tokenizer.encode(text))
        for word in filter(None, words)
        for text in (word, " " + word.lstrip(" "))
    }
    assert found == one_by_one
