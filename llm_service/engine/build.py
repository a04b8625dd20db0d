"""Builds an engine from an LLMConfig, on the thread or in the process that will run it."""

from __future__ import annotations

import functools
import logging

import torch

from llm_service.device.attention import make_backend
from llm_service.device.attention.base import ATTENTION_NAME
from llm_service.device.model_runner import ModelRunner, RunnerLimits
from llm_service.engine.engine import Emit, Engine
from llm_service.engine.grammar_compiler import GrammarCompiler
from llm_service.engine.main import RowsDamaged, Send
from llm_service.policy.engine_config import EngineConfig
from llm_service.policy.row_source import RowSource
from llm_service.rows.store_rows import StoreRows
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.config import LLMConfig
from opticnerve.embeddings.open import open_local_tier
from opticnerve.errors import ConfigError
from opticnerve.generation.grammars import load_vocabulary
from opticnerve.media.plan import SpanAttention, Structure
from opticnerve.models.family import LanguageModel, Layout
from opticnerve.models.registry import load_language, make_layout
from opticnerve.telemetry import logs
from opticnerve.tensors.dtypes import dtype_name

log = logging.getLogger(__name__)

USUAL_PICTURE = Structure("jpeg", 1024, 768)


def build_in_process(settings: LLMConfig, send: Send) -> Engine:
    """Like ``build``, in the engine's own process: opens the local tier, and reports damaged rows
    to the parent."""
    logs.configure(settings.telemetry.log_level)
    tier = open_local_tier(settings.store.read_url())
    rows = StoreRows(tier, report=lambda key: send(RowsDamaged(key)))
    return build(settings, rows, send)


def build(settings: LLMConfig, rows: RowSource, emit: Emit) -> Engine:
    """Loads the language model and allocates its KV cache. Raises StartupError."""
    torch.set_num_threads(settings.model.num_threads)
    model = settings.model
    checkpoint = Checkpoint.configured(model, "llm")
    layout = make_layout(checkpoint)
    check_step(settings, layout)
    backend = make_backend(settings.attention)
    language = load_language(checkpoint, model.dtype, model.device, ATTENTION_NAME)
    limits = RunnerLimits(
        max_model_len=model_length(settings, layout),
        max_num_seqs=settings.max_num_seqs,
        kv_cache_tokens=settings.kv_cache_tokens,
    )
    runner = ModelRunner(language, layout, backend, limits, rows)
    config = EngineConfig(
        num_blocks=runner.num_blocks,
        block_size=runner.block_size,
        max_model_len=limits.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_step_s=settings.max_step_ms / 1000,
        max_waiting=settings.max_waiting,
        prefix_caching=not settings.no_prefix_caching,
        vocab_size=language.vocab_size,
        row_bytes=(1 + layout.deepstack_levels) * language.hidden_size * language.dtype.itemsize,
    )
    _announce(checkpoint, language, runner, config, settings.model.num_threads)
    return Engine(config, runner, rows, emit, _grammars(checkpoint, language.vocab_size))


def _grammars(checkpoint: Checkpoint, vocab_size: int) -> GrammarCompiler:
    ends = checkpoint.eos_token_ids
    return GrammarCompiler(functools.partial(load_vocabulary, checkpoint.path, ends, vocab_size))


def model_length(settings: LLMConfig, layout: Layout) -> int:
    """The most prompt and output tokens of one sequence: --max-model-len, or all positions that the
    model has. Raises ConfigError if the flag exceeds those."""
    wanted = settings.max_model_len or layout.max_positions
    if wanted > layout.max_positions:
        raise ConfigError(
            f"--max-model-len {wanted} exceeds the model's {layout.max_positions} positions; lower "
            "it, or leave it out",
            param="max_model_len",
        )
    return wanted


def check_step(settings: LLMConfig, layout: Layout) -> None:
    """Raises ConfigError if the tokens of a usual picture attend to one another, and so have to be
    computed in one step, but exceed the budget of a step."""
    plan = layout.plan(USUAL_PICTURE)
    atomic = plan.attention is SpanAttention.BIDIRECTIONAL
    if atomic and plan.num_tokens > settings.max_num_batched_tokens:
        raise ConfigError(
            f"--max-num-batched-tokens {settings.max_num_batched_tokens} is less than the "
            f"{plan.num_tokens} tokens of a usual picture, which this model computes in one step; "
            f"raise it to at least {plan.num_tokens}",
            param="max_num_batched_tokens",
        )


def _announce(
    checkpoint: Checkpoint,
    language: LanguageModel,
    runner: ModelRunner,
    config: EngineConfig,
    num_threads: int,
) -> None:
    """Logs the model, its device and the sizes that were chosen."""
    log.info(
        "%s on %s in %s: %d threads, attention %s, max_model_len %d, %d KV blocks of %d tokens "
        "(%d MiB), max_num_seqs %d, max_num_batched_tokens %d, max_step_ms %g",
        checkpoint.name,
        language.device,
        dtype_name(language.dtype),
        num_threads,
        runner.backend_name,
        config.max_tokens,
        config.num_blocks,
        config.block_size,
        runner.kv_cache_bytes // 2**20,
        config.max_num_seqs,
        config.max_num_batched_tokens,
        config.max_step_s * 1000,
    )
