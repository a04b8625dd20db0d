"""API keys: the file, the comparison, and what is open without one."""

from pathlib import Path

import pytest

from gateway.edge.auth import ANONYMOUS, Caller, Keys, needs_key
from gateway.edge.rates import Rate
from opticnerve.errors import ConfigError, InvalidRequest, Unauthenticated

RATE = Rate.read("60/m")


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# people\nada: sk-ada\n\nbob : sk-bob  # left in May\nsk-plain\n")
    return Keys.load(str(path))


def test_named_and_plain_keys(keys):
    assert keys.identify("Bearer sk-ada") == Caller("ada", "ada", 1.0, 0)
    assert keys.identify("bearer  sk-bob") == Caller("bob", "bob")
    assert keys.identify("Bearer sk-plain") == Caller("key5", "key5")
    assert keys.identify(None, "sk-ada").name == keys.identify("Basic x", " sk-ada").name == "ada"
    assert keys.identify("Bearer sk-eve", "sk-bob").name == "bob"  # One of the two is known.
    assert "sk-" not in repr(keys)


def test_attributes_of_keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text(
        "ada: sk-1 tenant=acme weight=2 priority=-10\n"
        "bob : sk:2==\tpriority=5  # in the background\n"
        "sk-3 weight=0.5\n"
        "eve: sk-4 rate=60/m concurrency=8 models=demo,org/model\n"
    )
    keys = Keys.load(str(path))
    assert keys.identify("Bearer sk-1") == Caller("ada", "acme", 2.0, -10)
    assert keys.identify("Bearer sk:2==") == Caller("bob", "bob", 1.0, 5)
    assert keys.identify("Bearer sk-3") == Caller("key3", "key3", 0.5, 0)
    assert keys.identify("Bearer sk-4") == Caller(
        "eve", "eve", rate=Rate(60, 60.0), concurrency=8, models=("demo", "org/model")
    )


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("ada: sk-1 weight=0", "weight: expected a number from 0.01 to 1000"),
        ("ada: sk-1 weight=1001", "weight: expected"),
        ("ada: sk-1 weight=nan", "weight: expected"),
        ("ada: sk-1 weight=", "weight: expected"),
        ("ada: sk-1 priority=1.5", "priority: expected a whole number"),
        ("ada: sk-1 priority=-2147483649", "priority: expected"),
        ("ada: sk-1 priority=" + "9" * 5000, "priority: expected"),
        ("ada: sk-1 tenant=", "tenant: expected a name"),
        ("ada: sk-1 tenant=a/b", "tenant: expected a name"),
        ("ada: sk-1 weight=1 weight=2", "weight is there twice"),
        ("ada: sk-1 rate=60", "rate: expected requests per second, minute or hour, such as 60/m"),
        ("ada: sk-1 rate=60/d", "rate: expected"),
        ("ada: sk-1 concurrency=0", "concurrency: expected a number of requests in flight"),
        ("ada: sk-1 concurrency=many", "concurrency: expected"),
        ("ada: sk-1 models=", "models: expected served names"),
        ("ada: sk-1 models=demo,,model", "models: expected served names"),
        ("ada: sk-1 models=demo, model", "models: expected served names"),
        ("ada: sk-1 wieght=2", "place 1, is no attribute; did you mean weight=?"),
        ("ada: sk-1 weight=2 acme", "place 2, is no attribute; expected 'name: key'"),
        ("ada: one sk-1", "place 1, is no attribute"),
        ("ada: tenant=acme sk-1", "an attribute where the key should be"),
        ("tenant=acme sk-1", "an attribute where the key should be"),
    ],
)
def test_wrong_attributes_are_refused_by_their_line_and_show_no_key(tmp_path, line, told):
    path = tmp_path / "keys"
    path.write_text(f"bob: sk-2\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        Keys.load(str(path))
    start, _, rest = caught.value.message.partition("keys:2: ")
    assert start and told in rest
    assert "sk-" not in rest and "9999" not in rest


def test_what_requests_of_a_key_may_ask_for():
    for least, asked, runs_at in (
        (0, None, 0), (0, 0, 0), (0, 7, 7), (-10, None, 0), (-10, -10, -10), (5, None, 5), (5, 6, 6)
    ):  # fmt: skip
        assert Caller("ada", "ada", min_priority=least).priority(asked) == runs_at
    for caller, asked in ((Caller("ada", "ada", min_priority=5), 0), (ANONYMOUS, -1)):
        with pytest.raises(InvalidRequest, match=f"{asked} is below {caller.min_priority}"):
            caller.priority(asked)


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
        file.write("ada: sk-ada tenant=acme\neve: sk-eve\n")
    for name in ("ada", "bob"):
        keys.rates.take(name, RATE)
    assert keys.identify("Bearer sk-bob").name == "bob"  # Not before it is asked for.
    keys.reread()
    left = {name: keys.rates.left(name, RATE).remaining for name in ("ada", "bob")}
    assert left == {"ada": RATE.requests - 1, "bob": RATE.requests}
    assert keys.identify("Bearer sk-ada").tenant == "acme"
    assert keys.identify("Bearer sk-eve").name == "eve"
    with pytest.raises(Unauthenticated):
        keys.identify("Bearer sk-bob")
    logged = "2 keys; 1 added, 2 removed, 1 with changed name or attributes"
    assert logged in caplog.text and "sk-" not in caplog.text


@pytest.mark.parametrize("text", [None, "", "ada: x\nada: y\n", "bob: sk-bob weight=x\n"])
def test_a_file_that_is_wrong_by_now_changes_nothing(keys, text, caplog):
    path = Path(keys.path)
    path.unlink()
    if text is not None:
        path.write_text(text)
    keys.reread()
    assert keys.identify("Bearer sk-bob") == Caller("bob", "bob")
    assert "the keys stay as they were" in caplog.text and keys.path in caplog.text


def test_without_a_file_nothing_is_read_again():
    keys = Keys.load(None)
    keys.reread()
    assert not keys.required


def test_without_keys_everyone_is_anonymous():
    assert Keys.load(None).identify(None) is ANONYMOUS


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "a b c\n", "ada: x\nada: y\n", "ada: x\nbob: x\n"]
)
def test_files_that_are_refused(tmp_path, text):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError):
        Keys.load(str(path))


def test_a_colon_without_a_space_is_refused_and_with_one_kept(tmp_path):
    path = tmp_path / "keys"
    path.write_text("ada: sk-1:2:3\n")
    assert Keys.load(str(path)).identify("Bearer sk-1:2:3").name == "ada"
    for line in ("ada:sk-1", "sk-proj:abc:def"):
        path.write_text(f"{line}\n")
        with pytest.raises(ConfigError, match="keys:1: a colon without a space") as caught:
            Keys.load(str(path))
        assert "sk" not in caught.value.message.split("keys:1")[1]


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(ConfigError):
        Keys.load(str(tmp_path / "none"))


def test_open_paths():
    pages = ("/", "/docs", "/openapi.json", "/playground/main.js")
    for path in (*pages, "/live", "/ready", "/health"):
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
    assert Keys.load(str(path)).identify("Bearer sk-ada").name == "ada"


def test_a_key_file_that_cannot_be_read_says_why(tmp_path):
    with pytest.raises(ConfigError, match="absent: No such file"):
        Keys.load(str(tmp_path / "absent"))
    (tmp_path / "binary").write_bytes(b"ada: sk-\xff\xfe")
    with pytest.raises(ConfigError, match="binary is not UTF-8 text"):
        Keys.load(str(tmp_path / "binary"))
