"""``opticnerve check``: whether a checkpoint will be served, and how, from its files alone."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.checkpoints.sizes import (
    DTYPE_BYTES,
    HalfSize,
    cache_bytes_per_token,
    listed_size,
)
from opticnerve.config import CheckpointConfig, GatewayConfig
from opticnerve.config.command_line import Parser, add_options
from opticnerve.config.options import build, options
from opticnerve.errors import (
    CheckpointError,
    FamilyError,
    InvalidMedia,
    InvalidRequest,
    StartupError,
)
from opticnerve.extras import PACKAGES
from opticnerve.media.plan import Overrides, Structure
from opticnerve.models.family import Family, Layout, wanted
from opticnerve.models.registry import (
    check_halves,
    describe_decoder,
    discover,
    find_family,
    make_layout,
)

DESCRIPTION = (
    "Says whether a checkpoint will be served, and how: family, what each service loads and the "
    "memory that this takes, tokens of pictures, chat template, limits. Reads configuration, "
    "tokenizer and the headers of weights, no weights. Of a hub id, JSON files are fetched and "
    "weights are not, which may be missing then; those of a directory must be in it."
)
EPILOG = (
    "Exit status: 0 if it will be served, 1 if not, with the error that loading it would end with, "
    "2 for a wrong command line. Without the worker extra, what only torch and transformers know "
    "is left out, and said to be."
)
EXAMPLES = ((640, 480), (1024, 768), (1600, 400))  # Width and height of pictures, in pixels.
BOUNDS = {  # Tried to see whether a request may set them; the values change little.
    "min_pixels": Overrides(min_pixels=1),
    "max_pixels": Overrides(max_pixels=EXAMPLES[0][0] ** 2),
}
GIB = 2**30


@dataclass(frozen=True, slots=True)
class PictureTokens:
    """The tokens and patches of a picture of one size."""

    width: int
    height: int
    seen_width: int  # After resizing, as the tower sees it.
    seen_height: int
    rows: int  # Rows of its embedding, each of which has a placeholder token.
    prompt_tokens: int  # Also counts row breaks and markers that the expansion adds.
    patches: int


@dataclass(frozen=True, slots=True)
class Report:
    """What is known of a checkpoint that will be served. Unknown sizes are None."""

    checkpoint: str
    revision: str | None
    family: str
    title: str
    dtype: str
    vision: HalfSize | None
    language: HalfSize | None
    missing_weights: tuple[str, ...]
    encoder_bytes: int | None  # The encoder's weights.
    llm_bytes: int | None
    cache_bytes_per_token: int | None
    max_positions: int
    position_dims: int
    deepstack_levels: int
    pictures: tuple[PictureTokens, ...]
    pixel_bounds: tuple[str, ...]  # Which of min_pixels and max_pixels a request may set.
    settings: Mapping[str, Any]  # The processor's settings, as they go into content keys.
    prompt: Mapping[str, Any]  # See gateway.startup_check.PromptFacts.
    eos_token_ids: tuple[int, ...]
    left_out: tuple[str, ...]  # Checks that could not be made on this machine.
    broken_families: tuple[str, ...]


def parser() -> Parser:
    made = Parser("check", DESCRIPTION, "[MODEL] [flags]", EPILOG)
    add_options(made, options(CheckpointConfig))
    how = made.add_argument_group("Check")
    how.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="type of weights, for the memory that they take (default: the checkpoint's)",
    )
    how.add_argument(
        "--chat-template",
        metavar="TEMPLATE",
        help="a file, the text itself, or a name, as `opticnerve gateway` takes it",
    )
    how.add_argument("--json", action="store_true", help="print one JSON object")
    return made


def main(argv: Sequence[str]) -> int:
    given = vars(parser().parse_args(argv))
    as_json, dtype = given.pop("json"), given.pop("dtype")
    settings = build(GatewayConfig, given)
    try:
        report = inspect(settings, dtype)
    except StartupError as error:
        broken = [line for line in discover().broken if as_json or line not in error.message]
        if as_json:
            told = {"type": type(error).__name__, "message": error.message}
            print(json.dumps({"served": False, "error": told, "broken_families": broken}))
        else:
            print(f"will not be served: {error.message}")
            print(*(f"note: {line}" for line in broken), sep="\n", end="\n" if broken else "")
        return 1
    if as_json:
        print(json.dumps({"served": True, **asdict(report)}, indent=2))
    else:
        print("\n".join(lines(report)))
    return 0


def inspect(settings: GatewayConfig, dtype: str = "auto") -> Report:
    """Reads the checkpoint of ``settings`` as a gateway, an encoder and an LLM worker would. Raises
    StartupError as they would."""
    checkpoint = Checkpoint.configured(settings.model, "llm")
    family, layout = find_family(checkpoint.config), make_layout(checkpoint)
    _check_layout(layout, family)
    dtype = checkpoint.dtype if dtype == "auto" else dtype
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(f"config.json names the dtype {dtype!r}, which is not supported")
    check = importlib.import_module("gateway.startup_check")
    prompt = asdict(check.describe_prompt(settings, checkpoint, layout))
    _check_weights(checkpoint)
    vision, language, cache, left_out = _halves(checkpoint, family, dtype)
    return Report(
        checkpoint=checkpoint.name,
        revision=checkpoint.revision,
        family=family.name,
        title=family.title,
        dtype=dtype,
        vision=vision,
        language=language,
        missing_weights=checkpoint.missing_weights,
        encoder_bytes=None if vision is None else vision.num_bytes(dtype),
        llm_bytes=None if language is None else language.num_bytes(dtype),
        cache_bytes_per_token=cache,
        max_positions=layout.max_positions,
        position_dims=layout.position_dims,
        deepstack_levels=layout.deepstack_levels,
        pictures=tuple(_picture(layout, *size) for size in EXAMPLES),
        pixel_bounds=tuple(name for name, bounds in BOUNDS.items() if _takes(layout, bounds)),
        settings=layout.settings(),
        prompt=prompt,
        eos_token_ids=checkpoint.eos_token_ids,
        left_out=left_out,
        broken_families=discover().broken,
    )


def _check_layout(layout: Layout, family: Family) -> None:
    """Raises FamilyError for a layout that would later crash a service, or mix pictures up."""
    lacking = [name for name in Layout.__annotations__ if not hasattr(layout, name)]
    if lacking:
        raise FamilyError(
            f"the layout of {family.title} has no {', '.join(lacking)}; what a layout has is in "
            "opticnerve.models.family"
        )
    if layout.family != family.name:
        raise FamilyError(
            f"the layout of {family.title} says family = {layout.family!r}; its package is "
            f"{family.name!r}"
        )


def _halves(
    checkpoint: Checkpoint, family: Family, dtype: str
) -> tuple[HalfSize | None, HalfSize | None, int | None, tuple[str, ...]]:
    """(vision, language, cache bytes a token, what could not be checked)"""
    lacking = [name for name in PACKAGES["worker"] if find_spec(name) is None]
    if not lacking:
        vision, language = check_halves(checkpoint)
        text = describe_decoder(checkpoint).config.to_dict()
        return vision, language, cache_bytes_per_token(text, dtype), ()
    left_out = (
        f"that tensors and configuration are those of the model: needs {lacking[0]}, which "
        "pip install 'opticnerve[worker]' brings",
    )
    sizes = [
        listed_size(checkpoint, wanted(keys)) for keys in (family.vision_keys, family.language_keys)
    ]
    if any(size is not None and not size.tensors for size in sizes):
        raise CheckpointError(
            f"{checkpoint.path} names no tensor of one of the two halves of {family.title}"
        )
    cache = cache_bytes_per_token(checkpoint.text_config, dtype)
    return sizes[0], sizes[1], cache, left_out


def _check_weights(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError, as loading does, for weights that cannot be loaded. A directory must
    contain all of its weights, and pickles are never loaded. Weights of a hub id are downloaded
    when they are needed, and a directory in the hub's cache layout may hold only what one service
    needs."""
    if checkpoint.hub_id is not None:
        return
    names, path = checkpoint.missing_weights, checkpoint.path
    pickles = any(any(path.glob(f"*.{end}")) for end in ("bin", "pt", "pth"))
    never = any(os.path.lexists(path / name) for name in names)  # Exists, but is not a file.
    never |= pickles and checkpoint.weight_map is None
    if names and (checkpoint.revision is None or never):
        checkpoint.tensor_index()


