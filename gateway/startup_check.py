"""Reads what a gateway needs of its checkpoint. With ``check``, a process that starts gateways
finds errors before it does. Imports neither the routes nor the pipeline."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.api.schemas.messages import Message
from gateway.edge.auth import Keys
from gateway.edge.connections import allow_files
from gateway.edge.tls import Https
from gateway.job import ChatPrompt
from gateway.prompt.renderer import ChatRenderer
from gateway.prompt.template import find_template
from gateway.sampling import Defaults, load_defaults
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.config import GatewayConfig
from opticnerve.errors import CheckpointError, InvalidRequest
from opticnerve.models.family import Layout
from opticnerve.models.registry import make_layout


def check(settings: GatewayConfig, checkpoint: Checkpoint, workers: int) -> None:
    """Reads the keys, the certificate, the tokenizer, the template and the generation config, and
    raises the limit on open files to what ``workers`` and clients need. Raises ConfigError,
    CheckpointError, StartupError."""
    Keys.load(settings.api_key_file)
    Https.of(settings.https)
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


@dataclass(frozen=True, slots=True)
class PromptFacts:
    """How a gateway makes prompts for a checkpoint."""

    template: str  # The file or flag that the chat template comes from.
    placeholder: str  # The token that the template writes for a picture, and its id.
    placeholder_id: int
    vocabulary: int  # Number of tokens.
    named_tokens: dict[str, str]  # By name, such as "bos_token".
    special_tokens: int


def describe_prompt(settings: GatewayConfig, checkpoint: Checkpoint, layout: Layout) -> PromptFacts:
    """Reads tokenizer and template, and renders a chat with two pictures. Raises ConfigError, and
    CheckpointError for a template that does not write one placeholder for each picture."""
    renderer, _ = read_checkpoint(settings, checkpoint, layout)
    tokenizer = renderer.tokenizer
    written = "image_token" if layout.rewrite is None else layout.rewrite.written
    token_id = layout.placeholder_ids[written]
    picture = {"type": "image_url", "image_url": {"url": "data:,"}}
    content = [picture, picture, {"type": "text", "text": "What do you see?"}]
    message = Message.model_validate({"role": "user", "content": content})
    try:
        renderer.render(ChatPrompt(messages=[message], size=0))
    except InvalidRequest as error:
        raise CheckpointError(f"no picture can be asked about: {error.message}") from error
    return PromptFacts(
        template=find_template(checkpoint.path, tokenizer.config, settings.chat_template)[1],
        placeholder=tokenizer.token_of(token_id) or "",
        placeholder_id=token_id,
        vocabulary=tokenizer.vocab_size,
        named_tokens=dict(tokenizer.named),
        special_tokens=len(tokenizer.special_ids),
    )
