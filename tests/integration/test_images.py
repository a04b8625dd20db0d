"""The images of ``deploy/Dockerfile``: linted, without secrets or root, and each one's command and
health check run here with the image's environment. No image is built: that takes an engine."""

import contextlib
import fnmatch
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.images import DOCKERFILE, ROOT, TARGETS, read_stages
from tests.system import free_port, wait_for

STAGES = read_stages()
LISTENS = {"gateway": "8000", "encoder": "7000", "llm": "7000"}


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
    [("gateway-environment", ""), ("worker-environment", "[worker]")],
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


def run_here(words, port="", ours=""):
    """A command of a container, run by this environment's Python, with another port."""
    assert words[0] == "opticnerve"
    return [sys.executable, "-m", *(word.replace(port, ours) for word in words)]


@contextlib.contextmanager
def container(target, directory, *flags, **variables):
    """The ENTRYPOINT of an image with its environment, on free ports; yields what its HEALTHCHECK
    runs, and the process."""
    stage, port = STAGES[target], str(free_port())
    assert stage.environment["OPTICNERVE_PORT"] == LISTENS[target]
    image = {name: value for name, value in stage.environment.items() if name != "PATH"}
    env = {name: value for name, value in os.environ.items() if not name.startswith("OPTICNERVE_")}
    env |= image | {
        "HOME": str(directory), "HF_HOME": str(directory), "PYTHONPATH": str(ROOT),
        "OPTICNERVE_CACHE_DIR": str(directory / "cache"), "OMP_NUM_THREADS": "1",
        "OPTICNERVE_PORT": port, "OPTICNERVE_METRICS_PORT": "0", **variables,
    }  # fmt: skip
    command = [*run_here(stage.command("ENTRYPOINT")), *flags]
    check = run_here(stage.command("HEALTHCHECK"), LISTENS[target], port)
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=directory, env=env, stdout=log, stderr=log)
    try:
        yield f"127.0.0.1:{port}", check, process
    finally:
        process.terminate()
        process.wait(60)


def succeeds(command, processes):
    assert [process.poll() for process in processes] == [None] * len(processes), "one has ended"
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.process
@pytest.mark.slow
def test_the_commands_of_all_images_start_and_become_healthy(tmp_path):
    token = tmp_path / "token"
    token.write_text("t" * 32)
    store = f"shm://{tmp_path}/store?capacity=16MiB"
    with contextlib.ExitStack() as stack:
        started = {}
        for target in ("encoder", "llm", "gateway"):
            directory = tmp_path / target
            directory.mkdir()
            flags = ["--store", store]
            if target == "gateway":
                flags = [
                    *("--encoder-addresses", started["encoder"][0]),
                    *("--llm-addresses", started["llm"][0]),
                ]
            started[target] = stack.enter_context(
                container(target, directory, *flags, OPTICNERVE_RPC_TOKEN_FILE=str(token))
            )
        processes = [process for _, _, process in started.values()]
        ready = [sys.executable, "-m", "opticnerve", "health", f"http://{started['gateway'][0]}"]
        wait_for("the gateway to be ready", lambda: succeeds(ready, processes))
        for _, check, _ in started.values():
            assert succeeds(check, processes)
