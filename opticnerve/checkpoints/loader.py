"""Loads one half of a checkpoint into a module, completely or not at all.

transformers' ``from_pretrained`` of a tower's or decoder's class on a whole checkpoint leaves
dozens of weights random without an exception. Here a family declares the keys of each half and
their names in its module; every parameter and buffer is then loaded, tied, recomputed, or reported
in a CheckpointError.

Tensors are read one by one into memory of their own, not mapped. No page of the other half is read,
and replacing or truncating the files later changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from opticnerve.checkpoints.experts import TensorPlace
from opticnerve.checkpoints.sizes import HalfSize
from opticnerve.errors import CheckpointError, ConfigError, OpticNerveError
from opticnerve.models.family import module_name, wanted
from opticnerve.tensors.dtypes import FLOATING, dtype_name

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.models.family import KeyMap
    from opticnerve.tensors.header import TensorEntry

log = logging.getLogger(__name__)

Recompute = Callable[[nn.Module], torch.Tensor]
"""Makes a buffer that no checkpoint holds. Its argument is the owning module, on the meta
device."""

DTYPES = {dtype_name(FLOATING[name]): FLOATING[name] for name in ("F32", "F16", "BF16")}
MAX_LISTED = 6  # Keys in an error message.


def load_module(
    make_module: Callable[[], nn.Module],
    checkpoint: Checkpoint,
    key_map: KeyMap,
    *,
    dtype: str | torch.dtype,
    device: str | torch.device,
    tied: Mapping[str, str] | None = None,
    recomputed: Mapping[str, Recompute] | None = None,
    ignored: Sequence[str] = (),
) -> nn.Module:
    """``make_module()`` with every weight from ``checkpoint``. ``dtype`` and ``device`` are values
    of ``--dtype`` and ``--device``, or torch's.

    ``key_map`` renames the keys of this half, see ``family.KeyMap``. ``tied`` maps a parameter to
    the one that it shares if the checkpoint does not hold it. ``recomputed`` maps a non-persistent
    buffer to the function that makes it; the buffer keeps the dtype of the result. ``ignored``:
    patterns (matched at the start) of keys of this half that the module does not use. The module is
    in eval mode, without gradients.

    Raises CheckpointError for weights that are missing, of another shape, not floating point,
    duplicated, without a place in the module, or left uninitialised; ConfigError.
    """
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, checkpoint, device)
    module = _make_on_meta(make_module, checkpoint)
    sources, tied = _match(checkpoint, module, key_map, tied, ignored)
    weights = _read(sources, module, dtype, device)
    module.load_state_dict(weights, strict=False, assign=True)
    for target, source in tied.items():
        owner, leaf = _owner(module, target)
        setattr(owner, leaf, module.get_parameter(source))
    for name, make in (recomputed or {}).items():
        _set_buffer(module, name, make, device)
    _check_nothing_left(checkpoint, module)
    return module.requires_grad_(False).eval()


def check_module(
    make_module: Callable[[], nn.Module],
    checkpoint: Checkpoint,
    key_map: KeyMap,
    *,
    tied: Mapping[str, str] | None = None,
    ignored: Sequence[str] = (),
) -> HalfSize:
    """The size of what ``load_module`` would load, without reading or downloading weights. If all
    weight files are here, their headers are compared with the module; otherwise the keys of the
    index, if there is one. Raises what ``load_module`` raises.
    """
    module = _make_on_meta(make_module, checkpoint)
    if checkpoint.missing_weights:
        expected = [item for name, item in module.state_dict().items() if name not in (tied or {})]
        _check_index(checkpoint, module.state_dict(), wanted(key_map, ignored), key_map, tied or {})
        return HalfSize(len(expected), sum(item.numel() for item in expected), "configuration")
    sources, _ = _match(checkpoint, module, key_map, tied, ignored)
    return HalfSize.of_entries(entry for _, entry in sources.values())


def _make_on_meta(make_module: Callable[[], nn.Module], checkpoint: Checkpoint) -> nn.Module:
    """The module on the meta device. Raises CheckpointError if it cannot be made."""
    try:
        with torch.device("meta"):
            return make_module()
    except OpticNerveError:
        raise
    except Exception as error:  # transformers raises many kinds of errors for a wrong config.
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'} describes a model that transformers cannot make: "
            f"{type(error).__name__}: {error}"
        ) from error


def _match(
    checkpoint: Checkpoint,
    module: nn.Module,
    key_map: KeyMap,
    tied: Mapping[str, str] | None,
    ignored: Sequence[str],
) -> tuple[dict[TensorPlace, tuple[str, TensorEntry]], dict[str, str]]:
    """The sources of the module's tensors, and the part of ``tied`` that these lack. Raises
    CheckpointError unless both together are all of the module's tensors."""
    sources = _sources(checkpoint, key_map, ignored)
    held = {place.name for place in sources}
    tied = {target: source for target, source in (tied or {}).items() if target not in held}
    _check(checkpoint, module.state_dict(), sources, tied)
    return sources, tied


