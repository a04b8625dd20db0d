"""The tables of docs/models.md, and README's: families, and the published checkpoints that are
fixtures. The files of the example in docs/adding-a-model.md.

    python -m tests.model_docs

writes them anew from the families' declarations, from tests/fixtures/checkpoints and from the
example; a test holds the documents to them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from opticnerve.models import registry
from opticnerve.models.family import Family, wanted
from tests import published
from tests.api_docs import code, table

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "adding-a-model.md"
EXAMPLE = ROOT / "examples" / "vip_llava"
DOCUMENTS = (ROOT / "docs" / "models.md", ROOT / "README.md")
GRAPH_BACKENDS = ("onnx", "tensorrt", "tensorrt_rtx")  # Of towers that can be exported.


def fixtures() -> Iterator[tuple[Family, dict[str, Any]]]:
    """The fixtures whose family is here."""
    for name in published.NAMES:
        fixture = published.read(name)
        family = find(fixture["files"]["config.json"])
        if family is not None:
            yield family, fixture


def find(config: Mapping[str, Any]) -> Family | None:
    tower = config["vision_config"].get("model_type")
    known = registry.families()
    return known.get(f"{config['model_type']}/{tower}") or known.get(config["model_type"])


def families_table() -> str:
    known = sorted(set(registry.families().values()), key=lambda family: family.title.lower())
    examples: dict[str, list[str]] = {}
    for family, fixture in fixtures():
        examples.setdefault(family.name, []).append(fixture["repository"])
    return table(
        "family",
        "`model_type`",
        "checkpoints, for example",
        "pictures",
        "video",
        "encoder `--backend`",
        rows=(
            (
                family.title,
                ", ".join(map(code, family.model_types)),
                ", ".join(examples.get(family.name, ["-"])),
                "yes",
                "no",
                ", ".join(map(code, ("torch", *(GRAPH_BACKENDS if family.graph else ())))),
            )
            for family in known
        ),
    )


def checkpoints_table() -> str:
    return table(
        "checkpoint",
        "encoder",
        "LLM worker",
        *(f"{size} picture" for size in ("640x480", "1024x768", "1600x400")),
        "",
        rows=(
            (
                fixture["repository"],
                _billions(fixture, family.vision_keys),
                _billions(fixture, family.language_keys),
                *(f"{tokens:,}" for tokens in (fixture["pictures"] or {"": "-"}).values()),
                " ".join(fixture["notes"]).replace("<", "&lt;"),
            )
            for family, fixture in fixtures()
            if fixture["pictures"]
        ),
    )


def _billions(fixture: Mapping[str, Any], keys: Any) -> str:
    is_wanted = wanted(keys)
    shapes = published.tensors(fixture)
    count = sum(math.prod(shape) for key, shape in shapes.items() if is_wanted(key))
    return f"{count / 1e9:.3g} B"


TABLES: dict[str, Callable[[], str]] = {
    "families": families_table,
    "checkpoints": checkpoints_table,
}


def with_tables(text: str) -> str:
    """The document with every table between its marks."""
    for name, make in TABLES.items():
        start, end = f"<!-- {name}: python -m tests.model_docs -->\n", f"<!-- end of {name} -->\n"
        if start in text:
            before, _, rest = text.partition(start)
            text = before + start + "\n" + make() + "\n" + end + rest.partition(end)[2]
    return text


def with_example(text: str) -> str:
    """The guide with each file of the example in the block after its name."""
    for file in sorted(EXAMPLE.rglob("*")):
        if file.suffix in (".py", ".toml"):
            name = re.escape(f"`{file.relative_to(EXAMPLE)}`:")
            block = re.compile(rf"({name}\n\n```\w+\n).*?```", re.DOTALL)
            source = file.read_text()
            text = block.sub(lambda match, source=source: f"{match[1]}{source}```", text)
    return text


if __name__ == "__main__":
    GUIDE.write_text(with_example(GUIDE.read_text()))
    for document in DOCUMENTS:
        document.write_text(with_tables(document.read_text()))
