"""Numbers that no message carries are the caller's error, by name, before anything is sent."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from opticnerve.client import AsyncLLMClient, MultiMediaInfo, Sampling, Tensors
from opticnerve.client.contents import place_tensors
from opticnerve.client.encoder import plan_picture
from opticnerve.errors import InvalidRequest
from opticnerve.generation.values import read_token_ids
from opticnerve.media.plan import Grid, Overrides
from opticnerve.rpc.convert import sampling_to_pb
from tests.encoders import demo_layout, picture

UINT32, UINT64 = 2**32 - 1, 2**64 - 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("seed", UINT64 + 1),
        ("max_tokens", -1),
        ("max_tokens", UINT32 + 1),
        ("max_tokens", 1.5),
        ("max_tokens", "16"),
        ("max_tokens", None),
        ("min_tokens", -1),
        ("top_k", -1),
        ("n", -1),
        ("logprobs", -1),
        ("prompt_logprobs", UINT32 + 1),
        ("temperature", "hot"),
        ("top_p", None),
        ("min_p", [0.1]),
        ("frequency_penalty", "x"),
        ("presence_penalty", "x"),
        ("repetition_penalty", 1j),
        ("stop_token_ids", (5, UINT32 + 1)),
        ("stop_token_ids", 5),
        ("eos_token_ids", (-1,)),
        ("eos_token_ids", ("</s>",)),
        ("allowed_token_ids", (1.5,)),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: "much"}),
        ("logit_bias", [5]),
        ("stop_token_ids", "</s>"),
        ("bad_words", ((1, -2),)),
        ("bad_words", (1, 2)),
    ],
)
def test_sampling_of_other_values_names_the_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        Sampling(**{name: value})
    assert caught.value.param == name


def test_what_sampling_takes_a_message_carries() -> None:
    sampling_to_pb(Sampling())
    message = sampling_to_pb(
        Sampling(
            max_tokens=UINT32,
            seed=UINT64,
            n=np.int64(3),  # type: ignore[arg-type]
            temperature=np.float32(0.5),  # type: ignore[arg-type]
            top_p=1,
            logprobs=0,
            stop_token_ids=(0, UINT32),
            logit_bias={UINT32: -1},
            bad_words=((1, 2),),
        )
    )
    assert (message.seed, message.n, message.temperature) == (UINT64, 3, 0.5)
    assert list(message.stop_token_ids) == [0, UINT32] and message.HasField("logprobs")


@pytest.mark.parametrize(
    "token_ids",
    [
        [1, -1], [UINT32 + 1], [1.0], ["a"], [None], b"text", "text", None, 5, {1: 2}, [[1, 2]],
        np.ones((1, 3), np.int64), torch.ones(1, 3, dtype=torch.int64), np.ones(3),
    ],
)  # fmt: skip
def test_prompts_are_token_ids(token_ids: Any) -> None:
    async def main() -> None:
        async with AsyncLLMClient("127.0.0.1:1") as client:
            with pytest.raises(InvalidRequest, match="token_ids"):
                await client.generate(token_ids)

    asyncio.run(main())


@pytest.mark.parametrize("ids", [[5, 6], (5, 6), range(5, 7), iter([5, 6]), np.array([5, 6])])
def test_any_sequence_or_array_of_ids_is_one(ids: Any) -> None:
    assert read_token_ids("token_ids", ids) == (5, 6)
    assert read_token_ids("token_ids", torch.tensor([5, 6])) == (5, 6)


def test_sampling_is_a_sampling() -> None:
    async def main() -> None:
        async with AsyncLLMClient("127.0.0.1:1") as client:
            with pytest.raises(InvalidRequest, match=r"a Sampling\(\.\.\.\), not dict"):
                await client.generate([1], sampling={"max_tokens": 5})  # type: ignore[arg-type]

    asyncio.run(main())


def test_contents_whose_numbers_no_message_carries_are_refused() -> None:
    rows = torch.ones(4, 8)
    for grid in (Grid(1, -2, 2), Grid(1, 2, UINT32 + 1), Grid(1, 2, 1.0)):  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="grid"):
            place_tensors(5, Tensors(rows, grid=grid))
    with pytest.raises(InvalidRequest, match="seconds_per_grid"):
        place_tensors(5, Tensors(rows, seconds_per_grid="1"))  # type: ignore[arg-type]
    for token_id in (-1, UINT32 + 1, "<image>"):
        with pytest.raises(InvalidRequest, match="contents"):
            MultiMediaInfo({token_id: [rows]})  # type: ignore[dict-item]


def test_overrides_that_no_message_carries_are_refused() -> None:
    for overrides in (Overrides(max_pixels=UINT64 + 1), Overrides(min_pixels=1.5)):  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="_pixels"):
            plan_picture(picture(1), demo_layout(), "f" * 64, overrides)
    with pytest.raises(InvalidRequest, match="background"):
        plan_picture(picture(1), demo_layout(), "f" * 64, Overrides(background=2**24))
