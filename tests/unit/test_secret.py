"""Files of secrets: what is read, what is refused, who may read what is made."""

from __future__ import annotations

import logging
import re
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest

from opticnerve import config
from opticnerve.config.options import build
from opticnerve.errors import ConfigError, StartupError
from opticnerve.local import up
from opticnerve.owned_directories import owned_directory
from opticnerve.secret import MAX_BYTES, MIN_CHARACTERS, make_secret, read_secret

OPTION = "store_key_file"


def written(tmp_path: Path, data: bytes, mode: int = 0o600) -> str:
    path = tmp_path / "secret"
    path.write_bytes(data)
    path.chmod(mode)
    return str(path)


def test_what_is_made_is_random_readable_and_this_users_alone(tmp_path: Path) -> None:
    one, two = make_secret(tmp_path, "one"), make_secret(tmp_path, "two")
    assert stat.S_IMODE(one.stat().st_mode) == 0o600
    secret = read_secret(str(one), OPTION)
    assert re.fullmatch("[0-9a-f]{64}", secret)
    assert read_secret(str(two), OPTION) != secret


def test_nothing_that_is_there_is_made_a_secret(tmp_path: Path) -> None:
    (tmp_path / "planted").symlink_to(tmp_path / "elsewhere")
    for name in ("planted", "no/directory"):
        with pytest.raises(StartupError, match="cannot make the secret"):
            make_secret(tmp_path, name)
    assert not (tmp_path / "elsewhere").exists()


def test_white_space_around_a_secret_is_no_part_of_it(tmp_path: Path) -> None:
    assert read_secret(written(tmp_path, b" \n" + b"s" * 32 + b"\r\n"), OPTION) == "s" * 32


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b" \n", "is empty"),
        (b"hunter2", f"7 characters.*at least {MIN_CHARACTERS}"),
        (b"a" * 40 + b" " + b"b" * 40, "one word"),
        (b"a" * 40 + b"\xff", "one word"),
        (b"a" * (MAX_BYTES + 1), f"more than {MAX_BYTES} bytes"),
    ],
)
def test_what_is_no_secret_is_refused_without_being_shown(
    tmp_path: Path, data: bytes, told: str
) -> None:
    path = written(tmp_path, data)
    with pytest.raises(ConfigError, match=f"--store-key-file: {path} .*{told}.*openssl") as caught:
        read_secret(path, OPTION)
    assert caught.value.param == OPTION
    assert not data.strip() or data.decode("latin-1").strip()[:40] not in caught.value.message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(ConfigError, match=f"--store-key-file: cannot read {path}: "):
            read_secret(str(path), OPTION)


def test_a_file_that_others_may_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        read_secret(written(tmp_path, b"s" * 32, 0o640), OPTION)  # Kubernetes' fsGroup.
        assert not caplog.records
        read_secret(written(tmp_path, b"s" * 32, 0o644), OPTION)
    (record,) = caplog.records
    assert "every user" in record.getMessage() and "s" * 32 not in record.getMessage()


# ---- `up`


def commands(given: dict[str, Any]) -> list[list[str]]:
    with owned_directory(Path(tempfile.gettempdir())) as directory:
        settings = build(config.GatewayConfig, given), build(config.StoreConfig, given)
        secrets = up._secret_files(*settings, directory)
        for path in map(Path, secrets.values()):
            assert not path.is_relative_to(directory) or len(read_secret(str(path), OPTION)) == 64
        workers = up.Commands(config.UpConfig(), {"parent_pid": 1, **given, **secrets}).workers()
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert not directory.exists()
    return [worker.command for worker in workers]


def of_flag(command: list[str], flag: str = "--store-key-file") -> str:
    assert command.count(flag) == 1
    return command[command.index(flag) + 1]


def test_up_makes_a_secret_of_its_own_for_every_stack(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stacks = [{of_flag(command) for command in commands({})} for _ in range(2)]
    assert all(len(files) == 1 for files in stacks) and stacks[0] != stacks[1]
    assert not caplog.records
    commands({"store": "redis://cache:6379/0"})
    assert "the same --store-key-file" in caplog.text


def test_up_hands_on_the_secret_that_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(make_secret(tmp_path, "mine"))
    given = {"store": "redis://cache:6379/0"}
    assert {of_flag(command) for command in commands({**given, OPTION: path})} == {path}
    monkeypatch.setenv("OPTICNERVE_STORE_KEY_FILE", path)
    assert {of_flag(command) for command in commands(given)} == {path}
    assert not capsys.readouterr().err
    monkeypatch.setenv("OPTICNERVE_STORE_KEY_FILE", str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="--store-key-file: cannot read"):
        commands(given)
