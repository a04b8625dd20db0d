"""The engine's limits, and the check that refuses requests that can never be served."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from llm_service.policy.messages import GenerateRequest
from opticnerve.errors import ContextLengthExceeded, InvalidRequest
from opticnerve.generation.values import MAX_CHOICES
from opticnerve.media.plan import SpanAttention


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The engine's settings, with the sizes that depend on the model and the device."""

    num_blocks: int  # KV blocks.
    block_size: int  # Tokens per block, a multiple of 16.
    max_model_len: int  # Prompt and output tokens of one sequence.
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_step_s: float = 0.0  # Target for a step while sequences decode; 0: no target.
    max_waiting: int = 1024
    prefix_caching: bool = True
    vocab_size: int = 0  # Token ids are below it; 0: not checked.
    row_bytes: int = 0  # Bytes of one embedding row, all levels; the unit of leases.
    check_integrity: bool = False  # Check every invariant whenever the engine is idle.

    @property
    def max_tokens(self) -> int:
        """Prompt and output tokens that one sequence can have."""
        return min(self.max_model_len, self.num_blocks * self.block_size)

    @property
    def prefix_cache_tokens(self) -> int:
        """Capacity of the prefix cache in tokens; 0: it is off."""
        return self.num_blocks * self.block_size if self.prefix_caching else 0


def check_request(request: GenerateRequest, config: EngineConfig) -> None:
    """Raises InvalidRequest or ContextLengthExceeded for a request that could never finish."""
    _check_sampling(request)
    _check_tokens(request, config)
    _check_spans(request, config)


def _check_sampling(request: GenerateRequest) -> None:
    sampling = request.sampling
    if sampling.max_tokens < 1:
        raise InvalidRequest("max_tokens must be at least 1", param="max_tokens")
    if not 1 <= sampling.n <= MAX_CHOICES:
        raise InvalidRequest(f"n must be between 1 and {MAX_CHOICES}", param="n")
    choices = [output.choice for output in request.outputs]
    if len(set(choices)) < len(choices) or not set(choices) <= set(range(sampling.n)):
        raise InvalidRequest(
            "outputs must name choices from 0 to n - 1, each at most once", param="outputs"
        )


def _check_tokens(request: GenerateRequest, config: EngineConfig) -> None:
    if not request.token_ids:
        raise InvalidRequest("the prompt has no tokens", param="token_ids")
    vocabulary = config.vocab_size or 1 << 31
    for name, ids in (
        ("token_ids", request.token_ids),
        *(("outputs", output.output_ids) for output in request.outputs),
    ):
        if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
            raise InvalidRequest(f"token ids must be from 0 to {vocabulary - 1}", param=name)
    prompt, output = len(request.token_ids), request.sampling.max_tokens
    if prompt + output > config.max_tokens:
        raise ContextLengthExceeded(
            f"prompt ({prompt} tokens) and output (up to {output} tokens) do not fit the "
            f"{config.max_tokens} tokens of this worker; shorten the prompt or lower max_tokens",
            param="max_tokens" if prompt < config.max_tokens else "token_ids",
        )


def _check_spans(request: GenerateRequest, config: EngineConfig) -> None:
    for span in request.spans:
        end = span.token_offset + span.num_tokens
        inside = 0 <= span.token_offset < end <= len(request.token_ids)
        if not inside or span.row_start < 0 or not 0 <= span.item < len(request.items):
            raise InvalidRequest(
                "each span must lie within the prompt and name one of the items", param="spans"
            )
        atomic = span.attention is SpanAttention.BIDIRECTIONAL
        if atomic and span.num_tokens > config.max_num_batched_tokens:
            raise InvalidRequest(
                f"{span.num_tokens} tokens that attend to one another do not fit a step of "
                f"{config.max_num_batched_tokens}; start the worker with a higher "
                "--max-num-batched-tokens, or send a smaller picture",
                param="spans",
            )
    for before, after in pairwise(request.spans):
        if before.token_offset + before.num_tokens > after.token_offset:
            raise InvalidRequest("spans overlap or are out of order", param="spans")
