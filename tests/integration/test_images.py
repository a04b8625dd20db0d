"""The images of ``deploy/Dockerfile``: linted, without secrets or root. No image is built: that
takes an engine. ``test_compose`` runs each one's command and health check here."""

import fnmatch
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.images import DOCKERFILE, ROOT, TARGETS, read_stages

STAGES = read_stages()


@pytest.mark.process
def test_the_dockerfile_is_clean():
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run([str(hadolint), str(DOCKERFILE)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_without_root_and_holds_the_environment_alone(target):
    stage = STAGES[target]
    assert stage.settings["USER"] == "10001:10001"
    (copied,) = stage.copies
    assert copied.split()[1:] == ["/opt/opticnerve", "/opt/opticnerve"]
    secret = ("token", "key", "password", "secret")
    assert not [name for name in stage.environment if any(s in name.lower() for s in secret)]


@pytest.mark.parametrize(
    ("stage", "requirement"),
    [("gateway-environment", "[otel]"), ("worker-environment", "[worker,otel]")],
)
def test_an_image_installs_our_wheel_by_the_constraints(stage, requirement):
    install = STAGES[stage].runs[-1]
    assert install.endswith(f'-c /constraints.txt "$(echo /wheels/*.whl){requirement}"')
    assert "constraints.txt /" in STAGES[stage].copies


def test_what_is_sent_to_the_builder_is_what_a_wheel_is_made_of():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines and all((ROOT / name).exists() for name in kept)
    for name in (".git", ".venv", "tests", "keys", "token"):
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in kept)
