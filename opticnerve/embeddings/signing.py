"""The MAC of an embedding under the pools' secret, which proves that an encoder of this deployment
made it.

HMAC-SHA-256 (RFC 2104) over the content key and the safetensors bytes, whose header contains the
encoder's fingerprint, so that a value is valid under no other key. Values that travel by Redis or
``Fetch`` carry it. Files of a local tier do not: its directory belongs to this user alone, and a
process that can write there can also read the secret.
"""

from __future__ import annotations

import hmac
import logging
import math
import threading
import time
from collections.abc import Iterable

from opticnerve.secret import read_secret
from opticnerve.telemetry.metrics import EMBEDDINGS_REFUSED

DIGEST = "sha256"  # Twice as fast as keyed BLAKE2b, with SHA instructions.
MAC_BYTES = 32
WARN_EVERY_S = 30.0

log = logging.getLogger(__name__)


class Seal:
    """Signs and checks under one secret. Thread-safe.

    ``id`` names the secret without revealing it; values with another id belong to another pool.
    """

    def __init__(self, secret: str) -> None:
        self._key = hmac.digest(secret.encode(), b"opticnerve-store-mac-1", DIGEST)
        self.id = hmac.digest(secret.encode(), b"opticnerve-store-id-1", DIGEST).hex()[:16]
        self._lock = threading.Lock()  # Guards the next two.
        self._warned_at = -math.inf
        self._refused = 0
        for tier in ("redis", "fetch"):  # An alert on the increase sees the first one, from 0.
            EMBEDDINGS_REFUSED.labels(tier=tier)

    @classmethod
    def load(cls, path: str | None) -> Seal | None:
        """A seal with the secret in ``--store-key-file``; None without the option. Raises
        ConfigError."""
        return None if path is None else cls(read_secret(path, "store_key_file"))

    def mac(self, key: str, pieces: Iterable[bytes | memoryview]) -> bytes:
        """The MAC of ``pieces``, which together are one safetensors file, as the value of
        ``key``."""
        found = hmac.new(self._key, key.encode(), DIGEST)
        for piece in pieces:
            found.update(piece)
        return found.digest()

    def verify(self, mac: bytes, key: str, data: bytes | memoryview, tier: str) -> bool:
        """Whether ``mac`` signs ``data``, from ``tier`` (redis, fetch), for ``key``. Failures are
        counted, and logged at most every ``WARN_EVERY_S``."""
        if hmac.compare_digest(mac, self.mac(key, [data])):
            return True
        EMBEDDINGS_REFUSED.labels(tier=tier).inc()
        with self._lock:
            self._refused += 1
            count, now = self._refused, time.monotonic()
            if now - self._warned_at < WARN_EVERY_S:
                return False
            self._warned_at = now
        log.warning(
            "embedding %.12s from %s has a missing or wrong signature and is not used (%d so far): "
            "an encoder has no --store-key-file or a different one, or another program writes "
            "there",
            key, tier, count,
        )  # fmt: skip
        return False
