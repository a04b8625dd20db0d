"""The internal services called directly, without a gateway: pictures to embeddings, and embeddings
with token ids to tokens.

    opticnerve encoder --port 7001
    opticnerve llm --port 7002
    python -m examples.services
"""

from __future__ import annotations

import os

from transformers import AutoTokenizer

from examples.picture import PICTURES, STAR
from opticnerve.client import EncoderClient, LLMClient, Sampling

MODEL = str(PICTURES.parent / "checkpoint")  # The directory that both workers serve.
ENCODER = os.environ.get("ENCODER", "127.0.0.1:7001")
LLM = os.environ.get("LLM", "127.0.0.1:7002")

tokenizer = AutoTokenizer.from_pretrained(MODEL)
question = [{"type": "image"}, {"type": "text", "text": "What do you see?"}]
chat = [{"role": "user", "content": question}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)

with EncoderClient(ENCODER, MODEL) as encoder, LLMClient(LLM, encoder=encoder) as llm:
    ref = encoder.encode(str(STAR))  # A reference, no tensor: the LLM worker loads the rows.
    layout = encoder.layout()
    placeholder = layout.item_token_ids["image"]
    at = prompt.index(placeholder)  # One placeholder, which becomes one for each row.
    prompt[at : at + 1] = layout.expand(ref.plan).token_ids
    answer = llm.generate(prompt, {placeholder: ref}, Sampling(max_tokens=64))
    print(tokenizer.decode(answer.token_ids, skip_special_tokens=True))