def _picture(layout: Layout, width: int, height: int) -> PictureTokens:
    plan = layout.plan(Structure("png", width, height))
    expansion = layout.expand(plan)
    rows = [
        row
        for run in expansion.runs
        for row in range(run.row_start, run.row_start + run.num_tokens)
    ]
    if sorted(rows) != list(range(plan.num_tokens)):
        raise FamilyError(
            f"of a picture of {width}x{height}, plan() of {layout.family} has {plan.num_tokens} "
            f"rows, and expand() places {len(rows)}; its runs must take every row once"
        )
    return PictureTokens(
        width,
        height,
        plan.resized_width,
        plan.resized_height,
        plan.num_tokens,
        len(expansion.token_ids),
        plan.num_patches,
    )


def _takes(layout: Layout, bounds: Overrides) -> bool:
    try:
        layout.plan(Structure("png", *EXAMPLES[0]), bounds)
    except (InvalidMedia, InvalidRequest):
        return False
    return True


# ---- for people


def lines(report: Report) -> Iterator[str]:
    yield f"{report.checkpoint} will be served"
    rows: list[tuple[str, str]] = [("family", f"{report.title} ({report.family})")]
    if report.revision:
        rows.append(("revision", report.revision))
    rows += [("dtype", report.dtype), *_weights(report), *_prompt(report)]
    rows += [("pictures", _tokens(picture)) for picture in report.pictures]
    rows.append(("picture sizes", _settings(report)))
    for name, text in rows:
        yield f"  {name:<14} {text}"
    for text in report.left_out:
        yield f"not checked here: {text}"
    for text in report.broken_families:
        yield f"note: {text}"


