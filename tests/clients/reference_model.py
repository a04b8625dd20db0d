"""The demo checkpoint's unsplit model, asked in the product's environment: SERVER_PYTHON.

Reads ``{"likelihoods": [[context, continuation], ...], "answers": [[prompt, stops, tokens], ...]}``
from stdin, and writes ``{"likelihoods": [[log-likelihood, greedy], ...], "answers": [text, ...]}``.
"""

from __future__ import annotations

import json
import sys

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from opticnerve.checkpoints.checkpoint import Checkpoint


class Reference:
    def __init__(self) -> None:
        path = Checkpoint.open(None).path
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def likelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """The log-likelihood of ``continuation``, and whether it is the greedy one."""
        before, whole = len(self.encode(context)), self.encode(context + continuation)
        rows = self.model(input_ids=torch.tensor([whole])).logits[0].float().log_softmax(-1)
        rows, targets = rows[before - 1 : -1], torch.tensor(whole[before:])
        total = rows.gather(1, targets.unsqueeze(1)).sum().item()
        return total, bool((rows.argmax(-1) == targets).all())

    def answer(self, prompt: str, stops: list[str], tokens: int) -> str:
        ids = self.encode(prompt)
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        out = self.model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=tokens, eos_token_id=end,
            pad_token_id=end,
        )  # fmt: skip
        text = str(self.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))
        return text[: min((at for s in stops if (at := text.find(s)) >= 0), default=len(text))]


def main() -> None:
    asked, reference = json.load(sys.stdin), Reference()
    with torch.inference_mode():
        answers = [reference.answer(*each) for each in asked.get("answers", ())]
        found = [reference.likelihood(*each) for each in asked.get("likelihoods", ())]
    json.dump({"likelihoods": found, "answers": answers}, sys.stdout)


if __name__ == "__main__":
    main()
