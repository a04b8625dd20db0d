"""Split equals whole over HTTP: three real services say what transformers' unsplit model says.

For families of each kind: the chat template, tokenizer, image processor and ``generate`` of
transformers on one side, the gateway with an encoder and an LLM process on the other, in fp32.
Budgets are small, so that prompts are cut into chunks within pictures and a full KV cache
preempts. Tokens are compared by their bytes; one may differ only where the unsplit model's two
best logits are closer than MAX_GAP, and never on the demo checkpoint.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import opticnerve
from gateway.output.detokenizer import Vocabulary
from gateway.prompt.renderer import ChatRenderer
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.media.plan import Modality
from opticnerve.models.registry import make_layout
from tests.checkpoints import DEMO, make_checkpoint
from tests.e2e.conftest import data_url, png
from tests.engines import GRAPHS, build_engine
from tests.families import samples
from tests.reference import load_reference, picture

MAX_GAP = 1e-3
MAX_TOKENS = 16
CROWDED = 56  # Tokens of each of eight choices.
SMALL = {"max_num_batched_tokens": 24, "kv_cache_tokens": 384, "max_num_seqs": 8}


class Whole:
    """Hugging Face's side: a chat in, the bytes of each greedy token out."""

    def __init__(self, name, path):
        self.checkpoint = Checkpoint.open(str(path))
        self.layout = make_layout(self.checkpoint)
        self.renderer = ChatRenderer.load(self.checkpoint.path, self.layout)
        self.vocabulary = Vocabulary(self.renderer.tokenizer)
        self.model = load_reference(path)
        self.model.generation_config.eos_token_id = None
        self.sample = samples()[name]
        self.processor = self.sample.processor(path)
        self.close_calls = 0

    def inputs(self, messages):
        images = [
            part["image"]
            for message in messages
            for part in message["content"]
            if part["type"] == "image"
        ]
        text = self.processor.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return self.sample.process(self.processor, text, images)

    def forward_inputs(self, given, more=()):
        ids = torch.cat([given["input_ids"], torch.tensor([[*more]], dtype=torch.int64)], dim=1)
        image = self.layout.item_token_ids[Modality.IMAGE]
        return {**given, **self.sample.token_inputs(ids, image)}

    def generate(self, given, max_tokens):
        with torch.inference_mode():
            out = self.model.generate(
                **self.forward_inputs(given), max_new_tokens=max_tokens, do_sample=False
            )
        return out[0, given["input_ids"].shape[1] :].tolist()

    def check(self, messages, got):
        given = self.inputs(messages)
        want = self.generate(given, len(got))
        spelled = [list(self.vocabulary.token_bytes(token)) for token in want]
        at = next((i for i, (a, b) in enumerate(zip(got, spelled, strict=True)) if a != b), None)
        if at is None:
            return
        with torch.inference_mode():
            logits = self.model(**self.forward_inputs(given, want[:at])).logits[0, -1]
        best = logits.topk(2).values
        gap = (best[0] - best[1]).item()
        assert gap < MAX_GAP, f"token {at}: {got[at]} for {spelled[at]}; the gap is {gap}"
        self.close_calls += 1


def ask(stack, messages, **parameters):
    """(the bytes of each greedy token that the three services sample, by choice; preemptions)"""
    body = {
        "model": "model",
        "messages": [
            {
                "role": message["role"],
                "content": [
                    {"type": "image_url", "image_url": {"url": data_url(png(part["image"]))}}
                    if part["type"] == "image"
                    else part
                    for part in message["content"]
                ],
            }
            for message in messages
        ],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "ignore_eos": True,
        "logprobs": True,
        "skip_special_tokens": False,
        "timings": True,
        **parameters,
    }
    answer = stack._http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    tokens = [
        [token["bytes"] for token in choice["logprobs"]["content"]] for choice in told["choices"]
    ]
    assert {len(choice) for choice in tokens} == {body["max_tokens"]}
    return tokens, told["timings"]["preemptions"]


