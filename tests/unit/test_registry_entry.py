"""What a worker says in the registry: nothing else is read, whatever the bytes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opticnerve.errors import ConfigError
from opticnerve.registry import entry as module
from opticnerve.registry.entry import MAX_ENTRY_BYTES, EntrySeal, WorkerEntry
from opticnerve.registry.redis_registry import Registry

ENTRY = WorkerEntry(
    instance_id="ab" * 16,
    kind="llm",
    address="llm-1:7002",
    state="serving",
    pair_id="cd" * 32,
    version="0.1.0",
    capacity={"max_num_seqs": 64},
    load={"running": 3},
)
TOKEN = "t" * 40


def told(entry):
    return entry.model_dump(exclude={"written_at"})


@pytest.mark.parametrize("token", [None, TOKEN])
def test_an_entry_is_read_as_it_was_written(token):
    seal = EntrySeal("default", token)
    assert told(seal.read(seal.write(ENTRY))) == told(ENTRY)
    assert len(seal.write(ENTRY)) < MAX_ENTRY_BYTES / 4
    assert told(EntrySeal("default", None).read(seal.write(ENTRY))) == told(ENTRY)


@pytest.mark.parametrize(
    "change",
    [
        {"address": "0.0.0.0:7002"},
        {"address": "llm-1"},
        {"address": "a" * 400 + ":1"},
        {"address": 7},
        {"kind": "gateway"},
        {"state": "asleep"},
        {"instance_id": "../x"},
        {"pair_id": "x" * 200},
        {"load": {"running": "3"}},
        {"load": {"running": -1}},
        {"load": {"running": 1e400}},
        {"load": {str(n): n for n in range(100)}},
        {"load": []},
        {"capacity": None},
        {"written_at": "now"},
    ],
    ids=str,
)
def test_what_is_no_entry_is_refused(change):
    data = json.dumps({**ENTRY.model_dump(), **change}).encode()
    with pytest.raises(ValueError) as refused:
        EntrySeal("default", None).read(module.UNSIGNED + data)
    assert "7002" not in str(refused.value) and refused.value.__cause__ is None


@given(st.binary(max_size=2 * MAX_ENTRY_BYTES))
def test_no_bytes_are_an_entry_by_accident(value):
    for token in (None, TOKEN):
        with pytest.raises(ValueError):
            EntrySeal("default", token).read(value)


def test_a_later_release_may_say_more():
    data = json.dumps({**ENTRY.model_dump(), "colour": "blue"}).encode()
    assert told(EntrySeal("default", None).read(module.UNSIGNED + data)) == told(ENTRY)


def test_a_signature_is_of_one_token_one_namespace_and_one_time(monkeypatch):
    value = EntrySeal("default", TOKEN).write(ENTRY)
    changed = value.replace(b"llm-1", b"llm-2")
    for namespace, token, given_value in (
        ("default", "u" * 40, value),
        ("other", TOKEN, value),
        ("default", TOKEN, changed),
        ("default", TOKEN, EntrySeal("default", None).write(ENTRY)),
    ):
        with pytest.raises(ValueError, match="not signed"):
            EntrySeal(namespace, token).read(given_value)
    now = module.time.time() + module.MAX_AGE_S + 2
    monkeypatch.setattr(module.time, "time", lambda: now)
    with pytest.raises(ValueError, match="clocks"):
        EntrySeal("default", TOKEN).read(value)


@pytest.mark.parametrize("namespace", ["", "a b", "a:b", "x" * 65])
def test_a_namespace_is_a_plain_word(namespace):
    with pytest.raises(ConfigError, match="namespace"):
        Registry(f"redis://host/0?namespace={namespace}")


@pytest.mark.parametrize("url", ["redis://[bad", "redis://host/0?ssl=hush", "http://:hush@host"])
def test_a_wrong_url_is_refused_without_being_shown(url):
    with pytest.raises(ConfigError) as refused:
        Registry(url)
    assert "hush" not in refused.value.message
