"""GLM-4V's decoder: dense with norms on both sides of attention and feed-forward, or with a mixture
of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers.models.glm4v.configuration_glm4v import Glm4vTextConfig
from transformers.models.glm4v.modeling_glm4v import Glm4vTextModel
from transformers.models.glm4v_moe.configuration_glm4v_moe import Glm4vMoeTextConfig
from transformers.models.glm4v_moe.modeling_glm4v_moe import Glm4vMoeTextModel

from opticnerve.models.decoders.fused import PRE_NORM, LayerForm
from opticnerve.models.decoders.spec import DecoderSpec, llama_like
from opticnerve.models.glm4v.configuration import read_config

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint

SANDWICHED = LayerForm(
    after_attention="post_self_attn_layernorm",
    after_mlp="post_mlp_layernorm",
    neighbours=True,
)
MODELS: dict[type, tuple[Any, LayerForm]] = {
    Glm4vTextConfig: (Glm4vTextModel, SANDWICHED),
    Glm4vMoeTextConfig: (Glm4vMoeTextModel, PRE_NORM),
}


def describe_decoder(checkpoint: Checkpoint) -> DecoderSpec:
    config = read_config(checkpoint)
    model_class, form = MODELS[type(config.text_config)]
    # An additional last layer, for multi-token prediction, is not used here.
    ahead = rf"model\.language_model\.layers\.{config.text_config.num_hidden_layers}\."
    spec = llama_like(config, model_class, position_dims=3)
    return replace(spec, form=form, ignored=(*spec.ignored, ahead))
