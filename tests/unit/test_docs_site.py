"""The documentation builds as a site, and its links lead somewhere."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REPOSITORY = "https://github.com/opticnerve/opticnerve/blob/main/"
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.process
@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    built = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    for page in PAGES:
        assert (tmp_path / "build" / "docs" / f"{page.stem}.html").exists()


def test_every_page_is_in_the_navigation():
    listed = re.findall(r'"([\w-]+\.md)"', (ROOT / "zensical.toml").read_text())
    assert sorted(listed) == [page.name for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_of_the_repository_have_a_target(page):
    text = page.read_text()
    assert "](../" not in text  # It would lead out of the site.
    for target in re.findall(re.escape(REPOSITORY) + r"([^)#\s]*)", text):
        assert (ROOT / target).exists(), target
