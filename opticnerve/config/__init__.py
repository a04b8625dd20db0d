"""Configuration: one frozen dataclass for each service, composed of parts that services share.

A field is a flag (``--max-num-seqs``), an environment variable (``OPTICNERVE_MAX_NUM_SEQS``) and an
attribute, under one name: see ``options``. Unknown flags and unknown ``OPTICNERVE_`` variables are
refused.
"""

from opticnerve.config.encoder import EncoderConfig
from opticnerve.config.gateway import GatewayConfig
from opticnerve.config.llm import LLMConfig
from opticnerve.config.shared import (
    CheckpointConfig,
    ModelConfig,
    RpcConfig,
    StoreConfig,
    TelemetryConfig,
)
from opticnerve.config.up import UpConfig

__all__ = [
    "CheckpointConfig",
    "EncoderConfig",
    "GatewayConfig",
    "LLMConfig",
    "ModelConfig",
    "RpcConfig",
    "StoreConfig",
    "TelemetryConfig",
    "UpConfig",
]
