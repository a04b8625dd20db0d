"""docs/models.md has the tables that families and fixtures give, and docs/adding-a-model.md shows
the example's files as they are."""

import re

import pytest

from opticnerve.models import registry
from tests.model_docs import DOCUMENTS, EXAMPLE, GUIDE, ROOT, TABLES, with_tables


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_tables_are_those_of_the_declarations(document):
    text = document.read_text()
    assert with_tables(text) == text, "run python -m tests.model_docs"


def test_every_family_and_model_type_is_told():
    text = DOCUMENTS[0].read_text()
    assert all(f"<!-- end of {name} -->" in text for name in TABLES)
    for model_type, family in registry.families().items():
        assert f"| {family.title} |" in text and f"`{model_type}`" in text


def test_the_guide_shows_the_example_whole():
    text = GUIDE.read_text()
    files = [file for file in EXAMPLE.rglob("*") if file.suffix in (".py", ".toml")]
    assert len(files) == 5
    for file in files:
        assert f"\n{file.read_text()}```" in text, f"{file}: run python -m tests.model_docs"


def test_what_the_guide_names_is_there():
    text = GUIDE.read_text()
    for path in re.findall(r"`((?:tests|examples|opticnerve)/[\w./]+)`", text):
        if "NAME" not in path:
            assert (ROOT / path).exists(), path
    for name in re.findall(r"\]\(([\w-]+\.md)\)", text):
        assert (GUIDE.parent / name).is_file(), name
