"""Held-out accuracy of a checkpoint by kind of question, number of shapes and picture size.

    python -m examples.demo_training.evaluate CHECKPOINT

An answer counts when greedy decoding gives it word for word. Seeds 0 to 1,023 are never trained on.
"""

import sys

import torch
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl import modeling_qwen2_vl

from examples.demo_training import questions, scenes
from examples.demo_training.train_chats import (
    Encoder,
    collate,
    evaluate,
    forward,
    same_size_attention,
)

QUESTIONS = [
    questions.ask_describe,
    questions.ask_json,
    questions.ask_count,
    questions.ask_color,
    questions.ask_shape,
    questions.ask_place,
    questions.ask_presence,
]
SCENES = 150  # a size and question, spread over one, two and three shapes


def chat(question, seed, size):
    rng = scenes.Random(seed, size)
    return questions.one_question(scenes.random_items(rng, 1 + seed % 3), [question], rng)


def main():
    checkpoint = sys.argv[1]
    modeling_qwen2_vl.VisionAttention.forward = same_size_attention
    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    encode = Encoder(checkpoint)
    print("share right with one / two / three shapes")
    for size in scenes.PICTURE_SIZES:
        for question in QUESTIONS:
            batch = collate(
                [encode(chat(question, seed, size)) for seed in range(SCENES)], encode.pad
            )
            with torch.no_grad():
                right = forward(model, batch, encode.settings, encode.config, "cpu")[1].float()
            print(
                f"{size[0]}x{size[1]} {question.__name__.removeprefix('ask_'):9}",
                " / ".join(f"{right[n::3].mean():.2f}" for n in range(3)),
                flush=True,
            )
    evaluate(
        model, type("Where", (), {"model_dir": checkpoint}), encode.settings, encode.config, "cpu"
    )


if __name__ == "__main__":
    main()
