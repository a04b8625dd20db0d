"""An engine and its runner in this thread, without services: submit, run, look at the tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llm_service.device.attention import make_backend
from llm_service.device.attention.base import ATTENTION_NAME
from llm_service.device.model_runner import ModelRunner, RunnerLimits
from llm_service.engine.engine import Engine, EngineConfig, Message
from llm_service.engine.grammar_compiler import GrammarCompiler
from llm_service.policy.messages import (
    FailedEvent,
    GenerateRequest,
    PromptLogprobsEvent,
    TokensEvent,
)
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.errors import EmbeddingNotFound
from opticnerve.generation.values import PositionLogprobs
from opticnerve.models.registry import load_language, make_layout


class DictRows:
    """RowSource over a dictionary: everything that is in it is ready."""

    def __init__(self) -> None:
        self.items: dict[str, Mapping[str, torch.Tensor]] = {}

    def ready(self, key: str) -> bool:
        return key in self.items

    def can_acquire(self, num_bytes: int) -> bool:
        return True

    def acquire(self, key: str, num_bytes: int) -> None:
        pass

    def release(self, key: str) -> None:
        pass

    def get(self, key: str) -> Mapping[str, torch.Tensor]:
        if key not in self.items:
            raise EmbeddingNotFound(f"no rows for {key}", param=key)
        return self.items[key]

    def discard(self, key: str) -> None:
        self.items.pop(key, None)

    def load(self, key: str) -> bool:
        return key in self.items


@dataclass
class Answer:
    """What one choice said."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)


class LocalEngine:
    """``generate`` runs requests to their ends and returns what each choice said."""

    def __init__(
        self,
        language: Any,
        layout: Any,
        *,
        max_model_len: int = 2048,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 512,
        kv_cache_tokens: int = 8192,
        prefix_caching: bool = True,
        block_size: int = 0,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self.rows = DictRows()
        limits = RunnerLimits(max_model_len, max_num_seqs, kv_cache_tokens, block_size)
        self.runner = ModelRunner(language, layout, make_backend("auto"), limits, self.rows)
        config = EngineConfig(
            self.runner.num_blocks,
            self.runner.block_size,
            max_model_len,
            max_num_seqs,
            max_num_batched_tokens,
            prefix_caching=prefix_caching,
            vocab_size=language.vocab_size,
        )
        self.messages: list[Message] = []
        self.grammars = grammars or GrammarCompiler()
        self.engine = Engine(config, self.runner, self.rows, self.messages.extend, self.grammars)

    @classmethod
    def load(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, **settings: Any
    ) -> LocalEngine:
        checkpoint = Checkpoint.open(str(path))
        language = load_language(checkpoint, dtype, "cpu", ATTENTION_NAME)
        return cls(language, make_layout(checkpoint), **settings)

    def run(self) -> None:
        """Steps until nothing can be computed, then checks every invariant."""
        while self.engine.step() or self.grammars.waiting:
            while self.grammars.waiting:
                self.engine.handle(self.engine.inbox.get())
        self.engine.check_integrity()

    def generate(self, requests: Iterable[GenerateRequest]) -> dict[tuple[str, int], Answer]:
        """By (request id, choice). Raises the error of a request that failed."""
        first = len(self.messages)
        for request in requests:
            self.engine.submit(request)
        self.run()
        answers: dict[tuple[str, int], Answer] = {}
        for message in self.messages[first:]:
            if isinstance(message, FailedEvent):
                raise message.error
            if isinstance(message, TokensEvent):
                delta = message.delta
                answer = answers.setdefault((message.request_id, delta.choice), Answer())
                answer.token_ids += delta.token_ids
                answer.logprobs += delta.logprobs
        return answers

    def prompt_logprobs(self) -> dict[str, tuple[PositionLogprobs, ...]]:
        found: dict[str, tuple[PositionLogprobs, ...]] = {}
        for message in self.messages:
            if isinstance(message, PromptLogprobsEvent):
                before = found.get(message.request_id, ())
                found[message.request_id] = before + message.positions
        return found
