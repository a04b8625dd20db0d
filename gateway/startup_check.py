"""What a gateway reads of its checkpoint, and checks for errors that would end it at its start, in
the process that will start it. Imports neither the routes nor the pipeline."""

from __future__ import annotations

from gateway.edge.auth import Keys
from gateway.edge.connections import allow_files
from gateway.prompt.renderer import ChatRenderer
from gateway.sampling import Defaults, load_defaults
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.config import GatewayConfig
from opticnerve.models.family import Layout
from opticnerve.models.registry import make_layout


def check(settings: GatewayConfig, checkpoint: Checkpoint, workers: int) -> None:
    """Reads the keys, the tokenizer, the template and the generation config, and asks for the
    files that ``workers`` and clients need. Raises ConfigError, CheckpointError, StartupError."""
    Keys.load(settings.api_key_file)
    allow_files(settings.max_connections, workers)
    read_checkpoint(settings, checkpoint, make_layout(checkpoint))


def read_checkpoint(
    settings: GatewayConfig, checkpoint: Checkpoint, layout: Layout
) -> tuple[ChatRenderer, Defaults]:
    """The renderer of chats, and the defaults of sampling. Raises ConfigError, CheckpointError."""
    path = checkpoint.path
    renderer = ChatRenderer.load(
        path, layout, settings.chat_template, settings.default_system_prompt
    )
    defaults = load_defaults(
        settings.generation_config,
        path,
        renderer.tokenizer,
        checkpoint.text_config,
        settings.default_sampling,
    )
    return renderer, defaults
