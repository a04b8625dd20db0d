"""Values of media and embeddings cross the wire whole."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from google.protobuf.message import Message

from encoder_service.encoder import ItemRequest, StageTimings
from opticnerve.embeddings.ref import EmbeddingRef, Location, TensorSpec
from opticnerve.media.plan import Grid, Modality, Overrides, Plan, Span, SpanAttention
from opticnerve.pb import embedding_pb2 as pb
from opticnerve.pb import encoder_pb2, llm_pb2
from opticnerve.rpc import convert

PLAN = Plan(Modality.VIDEO, "png", 84, 56, 6, 112, 140, Grid(2, 8, 10), 40, 160, 3, 0.5)
SPAN = Span(7, 40, 1, 20, Modality.IMAGE, Grid(1, 8, 10), 0.5, SpanAttention.BIDIRECTIONAL)
REF = EmbeddingRef(
    "a" * 64,
    "f" * 64,
    (TensorSpec("rows", "BF16", (40, 8)), TensorSpec("deepstack.0", "F32", (40, 8))),
    40,
    Location("tier", True, "encoder:7001", b"rows"),
)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Plan, pb.Plan),
        (Grid, pb.Grid),
        (Span, llm_pb2.Span),
        (EmbeddingRef, pb.EmbeddingRef),
        (Location, pb.Location),
        (TensorSpec, pb.TensorSpec),
        (Overrides, pb.ProcessorOverrides),
        (ItemRequest, encoder_pb2.EncodeHeader),
        (StageTimings, encoder_pb2.EncodeTimings),
    ],
)
def test_class_and_message_have_the_same_fields(value: type[Any], message: type[Message]) -> None:
    compared = {each.name for each in fields(value) if each.compare}
    assert compared == {each.name for each in message.DESCRIPTOR.fields}


def test_every_field_travels() -> None:
    assert convert.plan_from_pb(convert.plan_to_pb(PLAN)) == PLAN
    assert convert.span_from_pb(convert.span_to_pb(SPAN)) == SPAN
    assert convert.ref_from_pb(convert.ref_to_pb(REF)) == REF
    for overrides in (
        Overrides(),
        Overrides(1, 2, None),
        Overrides(background=0),
        Overrides(one_of_several=True),
    ):
        assert convert.overrides_from_pb(convert.overrides_to_pb(overrides)) == overrides


def test_what_an_earlier_release_leaves_out_has_its_default() -> None:
    plan = convert.plan_from_pb(pb.Plan())
    assert (plan.modality, plan.orientation, plan.frames) == (Modality.IMAGE, 1, 1)
    span = convert.span_from_pb(llm_pb2.Span())
    assert (span.modality, span.attention) == (Modality.IMAGE, SpanAttention.CAUSAL)
