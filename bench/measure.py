"""The size of the product, and how much of it a request runs.

    python -m bench.measure [--before COMMIT]

Counts code lines (no blank lines, comments or docstrings), files, folders, functions and classes;
names the files that a sampling field touches; and lets ``bench.trace`` count the files and
functions that one request of each kind visits. With ``--before``, a worktree of that commit is
counted as well, by the scripts of this tree. The JSON also has lines by file, and functions by
request and file.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import statistics
import subprocess
import sys
import tempfile
import tokenize
import tomllib
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from bench import commits, report

LONG = 40  # Lines; functions above are listed.
SAMPLING_FIELD = "min_p"  # Stands for all sampling fields: its name occurs nowhere else.
LAYOUT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER,
}  # fmt: skip
TRACE = Path(__file__).with_name("trace.py")


def code_lines(source: str) -> int:
    """The number of lines with code. A string that is a statement counts as a docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                lines.difference_update(range(node.lineno, (node.end_lineno or 0) + 1))
    return len(lines)


def functions(source: str) -> dict[str, int]:
    """The number of lines of each function, from ``def`` on, by "line name"."""
    return {
        f"{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def shared_classes(sources: dict[Path, str]) -> dict[str, list[str]]:
    """Class names that occur more than once, with the classes' files."""
    found: dict[str, list[str]] = {}
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(str(path))
    return {name: files for name, files in sorted(found.items()) if len(files) > 1}


def lines_by_package(lines_of: dict[Path, int]) -> dict[str, int]:
    """Code lines of each package and of the packages directly in it."""
    lines: Counter[str] = Counter()
    for path, number in sorted(lines_of.items()):
        lines[path.parts[0]] += number
        if len(path.parts) > 2 and number:
            lines["/".join(path.parts[:2])] += number
    return dict(lines)


def modules_by_folder(paths: list[Path]) -> dict[str, int]:
    """Modules directly in each folder, without ``__init__``; the largest folder first."""
    folders = Counter(str(path.parent) for path in paths if path.name != "__init__.py")
    return dict(folders.most_common())


def mentions(sources: dict[Path, str], word: str) -> list[str]:
    return sorted(str(path) for path, text in sources.items() if re.search(rf"\b{word}\b", text))


def read(tree: Path) -> dict[Path, str]:
    """Sources of a tree, by their path in it: Python and protos, without generated files."""
    listed = commits.git(
        "-C", str(tree), "ls-files", "-co", "--exclude-standard", "--", "*.py", "*.proto"
    )
    paths = [Path(line) for line in listed.splitlines()]
    return {path: (tree / path).read_text() for path in paths if (tree / path).exists()}


def count(tree: Path) -> dict[str, Any]:
    """Everything that can be counted in the sources."""
    document = tomllib.loads((tree / "pyproject.toml").read_text())
    packages = document["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    sources = read(tree)
    protos = {path: text for path, text in sources.items() if path.suffix == ".proto"}
    python = {path: text for path, text in sources.items() if path.suffix == ".py"}
    product = {path: text for path, text in python.items() if path.parts[0] in packages}
    lines = {path: code_lines(text) for path, text in python.items()}
    beside = {path.parts[0] for path in python if path not in product}
    spans = {
        f"{path}:{name}": span
        for path, text in product.items()
        for name, span in functions(text).items()
    }
    ordered = sorted(spans.values())
    by_package = lines_by_package(lines)
    return {
        "packages": {k: n for k, n in by_package.items() if k.split("/")[0] in packages},
        "product": sum(lines[path] for path in product),
        "beside": {k: n for k, n in by_package.items() if k in beside},
        "files": {str(path): lines[path] for path in product if lines[path]},
        "folders": modules_by_folder(list(product)),
        "shared_classes": shared_classes(product),
        "functions": {
            "number": len(ordered),
            "median": int(statistics.median_low(ordered)),
            "p90": ordered[len(ordered) * 9 // 10],
            "max": ordered[-1],
            "long": {k: n for k, n in sorted(spans.items(), key=lambda x: -x[1]) if n > LONG},
        },
        "sampling_field": mentions(product | protos, SAMPLING_FIELD),
    }


def visits(tree: Path, product: Collection[str]) -> dict[str, dict[str, int]]:
    """The number of functions that one request of each kind runs, by file. See ``bench.trace``."""
    with commits.code_of(tree), tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "visits.json"
        command = [sys.executable, "-P", str(TRACE), str(tree.resolve()), str(output)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise SystemExit(f"{done.stdout}\nno request could be traced, see above")
        kinds = json.loads(output.read_text())
    return {
        kind: {file: number for file, number in files.items() if file in product}
        for kind, files in kinds.items()
    }


def sizes(sides: dict[str, dict[str, Any]]) -> list[tuple[object, ...]]:
    """Rows of code lines: each package of any side, the product, and what is not product."""

    def section(name: str) -> list[tuple[object, ...]]:
        keys = sorted({key for found in sides.values() for key in found[name]})
        return [(key, *(found[name].get(key, "-") for found in sides.values())) for key in keys]

    total = ("**the product**", *(found["product"] for found in sides.values()))
    return [*section("packages"), total, *section("beside")]


def figures(found: dict[str, Any]) -> dict[str, object]:
    """The other figures of one tree, by label."""
    spans = found["functions"]
    shown: dict[str, object] = {
        "files with code": len(found["files"]),
        "modules in the largest folder": max(found["folders"].values()),
        "class names used more than once": len(found["shared_classes"]),
        "functions": spans["number"],
        "lines of a function, median": spans["median"],
        "lines of a function, p90": spans["p90"],
        "lines of a function, max": spans["max"],
        f"functions over {LONG} lines": len(spans["long"]),
        "files of a sampling field": len(found["sampling_field"]),
    }
    for kind, files in found.get("visits", {}).items():
        shown[f"{kind}: files"] = len(files)
        shown[f"{kind}: functions"] = sum(files.values())
    return shown


def show(sides: dict[str, dict[str, Any]]) -> None:
    print(report.table(("code lines", *sides), sizes(sides)), end="\n\n")
    columns = [figures(found) for found in sides.values()]
    rows = [(label, *(column[label] for column in columns)) for label in columns[0]]
    print(report.table(("figure", *sides), rows))
    for side, found in sides.items():
        folders = [f"{name} {number}" for name, number in list(found["folders"].items())[:3]]
        print(f"\n{side}: largest folders: {', '.join(folders)}")
        print(f"{side}: a sampling field: {', '.join(found['sampling_field'])}")
        for name, files in found["shared_classes"].items():
            print(f"{side}: class {name}: {', '.join(files)}")
        for name, span in found["functions"]["long"].items():
            print(f"{side}: {span} lines: {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", metavar="COMMIT", help="measure this commit too")
    parser.add_argument("--no-trace", action="store_true", help="start no services")
    arguments = parser.parse_args()
    sides = {}
    with commits.trees(arguments.before) as trees:
        for side, tree in trees.items():
            sides[side] = count(tree)
            if not arguments.no_trace:
                sides[side]["visits"] = visits(tree, sides[side]["files"])
    show(sides)
    results = {"commits": commits.describe(arguments.before), **sides}
    print("\nwritten to", report.save("measure", results).relative_to(Path.cwd()))


if __name__ == "__main__":
    main()
