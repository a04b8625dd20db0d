"""Checks for errors that would end a gateway at its start, in the process that will start it.
Imports neither the routes nor the pipeline."""

from __future__ import annotations

from gateway.edge.auth import Keys
from gateway.edge.connections import allow_files
from gateway.prompt.renderer import ChatRenderer
from gateway.sampling import load_defaults
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.config import GatewayConfig
from opticnerve.models.registry import make_layout


def check(settings: GatewayConfig, checkpoint: Checkpoint, workers: int) -> None:
    """Reads the keys, the tokenizer, the template and the generation config, and asks for the
    files that ``workers`` and clients need. Raises ConfigError, CheckpointError, StartupError."""
    Keys.load(settings.api_key_file)
    allow_files(settings.max_connections, workers)
    path, layout = checkpoint.path, make_layout(checkpoint)
    tokenizer = ChatRenderer.load(path, layout, settings.chat_template).tokenizer
    load_defaults(settings.generation_config, path, tokenizer, checkpoint.text_config)
