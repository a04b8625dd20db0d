"""Opening checkpoints: every source, every refusal with one clear message, no torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gateway.prompt.tokenizer import Tokenizer
from gateway.sampling import load_defaults
from opticnerve.checkpoints import hub
from opticnerve.checkpoints.checkpoint import DEMO_NAME, INDEX_FILE, SINGLE_FILE, Checkpoint
from opticnerve.errors import CheckpointError, UnsupportedCheckpoint
from opticnerve.models.registry import families, make_layout
from opticnerve.tensors.header import read_header
from tests.checkpoints import DEMO

CONFIG: dict[str, Any] = {
    "model_type": "qwen2_vl",
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "hidden_size": 8,
    "max_position_embeddings": 64,
    "vision_config": {"spatial_patch_size": 14},
}
TENSORS = {
    "model.embed": np.arange(12, dtype=np.float32).reshape(3, 4),
    "visual.block": np.arange(6, dtype=np.float16),
}


def write(path: Path, config: dict[str, Any] | None = None, shards: bool = False) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    (path / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 5}))
    if not shards:
        save_file(TENSORS, path / SINGLE_FILE)
        return path
    weight_map = {}
    for number, (key, tensor) in enumerate(TENSORS.items()):
        name = f"model-{number}.safetensors"
        save_file({key: tensor}, path / name)
        weight_map[key] = name
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return path


# ---- sources


def test_the_demo_is_built_in() -> None:
    checkpoint = Checkpoint.open(None)
    assert checkpoint.name == DEMO_NAME
    assert checkpoint.family == "qwen2_vl"
    assert checkpoint.processor_config["patch_size"] == 14
    assert checkpoint.generation_config["eos_token_id"] == 629
    assert make_layout(checkpoint).hidden_size == 192
    assert len(checkpoint.tensor_index()) > 100


def test_a_directory(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(write(tmp_path / "my-model")))
    assert (checkpoint.name, checkpoint.path) == ("my-model", tmp_path / "my-model")
    assert (checkpoint.revision, checkpoint.hub_id) == (None, None)
    assert checkpoint.generation_config == {}
    assert checkpoint.text_config["hidden_size"] == 8  # Flat, as older files are.


def test_a_relative_directory_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path / "my-model")
    assert Checkpoint.open(".").name == "my-model"


@pytest.mark.parametrize("nested", [True, False])
def test_processor_settings_in_either_file(tmp_path: Path, nested: bool) -> None:
    write(tmp_path)
    content = {"image_processor": {"min_pixels": 9}} if nested else {"patch_size": 14}
    (tmp_path / "processor_config.json").write_text(json.dumps(content))
    expected = 9 if nested else 5
    assert Checkpoint.open(str(tmp_path)).processor_config["min_pixels"] == expected


# ---- weights


@pytest.mark.parametrize("shards", [False, True])
def test_tensor_index_tells_where_bytes_lie(tmp_path: Path, shards: bool) -> None:
    index = Checkpoint.open(str(write(tmp_path, shards=shards))).tensor_index()
    assert index.keys() == TENSORS.keys()
    for key, entry in index.items():
        with entry.file.open("rb") as stream:
            stream.seek(entry.start)
            data = stream.read(entry.num_bytes)
        assert data == TENSORS[key].tobytes()
        assert entry.shape == TENSORS[key].shape
        assert entry.dtype == {"float32": "F32", "float16": "F16"}[str(TENSORS[key].dtype)]


def test_only_wanted_shards_are_opened(tmp_path: Path) -> None:
    write(tmp_path, shards=True)
    (tmp_path / "model-0.safetensors").unlink()
    checkpoint = Checkpoint.open(str(tmp_path), side="encoder")
    assert checkpoint.tensor_index(is_visual).keys() == {"visual.block"}
    with pytest.raises(CheckpointError, match=r"lacks model-0\.safetensors"):
        checkpoint.tensor_index()


def is_visual(key: str) -> bool:
    return key.startswith("visual")


def test_a_missing_shard_is_named_at_once(tmp_path: Path) -> None:
    write(tmp_path, shards=True)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-1\.safetensors"):
        Checkpoint.open(str(tmp_path), side="encoder").tensor_index(is_visual)


def test_an_index_that_lies(tmp_path: Path) -> None:
    write(tmp_path, shards=True)
    save_file({"other": TENSORS["visual.block"]}, tmp_path / "model-1.safetensors")
    with pytest.raises(CheckpointError, match=r"places visual\.block in model-1"):
        Checkpoint.open(str(tmp_path)).tensor_index()


@pytest.mark.parametrize("names", [{"a": "../../etc/x"}, {"a": ""}, {"a": 3}, ["a"], None])
def test_an_index_that_is_none(tmp_path: Path, names: object) -> None:
    write(tmp_path, shards=True)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match="no usable weight_map"):
        Checkpoint.open(str(tmp_path)).tensor_index()


def test_no_weights_and_pickled_weights(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / SINGLE_FILE).unlink()
    checkpoint = Checkpoint.open(str(tmp_path))  # The gateway needs none.
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        checkpoint.tensor_index()
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="convert the checkpoint to safetensors"):
        checkpoint.tensor_index()


def test_truncation_anywhere_is_told(tmp_path: Path) -> None:
    whole = (write(tmp_path) / SINGLE_FILE).read_bytes()
    for end in range(len(whole)):
        (tmp_path / SINGLE_FILE).write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match="fetch it again"):
            read_header(tmp_path / SINGLE_FILE)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b"\xff\xff",
        b"[" * 5000,
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
    ],
)
def test_headers_of_every_other_kind(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(CheckpointError, match="damaged"):
        read_header(file)


# ---- refusals


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        Checkpoint.open(str(tmp_path))
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match="GGUF"):
        Checkpoint.open(str(tmp_path))
    with pytest.raises(CheckpointError, match="is a file"):
        Checkpoint.open(str(tmp_path / "model.gguf"))
    for missing in (str(tmp_path / "nothing"), "./nothing", "~no-such-user/x", "a/b/c"):
        with pytest.raises(CheckpointError, match="there is no directory"):
            Checkpoint.open(missing)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_a_broken_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "idefics2", "vision_config": {}}, "model_type 'idefics2'"),
        ({}, "model_type None"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "no vision tower"),
        ({"model_type": "their_chat", "auto_map": {}}, "remote code is never run"),
        ({"model_type": "mllama", "vision_config": {}}, "cross-attention"),
        ({"model_type": "qwen2_audio", "audio_config": {}}, "takes audio"),
        ({"model_type": "qwen2_5_omni", "thinker_config": {}}, "takes audio"),
        ({"model_type": "qwen3_5", "vision_config": {}}, "recurrent state .*'qwen3_5'"),
        (
            {
                "model_type": "some_vl",
                "vision_config": {},
                "text_config": {"layer_types": ["full_attention", "conv"]},
            },
            "recurrent state",
        ),
    ],
)
def test_unsupported_models_are_named_with_what_is_supported(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=said) as caught:
        Checkpoint.open(str(write(tmp_path, config)))
    for kind in families():
        assert kind in caught.value.message


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    config = {**CONFIG, "quantization_config": {"quant_method": "awq"}}
    with pytest.raises(UnsupportedCheckpoint, match=r"quantized \(awq\)"):
        Checkpoint.open(str(write(tmp_path, config)))


# ---- identity


def pair_id(path: Path) -> str:
    return Checkpoint.open(str(path)).pair_id


def test_one_checkpoint_has_one_pair_id(tmp_path: Path) -> None:
    one, copy = write(tmp_path / "a"), write(tmp_path / "b")
    sharded = write(tmp_path / "c", shards=True)
    assert pair_id(one) == pair_id(copy) == pair_id(sharded)
    ids = {Checkpoint.open(str(one), side=side).pair_id for side in ("gateway", "encoder", "llm")}
    assert len(ids) == 1


def test_other_weights_configuration_or_settings_have_another(tmp_path: Path) -> None:
    base = pair_id(write(tmp_path / "a"))
    tuned = write(tmp_path / "tuned")
    changed = {key: tensor + 1 for key, tensor in TENSORS.items()}
    save_file(changed, tuned / SINGLE_FILE)
    renamed = write(tmp_path / "renamed")
    save_file({"x" + key: tensor for key, tensor in TENSORS.items()}, renamed / SINGLE_FILE)
    configured = write(tmp_path / "configured", {**CONFIG, "hidden_size": 9})
    processed = write(tmp_path / "processed")
    (processed / "preprocessor_config.json").write_text('{"min_pixels": 6}')
    assert len({base, *map(pair_id, (tuned, renamed, configured, processed))}) == 5


# ---- ends


def test_what_ends_an_answer_is_what_ends_it_at_the_gateway(tmp_path: Path) -> None:
    """Whichever files tell it, and whichever of the two speaks to the LLM worker."""
    tokenizer = json.loads((DEMO / "tokenizer_config.json").read_text())
    named = {**tokenizer, "eos_token": {"content": "<|vision_end|>"}}
    decoder = {**tokenizer, "added_tokens_decoder": {"629": {"content": "<|im_end|>"}}}
    for number, (own, text, files, expected) in enumerate(
        (
            ({}, {}, tokenizer, (629,)),
            ({"eos_token_id": [1, 2, 1]}, {"eos_token_id": 3}, tokenizer, (1, 2, 629)),
            ({}, {"eos_token_id": 3}, tokenizer, (3, 629)),
            ({"eos_token_id": None}, {"eos_token_id": 3}, tokenizer, (629,)),
            ({"eos_token_id": 5}, {}, named, (5, 631)),
            ({"eos_token_id": 5}, {}, decoder, (5, 629)),
            ({"eos_token_id": 5}, {}, {"tokenizer_class": "T"}, (5,)),
        )
    ):
        path = tmp_path / str(number)
        shutil.copytree(DEMO, path)
        config = json.loads((path / "config.json").read_text())
        config["text_config"].pop("eos_token_id")
        config["text_config"].update(text)
        for name, content in (
            ("config.json", config), ("generation_config.json", own),
            ("tokenizer_config.json", files),
        ):  # fmt: skip
            (path / name).write_text(json.dumps(content))
        checkpoint = Checkpoint.open(str(path))
        assert checkpoint.eos_token_ids == expected
        at_gateway = load_defaults("auto", path, Tokenizer.load(path), checkpoint.text_config)
        assert at_gateway.sampling.eos_token_ids == expected


def test_a_checkpoint_without_a_tokenizer_ends_where_its_configuration_says(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, true, -1, "x"]}')
    assert Checkpoint.open(str(tmp_path)).eos_token_ids == (4,)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    for torn in ('{"added_tokens": [{"content": "</s>"', '{"added_tokens": [{"content": "</s>"}]}'):
        (tmp_path / "tokenizer.json").write_text(torn)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
            _ = Checkpoint.open(str(tmp_path)).eos_token_ids


# ---- hub


class FakeHub:
    """Downloads by copying from a directory, and remembers what was asked for."""

    def __init__(self, source: Path, cache: Path) -> None:
        self.source = source
        self.commit = "0123456789abcdef0123456789abcdef01234567"
        self.snapshot = cache / "models--o--m" / "snapshots" / self.commit
        self.calls: list[tuple[str, str | None, tuple[str, ...]]] = []

    def download(
        self, repo_id: str, revision: str | None, download_dir: str | None, files: Any
    ) -> Path:
        self.calls.append((repo_id, revision, tuple(files)))
        self.snapshot.mkdir(parents=True, exist_ok=True)
        for pattern in files:
            for file in self.source.glob(pattern):
                (self.snapshot / file.name).write_bytes(file.read_bytes())
        return self.snapshot


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(write(tmp_path / "source", shards=True), tmp_path / "cache")
    monkeypatch.setattr(hub, "download", fake.download)
    monkeypatch.chdir(tmp_path)
    return fake


def test_the_gateway_downloads_no_weights(fake_hub: FakeHub) -> None:
    checkpoint = Checkpoint.open("o/m", "main")
    assert (checkpoint.name, checkpoint.revision) == ("o/m", fake_hub.commit)
    assert not list(checkpoint.path.glob("*.safetensors"))
    assert len(checkpoint.pair_id) == 64


def test_a_side_downloads_its_own_shards(fake_hub: FakeHub) -> None:
    encoder = Checkpoint.open("o/m", "main", side="encoder")
    encoder.tensor_index(is_visual)
    assert [file.name for file in encoder.path.glob("*.safetensors")] == ["model-1.safetensors"]
    assert fake_hub.calls[-1] == ("o/m", fake_hub.commit, ("model-1.safetensors",))
    gateway = Checkpoint.open("o/m")
    assert gateway.pair_id == encoder.pair_id


def test_a_repository_without_safetensors(fake_hub: FakeHub) -> None:
    for file in fake_hub.source.glob("model*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="holds neither"):
        Checkpoint.open("o/m", side="llm").tensor_index()


def test_an_unreachable_hub_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"o/m is no directory here, and the hub cannot"):
        Checkpoint.open("o/m", download_dir=str(tmp_path / "cache"))


# ---- no torch


@pytest.mark.process
def test_nothing_here_imports_torch_or_transformers() -> None:
    code = (
        "import sys\n"
        "from opticnerve.checkpoints.checkpoint import Checkpoint\n"
        "from opticnerve.models.registry import make_layout\n"
        "import opticnerve.media.probe, opticnerve.media.decode, opticnerve.content_keys\n"
        "make_layout(Checkpoint.open(None)); Checkpoint.open(None).pair_id\n"
        "loaded = {'torch', 'transformers', 'huggingface_hub', 'grpc'} & set(sys.modules)\n"
        "sys.exit(f'imported: {loaded}' if loaded else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
