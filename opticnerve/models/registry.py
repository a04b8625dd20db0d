"""Finds the family that serves a checkpoint, and makes its parts.

Families are the folders of ``opticnerve/models`` that declare ``FAMILY``, and what other
distributions name in the entry-point group ``opticnerve.families``: a package that declares
``FAMILY``, or the declaration itself (``package:FAMILY``). torch is imported only when a part of a
tower or a language model is asked for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from opticnerve import models
from opticnerve.errors import FamilyError, UnsupportedCheckpoint
from opticnerve.models.family import Family

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.checkpoints.sizes import HalfSize
    from opticnerve.models.decoders.spec import DecoderSpec
    from opticnerve.models.family import LanguageModel, Layout, Preprocessor, Tower
    from opticnerve.models.towers.graph import TowerGraph
    from opticnerve.models.towers.tower import TowerSpec

ENTRY_POINTS = "opticnerve.families"
RECURRENT = {"linear_attention", "conv", "mamba", "recurrent"}  # Kinds of layers with a state.
HYBRID = ("qwen3_5", "qwen3_5_moe")  # Models with such layers, whether they list them or not.


@dataclass(frozen=True, slots=True)
class Discovery:
    """The families found, and the faults of others. A fault is reported only for a checkpoint that
    needs the faulty family."""

    families: Mapping[str, Family]  # By each model_type of config.json that they serve.
    conflicts: Mapping[str, str]  # By model_type: why none of the families that claim it serves it.
    broken: tuple[str, ...]  # Installed families that cannot be used, each with its reason.


def families() -> Mapping[str, Family]:
    """Every usable family, by each ``model_type`` of config.json that it serves."""
    return discover().families


@cache
def discover() -> Discovery:
    """Looks for families once in a process; imports their declarations, not their parts."""
    declared: list[tuple[Family, str]] = []  # (family, where it comes from).
    broken: list[str] = []
    for module in iter_modules(models.__path__):
        if module.ispkg:
            package = import_module(f"{models.__name__}.{module.name}")
            family = getattr(package, "FAMILY", None)
            if isinstance(family, Family):
                declared.append((family, family.package))
    for point in entry_points(group=ENTRY_POINTS):
        source = f"{point.name} of {_distribution(point)}"
        try:
            declared.append((_load_installed(point), source))
        except Exception as error:  # Whatever the import of a foreign package raises.
            broken.append(f"the family {source} cannot be used: {type(error).__name__}: {error}")
    return Discovery(*_by_model_type(declared), tuple(broken))


def _load_installed(point: EntryPoint) -> Family:
    found = point.load()
    family = found if isinstance(found, Family) else getattr(found, "FAMILY", None)
    if not isinstance(family, Family):
        raise FamilyError(f"{point.value} is no Family, and declares no FAMILY")
    return family


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unnamed distribution"


def _by_model_type(
    declared: list[tuple[Family, str]],
) -> tuple[dict[str, Family], dict[str, str]]:
    """(families, conflicts) by model_type. Two families of one name conflict, too: content keys
    hold it."""
    claims: dict[str, list[tuple[Family, str]]] = defaultdict(list)
    names: dict[str, list[str]] = defaultdict(list)
    for family, source in declared:
        names[family.name].append(source)
        for model_type in family.model_types:
            claims[model_type].append((family, source))
    served: dict[str, Family] = {}
    conflicts: dict[str, str] = {}
    for model_type, claimants in claims.items():
        family, _ = claimants[0]
        sources = [source for _, source in claimants]
        if len(claimants) > 1:
            conflicts[model_type] = _conflict(f"the model_type {model_type!r}", sources)
        elif len(names[family.name]) > 1:
            conflicts[model_type] = _conflict(f"the name {family.name!r}", names[family.name])
        else:
            served[model_type] = family
    return served, conflicts


def _conflict(what: str, sources: list[str]) -> str:
    return f"several families have {what}: {', '.join(sources)}; uninstall all but one of them"


def make_layout(checkpoint: Checkpoint) -> Layout:
    """Sizing, placeholders and positions of ``checkpoint``. Raises CheckpointError."""
    family = find_family(checkpoint.config)
    layout: Layout = _part(family, family.layout)(checkpoint)
    return layout


def make_preprocessor(checkpoint: Checkpoint, layout: Layout) -> Preprocessor:
    """Turns decoded pictures into the tower's input. ``layout`` is the checkpoint's."""
    family = find_family(checkpoint.config)
    preprocessor: Preprocessor = _part(family, family.preprocess)(layout)
    return preprocessor


def describe_tower(checkpoint: Checkpoint) -> TowerSpec:
    """The vision half as its family declares it. Imports torch. Raises CheckpointError."""
    family = find_family(checkpoint.config)
    spec: TowerSpec = _part(family, family.tower)(checkpoint)
    return spec


def describe_decoder(checkpoint: Checkpoint) -> DecoderSpec:
    """The language half as its family declares it. Imports torch. Raises CheckpointError."""
    family = find_family(checkpoint.config)
    spec: DecoderSpec = _part(family, family.decoder)(checkpoint)
    return spec


def load_tower(checkpoint: Checkpoint, dtype: Any, device: Any) -> Tower:
    """Vision tower and projector of ``checkpoint`` on ``device``; ``dtype`` and ``device`` are
    values of ``--dtype`` and ``--device``, or torch's. Raises CheckpointError, ConfigError."""
    keys = find_family(checkpoint.config).vision_keys
    return describe_tower(checkpoint).load(checkpoint, keys, dtype, device)


