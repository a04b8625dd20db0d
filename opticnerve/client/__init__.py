"""Python clients of the internal services, without the gateway: pictures in, token ids out.

With `opticnerve encoder --port 7001` and `opticnerve llm --port 7002` running:

    from transformers import AutoTokenizer

    from opticnerve.client import EncoderClient, LLMClient, Sampling

    MODEL = "opticnerve/demo/checkpoint"  # The directory or hub id that both workers serve.
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    question = [{"type": "image"}, {"type": "text", "text": "What do you see?"}]
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)

    with (
        EncoderClient("127.0.0.1:7001", MODEL) as encoder,
        LLMClient("127.0.0.1:7002", encoder=encoder) as llm,
    ):
        ref = encoder.encode("opticnerve/demo/pictures/star.png")  # A reference, no tensor.
        layout = encoder.layout()
        at = prompt.index(layout.image_token_id)  # One placeholder, which becomes one for each row.
        prompt[at : at + 1] = layout.expand(ref.plan).token_ids
        answer = llm.generate(prompt, {layout.image_token_id: ref}, Sampling(max_tokens=64))
        print(tokenizer.decode(answer.token_ids, skip_special_tokens=True))

The text is the caller's: the clients know token ids alone. ``encoder.fetch(ref)["rows"]`` are a
picture's embeddings as a tensor that speaks DLPack; such tensors are contents too, as are the
pictures themselves, in any number: ``{id: [picture, ref, tensor]}``. An answer ends where the
checkpoint says, unless ``Sampling(eos_token_ids=...)`` says otherwise.

``AsyncEncoderClient`` and ``AsyncLLMClient`` are the same with ``await``. Workers that were started
with ``--rpc-token-file`` want it of their clients too: ``rpc_token_file=``. Errors are those of
``opticnerve.errors``.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from opticnerve.client.contents import Content, EncodedPicture, MultiMediaInfo, Tensors
from opticnerve.client.encoder import AsyncEncoderClient
from opticnerve.client.llm import AsyncLLMClient, Contents
from opticnerve.client.pictures import NO_OVERRIDES
from opticnerve.client.portal import Portal, open_portal
from opticnerve.embeddings.ref import EmbeddingRef
from opticnerve.embeddings.store import Store
from opticnerve.generation.values import (
    Choice,
    Delta,
    FinishReason,
    Generation,
    Logprob,
    PositionLogprobs,
    Sampling,
    Usage,
)
from opticnerve.media.pictures import Picture
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
        self,
        address: str,
        model: str | Path | Layout | None = None,
        *,
        timeout_s: float = 120.0,
        rpc_token_file: str | Path | None = None,
    ) -> None:
        async def make() -> AsyncEncoderClient:  # gRPC's channels belong to the loop they see.
            return AsyncEncoderClient(
                address, model, timeout_s=timeout_s, rpc_token_file=rpc_token_file
            )

        self._portal, self.asynchronous = open_portal(make)
        self._open = True

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
        rpc_token_file: str | Path | None = None,
    ) -> None:
        async def make() -> AsyncLLMClient:
            return AsyncLLMClient(
                address,
                encoder=encoder.asynchronous if encoder else None,
                store=store,
                timeout_s=timeout_s,
                rpc_token_file=rpc_token_file,
            )

        self._portal, self.asynchronous = open_portal(make)
        self._open = True

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