def _weights(report: Report) -> Iterator[tuple[str, str]]:
    for name, size, num_bytes in (
        ("encoder", report.vision, report.encoder_bytes),
        ("LLM worker", report.language, report.llm_bytes),
    ):
        if size is None:
            yield name, "size unknown: neither weights nor their index are here"
            continue
        memory = "" if num_bytes is None else f", {gib(num_bytes)} in {report.dtype}"
        yield name, f"{size.tensors} tensors{memory} (from {_SOURCES[size.source]})"
    cache = report.cache_bytes_per_token
    if cache is not None:
        context = gib(cache * report.max_positions)
        yield (
            "KV cache",
            (
                f"{cache / 1024:g} KiB a token; {context} for one context of "
                f"{report.max_positions:,} tokens"
            ),
        )
    if report.missing_weights:
        count = len(report.missing_weights)
        yield "weights", f"{count} file{'s are' if count > 1 else ' is'} not here"


_SOURCES = {
    "headers": "the weights' headers",
    "index": "the weights' index",
    "configuration": "config.json",
}


def _prompt(report: Report) -> list[tuple[str, str]]:
    prompt, dims = report.prompt, report.position_dims
    named = ", ".join(f"{name} {text}" for name, text in prompt["named_tokens"].items())
    special, written = prompt["special_tokens"], prompt["placeholder"]
    written = f"writes {written} ({prompt['placeholder_id']}) once for each picture"
    return [
        ("context", f"{report.max_positions:,} tokens" + (f", {dims}D positions" * (dims > 1))),
        ("tokenizer", f"{prompt['vocabulary']:,} tokens, {special} of them special"),
        ("special tokens", named or "none by name"),
        ("ends", "token " + ", ".join(map(str, report.eos_token_ids))),
        ("chat template", f"{prompt['template']}: {written}"),
    ]


def _tokens(picture: PictureTokens) -> str:
    more = picture.prompt_tokens - picture.rows
    seen = f"{picture.seen_width}x{picture.seen_height}"
    return (
        f"{picture.width}x{picture.height}: {picture.prompt_tokens:,} tokens"
        + (f", {picture.rows:,} of them rows of its embedding" if more else "")
        + f"; the tower sees {seen} in {picture.patches:,} patches"
    )


def _settings(report: Report) -> str:
    shown = {
        name: value
        for name, value in report.settings.items()
        if isinstance(value, int | str) and not isinstance(value, bool) and name != "family"
    }
    listed = ", ".join(f"{name} {value}" for name, value in shown.items())
    bounds = " and ".join(report.pixel_bounds)
    may = f"may set {bounds}" if bounds else "may not set min_pixels and max_pixels"
    return f"{listed}; a request {may}"


def gib(num_bytes: int) -> str:
    """``1.26 GiB``, or ``640 MiB``."""
    return (
        f"{num_bytes / GIB:.3g} GiB" if num_bytes >= GIB // 10 else f"{num_bytes / 2**20:.3g} MiB"
    )
