"""A MAC fits one value under one key and one secret, and tells nothing of the secret."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from opticnerve.addresses import is_elsewhere
from opticnerve.embeddings import signing as module
from opticnerve.embeddings.open import open_store
from opticnerve.embeddings.signing import MAC_BYTES, Seal
from opticnerve.errors import ConfigError
from opticnerve.secret import make_secret
from opticnerve.telemetry.metrics import EMBEDDINGS_REFUSED
from tests.stores import key

DATA = bytes(range(200)) * 50
SECRET = "s" * 32


def refused(tier: str) -> float:
    name, labels = "opticnerve_embeddings_refused_total", {"tier": tier}
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_what_was_signed_fits_in_however_many_pieces() -> None:
    seal = Seal(SECRET)
    mac = seal.mac(key(1), [DATA[:7], memoryview(DATA)[7:]])
    assert len(mac) == MAC_BYTES
    assert Seal(SECRET).verify(mac, key(1), DATA, "redis")
    assert Seal(SECRET).verify(mac, key(1), bytearray(DATA), "redis")


def test_no_other_value_key_or_secret_fits() -> None:
    seal, before = Seal(SECRET), refused("redis")
    mac = seal.mac(key(1), [DATA])
    changed = bytearray(DATA)
    changed[len(DATA) // 2] ^= 1
    others = [
        seal.verify(mac, key(1), changed, "redis"),
        seal.verify(mac, key(1), DATA[:-1], "redis"),
        seal.verify(mac, key(2), DATA, "redis"),
        seal.verify(b"", key(1), DATA, "redis"),
        seal.verify(bytes(MAC_BYTES), key(1), DATA, "redis"),
        Seal("t" * 32).verify(mac, key(1), DATA, "redis"),
    ]
    assert not any(others)
    assert refused("redis") - before == len(others)


def test_refusals_count_from_zero_so_that_an_alert_sees_the_first() -> None:
    EMBEDDINGS_REFUSED.clear()
    Seal(SECRET)
    name = "opticnerve_embeddings_refused_total"
    assert REGISTRY.get_sample_value(name, {"tier": "fetch"}) == 0


def test_refusals_are_told_of_once_in_a_while(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = Seal(SECRET)
    for _ in range(100):
        seal.verify(b"", key(1), DATA, "fetch")
    (record,) = caplog.records
    assert "fetch" in record.getMessage() and "--store-key-file" in record.getMessage()
    monkeypatch.setattr(module, "WARN_EVERY_S", 0.0)
    seal.verify(b"", key(1), DATA, "fetch")
    assert "(101 so far)" in caplog.records[-1].getMessage()


def test_a_secrets_id_is_its_own_and_no_part_of_it(tmp_path: Path) -> None:
    ids = set()
    for name in ("one", "two"):
        path = make_secret(tmp_path, name)
        seal = Seal.load(str(path))
        assert seal is not None and seal.id not in path.read_text()
        ids.add(seal.id)
    assert len(ids) == 2


def test_without_a_file_nothing_is_signed(tmp_path: Path) -> None:
    assert Seal.load(None) is None
    with pytest.raises(ConfigError, match="--store-key-file"):
        Seal.load(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("url", "elsewhere"),
    [
        ("redis://cache:6379/0", True),
        ("rediss://:password@10.0.0.7", True),
        ("redis://127.0.0.1:6379", False),
        ("redis://localhost", False),
        ("redis://[::1]:6379/0", False),
        ("redis://", False),
        ("unix:///run/redis.sock", False),
        ("shm://", False),
    ],
)
def test_stores_that_others_reach(url: str, elsewhere: bool) -> None:
    assert is_elsewhere(url) is elsewhere


@pytest.mark.parametrize("signed", [False, True])
def test_a_redis_elsewhere_is_warned_of_where_values_are_not_signed(
    signed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    url = "redis://cache.invalid:6379/0?local=memory://"
    with caplog.at_level(logging.WARNING):
        open_store(url, seal=Seal(SECRET) if signed else None).close()
    told = [r.getMessage() for r in caplog.records if "--store-key-file" in r.getMessage()]
    assert len(told) == (not signed)
