"""One item on its way to an encoder: the messages of an Encode call."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from opticnerve.media.plan import Overrides, Plan
from opticnerve.pb import encoder_pb2 as pb
from opticnerve.rpc import convert
from opticnerve.rpc.channel import chunks


@dataclass(frozen=True, slots=True)
class EncodeItem:
    """One item, ready for an encoder that has ``fingerprint``. ``data``: the compressed picture."""

    key: str
    fingerprint: str
    plan: Plan
    overrides: Overrides
    data: bytes = field(repr=False)
    lost: bool = False  # An LLM worker found no usable rows where the encoder said they are.
    cache_salt: str = ""  # Part of the key.


class EncodeUpload:
    """The item in chunks; a header comes with the first. ``delivered``: the encoder's host has
    all of them."""

    def __init__(self, item: EncodeItem, request_id: str = "") -> None:
        self.delivered = False
        self._data = item.data
        self._header = pb.EncodeHeader(
            request_id=request_id,
            key=item.key,
            fingerprint=item.fingerprint,
            plan=convert.plan_to_pb(item.plan),
            overrides=convert.overrides_to_pb(item.overrides),
            num_bytes=len(item.data),
            lost=item.lost,
            cache_salt=item.cache_salt,
        )

    async def messages(self) -> AsyncIterator[pb.EncodeRequest]:
        header: pb.EncodeHeader | None = self._header
        for chunk in chunks(self._data):
            yield pb.EncodeRequest(header=header, data=chunk)
            header = None
        self.delivered = True
