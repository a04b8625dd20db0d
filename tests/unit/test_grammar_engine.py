"""Grammars in the engine, on the demo checkpoint: every output follows its grammar, whatever the
scheduler does, and whatever ends it."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import torch

from llm_service.engine.grammar_compiler import GrammarCompiler
from llm_service.policy.messages import (
    Abort,
    AbortedEvent,
    FailedEvent,
    FinishedEvent,
    GenerateRequest,
    TokensEvent,
)
from opticnerve.errors import InvalidRequest, UnsupportedFeature
from opticnerve.generation.grammars import compile_grammar, load_vocabulary
from opticnerve.generation.values import ChoiceOutput, FinishReason, Sampling
from tests.checkpoints import DEMO, EOS, VOCAB_SIZE
from tests.local_engine import LocalEngine
from tests.random_schemas import random_schema
from tests.runners import load_demo, request, tokens

SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square", "triangle"]},
        "sides": {"type": "integer", "minimum": 0, "maximum": 9},
        "names": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 3},
    },
    "required": ["shape", "sides", "names"],
    "additionalProperties": False,
}
COMPACT_OPTIONS = {"x-guidance": {"whitespace_flexible": False}}
OBJECT = f"start: %json {json.dumps(COMPACT_OPTIONS | SCHEMA)}"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # On a busy machine two wait for each other.


@functools.cache
def vocabulary() -> Any:
    return load_vocabulary(DEMO, (EOS,), VOCAB_SIZE)


def make_engine(**settings: Any) -> LocalEngine:
    return LocalEngine(*load_demo(), grammars=GrammarCompiler(vocabulary), **settings)


def asks(name: str, grammar: str = OBJECT, **sampling: Any) -> GenerateRequest:
    wanted = {"max_tokens": 120, "temperature": 1.5, "eos_token_ids": (EOS,), "seed": 5}
    return request(name, tokens(20), **{**wanted, **sampling}, grammar=grammar)


def text(ids: list[int] | tuple[int, ...]) -> str:
    return str(vocabulary().decode_str([token for token in ids if token != EOS]))


@pytest.mark.slow
def test_random_schemas_at_a_high_temperature() -> None:
    """``bench.structured`` does the same with a thousand."""
    engine = make_engine(max_num_seqs=16)
    schemas = {f"r{seed}": random_schema(seed) for seed in range(60)}
    requests = [
        asks(name, f"start: %json {json.dumps(COMPACT_OPTIONS | schema)}", seed=seed)
        for seed, (name, schema) in enumerate(schemas.items())
    ]
    ended = 0
    for (name, _), answer in engine.generate(requests).items():
        if reasons(engine, name) == [FinishReason.STOP]:
            jsonschema.validate(json.loads(text(answer.token_ids)), schemas[name])
            ended += 1
    assert ended > 30


def reasons(engine: LocalEngine, name: str) -> list[FinishReason]:
    return [
        message.delta.finish_reason
        for message in engine.messages
        if isinstance(message, TokensEvent)
        and message.request_id == name
        and message.delta.finish_reason is not None
    ]


def failure(engine: LocalEngine, name: str) -> Exception:
    (error,) = [
        m.error for m in engine.messages if isinstance(m, FailedEvent) and m.request_id == name
    ]
    return error


def outputs(engine: LocalEngine, *requests: GenerateRequest) -> list[list[int]]:
    return [answer.token_ids for _, answer in sorted(engine.generate(requests).items())]


def test_outputs_follow_their_schema_and_end_with_it() -> None:
    engine = make_engine()
    for ids in outputs(engine, *(asks(f"r{i:02}", seed=i) for i in range(12)), asks("s", n=3)):
        jsonschema.validate(json.loads(text(ids)), SCHEMA)
        assert EOS not in ids  # Nothing can follow: no token is spent on the end.
    assert reasons(engine, "r00") == [FinishReason.STOP]
    assert reasons(engine, "s") == [FinishReason.STOP] * 3


@pytest.mark.parametrize("ends", [{}, {"ignore_eos": True}, {"eos_token_ids": ()}])
def test_a_complete_grammar_ends_the_choice_whatever_else_would(ends: dict[str, Any]) -> None:
    engine = make_engine()
    (ids,) = outputs(engine, asks("r", 'start: "red square"', min_tokens=100, **ends))
    assert text(ids) == "red square"
    (last,) = [
        m.delta
        for m in engine.messages
        if isinstance(m, TokensEvent) and m.delta.finish_reason is not None
    ]
    assert (last.finish_reason, last.stop_token_id) == (FinishReason.STOP, None)


def test_a_grammar_of_nothing_ends_at_once() -> None:
    engine = make_engine()
    assert outputs(engine, asks("r", 'start: ""', n=2)) == [[], []]
    assert reasons(engine, "r") == [FinishReason.STOP] * 2


def test_where_a_grammar_may_end_every_ending_id_is_allowed() -> None:
    engine = make_engine()
    only = {"allowed_token_ids": (EOS,)}
    assert outputs(engine, asks("eos", "start: /[a-z]*/", **only)) == [[EOS]]
    stop = {"stop_token_ids": (7,), "allowed_token_ids": (7,), "ignore_eos": True}
    assert outputs(engine, asks("stop", "start: /[0-9]*/", **stop)) == [[7]]
    engine.engine.submit(asks("neither", "start: /[a-z]+/", **only))
    engine.run()
    assert "exclude every token" in str(failure(engine, "neither"))


def test_min_tokens_delays_the_end_of_what_can_go_on() -> None:
    (ids,) = outputs(make_engine(), asks("r", "start: /[a-z]*/", min_tokens=30))
    assert len(ids) > 30


def test_neighbours_are_left_alone() -> None:
    plain = [request(f"p{i}", tokens(20 + i, i), temperature=0.7, seed=i) for i in range(4)]
    alone = outputs(make_engine(), *plain)
    engine = make_engine()
    together = engine.generate([*plain, *(asks(f"g{i}", seed=i) for i in range(4))])
    assert [together[f"p{i}", 0].token_ids for i in range(4)] == alone


def test_preempted_choices_go_on_where_they_were() -> None:
    requests = [asks(f"r{i}", seed=i, n=2, max_tokens=60) for i in range(2)]
    roomy = outputs(make_engine(), *requests)
    tight = make_engine(kv_cache_tokens=112, prefix_caching=False)
    assert outputs(tight, *requests) == roomy
    assert tight.engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize("cut", [0, 1, 7])
def test_a_continuation_equals_the_whole(cut: int) -> None:
    ask = asks("r", n=2)
    whole = outputs(make_engine(), ask)
    given = tuple(ChoiceOutput(i, tuple(ids[:cut])) for i, ids in enumerate(whole))
    engine = make_engine()
    rest = outputs(engine, replace(ask, outputs=given))
    assert [ids[:cut] + more for ids, more in zip(whole, rest, strict=True)] == whole


def test_a_continuation_of_what_is_complete_ends_at_once() -> None:
    engine = make_engine()
    ask = asks("r")
    (ids,) = outputs(make_engine(), ask)
    given = (ChoiceOutput(0, tuple(ids)),)
    more = replace(ask, outputs=given)
    assert outputs(engine, more) == [[]]
    assert reasons(engine, "r") == [FinishReason.STOP]


def test_output_that_does_not_follow_the_grammar_is_refused() -> None:
    engine = make_engine()
    ask = asks("r")
    given = (ChoiceOutput(0, (9, 9, 9)),)
    engine.engine.submit(replace(ask, outputs=given))
    engine.run()
    error = failure(engine, "r")
    assert isinstance(error, InvalidRequest) and error.param == "outputs"


def test_a_bad_grammar_fails_its_request_alone() -> None:
    engine = make_engine()
    engine.engine.submit(asks("bad", "start: nowhere"))
    engine.engine.submit(asks("good"))
    engine.run()
    error = failure(engine, "bad")
    assert isinstance(error, InvalidRequest) and "nowhere" in error.message
    assert (error.param, error.code) == ("grammar", "invalid_grammar")
    assert reasons(engine, "good") == [FinishReason.STOP]


def test_a_grammar_that_exceeds_a_limit_fails_its_request_alone() -> None:
    """Twenty conditions at once: each token makes the lexer's state grow."""
    hard = "start: X\nX: " + " & ".join(f"/.*{letter}.*/" for letter in "abcdefghijklmnopqrst")
    engine = make_engine()
    for ask in (asks("hard", hard, ignore_eos=True), asks("good")):
        engine.engine.submit(ask)
    engine.run()
    error = failure(engine, "hard")
    assert isinstance(error, InvalidRequest) and error.code == "invalid_grammar"
    assert reasons(engine, "good") == [FinishReason.STOP]


