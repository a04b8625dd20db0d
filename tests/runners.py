"""Requests for tests of the model runner, on the demo checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from llm_service.device.attention.base import ATTENTION_NAME
from llm_service.policy.messages import GenerateRequest
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.generation.values import Sampling
from opticnerve.media.plan import Grid, Modality, Span
from opticnerve.models.registry import load_language, make_layout
from tests.checkpoints import DEMO
from tests.local_engine import LocalEngine

IMAGE, WIDTH = 632, 192


@functools.cache
def load_demo() -> tuple[Any, Any]:
    """The language model of the demo checkpoint, and its layout."""
    checkpoint = Checkpoint.open(str(DEMO))
    return load_language(checkpoint, torch.float32, "cpu", ATTENTION_NAME), make_layout(checkpoint)


def tokens(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(5, 600, count).tolist())


def rows(seed: int = 0, count: int = 9) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) * 0.05


def with_picture(
    key: str = "a" * 64, before: int = 6, after: int = 7, seed: int = 0
) -> dict[str, Any]:
    """Fields of a request with nine placeholders, a 6x6 grid."""
    ids = (*tokens(before, seed), *[IMAGE] * 9, *tokens(after, seed + 100))
    span = Span(before, 9, 0, 0, Modality.IMAGE, Grid(1, 6, 6))
    return {"token_ids": ids, "spans": (span,), "items": (key,)}


def request(
    name: str, fields: dict[str, Any] | tuple[int, ...], **sampling: Any
) -> GenerateRequest:
    fields = fields if isinstance(fields, dict) else {"token_ids": fields}
    params = Sampling(**{"max_tokens": 12, **sampling})
    return GenerateRequest(name, sampling=params, **fields)


def ids_of(engine: LocalEngine, requests: Sequence[GenerateRequest]) -> dict[str, list[int]]:
    answers = engine.generate(requests)
    return {f"{name}/{choice}": answer.token_ids for (name, choice), answer in answers.items()}
