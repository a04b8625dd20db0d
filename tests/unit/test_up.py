"""What ``opticnerve up`` tells its children of the store."""

from pathlib import Path

import pytest

from opticnerve.config import StoreConfig, UpConfig
from opticnerve.errors import ConfigError
from opticnerve.local import up


def test_a_password_is_on_no_childs_command_line():
    url = "redis://:secret@host/0"
    commands = up.Commands(UpConfig(), {"parent_pid": 1, "store": url})
    for worker in commands.workers():
        assert "secret" not in " ".join(worker.command)
        assert worker.environment["OPTICNERVE_STORE"] == url
    assert "secret" not in " ".join(commands.gateway([], []).command)
    for plain in ("shm:///tmp/tier", "file:///run/secrets/store"):
        (encoder, _) = up.Commands(UpConfig(), {"parent_pid": 1, "store": plain}).workers()
        assert f"--store {plain}" in " ".join(encoder.command)


def test_a_file_that_names_no_store_is_told_before_anything_starts(tmp_path):
    file = tmp_path / "store"
    settings = StoreConfig(store=f"file://{file}")
    with pytest.raises(ConfigError, match=str(file)), up._store_url(settings):
        pass
    file.write_text("redis://:secret@host/0")
    with up._store_url(settings) as given:
        assert given == settings.store  # Workers read the file themselves, after a restart too.
    file.write_text("shm://?capacity=8MiB")  # A directory that all workers share.
    with up._store_url(settings) as given:
        directory, _, query = given.removeprefix("shm://").partition("?")
        assert Path(directory).is_dir() and query == "capacity=8MiB"
    assert not Path(directory).exists()


def flags(child):
    """The value of --registry on a child's command line."""
    return child.command[child.command.index("--registry") + 1]


def test_the_workers_of_up_join_no_registry_and_its_gateway_follows_one_that_is_named(monkeypatch):
    """They listen on loopback, and the gateway knows their addresses."""
    there = "redis://cache:6379/0?namespace=x"
    for given, followed in (({"store": there}, "none"), ({"registry": there}, there)):
        commands = up.Commands(UpConfig(), {"parent_pid": 1, **given})
        assert {flags(worker) for worker in commands.workers()} == {"none"}
        assert flags(commands.gateway([], [])) == followed
    monkeypatch.setenv("OPTICNERVE_REGISTRY", there)
    commands = up.Commands(UpConfig(), {"parent_pid": 1})
    assert {flags(worker) for worker in commands.workers()} == {"none"}
    assert flags(commands.gateway([], [])) == there