def rotary_buffers(module: str, kinds: Iterable[str | None] = (None,)) -> dict[str, Recompute]:
    """``recomputed`` entries for a transformers rotary embedding at ``module``. ``kinds``: the
    names of its tables if it has several, else None."""

    def fresh(owner: nn.Module, name: str) -> torch.Tensor:
        with torch.device("cpu"):
            buffer: torch.Tensor = getattr(type(owner)(owner.config), name)
        return buffer

    names = [
        name if kind is None else f"{kind}_{name}"
        for kind in kinds
        for name in ("inv_freq", "original_inv_freq")
    ]
    return {f"{module}.{name}": partial(fresh, name=name) for name in names}


def transformers_config(config_class: Any, checkpoint: Checkpoint) -> Any:
    """The transformers configuration of ``checkpoint``. Raises CheckpointError."""
    try:
        return config_class.from_pretrained(checkpoint.path)
    except Exception as error:  # Validation errors of several kinds, none with a common base.
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'} is no usable {config_class.__name__}: {error}"
        ) from error


def resolve_device(device: str | torch.device) -> torch.device:
    """The device for a value of ``--device``. Raises ConfigError if there is no such device."""
    if isinstance(device, torch.device):
        return device
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"unknown device {device!r}; use cpu, cuda or cuda:N", param="device"
        ) from error
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {device!r} is not there: {torch.cuda.device_count()} CUDA devices are visible",
            param="device",
        )
    return resolved


def resolve_dtype(
    dtype: str | torch.dtype, checkpoint: Checkpoint, device: torch.device
) -> torch.dtype:
    """The dtype for a value of ``--dtype``. "auto" is the checkpoint's (float32 if it names none),
    or float32 if ``device`` is a CPU without arithmetic in that type. Raises ConfigError."""
    if isinstance(dtype, torch.dtype):
        return dtype
    automatic = dtype == "auto"
    if automatic:
        dtype = checkpoint.dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}", param="dtype")
    if automatic and device.type == "cpu" and not cpu_computes(DTYPES[dtype]):
        _log_float32(dtype)
        return torch.float32
    return DTYPES[dtype]


@cache
def cpu_computes(dtype: torch.dtype) -> bool:
    """Whether this CPU has arithmetic in ``dtype``. Without it, products of many rows took eight
    to twelve times as long as in float32."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    try:
        return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())
    except (AttributeError, RuntimeError):  # A build without oneDNN.
        return False


@cache
def _log_float32(dtype: str) -> None:
    log.info(
        "this CPU has no %s arithmetic: computing in float32 (--dtype %s uses it all the same)",
        dtype,
        dtype,
    )


def _sources(
    checkpoint: Checkpoint, key_map: KeyMap, ignored: Sequence[str]
) -> dict[TensorPlace, tuple[str, TensorEntry]]:
    """Place in the module -> (checkpoint key, entry), for every tensor of this half. Raises
    CheckpointError for two tensors in one place."""
    sources: dict[TensorPlace, tuple[str, TensorEntry]] = {}
    for key, entry in checkpoint.tensor_index(wanted(key_map, ignored)).items():
        place = TensorPlace.of(module_name(key_map, key))
        if place in sources:
            raise CheckpointError(
                f"{checkpoint.path} holds {place.name} twice, as {sources[place][0]} and as {key}"
            )
        sources[place] = (key, entry)
    return sources


def _check(
    checkpoint: Checkpoint,
    expected: Mapping[str, torch.Tensor],
    sources: Mapping[TensorPlace, tuple[str, TensorEntry]],
    tied: Mapping[str, str],
) -> None:
    """Raises CheckpointError unless the tensors are exactly those of the module."""
    elements = dict.fromkeys(expected, 0)
    unknown, misfits, square = [], [], []
    for place, (key, entry) in sources.items():
        try:
            view = place.view(expected[place.name])
        except (KeyError, IndexError):
            unknown.append(key)
            continue
        elements[place.name] += view.numel()
        if place.is_square_stack(view):
            square.append(key)
        if entry.shape != tuple(view.shape) and not place.is_exchanged(entry.shape, view):
            misfits.append(f"{key} (shape {list(entry.shape)}, the model's is {list(view.shape)})")
    missing = [name for name, found in elements.items() if not found and name not in tied]
    partial = [
        f"{name} ({found} of {expected[name].numel()} elements)"
        for name, found in elements.items()
        if found not in (0, expected[name].numel())
    ]
    quantized = [f"{key} ({e.dtype})" for key, e in sources.values() if e.dtype not in FLOATING]
    for names, what in (
        (missing, "lacks"),
        (partial, "holds experts of a layer partly, or twice:"),
        (unknown, "holds tensors that have no place in the model:"),
        (misfits, "holds tensors that do not fit config.json:"),
        (quantized, "holds tensors that are not floating point:"),
        (
            square,
            "holds square stacks of experts, published in one of two forms which nothing "
            "tells apart; publish every expert's projections on their own:",
        ),
    ):
        if names:
            raise CheckpointError(f"{checkpoint.path} {what} {_list(names)}")


def _check_index(
    checkpoint: Checkpoint,
    expected: Mapping[str, torch.Tensor],
    is_wanted: Callable[[str], bool],
    key_map: KeyMap,
    tied: Mapping[str, str],
) -> None:
    """Raises CheckpointError unless the checkpoint's index, if it has one, names exactly the
    module's tensors."""
    if checkpoint.weight_map is None:
        return
    names = {
        key: TensorPlace.of(module_name(key_map, key)).name
        for key in checkpoint.weight_map
        if is_wanted(key)
    }
    missing = expected.keys() - set(names.values()) - tied.keys()
    unknown = [key for key, name in names.items() if name not in expected]
    for listed, what in (
        (missing, "lacks"),
        (unknown, "names tensors that have no place in the model:"),
    ):
        if listed:
            raise CheckpointError(f"the index of {checkpoint.path} {what} {_list(listed)}")


