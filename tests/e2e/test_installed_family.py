"""A family from another distribution is installed, checked, served, and equals the whole model.

It is the example of docs/adding-a-model.md.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.families.llava import IMAGE, Llava

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "vip_llava"


class VipLlava(Llava):
    name = "vip_llava"
    architecture = "VipLlavaForConditionalGeneration"

    def config(self, text, vision, tied):
        from transformers import VipLlavaConfig

        usual = super().config(text, vision, tied)
        return VipLlavaConfig(
            text_config=usual.text_config,
            vision_config=usual.vision_config,
            image_token_index=IMAGE,
            vision_feature_layer=[-2, -3, 1],
            tie_word_embeddings=tied,
        )

    def processor_settings(self, config):
        return {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": config.vision_config.patch_size,
            "vision_feature_select_strategy": "default",
        }


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Variables under which the distribution is installed."""
    target = tmp_path_factory.mktemp("site")
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps",
            "--no-build-isolation", "--target", str(target), str(EXAMPLE),
        ],
        check=True,
    )  # fmt: skip
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(target), str(ROOT)))}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(VipLlava(), tmp_path_factory.mktemp("vip_llava"), seed=4)


def run(environment, *argv):
    command = [sys.executable, "-m", "opticnerve", *map(str, argv), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_it_is_served_where_it_is_installed(environment, model):
    status, told = run(environment, "check", model)
    assert (status, told["family"], told["title"]) == (0, "vip_llava", "ViP-LLaVA")
    status, told = run(dict(os.environ), "check", model)
    assert status == 1 and "'vipllava'" in told["error"]["message"]


@pytest.mark.slow
def test_it_equals_the_whole_model(environment, model):
    few = ["--cases", "20", "--max-tokens", "4", "--dtype", "float32"]
    status, told = run(environment, "verify", model, *few)
    assert status == 0 and told["equal"], told
    assert told["kinds"]["several pictures"]["pictures"] == 9  # Three such chats.
