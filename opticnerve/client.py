"""Python clients of the internal services, without the gateway: pictures in, token ids out.

    from opticnerve.client import EncoderClient, LLMClient, MultiMediaInfo, Sampling

    with EncoderClient("127.0.0.1:7001", MODEL) as encoder, \\
         LLMClient("127.0.0.1:7002", encoder=encoder) as llm:
        ref = encoder.encode("cat.png")                    # an EmbeddingRef
        rows = encoder.fetch(ref)["rows"]                  # a tensor; torch.from_dlpack(rows)
        ids = [*before, *[IMAGE_PAD] * ref.num_rows, *after]
        contents = MultiMediaInfo({IMAGE_PAD: [ref]})      # or the picture, or tensors you have
        print(llm.generate(ids, contents, Sampling(max_tokens=32)).token_ids)

Families whose pictures are more than one run of placeholders say so in
``encoder.layout().expand(ref.plan).token_ids``.

``AsyncEncoderClient`` and ``AsyncLLMClient`` are the same with ``await``. Errors are those of
``opticnerve.errors``.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from opticnerve.clients.contents import Content, EncodedPicture, MultiMediaInfo, Tensors
from opticnerve.clients.encoder import AsyncEncoderClient
from opticnerve.clients.generation import (
    Choice,
    Delta,
    FinishReason,
    Generation,
    Logprob,
    PositionLogprobs,
    Sampling,
    Usage,
)
from opticnerve.clients.llm import AsyncLLMClient, Contents
from opticnerve.clients.pictures import NO_OVERRIDES, Picture
from opticnerve.clients.portal import Portal
from opticnerve.embeddings.ref import EmbeddingRef
from opticnerve.embeddings.store import Store
from opticnerve.media.plan import Overrides
from opticnerve.models.family import Layout
from opticnerve.pb import encoder_pb2, llm_pb2

if TYPE_CHECKING:
    import torch

__all__ = [
    "AsyncEncoderClient",
    "AsyncLLMClient",
    "Choice",
    "Content",
    "Delta",
    "EmbeddingRef",
    "EncodedPicture",
    "EncoderClient",
    "FinishReason",
    "Generation",
    "LLMClient",
    "Logprob",
    "MultiMediaInfo",
    "Picture",
    "PositionLogprobs",
    "Sampling",
    "Tensors",
    "Usage",
]


class EncoderClient:
    """See ``AsyncEncoderClient``."""

    def __init__(
        self, address: str, model: str | Layout | None = None, *, timeout_s: float = 120.0
    ) -> None:
        async def make() -> AsyncEncoderClient:  # gRPC's channels belong to the loop they see.
            return AsyncEncoderClient(address, model, timeout_s=timeout_s)

        self._portal = Portal.acquire()
        self._open = True
        self.asynchronous = self._portal.call(make())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._open:
            self._open = False
            try:
                self._portal.call(self.asynchronous.close())
            finally:
                Portal.release()

    def describe(self) -> encoder_pb2.DescribeEncoderResponse:
        return self._portal.call(self.asynchronous.describe())

    def layout(self) -> Layout:
        return self._portal.call(self.asynchronous.layout())

    def encode(self, picture: Picture, overrides: Overrides = NO_OVERRIDES) -> EncodedPicture:
        return self._portal.call(self.asynchronous.encode(picture, overrides))

    def fetch(self, ref: EmbeddingRef) -> dict[str, torch.Tensor]:
        return self._portal.call(self.asynchronous.fetch(ref))


class LLMClient:
    """See ``AsyncLLMClient``. ``encoder`` and ``store`` are the caller's to close."""

    def __init__(
        self,
        address: str,
        *,
        encoder: EncoderClient | None = None,
        store: Store | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        async def make() -> AsyncLLMClient:
            return AsyncLLMClient(
                address,
                encoder=encoder.asynchronous if encoder else None,
                store=store,
                timeout_s=timeout_s,
            )

        self._portal = Portal.acquire()
        self._open = True
        self.asynchronous = self._portal.call(make())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._open:
            self._open = False
            try:
                self._portal.call(self.asynchronous.close())
            finally:
                Portal.release()

    def describe(self) -> llm_pb2.DescribeLLMResponse:
        return self._portal.call(self.asynchronous.describe())

    def generate(
        self,
        token_ids: Sequence[int],
        contents: Contents | None = None,
        sampling: Sampling | None = None,
        *,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Generation:
        return self._portal.call(
            self.asynchronous.generate(
                token_ids, contents, sampling, request_id=request_id, timeout_s=timeout_s
            )
        )

    def stream(
        self,
        token_ids: Sequence[int],
        contents: Contents | None = None,
        sampling: Sampling | None = None,
        *,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Generator[Delta, None, None]:
        """New tokens as they come. Leaving the loop early aborts the generation, at the latest
        when the iterator is closed."""
        return self._portal.iterate(
            self.asynchronous.stream(
                token_ids, contents, sampling, request_id=request_id, timeout_s=timeout_s
            )
        )
