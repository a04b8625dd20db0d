"""API keys: the file, the comparison, and what is open without one."""

from pathlib import Path

import pytest

from gateway.auth import Keys, needs_key
from opticnerve.errors import ConfigError, Unauthenticated


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# people\nada: sk-ada\n\nbob : sk-bob  # left in May\nsk-plain\n")
    return Keys.load(str(path))


def test_named_and_plain_keys(keys):
    assert keys.identify("Bearer sk-ada") == "ada"
    assert keys.identify("bearer  sk-bob") == "bob"
    assert keys.identify("Bearer sk-plain") == "key5"


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Basic sk-ada", "Bearer sk-ad", "Bearer sk-adaa"]
)
def test_everything_else_is_refused(keys, header):
    with pytest.raises(Unauthenticated) as caught:
        keys.identify(header)
    assert "sk-" not in caught.value.message


def test_a_file_is_read_again(keys, caplog):
    caplog.set_level("INFO")
    with open(keys.path, "w") as file:
        file.write("ada: sk-ada\neve: sk-eve\n")
    assert keys.identify("Bearer sk-bob") == "bob"  # Not before it is asked for.
    keys.reread()
    assert keys.identify("Bearer sk-ada") == "ada"
    assert keys.identify("Bearer sk-eve") == "eve"
    with pytest.raises(Unauthenticated):
        keys.identify("Bearer sk-bob")
    assert "2 keys, 1 of them new, and 2 are gone" in caplog.text and "sk-" not in caplog.text


@pytest.mark.parametrize("text", [None, "", "ada: x\nada: y\n"])
def test_a_file_that_is_wrong_by_now_changes_nothing(keys, text, caplog):
    path = Path(keys.path)
    path.unlink()
    if text is not None:
        path.write_text(text)
    keys.reread()
    assert keys.identify("Bearer sk-bob") == "bob"
    assert "the keys stay as they were" in caplog.text and keys.path in caplog.text


def test_without_a_file_nothing_is_read_again():
    keys = Keys.load(None)
    keys.reread()
    assert not keys.required


def test_without_keys_everyone_is_anonymous():
    assert Keys.load(None).identify(None) == "anonymous"


@pytest.mark.parametrize("text", ["", "# nothing\n", "a b c\n", "ada: x\nada: y\n"])
def test_files_that_are_refused(tmp_path, text):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError):
        Keys.load(str(path))


def test_a_colon_without_a_space_is_refused_and_with_one_kept(tmp_path):
    path = tmp_path / "keys"
    path.write_text("ada: sk-1:2:3\n")
    assert Keys.load(str(path)).identify("Bearer sk-1:2:3") == "ada"
    for line in ("ada:sk-1", "sk-proj:abc:def"):
        path.write_text(f"{line}\n")
        with pytest.raises(ConfigError, match="keys:1: a colon without a space") as caught:
            Keys.load(str(path))
        assert "sk" not in caught.value.message.split("keys:1")[1]


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(ConfigError):
        Keys.load(str(tmp_path / "none"))


def test_open_paths():
    for path in ("/", "/live", "/ready", "/health", "/openapi.json", "/docs"):
        assert not needs_key(path, public_models=False)
    for path in ("/v1/models", "/v1/chat/completions", "/metrics", "/version", "/nothing"):
        assert needs_key(path, public_models=False)
    assert not needs_key("/v1/models", public_models=True)
    assert not needs_key("/v1/models/model", public_models=True)
    assert needs_key("/v1/modelsx", public_models=True)


@pytest.mark.parametrize("line", ["schlüssel", "ada: sk–1", "ключ: sk-1", "sk\u00a0-1", "sk-\x001"])
def test_keys_that_not_every_client_can_send_are_refused_by_their_line(tmp_path, line):
    path = tmp_path / "keys"
    path.write_text(f"# Müllers Schlüssel\nbob: sk-2\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"keys:3: .*not printable ASCII") as caught:
        Keys.load(str(path))
    assert "sk" not in caught.value.message.split("keys:3")[1]


def test_a_key_in_a_header_that_is_not_ascii_is_an_unknown_key(keys):
    for sent in ("schlüssel", "schlüssel".encode().decode("latin-1")):
        with pytest.raises(Unauthenticated):
            keys.identify(f"Bearer {sent}")


def test_a_file_that_an_editor_began_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "keys"
    path.write_text("\ufeffada: sk-ada\n", encoding="utf-8")
    assert Keys.load(str(path)).identify("Bearer sk-ada") == "ada"