def make_graph(checkpoint: Checkpoint, tower: Tower) -> TowerGraph:
    """``tower``, loaded from ``checkpoint``, as a graph for export. Raises UnsupportedCheckpoint if
    the family's tower cannot be exported."""
    family = find_family(checkpoint.config)
    if not family.graph:
        raise UnsupportedCheckpoint(
            f"{family.title} has no tower that can be exported; serve it with --backend torch"
        )
    graph: TowerGraph = family.load_part(family.graph)(tower)
    return graph


def load_language(checkpoint: Checkpoint, dtype: Any, device: Any, attention: str) -> LanguageModel:
    """Language model and head of ``checkpoint`` on ``device``. ``attention`` names a function in
    transformers' attention interface. Raises CheckpointError, ConfigError."""
    keys = find_family(checkpoint.config).language_keys
    return describe_decoder(checkpoint).load(checkpoint, keys, dtype, device, attention)


def check_halves(checkpoint: Checkpoint) -> tuple[HalfSize, HalfSize]:
    """The sizes of the vision and the language half, without loading their weights. Imports torch.
    Raises the CheckpointError that loading would raise."""
    family = find_family(checkpoint.config)
    vision = describe_tower(checkpoint).check(checkpoint, family.vision_keys)
    return vision, describe_decoder(checkpoint).check(checkpoint, family.language_keys)


def _part(family: Family, part: str) -> Any:
    """Raises FamilyError for a part that is not there or cannot be imported."""
    try:
        return family.load_part(part)
    except (ImportError, AttributeError) as error:
        raise FamilyError(f"{part} of {family.package} cannot be imported: {error}") from error


def find_family(config: Mapping[str, Any]) -> Family:
    """The family that serves ``config``, a checkpoint's config.json. Raises UnsupportedCheckpoint,
    which says what was found and what is served, and FamilyError where families conflict."""
    found, kind = discover(), str(config.get("model_type"))
    tower = _mapping(config.get("vision_config")).get("model_type")
    for model_type in (f"{kind}/{tower}", kind):
        if model_type in found.conflicts:
            raise FamilyError(found.conflicts[model_type])
    family = found.families.get(f"{kind}/{tower}") or found.families.get(kind)
    if family is None:
        said = (f"this checkpoint {_obstacle(config)}", _supported(), *found.broken)
        raise UnsupportedCheckpoint("; ".join(said))
    if "quantization_config" in config:
        method = _mapping(config["quantization_config"]).get("quant_method", "unknown")
        raise UnsupportedCheckpoint(
            f"this checkpoint's weights are quantized ({method}), which is not supported; "
            "serve the unquantized checkpoint that it was made from"
        )
    return family


def _obstacle(config: Mapping[str, Any]) -> str:
    """Why no family serves ``config``; completes "this checkpoint ..."."""
    kind, found = str(config.get("model_type")), _found(config)
    for family in families().values():
        for model_type, why in family.unserved:
            if model_type == kind:
                return why
    if "auto_map" in config:
        return f"brings its own model code (auto_map; {found}), and remote code is never run"
    if kind.startswith("mllama") or "cross_attention_layers" in _mapping(config.get("text_config")):
        return (
            f"has a decoder that reads pictures by cross-attention ({found}), not as embeddings "
            "among its tokens, which cannot be served here"
        )
    if any(key in config for key in ("audio_config", "audio_encoder_config", "thinker_config")):
        return f"takes audio ({found}), which is not supported"
    if kind in HYBRID or RECURRENT.intersection(map(str, _layer_types(config))):
        return (
            f"has layers with a recurrent state ({found}), such as linear attention; the engine "
            "keeps keys and values only"
        )
    if "vision_config" not in config and kind != "None":
        return f"has no vision tower ({found})"
    return f"has {found}"


def _layer_types(config: Mapping[str, Any]) -> Sequence[Any]:
    text = _mapping(config.get("text_config")) or config
    found = text.get("layer_types")
    return found if isinstance(found, list) else ()


def _found(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    listed = ", ".join(map(str, names)) if isinstance(names, list) and names else "none"
    return f"model_type {config.get('model_type')!r}, architectures: {listed}"


def _supported() -> str:
    return "supported are " + ", ".join(
        f"{family.title} (model_type {model_type})" for model_type, family in families().items()
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