def test_an_ambiguous_grammar_fails_before_its_tokens_take_long() -> None:
    """Its rows grow with the output, and the work with their cube."""
    engine = make_engine()
    for ask in (asks("hard", 'start: s\ns: s s s | s s | "a" | "b"'), asks("good")):
        engine.engine.submit(replace(ask, sampling=replace(ask.sampling, ignore_eos=True)))
    engine.run()
    error = failure(engine, "hard")
    assert isinstance(error, InvalidRequest) and "max is 500" in error.message
    assert reasons(engine, "good") == [FinishReason.STOP]


def test_a_vocabulary_that_cannot_be_read_refuses_grammars_alone() -> None:
    engine = LocalEngine(*load_demo())
    engine.engine.submit(asks("r"))
    engine.engine.submit(request("plain", tokens(20)))
    engine.run()
    assert isinstance(failure(engine, "r"), UnsupportedFeature)
    assert reasons(engine, "plain") == [FinishReason.LENGTH]


def test_a_request_may_end_while_its_grammar_compiles() -> None:
    engine = make_engine()
    engine.engine.submit(asks("gone"))
    engine.engine.handle(Abort("gone"))
    engine.engine.submit(asks("r"))
    engine.run()
    ended = [m for m in engine.messages if isinstance(m, AbortedEvent | FinishedEvent)]
    assert [type(event) for event in ended] == [AbortedEvent, FinishedEvent]


