"""What tests know of each family: one module a family, found by its file.

A module names its samples in ``SAMPLES``. A sample writes small random checkpoints as published
ones are, and says how Hugging Face's own parts are asked for the same pictures. A new family adds
one module here, and every test of ``tests.checkpoints.FAMILIES`` then covers it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

import opticnerve.demo

if TYPE_CHECKING:  # Tests that need the demo alone wait for no torch.
    import torch

DEMO = Path(opticnerve.demo.__file__).parent / "checkpoint"

VOCAB_SIZE = 640
IMAGE_PAD, VIDEO_PAD, EOS, PAD = 632, 633, 629, 627
VISION_START, VISION_END = 630, 631
EXTRA = 634  # The first id that no token of the demo has: samples add their special ones here.

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


class Sample:
    """A small random model of a family. Subclasses say what differs from the usual."""

    name: ClassVar[str]
    architecture: ClassVar[str]
    # "module:Class" in ``transformers.models``.
    image_processor_class: ClassVar[str]
    processor_class: ClassVar[str]
    # Tokens that the chat template writes around the placeholder.
    around: ClassVar[tuple[tuple[int, ...], tuple[int, ...]]] = ((), ())
    has_experts: ClassVar[bool] = False  # Whether feed-forwards are mixtures of experts.
    mean: ClassVar[list[float]] = CLIP_MEAN
    std: ClassVar[list[float]] = CLIP_STD

    @property
    def family(self) -> str:
        """The folder of ``opticnerve/models``."""
        return self.name

    # ---- its checkpoint

    def config(self, text: dict[str, Any], vision: dict[str, Any], tied: bool) -> Any:
        """The transformers configuration; ``text`` and ``vision`` override sizes."""
        raise NotImplementedError

    def old_name(self, name: str) -> str:
        """A tensor's name in the first published checkpoints, from transformers' own."""
        return name

    def old_tensors(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the first published checkpoints hold of the tensor that transformers calls ``name``:
        itself, renamed, or its parts."""
        return {self.old_name(name): tensor}

    def old_config(self, fields: dict[str, Any]) -> dict[str, Any]:
        """config.json of the first published checkpoints."""
        return fields

    def image_settings(
        self, layout: str, config: Any, settings: dict[str, Any]
    ) -> Mapping[str, Any]:
        """Fields of preprocessor_config.json, beside the usual ones; ``settings`` are the
        caller's, which go in after these, and may be taken out here."""
        raise NotImplementedError

    def processor_settings(self, config: Any) -> Mapping[str, Any] | None:
        """Fields of processor_config.json; None: there is none."""
        return None

    def write_tokenizer(self, directory: Path) -> None:
        """Tokenizer and chat template; the demo's are Qwen2-VL's."""
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(DEMO / name, directory / name)

    # ---- Hugging Face's parts

    def image_processor(self, path: Path) -> Any:
        """The Pillow-backed one of a checkpoint."""
        return _transformers(self.image_processor_class).from_pretrained(path)

    def processor(self, path: Path) -> Any:
        """The processor of a checkpoint, which expands placeholders, with the Pillow-backed image
        processor. Called with ``text`` and ``images`` it returns the unsplit model's inputs."""
        from transformers import AutoTokenizer

        kind = _transformers(self.processor_class)
        # Video processors need torchvision, and the image processors' base class too.
        unchecked = {"check_argument_for_proper_class": lambda self, name, argument: None}
        parts: dict[str, Any] = {
            "image_processor": self.image_processor(path),
            "tokenizer": AutoTokenizer.from_pretrained(path),
        }
        if "video_processor" in kind.__init__.__code__.co_varnames:
            parts["video_processor"] = None
        file = path / "processor_config.json"
        if file.is_file():
            parts |= json.loads(file.read_text())
            parts.pop("processor_class", None)
        return type(kind.__name__, (kind,), unchecked)(**parts)

    def process(self, processor: Any, text: str, images: list[Any]) -> dict[str, Any]:
        """The unsplit model's inputs, as tensors, for a templated prompt. The processor may take
        the beginning-of-sequence token from the text or add it, as the model's users have it."""
        given = {"images": images} if images else {}
        return dict(processor(text=[text], **given, return_tensors="pt"))

    def image_inputs(self, image_processor: Any, images: list[Any]) -> dict[str, Any]:
        """What the image processor alone makes of pictures of one prompt, as tensors."""
        return dict(image_processor(images, return_tensors="pt"))

    def token_inputs(self, token_ids: torch.Tensor, image_token_id: int) -> dict[str, Any]:
        """Inputs of the unsplit model beside the pictures' for ids [1, tokens], expanded."""
        import torch

        return {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}

    def rows(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Named tensors of one picture's embedding by the unsplit model, from ``image_inputs``."""
        import torch

        with torch.inference_mode():
            features = model.model.get_image_features(**inputs).pooler_output
        return {"rows": torch.cat(tuple(features)) if isinstance(features, list | tuple)
                else features.flatten(0, -2)}  # fmt: skip

    def pixels(self, inputs: Mapping[str, Any]) -> NDArray[np.float32]:
        """The image processor's ``pixel_values`` of one picture, ordered as our preprocessor
        orders pixels, channels last."""
        values: NDArray[np.float32] = np.asarray(inputs["pixel_values"])
        return values.reshape(-1, *values.shape[-3:]).transpose(0, 2, 3, 1)

    def tower_tensors(self, model: Any) -> dict[str, torch.Tensor]:
        """Parameters and buffers of the unsplit model's vision half, by our module's names."""
        return tensors_of(model.model.visual)

    def language_tensors(self, model: Any) -> dict[str, torch.Tensor]:
        """The same of the language half without its head."""
        return {f"model.{k}": v for k, v in tensors_of(model.model.language_model).items()}


def tensors_of(module: Any) -> dict[str, torch.Tensor]:
    """Parameters and every buffer, those of no checkpoint too."""
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}


