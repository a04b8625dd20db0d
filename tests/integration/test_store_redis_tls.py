"""``rediss://``: a real Redis that speaks TLS, with certificates of an authority of our own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from opticnerve.embeddings.open import open_store
from opticnerve.embeddings.redis_store import RedisStore
from tests.certificates import Authority
from tests.redis import PATIENT, RedisServer
from tests.stores import key, rows
from tests.system import free_port

pytestmark = pytest.mark.process


@contextlib.contextmanager
def opened(port: int, **files: str) -> Iterator[RedisStore]:
    options = "&".join(f"{name}={value}" for name, value in files.items())
    local = f"local=memory%3A%2F%2F&{PATIENT}"
    store = open_store(f"rediss://127.0.0.1:{port}/0?{local}&{options}")
    assert isinstance(store, RedisStore)
    with contextlib.closing(store):
        yield store


def test_embeddings_cross_tls_between_those_that_are_known(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    server, worker = authority.issue("server"), authority.issue("worker", "worker")
    port = free_port()
    known = {
        "ssl_ca_certs": authority.certificate,
        "ssl_certfile": worker.certificate,
        "ssl_keyfile": worker.key,
    }
    with RedisServer(
        *("--tls-port", str(port), "--tls-ca-cert-file", authority.certificate),
        *("--tls-cert-file", server.certificate, "--tls-key-file", server.key),
    ):
        with opened(port, **known) as one, opened(port, **known) as another:
            one.put(key(1), rows(1), {})
            entry = another.get(key(1))
            assert entry is not None and entry.tensors["rows"][0, 0] == 1.0
        for wrong in (
            {**known, "ssl_ca_certs": other.certificate},
            {"ssl_ca_certs": authority.certificate},
        ):
            with opened(port, **wrong) as stranger:
                assert not stranger.state.reachable
