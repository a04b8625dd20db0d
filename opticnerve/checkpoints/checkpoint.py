"""A checkpoint as every service opens it: configuration at once, weights on demand.

A checkpoint is the built-in demo, a directory, or a hub id. For a hub checkpoint, ``open``
downloads only configuration, tokenizer and weight index; ``tensor_index(wanted)`` then downloads
the shards that hold wanted keys, so that each side downloads only its own. No torch here.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import opticnerve.demo
from opticnerve.checkpoints import hub
from opticnerve.checkpoints.digests import Digests
from opticnerve.checkpoints.json_files import read_object
from opticnerve.checkpoints.tokenizer_files import eos_token_id
from opticnerve.content_keys import hash_parts
from opticnerve.errors import CheckpointError
from opticnerve.models.registry import find_family, make_layout
from opticnerve.tensors.header import TensorEntry, read_header

if TYPE_CHECKING:
    from opticnerve.config import CheckpointConfig

Side = Literal["gateway", "encoder", "llm"]
KeyFilter = Callable[[str], bool]

DEMO_NAME = "opticnerve-demo"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PAIR_SCHEME = "opticnerve-pair-3"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One published checkpoint directory. Make it with ``Checkpoint.open``."""

    path: Path
    name: str  # Its default name in requests: the directory's name, or the hub id.
    side: Side
    config: Mapping[str, Any]  # config.json as it is; text_config finds the nested part.
    processor_config: Mapping[str, Any]  # The image processor's settings; {} when there are none.
    generation_config: Mapping[str, Any]
    revision: str | None = None  # The commit; None outside of the hub's cache layout.
    hub_id: str | None = None
    download_dir: str | None = field(default=None, repr=False)
    _digests: Digests = field(default_factory=Digests, repr=False)

    @classmethod
    def open(
        cls,
        model: str | None,
        revision: str | None = None,
        download_dir: str | None = None,
        *,
        side: Side = "gateway",
    ) -> Checkpoint:
        """Opens a checkpoint for one side. Weights are downloaded and checked when they are needed.

        Raises CheckpointError, or UnsupportedCheckpoint for a model that no family serves.
        """
        path, name, hub_id = _locate(model, revision, download_dir)
        config = read_object(path / "config.json")
        if config is None:
            raise CheckpointError(_no_config(path))
        find_family(config)
        return cls(
            path=path,
            name=name,
            side=side,
            config=config,
            processor_config=_image_processor(path),
            generation_config=read_object(path / "generation_config.json") or {},
            revision=hub.commit_of(path),
            hub_id=hub_id,
            download_dir=download_dir,
        )

    @classmethod
    def configured(cls, config: CheckpointConfig, side: Side = "gateway") -> Checkpoint:
        """The checkpoint of a service's configuration. Raises what ``open`` raises."""
        return cls.open(config.model, config.revision, config.download_dir, side=side)

    @property
    def family(self) -> str:
        """The family's name."""
        return find_family(self.config).name

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of ``config``: nested, or (older Qwen) the top level itself."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, Mapping) else self.config

    @property
    def vision_config(self) -> Mapping[str, Any]:
        nested = self.config.get("vision_config")
        return nested if isinstance(nested, Mapping) else {}

    @property
    def dtype(self) -> str:
        """The weights' type in config.json, as a value of ``--dtype``; "float32" if it names
        none."""
        named = (
            section.get(key)
            for section in (self.config, self.text_config)
            for key in ("dtype", "torch_dtype")
        )
        return next((str(name) for name in named if name), "float32")

    def check(self) -> None:
        """Raises CheckpointError for what would fail at load, before torch is imported or any
        process is started: a layout that is not served, weights that are missing or cut short.

        Reads the header of every weight file, and downloads nothing. In the hub's cache layout,
        where each side may have only its own shards, weights are checked when they are loaded.
        """
        make_layout(self)
        if self.side == "llm":
            _ = self.eos_token_ids
        if self.revision is None:
            self.tensor_index()

    # ---- weights

    def tensor_index(self, wanted: KeyFilter | None = None) -> dict[str, TensorEntry]:
        """Every tensor whose key ``wanted`` accepts (None: all), from the files' own headers.

        Downloads missing shards of a hub checkpoint. Raises CheckpointError for weights that are
        missing, cut short, only pickled, or not where the index says.
        """
        weight_map = self.weight_map
        if weight_map is None:
            self._ensure([SINGLE_FILE])
            entries = read_header(self.path / SINGLE_FILE)
            return {key: entry for key, entry in entries.items() if wanted is None or wanted(key)}
        keys = [key for key in weight_map if wanted is None or wanted(key)]
        files = sorted({weight_map[key] for key in keys})
        self._ensure(files)
        headers = {name: read_header(self.path / name) for name in files}
        for key in keys:
            if key not in headers[weight_map[key]]:
                raise CheckpointError(
                    f"{self.path / INDEX_FILE} places {key} in {weight_map[key]}, which does not "
                    "hold it; index and shards are not of one download, fetch both again"
                )
        return {key: headers[weight_map[key]][key] for key in keys}

    @cached_property
    def weight_map(self) -> dict[str, str] | None:
        """Key -> shard's file name; None for a checkpoint of one file. Raises CheckpointError."""
        index = read_object(self.path / INDEX_FILE)
        if index is None:
            return None
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) and name and Path(name).name == name
            for name in weight_map.values()
        ):
            raise CheckpointError(f"{self.path / INDEX_FILE} has no usable weight_map")
        return {str(key): name for key, name in weight_map.items()}

    @property
    def missing_weights(self) -> tuple[str, ...]:
        """Weight files that are not here. Downloads nothing. Raises CheckpointError."""
        files = {SINGLE_FILE} if self.weight_map is None else set(self.weight_map.values())
        return tuple(sorted(name for name in files if not (self.path / name).is_file()))

    def _ensure(self, files: Iterable[str]) -> None:
        """Downloads those of ``files`` that are missing. Raises CheckpointError, which names those
        that cannot be had."""
        missing = [name for name in files if not (self.path / name).is_file()]
        if missing and self.hub_id is not None:
            hub.download(self.hub_id, self.revision, self.download_dir, missing)
            missing = [name for name in missing if not (self.path / name).is_file()]
        if missing:
            raise CheckpointError(_missing_weights(self.path, missing))

    # ---- ends

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: those of generation_config.json, or else of config.json, and
        the tokenizer's. Raises CheckpointError for files that cannot be read."""
        ends = self.generation_config.get("eos_token_id", self.text_config.get("eos_token_id"))
        ids = ends if isinstance(ends, list) else [ends]
        found = [*ids, eos_token_id(self.path)]
        return tuple(dict.fromkeys(n for n in found if type(n) is int and n >= 0))

    # ---- identity

    @cached_property
    def pair_id(self) -> str:
        """A digest that is the same for every worker of one checkpoint; 64 hex digits.

        It covers configuration, processor settings and weights. In the hub's cache layout, where
        each side may have only its own shards, the commit identifies the weights; in any other
        directory every tensor's key, type, shape and bytes. So a hub download and a plain copy of
        the same files do not pair: give all workers the same kind of source. Reads all weights
        unless their digests are recorded (``opticnerve.checkpoints.digests``), so call it off the
        event loop. Raises CheckpointError if weights of a directory are missing.
        """
        weights = self.weights_digest() if self.revision is None else f"commit:{self.revision}"
        settings = (self.config, self.processor_config)
        return hash_parts(
            PAIR_SCHEME, *(json.dumps(part, sort_keys=True) for part in settings), weights
        )

    def read_ahead(self) -> None:
        """Computes ``pair_id`` on a thread, in parallel with loading."""

        def read() -> None:
            with contextlib.suppress(CheckpointError):  # Raised again when the id is needed.
                _ = self.pair_id

        threading.Thread(target=read, name="digests", daemon=True).start()

    def weights_digest(self, wanted: KeyFilter | None = None) -> str:
        """A digest of every tensor whose key ``wanted`` accepts (None: all): key, type, shape and
        bytes, independent of sharding; 64 hex digits. Downloads and raises like ``tensor_index``.
        """
        entries = self.tensor_index(wanted)
        digests = self._digests.of(entries)
        return hash_parts(
            *(
                part
                for key, entry in sorted(entries.items())
                for part in (f"{key} {entry.dtype} {entry.shape}", digests[key])
            )
        )


