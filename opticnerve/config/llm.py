"""``opticnerve llm``"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from opticnerve import addresses
from opticnerve.config import shared
from opticnerve.config.options import Group, option

_engine = partial(option, group=Group.ENGINE)


@dataclass(frozen=True)
class LLMConfig:
    """Settings of an LLM worker."""

    model: shared.ModelConfig = shared.ModelConfig()
    rpc: shared.RpcConfig = shared.RpcConfig()
    calls: shared.CallsConfig = shared.CallsConfig()  # To encoders.
    store: shared.StoreConfig = shared.StoreConfig()
    fetch_from: tuple[str, ...] = option(
        (),
        "hosts of encoders from which embeddings that the store does not have may be fetched; "
        "default: with --rpc-token-file or --tls-client-ca any host in a reference, else this "
        "machine if --host is loopback, else none",
        group=Group.STORE,
        metavar="HOST,...",
        expects="a host: a name, *.NAME for all below one, an IP or a network such as 10.0.0.0/8",
        check=addresses.check_host,
    )
    max_model_len: int = _engine(
        0, "tokens of prompt and output together; 0: the model's context length"
    )
    max_num_seqs: int = _engine(64, "sequences that run at the same time", minimum=1)
    max_num_batched_tokens: int = _engine(2048, "tokens of one step", minimum=1)
    max_step_ms: int = _engine(
        250,
        "target time of one step while any sequence decodes: prompts are computed in chunks that "
        "fit it, by the measured speed; 0: no target",
    )
    max_waiting: int = _engine(1024, "requests that may wait before more are refused", minimum=1)
    kv_cache_tokens: int = _engine(0, "tokens in the KV cache; 0: sized from memory")
    no_prefix_caching: bool = _engine(False, "do not share KV blocks between requests")
    attention: str = _engine("auto", "attention backend", choices=("auto", "sdpa"))
    engine: str = _engine(
        "thread",
        "run the engine in a thread, or in a separate process",
        choices=("thread", "process"),
    )
    embedding_wait_ms: int = _engine(30_000, "how long a sequence waits for its embeddings")
    max_logprobs: int = shared.MAX_LOGPROBS()
    telemetry: shared.TelemetryConfig = shared.TelemetryConfig()

    def __post_init__(self) -> None:
        """Raises ConfigError for TLS options without --tls-ca, which encrypts calls to encoders."""
        self.calls.check_certificate(self.rpc.certificate)
