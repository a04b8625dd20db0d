"""Small random checkpoints of every family, written as published ones are.

A checkpoint has a configuration, weights in one file or in shards with an index, the demo's
tokenizer (634 tokens, Qwen's special ones), a chat template and processor settings. Weights are
drawn from a seed, large enough that greedy decoding wanders and best logits stand apart.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import opticnerve.demo
from opticnerve.models.registry import families

if TYPE_CHECKING:  # Tests that need the demo alone wait for no torch.
    import torch

DEMO = Path(opticnerve.demo.__file__).parent / "checkpoint"
FAMILIES = tuple(sorted({family.name for family in families().values()}))
LAYOUTS = ("new", "old")

VOCAB_SIZE = 640
IMAGE_PAD, VIDEO_PAD, EOS, PAD = 632, 633, 629, 627
LLAVA_IMAGE, LLAVA_BOS = 634, 635

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]

LLAVA_TEMPLATE = """{% for message in messages %}{{ message['role'].upper() + ': ' }}\
{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}\
{% for part in message['content'] if part['type'] in ('image', 'image_url') %}{{ '<image>\n' }}\
{% endfor %}\
{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}\
{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


def make_checkpoint(
    family: str,
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
    """Writes a random checkpoint of ``family`` into ``directory`` and returns its path.

    ``layout``: "old" names tensors and configuration fields as the first published checkpoints
    do, "new" as transformers 5 does. ``text`` and ``vision`` override sizes of the two halves,
    ``config`` top-level fields, ``settings`` the image processor's. ``device`` draws the weights,
    which are float32 without a ``dtype``.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    made = make_config(family, tied=tied, dtype=dtype, text=text, vision=vision)
    for name, value in (config or {}).items():
        setattr(made, name, value)
    weights = random_weights(made, seed=seed, dtype=dtype, device=device)
    if layout == "old":
        weights = {_old_name(family, name): tensor for name, tensor in weights.items()}
    _write_config(made, directory, family, layout)
    write_weights(weights, directory, shards)
    if family == "llava":
        _write_llava_tokenizer(directory)
    else:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(DEMO / name, directory / name)
    _write_processor(directory, family, layout, made, settings)
    _write_json(directory / "generation_config.json", {"eos_token_id": EOS, "pad_token_id": PAD})
    return directory


def make_config(
    family: str,
    *,
    tied: bool = False,
    dtype: torch.dtype | None = None,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
) -> Any:
    """The transformers configuration of a small model; ``text`` and ``vision`` override sizes."""
    import torch

    config = _CONFIGS[family](text or {}, vision or {}, tied)
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype or torch.float32
    return config


def _text_sizes() -> dict[str, Any]:
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


def _mrope_sizes() -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    return _text_sizes() | {"rope_parameters": rope}


def _special_ids(tied: bool) -> dict[str, Any]:
    return {
        "image_token_id": IMAGE_PAD,
        "video_token_id": VIDEO_PAD,
        "vision_start_token_id": 630,
        "vision_end_token_id": 631,
        "tie_word_embeddings": tied,
    }


def _qwen2_vl(text: dict[str, Any], vision: dict[str, Any], tied: bool) -> Any:
    from transformers import Qwen2VLConfig

    tower = {"depth": 3, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14}
    text = _mrope_sizes() | {"tie_word_embeddings": tied} | text
    return Qwen2VLConfig(
        text_config=text,
        vision_config=tower | {"hidden_size": text["hidden_size"]} | vision,
        **_special_ids(tied),
    )


def _qwen2_5_vl(text: dict[str, Any], vision: dict[str, Any], tied: bool) -> Any:
    from transformers import Qwen2_5_VLConfig

    tower = {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 4,
        "patch_size": 14,
        "window_size": 56,  # Two merged patches a side.
        "fullatt_block_indexes": [1, 3],
    }
    text = _mrope_sizes() | {"tie_word_embeddings": tied} | text
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=tower | {"out_hidden_size": text["hidden_size"]} | vision,
        **_special_ids(tied),
    )


def _llava(text: dict[str, Any], vision: dict[str, Any], tied: bool) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    tower = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
        "projection_dim": 32,
    }
    bos = {"bos_token_id": LLAVA_BOS, "tie_word_embeddings": tied}
    return LlavaConfig(
        text_config=LlamaConfig(**(_text_sizes() | bos | text)),
        vision_config=CLIPVisionConfig(**(tower | vision)),
        image_token_index=LLAVA_IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=16,
        tie_word_embeddings=tied,
    )


_CONFIGS: dict[str, Callable[[dict[str, Any], dict[str, Any], bool], Any]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "llava": _llava,
}


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
        noise[VOCAB_SIZE:] *= 0.01  # Never the best: the tokenizer does not know them.
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
    _write_json(directory / "model.safetensors.index.json", index)


def _old_name(family: str, name: str) -> str:
    """As the first published checkpoints named ``name``."""
    if family != "llava":
        return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    name = name.replace("model.vision_tower.", "vision_tower.vision_model.")
    name = name.replace("model.language_model.", "language_model.model.")
    return name.replace("model.multi_modal_projector.", "multi_modal_projector.")


def _write_config(config: Any, directory: Path, family: str, layout: str) -> None:
    fields = config.to_dict()
    fields["architectures"] = {
        "qwen2_vl": ["Qwen2VLForConditionalGeneration"],
        "qwen2_5_vl": ["Qwen2_5_VLForConditionalGeneration"],
        "llava": ["LlavaForConditionalGeneration"],
    }[family]
    if layout == "old":
        fields = _old_llava_config(fields) if family == "llava" else _old_qwen_config(fields)
    _write_json(directory / "config.json", fields)


def _old_qwen_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Text settings at the top level, mRoPE under ``rope_scaling``, ``torch_dtype``."""
    text = fields.pop("text_config")
    rope = text.pop("rope_parameters")
    dtype = fields.pop("dtype", None)
    old = {k: v for k, v in text.items() if k not in ("model_type", "dtype", "layer_types")}
    old |= {k: v for k, v in fields.items() if k not in ("transformers_version",)}
    old["rope_theta"] = rope["rope_theta"]
    old["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    old["torch_dtype"] = dtype
    old["use_sliding_window"] = False
    old["sliding_window"] = 32768
    for name in ("dtype", "rope_parameters"):
        old["vision_config"].pop(name, None)
    return old


def _old_llava_config(fields: dict[str, Any]) -> dict[str, Any]:
    fields["image_token_index"] = LLAVA_IMAGE
    fields.pop("image_token_id", None)
    fields["torch_dtype"] = fields.pop("dtype", None)
    rope = fields["text_config"].pop("rope_parameters", {})
    fields["text_config"]["rope_theta"] = rope.get("rope_theta", 10000.0)
    return fields


def _write_processor(
    directory: Path, family: str, layout: str, config: Any, settings: dict[str, Any]
) -> None:
    common = {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True}
    common |= {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3}
    common |= {"rescale_factor": 1 / 255}
    if family == "llava":
        side = config.vision_config.image_size
        mine = {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_center_crop": True,
            "crop_size": {"height": side, "width": side},
            "size": {"shortest_edge": side},
        }
        processor = {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": config.vision_config.patch_size,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
        }
        _write_json(directory / "processor_config.json", processor)
    else:
        vision = config.vision_config
        low, high = settings.pop("min_pixels", 56 * 56), settings.pop("max_pixels", 64 * 28 * 28)
        limits: dict[str, Any] = {"min_pixels": low, "max_pixels": high}
        if layout == "new":
            limits = {"size": {"shortest_edge": low, "longest_edge": high}}
        mine = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
        } | limits
    _write_json(directory / "preprocessor_config.json", common | mine | settings)


def _write_llava_tokenizer(directory: Path) -> None:
    """The demo's tokenizer with ``<image>`` and ``<s>``, which encoding puts in front."""
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    for token_id, content in ((LLAVA_IMAGE, "<image>"), (LLAVA_BOS, "<s>")):
        added = dict(tokenizer["added_tokens"][0], id=token_id, content=content)
        tokenizer["added_tokens"].append(added)
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            bos,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [LLAVA_BOS], "tokens": ["<s>"]}},
    }
    _write_json(directory / "tokenizer.json", tokenizer)
    config = json.loads((DEMO / "tokenizer_config.json").read_text())
    config["bos_token"] = "<s>"
    config["extra_special_tokens"] = {"image_token": "<image>"}
    config["processor_class"] = "LlavaProcessor"
    _write_json(directory / "tokenizer_config.json", config)
    (directory / "chat_template.jinja").write_text(LLAVA_TEMPLATE)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2))
