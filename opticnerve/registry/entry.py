"""A worker's entry in the registry: its contents, and how it is signed and read.

An entry is a MAC (HMAC-SHA-256, RFC 2104) under the token of --rpc-token-file, followed by JSON.
The MAC keeps anyone who can write to Redis from having the gateways' token and requests sent to an
address of their own. A gateway without a token trusts every entry. Redis may hold anything: what
does not parse, is too large or was signed with another token raises ValueError.
"""

from __future__ import annotations

import hmac
import time
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from opticnerve.addresses import check_advertised

MAX_ENTRY_BYTES = 8192
MAX_AGE_S = 300  # Largest age of a signed entry; more than its time to live, since clocks differ.
DIGEST = "sha256"
MAC_CHARACTERS = 64
UNSIGNED = b"-" * MAC_CHARACTERS

Kind = Literal["encoder", "llm"]
State = Literal["starting", "serving", "draining"]
Hash = Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z_.-]{0,128}$")]
Name = Annotated[str, StringConstraints(max_length=64)]
Number = Annotated[int, Field(ge=0, lt=2**63)]
Numbers = Annotated[dict[Name, Number], Field(max_length=32)]


class WorkerEntry(BaseModel):
    """One worker. ``pair_id``, ``fingerprint``, ``capacity`` and ``load`` are as in its answer to
    Describe; empty while it starts."""

    model_config = ConfigDict(strict=True, frozen=True)  # Fields of later releases are ignored.

    instance_id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]  # The process's id.
    kind: Kind
    address: Annotated[
        str, StringConstraints(max_length=300), AfterValidator(check_advertised)
    ]  # HOST:PORT at which others reach it.
    state: State
    pair_id: Hash = ""
    fingerprint: Hash = ""
    version: Name = ""  # OpticNerve's version.
    capacity: Numbers = {}
    load: Numbers = {}
    written_at: Number = 0  # Seconds since 1970, by the worker's clock.


class EntrySeal:
    """Writes and reads entries of one namespace, signed with ``token`` if there is one."""

    def __init__(self, namespace: str, token: str | None) -> None:
        self._namespace = namespace.encode()
        self._key = token and hmac.digest(token.encode(), b"opticnerve-registry-mac-1", DIGEST)

    def write(self, entry: WorkerEntry) -> bytes:
        entry = entry.model_copy(update={"written_at": int(time.time())})
        data = entry.model_dump_json().encode()
        return self._mac(data) + data

    def read(self, value: bytes) -> WorkerEntry:
        """Reads an entry. Raises ValueError, whose message quotes nothing of ``value``."""
        mac, data = value[:MAC_CHARACTERS], value[MAC_CHARACTERS:]
        if len(value) > MAX_ENTRY_BYTES:
            raise ValueError(f"it has more than {MAX_ENTRY_BYTES} bytes")
        if self._key and not hmac.compare_digest(mac, self._mac(data)):
            raise ValueError("it is not signed with the token of --rpc-token-file")
        try:
            entry = WorkerEntry.model_validate_json(data)
        except ValueError:  # Its message quotes the text, so it is not chained.
            raise ValueError("it is no entry of a worker") from None
        if self._key and abs(time.time() - entry.written_at) > MAX_AGE_S:
            raise ValueError("it was signed long ago, or clocks of machines differ by minutes")
        return entry

    def _mac(self, data: bytes) -> bytes:
        if not self._key:
            return UNSIGNED
        return hmac.new(self._key, self._namespace + b"\n" + data, DIGEST).hexdigest().encode()
