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
        placeholder = layout.item_token_ids["image"]
        at = prompt.index(placeholder)  # One placeholder, which becomes one for each row.
        prompt[at : at + 1] = layout.expand(ref.plan).token_ids
        answer = llm.generate(prompt, {placeholder: ref}, Sampling(max_tokens=64))
        print(tokenizer.decode(answer.token_ids, skip_special_tokens=True))

Clients know only token ids; text is up to the caller. If a layout has a ``rewrite``, as Gemma 3's
does, the caller applies it to the template's text before tokenizing.

``encoder.fetch(ref)["rows"]`` is a picture's embedding as a tensor that supports DLPack. Contents
may be references, such tensors, and pictures, in any number: ``{id: [picture, ref, tensor]}``. An
answer ends with the checkpoint's end-of-sequence ids, unless ``Sampling(eos_token_ids=...)`` gives
others.

``AsyncEncoderClient`` and ``AsyncLLMClient`` are the same with ``await``. For workers with
``--rpc-token-file``, give their clients ``rpc_token_file=``; for those with ``--tls-certificate``,
``tls=ChannelTls("ca.pem")``, or ``ChannelTls("ca.pem", "client.pem", "client.key")`` if they
require a certificate. Errors are those of ``opticnerve.errors``.
"""

from __future__ import annotations

from opticnerve.client.contents import Content, EncodedPicture, MultiMediaInfo, Tensors
from opticnerve.client.encoder import AsyncEncoderClient
from opticnerve.client.llm import AsyncLLMClient
from opticnerve.client.synchronous import EncoderClient, LLMClient
from opticnerve.embeddings.ref import EmbeddingRef
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
from opticnerve.media.load import Picture
from opticnerve.rpc.tls import ChannelTls

__all__ = [
    "AsyncEncoderClient",
    "AsyncLLMClient",
    "ChannelTls",
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
