"""One item on its way to an encoder: the messages of an Encode call."""

from __future__ import annotations

from collections.abc import AsyncIterator

from opticnerve.media.plan import Overrides, Plan
from opticnerve.pb import encoder_pb2 as pb
from opticnerve.rpc import convert
from opticnerve.rpc.channel import chunks


class EncodeUpload:
    """``data``, the compressed picture, in chunks; a header comes with the first.

    ``delivered``: the encoder's host has all of it. ``lost``: an LLM worker found no usable rows
    where the encoder had said they are.
    """

    def __init__(
        self,
        data: bytes,
        key: str,
        fingerprint: str,
        plan: Plan,
        overrides: Overrides,
        *,
        request_id: str = "",
        lost: bool = False,
        cache_salt: str = "",
    ) -> None:
        self.delivered = False
        self._data = data
        self._header = pb.EncodeHeader(
            request_id=request_id,
            key=key,
            fingerprint=fingerprint,
            plan=convert.plan_to_pb(plan),
            overrides=convert.overrides_to_pb(overrides),
            num_bytes=len(data),
            lost=lost,
            cache_salt=cache_salt,
        )

    async def messages(self) -> AsyncIterator[pb.EncodeRequest]:
        header: pb.EncodeHeader | None = self._header
        for chunk in chunks(self._data):
            yield pb.EncodeRequest(header=header, data=chunk)
            header = None
        self.delivered = True
