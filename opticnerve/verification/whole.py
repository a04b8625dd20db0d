"""The unsplit model, as transformers loads and runs it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    ProcessorMixin,
)
from transformers.image_transforms import convert_to_rgb
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.checkpoints.json_files import read_object
from opticnerve.checkpoints.loader import resolve_device, resolve_dtype
from opticnerve.errors import StartupError
from opticnerve.verification.cases import Case


@dataclass(frozen=True, eq=False)
class Prefill:
    """What the unsplit model computes for a prompt and an answer."""

    # float32 [answer's tokens, vocabulary]: the logits from which each was to be sampled.
    logits: torch.Tensor
    # [prompt's tokens, hidden_size]: the language model's input, pictures included.
    embeddings: torch.Tensor
    deepstack: tuple[torch.Tensor, ...]  # By level, [placeholders, hidden_size].


class WholeModel:
    """A checkpoint run by transformers alone, with its Pillow-backed image processor."""

    def __init__(self, checkpoint: Checkpoint, processor: Any, dtype: str, device: str) -> None:
        """``processor``: from ``load_processor``. ``dtype`` and ``device``: values of the flags of
        these names. Raises StartupError."""
        place = resolve_device(device)
        self.dtype = resolve_dtype(dtype, checkpoint, place)
        self.processor = processor
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            checkpoint.path, dtype=self.dtype
        )
        self.model.to(place).eval()

    def inputs(self, case: Case) -> dict[str, torch.Tensor]:
        """The model's inputs for a chat: ``input_ids`` [1, tokens], pixels and so on."""
        pictures = iter(case.pictures)
        messages = [
            {
                "role": message["role"],
                "content": [with_picture(part, pictures) for part in message["content"]],
            }
            for message in case.messages
        ]
        # The base class's method, since some overrides need a video processor.
        made = ProcessorMixin.apply_chat_template(
            self.processor,
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return dict(made)

    def prefill(self, inputs: Mapping[str, torch.Tensor], answer: list[int]) -> Prefill:
        """One forward pass over a prompt, from ``inputs()``, and ``answer``."""
        prompt = inputs["input_ids"].shape[1]
        given = {name: _extended(name, value, inputs, answer) for name, value in inputs.items()}
        seen: dict[str, Any] = {}

        def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            seen.update(kwargs)

        hook = self.model.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
        try:
            with torch.inference_mode():
                out = self.model(
                    **{name: value.to(self.model.device) for name, value in given.items()},
                    use_cache=False,
                    logits_to_keep=len(answer) + 1,
                )
        finally:
            hook.remove()
        deepstack = seen.get("deepstack_visual_embeds") or ()
        return Prefill(
            out.logits[0, :-1].float().cpu(),
            seen["inputs_embeds"][0, :prompt].cpu(),
            tuple(level.cpu() for level in deepstack),
        )


def with_picture(part: Mapping[str, Any], pictures: Any) -> Mapping[str, Any]:
    """A part of a message with its picture, whose transparent pixels become white as in
    transformers' image processors. Converted here, since some checkpoints' processors take only
    RGB."""
    if part["type"] != "image":
        return part
    shown = convert_to_rgb(Image.open(io.BytesIO(next(pictures))), return_numpy=True)
    return {"type": "image", "image": Image.fromarray(shown)}


def _extended(
    name: str, value: torch.Tensor, inputs: Mapping[str, torch.Tensor], answer: list[int]
) -> torch.Tensor:
    """An input with the answer's tokens appended, if it has one value for each token."""
    if value.shape != inputs["input_ids"].shape:
        return value
    if name == "input_ids":
        more = torch.tensor([answer], dtype=value.dtype)
    else:
        more = torch.full((1, len(answer)), int(name == "attention_mask"), dtype=value.dtype)
    return torch.cat([value, more], dim=1)


def load_processor(checkpoint: Checkpoint) -> Any:
    """transformers' processor for the checkpoint, with the Pillow-backed image processor, whose
    pixels are the reference, and without a video processor, which would need torchvision. Raises
    StartupError, which names a missing package."""
    path = checkpoint.path
    kind = _processor_class(checkpoint)
    if getattr(kind, "is_dummy", False):
        raise StartupError(
            f"transformers' {kind.__name__} needs torchvision: pip install torchvision"
        )
    makers = {
        "image_processor": lambda: AutoImageProcessor.from_pretrained(path, backend="pil"),
        "tokenizer": lambda: AutoTokenizer.from_pretrained(path),
    }
    parts = [makers[name]() if name in makers else None for name in kind.get_attributes()]
    # Without its check of the parts' classes, which insists on the torchvision-backed one.
    unchecked = {"check_argument_for_proper_class": lambda self, name, argument: None}
    settings, _ = kind.get_processor_dict(path)
    made: Any = type(kind.__name__, (kind,), unchecked)
    try:
        return made.from_args_and_dict(parts, settings)
    except ImportError as error:  # Some need further packages, such as num2words.
        raise StartupError(f"transformers' {kind.__name__} cannot be made: {error}") from error


def _processor_class(checkpoint: Checkpoint) -> Any:
    files = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
    named = [(read_object(checkpoint.path / file) or {}).get("processor_class") for file in files]
    usual = PROCESSOR_MAPPING_NAMES.get(str(checkpoint.config.get("model_type")))
    name = next((name for name in (*named, usual) if name), None)
    kind = getattr(transformers, str(name), None)
    if kind is None:
        raise StartupError(f"transformers has no processor for this checkpoint ({name})")
    return kind
