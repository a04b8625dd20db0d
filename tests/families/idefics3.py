"""Idefics3. Its tokenizer has no token for ``<global-img>``, which is text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tests.families import EXTRA, Sample, tensors_of, text_sizes, write_tokenizer

if TYPE_CHECKING:
    import torch

TEMPLATE = """{% for message in messages %}{{ message['role'] | capitalize }}\
{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}\
{% for part in message['content'] %}\
{% if part['type'] == 'text' %}{{ part['text'] }}\
{% elif part['type'] in ('image', 'image_url') %}{{ '<image>' }}{% endif %}{% endfor %}\
{{ '<end_of_utterance>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""


class Idefics3(Sample):
    name = "idefics3"
    architecture = "Idefics3ForConditionalGeneration"
    config_class: ClassVar[str] = "Idefics3Config"
    image_processor_class = "idefics3.image_processing_pil_idefics3:Idefics3ImageProcessorPil"
    processor_class = "idefics3.processing_idefics3:Idefics3Processor"
    mean = [0.5, 0.5, 0.5]  # noqa: RUF012
    std = [0.5, 0.5, 0.5]  # noqa: RUF012
    tokens: ClassVar[tuple[str, ...]] = (
        "<image>",
        "<fake_token_around_image>",
        "<end_of_utterance>",
        *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
    )

    def config(self, text: dict[str, Any], vision: dict[str, Any], tied: bool) -> Any:
        import transformers

        tower = {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
        }
        vocabulary = {"vocab_size": 648, "model_type": "llama", "tie_word_embeddings": tied}
        return getattr(transformers, self.config_class)(
            text_config=text_sizes() | vocabulary | text,
            vision_config=tower | vision,
            image_token_id=EXTRA,
            scale_factor=2,
            tie_word_embeddings=tied,
        )

    def old_config(self, fields: dict[str, Any]) -> dict[str, Any]:
        return fields | {"torch_dtype": fields.pop("dtype", None)}

    def image_settings(self, layout: str, config: Any, settings: dict[str, Any]) -> Any:
        name = self.architecture.removesuffix("ForConditionalGeneration")
        side = config.vision_config.image_size
        return {
            "image_processor_type": f"{name}ImageProcessor",
            "processor_class": f"{name}Processor",
            "do_image_splitting": True,
            "do_pad": True,
            "max_image_size": {"longest_edge": side},
            "size": {"longest_edge": 2 * side},
            "resample": 1,
        }

    def processor_settings(self, config: Any) -> Any:
        vision = config.vision_config
        side = vision.image_size // vision.patch_size // config.scale_factor
        return {"image_seq_len": side**2}

    def write_tokenizer(self, directory: Path) -> None:
        tokens = {text: EXTRA + i for i, text in enumerate(self.tokens)}
        write_tokenizer(directory, tokens, TEMPLATE)

    def tower_tensors(self, model: Any) -> dict[str, torch.Tensor]:
        return {
            f"{ours}.{name}": tensor
            for ours, theirs in (("tower", "vision_model"), ("connector", "connector"))
            for name, tensor in tensors_of(getattr(model.model, theirs)).items()
        }

    def language_tensors(self, model: Any) -> dict[str, torch.Tensor]:
        return {f"model.{k}": v for k, v in tensors_of(model.model.text_model).items()}


SAMPLES = (Idefics3(),)
