"""An engine as its settings and its checkpoint make it."""

from __future__ import annotations

import pytest

from llm_service.engine.build import build
from opticnerve.config import LLMConfig, ModelConfig
from opticnerve.models.qwen2_vl.layout import Qwen2VLLayout
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
