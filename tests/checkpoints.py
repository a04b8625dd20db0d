"""Small random checkpoints of every family, written as published ones are.

A checkpoint has a configuration, weights in one file or in shards with an index, the demo's
tokenizer (634 tokens, Qwen's special ones), a chat template and processor settings. Weights are
drawn from a seed, large enough that greedy decoding wanders and best logits stand apart.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.families import DEMO, EOS, EXTRA, PAD, VOCAB_SIZE, Sample, samples, write_json

if TYPE_CHECKING:  # Tests that need the demo alone wait for no torch.
    import torch

__all__ = ["DEMO", "EOS", "FAMILIES", "LAYOUTS", "VOCAB_SIZE", "make_checkpoint", "make_config"]

FAMILIES = tuple(sorted(samples()))  # Names of samples: a family may have more than one.
LAYOUTS = ("new", "old")


def make_checkpoint(
    family: str | Sample,
    directory: str | Path,
    *,
    seed: int = 0,
    layout: str = "new",
    shards: int = 1,
    dtype: torch.dtype | None = None,
    tied: bool = False,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    device: str = "cpu",
    **settings: Any,
) -> Path:
    """Writes a random checkpoint of the sample ``family``, or the one of that name, into
    ``directory`` and returns its path.

    ``layout``: "old" names tensors and configuration fields as the first published checkpoints
    do, "new" as transformers 5 does. ``text`` and ``vision`` override sizes of the two halves,
    ``config`` top-level fields, ``settings`` the image processor's. ``device`` draws the weights,
    which are float32 without a ``dtype``.
    """
    directory = Path(directory)
    sample = family if isinstance(family, Sample) else samples()[family]
    directory.mkdir(parents=True, exist_ok=True)
    made = make_config(sample, tied=tied, dtype=dtype, text=text, vision=vision)
    for name, value in (config or {}).items():
        setattr(made, name, value)
    weights = random_weights(made, seed=seed, dtype=dtype, device=device)
    if layout == "old":
        weights = {
            old: part
            for name, tensor in weights.items()
            for old, part in sample.old_tensors(name, tensor).items()
        }
    _write_config(made, directory, sample, layout)
    write_weights(weights, directory, shards)
    sample.write_tokenizer(directory)
    _write_processor(directory, sample, layout, made, settings)
    write_json(directory / "generation_config.json", {"eos_token_id": EOS, "pad_token_id": PAD})
    return directory


def make_config(
    family: str | Sample,
    *,
    tied: bool = False,
    dtype: torch.dtype | None = None,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
) -> Any:
    """The transformers configuration of a small model; ``text`` and ``vision`` override sizes."""
    import torch

    sample = family if isinstance(family, Sample) else samples()[family]
    config = sample.config(text or {}, vision or {}, tied)
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype or torch.float32
    return config


def random_weights(
    config: Any, *, seed: int = 0, dtype: torch.dtype | None = None, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Tensors of the whole model by transformers' own names; the head only where it is not tied.
    Drawn on ``device``, which decides what a seed gives, and kept on the CPU."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    dtype = dtype or torch.float32
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weights[name] = _random_tensor(name, parameter.shape, generator).to(dtype).cpu()
    return weights


def _random_tensor(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    import torch

    noise = torch.randn(shape, generator=generator, device=generator.device)
    if len(shape) == 1 and name.endswith("weight"):  # A norm.
        return 1 + 0.1 * noise
    if len(shape) == 1:
        return 0.1 * noise
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):  # Logits of deviation 4.
        noise[EXTRA:] *= 0.01  # Never the best: placeholders, and what no tokenizer knows.
        return noise * (4 / math.sqrt(shape[-1]))
    if "position_embedding" in name:
        return 0.5 * noise
    return 1.6 * noise / math.sqrt(math.prod(shape[1:]))


def write_weights(weights: dict[str, torch.Tensor], directory: Path, shards: int = 1) -> None:
    """Writes safetensors: one file, or ``shards`` files with an index."""
    from safetensors.torch import save_file

    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)
    size = math.ceil(len(names) / shards)
    weight_map = {}
    for i in range(shards):
        mine = names[i * size : (i + 1) * size]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: weights[n] for n in mine}, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(mine, file))
    total = sum(t.numel() * t.element_size() for t in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)


def _write_config(config: Any, directory: Path, sample: Sample, layout: str) -> None:
    fields = {**config.to_dict(), "architectures": [sample.architecture]}
    write_json(directory / "config.json", sample.old_config(fields) if layout == "old" else fields)


def _write_processor(
    directory: Path, sample: Sample, layout: str, config: Any, settings: dict[str, Any]
) -> None:
    flags = ("do_convert_rgb", "do_normalize", "do_rescale", "do_resize")
    common: dict[str, Any] = dict.fromkeys(flags, True)
    common |= {"image_mean": sample.mean, "image_std": sample.std, "resample": 3}
    common |= {"rescale_factor": 1 / 255}
    mine = sample.image_settings(layout, config, settings)
    write_json(directory / "preprocessor_config.json", common | {**mine} | settings)
    processor = sample.processor_settings(config)
    if processor is not None:
        write_json(directory / "processor_config.json", processor)
