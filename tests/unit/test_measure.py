"""The counts of bench.measure, on small sources."""

import threading
from pathlib import Path

from bench.measure import (
    code_lines,
    figures,
    functions,
    lines_by_package,
    mentions,
    modules_by_folder,
    shared_classes,
    sizes,
)
from bench.trace import Recorder

SOURCE = '''"""A module.

Of several lines.
"""

import os  # A comment behind code.

# A comment alone.


class Box:
    """A box."""

    size: int = 3
    """Its size."""

    def open(self):
        """Opens it."""
        text = """one

        three"""
        return (
            text,

            os.sep,
        )


@decorated
async def carry(
    box,
): ...
'''


def test_code_lines_leave_out_blank_lines_comments_and_docstrings():
    # import; class, size; open, 3 of text (its blank line is content), 4 of return; 4 of carry
    assert code_lines(SOURCE) == 1 + 2 + 1 + 3 + 4 + 4
    assert code_lines("") == 0
    assert code_lines('"""Only a docstring."""\n') == 0
    assert code_lines("a = 1; b = 2\n\n\n\nc = 3\n") == 2


def test_functions_span_from_def_to_their_end():
    assert functions(SOURCE) == {"17 open": 10, "30 carry": 3}
    nested = "def outer():\n    def inner():\n        pass\n    return inner\n"
    assert functions(nested) == {"1 outer": 4, "2 inner": 2}


def test_shared_classes_name_every_file():
    sources = {
        Path("a.py"): "class Same: ...\nclass Other: ...\n",
        Path("b.py"): "def f():\n    class Same: ...\n",
    }
    assert shared_classes(sources) == {"Same": ["a.py", "b.py"]}


def test_a_package_counts_with_all_within_it():
    lines = {
        Path("p/a.py"): 3,
        Path("p/q/b.py"): 5,
        Path("p/q/r/c.py"): 7,
        Path("p/s/__init__.py"): 0,
    }
    assert lines_by_package(lines) == {"p": 15, "p/q": 12}


def test_folders_count_their_own_modules_without_init():
    paths = [Path(name) for name in ("p/a.py", "p/q/__init__.py", "p/q/b.py", "p/q/c.py")]
    assert list(modules_by_folder(paths).items()) == [("p/q", 2), ("p", 1)]


def test_mentions_are_of_the_whole_word():
    sources = {Path("a.py"): "x.min_p = 1", Path("b.proto"): "min_ps", Path("c.py"): "_min_p"}
    assert mentions(sources, "min_p") == ["a.py"]


def test_figures_of_requests_count_files_and_functions():
    found = {
        "files": {"p/a.py": 10},
        "folders": {"p": 1},
        "shared_classes": {},
        "functions": {"number": 2, "median": 3, "p90": 4, "max": 4, "long": {}},
        "sampling_field": ["p/a.py"],
        "visits": {"text request": {"p/a.py": 5, "p/b.py": 2}},
    }
    shown = figures(found)
    assert (shown["text request: files"], shown["text request: functions"]) == (2, 7)


def test_sizes_have_the_packages_of_both_sides():
    before = {"packages": {"p": 8, "p/a": 5}, "product": 8, "beside": {"tests": 4}}
    after = {"packages": {"p": 7, "p/b": 4}, "product": 7, "beside": {"examples": 1, "tests": 4}}
    assert sizes({"before": before, "after": after}) == [
        ("p", 8, 7),
        ("p/a", 5, "-"),
        ("p/b", "-", 4),
        ("**the product**", 8, 7),
        ("examples", "-", 1),
        ("tests", 4, 4),
    ]


def test_a_recorder_sees_functions_of_its_tree_in_threads(tmp_path):
    source = "def outer():\n    inner()\n\ndef inner(): ...\n\ndef never(): ...\n"
    names = {}
    exec(compile(source, str(tmp_path / "a.py"), "exec"), names)
    recorder = Recorder(tmp_path)
    recorder.install()
    try:
        thread = threading.Thread(target=names["outer"])
        thread.start()
        thread.join()
    finally:
        threading.setprofile(None)
    assert recorder.take() == {("a.py", "outer", 1), ("a.py", "inner", 4)}
    assert recorder.take() == set()
