"""Rows that callers send themselves: their names on this worker, and their lifetime.

A caller may give its rows any key, also that of another user's picture. Here they are named by a
hash of their bytes under a random secret of this process, so that the name is unique in the tier
and the prefix cache. They stay while some request holds their name.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from opticnerve.embeddings.ref import tensors_key


class OwnRows:
    """``hold`` belongs to one event loop, the rest to any thread. ``drop`` is called on that loop
    with a name that is no longer held."""

    def __init__(self, drop: Callable[[str], object]) -> None:
        self._drop = drop
        self._secret = secrets.token_bytes(32)
        self._holders: Counter[str] = Counter()

    def names(self, items: Mapping[str, bytes]) -> dict[str, str]:
        """Names by the caller's keys, from safetensors bytes; b"" if those come later: then the key
        has to be their ``tensors_key``. Reads all bytes."""
        return {key: self._name(tensors_key(data) if data else key) for key, data in items.items()}

    def is_named(self, name: str, data: bytes) -> bool:
        """Whether ``name`` is that of these bytes. Reads all of them."""
        return self._name(tensors_key(data)) == name

    def is_held(self, name: str) -> bool:
        return self._holders[name] > 0

    @contextlib.contextmanager
    def hold(self, names: Iterable[str]) -> Iterator[None]:
        """Holds the names while the context lasts."""
        held = set(names)
        self._holders.update(held)
        try:
            yield
        finally:
            self._holders.subtract(held)
            for name in held:
                if not self._holders[name]:
                    del self._holders[name]
                    self._drop(name)

    def _name(self, key: str) -> str:
        return hashlib.blake2b(key.encode(), key=self._secret, digest_size=32).hexdigest()
