"""An engine as its settings and its checkpoint make it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llm_service.engine.build import build, check_step
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.config import LLMConfig, ModelConfig
from opticnerve.errors import ConfigError
from opticnerve.models.qwen2_vl.layout import Qwen2VLLayout
from opticnerve.models.registry import make_layout
from tests.local_engine import DictRows


@pytest.mark.parametrize("levels", [0, 3])
def test_leases_count_the_rows_of_every_deepstack_level(
    levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Qwen2VLLayout, "deepstack_levels", levels)
    settings = LLMConfig(
        model=ModelConfig(dtype="float32", device="cpu", threads=1),
        max_model_len=64,
        kv_cache_tokens=256,
    )
    engine = build(settings, DictRows(), lambda messages: None)
    assert engine.config.row_bytes == (1 + levels) * 192 * 4  # hidden_size, fp32.


def test_a_step_holds_a_picture_whose_tokens_see_one_another(
    random_checkpoint: Callable[..., Path],
) -> None:
    small = LLMConfig(max_num_batched_tokens=15)
    gemma, qwen = (
        make_layout(Checkpoint.open(str(random_checkpoint(name))))
        for name in ("gemma3", "qwen2_vl")
    )
    check_step(LLMConfig(max_num_batched_tokens=16), gemma)
    check_step(small, qwen)
    with pytest.raises(ConfigError, match="16 tokens of a usual picture"):
        check_step(small, gemma)