def _locate(
    model: str | None, revision: str | None, download_dir: str | None
) -> tuple[Path, str, str | None]:
    """(directory, served name, hub id or None) of the checkpoint that MODEL names."""
    if model is None:
        return Path(opticnerve.demo.__file__).parent / "checkpoint", DEMO_NAME, None
    path = Path(os.path.expanduser(model))  # Path.expanduser raises for an unknown user.
    if path.is_dir():
        path = path.resolve() if path.name in ("", ".", "..") else path.absolute()
        return path, path.name, None
    if path.exists():
        raise CheckpointError(f"{model} is a file; give the directory that holds config.json")
    if not hub.looks_like_hub_id(model):
        raise CheckpointError(
            f"there is no directory {model}; give the checkpoint's directory or a hub id "
            "(owner/name), or no model at all for the built-in demo"
        )
    return hub.download(model, revision, download_dir, hub.METADATA_FILES), model, model


def _image_processor(path: Path) -> dict[str, Any]:
    """Image processor settings, from processor_config.json (newer) or preprocessor_config.json."""
    nested = (read_object(path / "processor_config.json") or {}).get("image_processor")
    if isinstance(nested, dict):
        return nested
    return read_object(path / "preprocessor_config.json") or {}


def _no_config(path: Path) -> str:
    if (path / "params.json").is_file():
        return (
            f"{path} holds params.json, a vendor's own format; use the checkpoint's Hugging Face "
            "conversion, which has a config.json"
        )
    if any(path.glob("*.gguf")):
        return f"{path} holds GGUF files; use the safetensors checkpoint that they were made from"
    return f"{path} holds no config.json; give the directory of a Hugging Face checkpoint"


def _missing_weights(path: Path, missing: list[str]) -> str:
    for name in missing:
        if os.path.lexists(path / name):
            return (
                f"{path / name} is no file, and no link that leads to one; fetch the weights again"
            )
    names = ", ".join(missing)
    if missing == [SINGLE_FILE]:
        pickles = [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]
        if pickles:
            return (
                f"{path} holds weights as pickles only ({pickles[0].name}), which are never "
                "loaded; convert the checkpoint to safetensors"
            )
        return f"{path} holds neither {SINGLE_FILE} nor {INDEX_FILE}; fetch the weights"
    return f"{path} lacks {names}, which {INDEX_FILE} names; fetch the missing shards"
