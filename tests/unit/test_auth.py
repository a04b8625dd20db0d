"""API keys: the file, the comparison, and what is open without one."""

import pytest

from gateway.auth import Keys, needs_key
from opticnerve.errors import ConfigError, Unauthenticated


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# people\nada: sk-ada\n\nbob:sk-bob  # left in May\nsk-plain\n")
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


def test_without_keys_everyone_is_anonymous():
    assert Keys.load(None).identify(None) == "anonymous"


@pytest.mark.parametrize("text", ["", "# nothing\n", "a b c\n", "ada: x\nada: y\n"])
def test_files_that_are_refused(tmp_path, text):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError):
        Keys.load(str(path))


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(ConfigError):
        Keys.load(str(tmp_path / "none"))


def test_open_paths():
    for path in ("/", "/live", "/ready", "/health"):
        assert not needs_key(path, public_models=False)
    for path in ("/v1/models", "/v1/chat/completions", "/metrics", "/version", "/nothing"):
        assert needs_key(path, public_models=False)
    assert not needs_key("/v1/models", public_models=True)
    assert not needs_key("/v1/models/model", public_models=True)
    assert needs_key("/v1/modelsx", public_models=True)