@cache
def samples() -> Mapping[str, Sample]:
    """Every sample, by its name."""
    found: dict[str, Sample] = {}
    for module in iter_modules(__path__):
        for sample in import_module(f"{__name__}.{module.name}").SAMPLES:
            assert sample.name not in found, f"two samples are called {sample.name}"
            found[sample.name] = sample
    return found


def _transformers(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(f"transformers.models.{module}"), attribute)


# ---- sizes and files that samples share


def text_sizes() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "bos_token_id": PAD,
    }


def mrope_sizes() -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    return text_sizes() | {"rope_parameters": rope}


def special_ids(tied: bool) -> dict[str, Any]:
    """Of models that have the demo's tokenizer."""
    return {
        "image_token_id": IMAGE_PAD,
        "video_token_id": VIDEO_PAD,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "tie_word_embeddings": tied,
    }


def write_tokenizer(
    directory: Path,
    tokens: Mapping[str, int],
    template: str,
    *,
    bos: str | None = None,
    **fields: Any,
) -> None:
    """The demo's tokenizer with more special ``tokens``, and a template. ``bos``: the one of them
    that encoding puts in front. ``fields`` go into tokenizer_config.json."""
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    for content, token_id in tokens.items():
        added = dict(tokenizer["added_tokens"][0], id=token_id, content=content)
        tokenizer["added_tokens"].append(added)
    if bos is not None:
        first = {"SpecialToken": {"id": bos, "type_id": 0}}
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                first,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [tokens[bos]], "tokens": [bos]}},
        }
    write_json(directory / "tokenizer.json", tokenizer)
    config = json.loads((DEMO / "tokenizer_config.json").read_text())
    if bos is not None:
        config["bos_token"] = bos
    write_json(directory / "tokenizer_config.json", config | fields)
    (directory / "chat_template.jinja").write_text(template)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2))