def image(seed, width=84, height=84):
    return {"type": "image", "image": picture(width, height, seed)}


def text(value):
    return {"type": "text", "text": value}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def assistant(value):
    return {"role": "assistant", "content": [text(value)]}


def chats():
    long = "Count to 20. What color is the star, and where is the large blue circle? " * 3
    return [
        [user(text("Hello!"))],
        [user(image(1), text("What do you see?"))],
        [user(text("What do you see?"), image(2, 112, 84))],
        [user(text("Look at this:"), image(3, 84, 112), text("Describe the image."))],
        [user(image(4), image(5, 112, 84), image(6, 84, 112), text("What do the images show?"))],
        [user(image(4), text("What do you see?")), assistant("A star."),
         user(text("What color is the star?"), image(7)), assistant("Red."),
         user(text("Where is the star?"))],
        [user(text(long), image(8), text(long))],
        [{"role": "system", "content": [text("You are a helpful assistant.")]},
         user(image(1), text("What do you see?"))],
    ]  # fmt: skip


# One of each kind of way from a picture to a prompt. The engine's test has every family.
OVER_HTTP = {
    "demo": "3D positions",
    "gemma3": "text around a picture, tokens that see one another",
    "glm4v": "bounds that count two frames",
    "idefics3": "tiles with tokens between them",
    "llava": "a beginning-of-sequence token",
    "llava_onevision": "one picture otherwise than several",
    "mistral3": "tokens at the ends of rows",
    "qwen2_5_vl": "windows",
    "qwen3_vl_moe": "DeepStack levels, experts",
}


@pytest.mark.parametrize("family", OVER_HTTP)
def test_three_services_equal_the_unsplit_model(family, tmp_path):
    path = DEMO if family == "demo" else make_checkpoint(family, tmp_path / family, seed=5)
    whole = Whole("qwen2_vl" if family == "demo" else family, path)
    model = None if family == "demo" else path
    with opticnerve.serve(model, dtype="float32", generation_config="neutral", **SMALL) as stack:
        for messages in chats():  # One by one, cold.
            (got,), _ = ask(stack, messages)
            whole.check(messages, got)
        with ThreadPoolExecutor(8) as pool:  # Together and warm.
            answers = pool.map(lambda messages: ask(stack, messages), chats())
            for messages, ((got,), _) in zip(chats(), answers, strict=True):
                whole.check(messages, got)
        # Choices that the cache cannot hold all at once, however the requests above met.
        crowd = [user(image(1), text("Count to 20."))]
        choices, preemptions = ask(stack, crowd, n=8, max_tokens=CROWDED)
        assert preemptions > 0
        for got in (choice for i, choice in enumerate(choices) if choice not in choices[:i]):
            whole.check(crowd, got)
    print(f"{family}: {whole.close_calls} tokens differ where logits nearly tie")
    if family == "demo":
        assert whole.close_calls == 0


@pytest.mark.parametrize("family", GRAPHS)
def test_an_exported_tower_equals_the_unsplit_model(family, tmp_path):
    """The encoder's rows come from onnxruntime."""
    path = make_checkpoint(family, tmp_path / family, seed=5)
    engine = tmp_path / "engine"
    build_engine(path, engine)
    whole = Whole(family, path)
    with opticnerve.serve(
        path,
        dtype="float32",
        generation_config="neutral",
        vision_engine=str(engine),
        **SMALL,
    ) as stack:
        (encoder,) = stack._http.get("/health").json()["encoders"]["workers"]
        assert (encoder["backend"], encoder["precision"]) == ("onnx", "float32")
        with ThreadPoolExecutor(8) as pool:
            answers = pool.map(lambda messages: ask(stack, messages), chats())
            for messages, ((got,), _) in zip(chats(), answers, strict=True):
                whole.check(messages, got)
    print(f"{family}: {whole.close_calls} tokens differ where logits nearly tie")
