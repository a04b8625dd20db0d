"""The values of generation and their messages: the same fields, and nothing lost on the way."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor

from opticnerve.errors import InvalidRequest
from opticnerve.generation.values import (
    ChoiceOutput,
    Delta,
    Done,
    FinishReason,
    Logprob,
    PositionLogprobs,
    Sampling,
    Timings,
    Usage,
)
from opticnerve.pb import llm_pb2 as pb
from opticnerve.rpc import convert

TOP = (Logprob(4, -0.25, 1), Logprob(7, -2.0, 2))
POSITIONS = (PositionLogprobs(), PositionLogprobs(TOP[0], TOP), PositionLogprobs(TOP[1]))
SAMPLING = Sampling(
    max_tokens=7,
    min_tokens=2,
    temperature=0.5,
    top_p=0.25,
    top_k=3,
    min_p=0.125,
    frequency_penalty=-0.5,
    presence_penalty=0.75,
    repetition_penalty=1.5,
    seed=2**64 - 1,
    n=4,
    stop_token_ids=(1, 2),
    ignore_eos=True,
    eos_token_ids=(3,),
    logprobs=0,
    prompt_logprobs=5,
    logit_bias={6: -1.5},
    bad_words=((1,), (2, 3)),
    allowed_token_ids=(8, 9),
    grammar="start: /a/",
)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Sampling, pb.SamplingParams),
        (ChoiceOutput, pb.ChoiceOutput),
        (Delta, pb.TokenDelta),
        (Logprob, pb.TokenLogprob),
        (PositionLogprobs, pb.PositionLogprobs),
        (Usage, pb.Usage),
        (Timings, pb.GenerateTimings),
        (Done, pb.Done),
    ],
)
def test_a_message_has_the_fields_of_its_class(cls: Any, message: Any) -> None:
    names = {each.name for each in message.DESCRIPTOR.fields}
    assert names == set(cls._fields if cls is Logprob else (each.name for each in fields(cls)))


def test_every_reason_has_its_number() -> None:
    names = pb.FinishReason.DESCRIPTOR.values_by_name
    wire = {name.removeprefix("FINISH_REASON_") for name in names}
    assert wire == {"UNSPECIFIED", *(each.name for each in FinishReason)}


def test_every_field_of_sampling_arrives() -> None:
    neutral = Sampling()
    for each in fields(Sampling):
        assert getattr(SAMPLING, each.name) != getattr(neutral, each.name), each.name
    message = pb.SamplingParams.FromString(convert.sampling_to_pb(SAMPLING).SerializeToString())
    assert convert.sampling_from_pb(message) == SAMPLING


def test_what_a_message_leaves_out_is_neutral() -> None:
    neutral = Sampling(max_tokens=0, eos_token_ids=())
    assert convert.sampling_from_pb(pb.SamplingParams()) == neutral
    assert convert.sampling_from_pb(convert.sampling_to_pb(Sampling(max_tokens=0))) == neutral


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 100.5),
        ("temperature", float("nan")),
        ("top_p", 1.01),
        ("top_p", -0.01),
        ("min_p", 1.01),
        ("frequency_penalty", 101.0),
        ("presence_penalty", -101.0),
        ("repetition_penalty", 1e-4),
        ("repetition_penalty", 101.0),
        ("logit_bias", {1: 1e31}),
        ("logit_bias", {1: float("nan")}),
        ("bad_words", [pb.TokenSequence()]),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        convert.sampling_from_pb(pb.SamplingParams(**{field: value}))
    assert caught.value.param == field


@pytest.mark.parametrize(
    "delta",
    [
        Delta(0, 0, (5,)),
        Delta(2, 7, (5, 6, 7), POSITIONS),
        Delta(1, 3, (), (), FinishReason.LENGTH),
        Delta(1, 3, (9,), (), FinishReason.STOP, 9),
        Delta(1, 3, (0,), (), FinishReason.STOP, 0),
        Delta(1, 3, (0,), (), FinishReason.STOP),
        Delta(1, 3, (), (), FinishReason.ABORT),
    ],
)
def test_a_delta_arrives(delta: Delta) -> None:
    message = pb.TokenDelta.FromString(convert.delta_to_pb(delta).SerializeToString())
    assert convert.delta_from_pb(message) == delta


def test_the_end_and_what_continues_arrive() -> None:
    done = Done(Usage(1, 2, 3, 4), Timings(1.5, 2.5, 3.5, 4.5, 5.5, 6))
    assert convert.done_from_pb(convert.done_to_pb(done)) == done
    output = ChoiceOutput(2, (4, 5), True)
    assert convert.output_from_pb(convert.output_to_pb(output)) == output


def test_stages_are_the_milliseconds() -> None:
    milliseconds = [
        each.name
        for each in pb.GenerateTimings.DESCRIPTOR.fields
        if each.type == FieldDescriptor.TYPE_DOUBLE
    ]
    assert [f"{name}_ms" for name in Timings(1, 2, 3, 4, 5, 6).stages] == milliseconds


def test_a_long_prompts_logprobs_travel_in_small_messages() -> None:
    top = tuple(Logprob(token, -1.0 - token, token + 1) for token in range(20))
    scored = PositionLogprobs(top[0], top)
    positions = (PositionLogprobs(), *[scored] * 2_000)
    pieces = list(convert.prompt_pieces(positions))
    assert all(piece.ByteSize() <= 2 * convert.PROMPT_PIECE_BYTES for piece in pieces)
    found = [convert.positions_from_pb(piece.positions) for piece in pieces]
    assert tuple(each for piece in found for each in piece) == positions and len(pieces) > 10
    assert list(convert.prompt_pieces(())) == []