def _read(
    sources: Mapping[TensorPlace, tuple[str, TensorEntry]],
    module: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Reads every tensor, file by file, into memory of its own."""
    expected = module.state_dict()
    dtypes = _dtypes(module, expected, dtype)
    by_file: dict[Path, list[tuple[TensorPlace, TensorEntry]]] = {}
    for place, (_, entry) in sources.items():
        by_file.setdefault(entry.file, []).append((place, entry))
    tensors: dict[str, torch.Tensor] = {}
    for file, entries in by_file.items():
        with file.open("rb") as stream:
            for place, entry in sorted(entries, key=lambda item: item[1].start):
                whole, own = expected[place.name], dtypes[place.name]
                tensor = _read_one(stream, entry)
                if place.is_exchanged(entry.shape, whole):
                    tensor = tensor.transpose(1, 2).contiguous()
                if place.expert is None:
                    tensors[place.name] = tensor.to(device=device, dtype=own)
                    continue
                if place.name not in tensors:
                    tensors[place.name] = torch.empty(whole.shape, dtype=own, device=device)
                place.view(tensors[place.name]).copy_(tensor)
    return tensors


def _dtypes(module: nn.Module, names: Iterable[str], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of each tensor: ``dtype``, or float32 where transformers' module requires it."""
    kept: set[str] = set()
    for part in module.modules():
        kept.update(getattr(part, "_keep_in_fp32_modules_strict", None) or ())
    return {name: dtype if kept.isdisjoint(name.split(".")) else torch.float32 for name in names}


def _read_one(stream: BufferedReader, entry: TensorEntry) -> torch.Tensor:
    data = torch.empty(entry.num_bytes, dtype=torch.uint8)
    stream.seek(entry.start)
    if stream.readinto(data.numpy()) != entry.num_bytes:
        raise CheckpointError(f"{entry.file} was cut short while it was read")
    return data.view(FLOATING[entry.dtype]).reshape(entry.shape)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _set_buffer(module: nn.Module, name: str, make: Recompute, device: torch.device) -> None:
    owner, leaf = _owner(module, name)
    buffer = make(owner)
    if buffer.shape != owner.get_buffer(leaf).shape:
        raise CheckpointError(f"the recomputed {name} has shape {list(buffer.shape)}")
    owner.register_buffer(leaf, buffer.to(device), persistent=False)


def _check_nothing_left(checkpoint: Checkpoint, module: nn.Module) -> None:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    left = [name for name, tensor in tensors if tensor.is_meta]
    if left:
        raise CheckpointError(
            f"{checkpoint.path} leaves uninitialised: {_list(left)}; a family names what no "
            "checkpoint holds as `recomputed`"
        )


def _list(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