def test_the_same_grammar_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def counting(grammar: str, *args: Any) -> Any:
        compiled.append(grammar)
        return compile_grammar(grammar, *args)

    monkeypatch.setattr("llm_service.engine.grammar_compiler.compile_grammar", counting)
    engine = make_engine()
    engine.engine.submit(asks("gone"))
    engine.engine.submit(asks("stays"))
    engine.engine.handle(Abort("gone"))  # The other one waits for the same grammar.
    engine.run()
    assert reasons(engine, "stays") == [FinishReason.STOP]
    assert outputs(engine, asks("a", seed=1), asks("b", seed=1)) == 2 * outputs(
        make_engine(), asks("a", seed=1)
    )
    assert compiled == [OBJECT] * 2  # One in each engine.


def test_prompt_logprobs_come_with_a_grammar() -> None:
    engine = make_engine()
    ask = asks("r", prompt_logprobs=1)
    (ids,) = outputs(engine, ask)
    jsonschema.validate(json.loads(text(ids)), SCHEMA)
    assert len(engine.prompt_logprobs()["r"]) == len(ask.token_ids)


def test_logprobs_are_those_of_raw_logits() -> None:
    plain, bound = request("p", tokens(20), logprobs=3, max_tokens=1), asks("g", logprobs=3)
    answers = make_engine().generate([plain, bound])
    assert answers["g", 0].logprobs[0].top == answers["p", 0].logprobs[0].top


def test_sampling_holds_any_text_as_a_grammar() -> None:
    with pytest.raises(InvalidRequest, match="grammar"):
        Sampling(grammar=7)  # type: ignore[arg-type]
