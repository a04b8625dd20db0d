"""/tokenize, /detokenize and /tokenizer_info agree with Hugging Face's tokenizer and with what the
generating routes make of a prompt."""

import pytest
from transformers import AutoTokenizer

from opticnerve.checkpoints.checkpoint import Checkpoint
from tests.gateways import data_url, keys_of, stack, tokenizer, user

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop")]

TEXTS = ["Once upon a time", "é 漢字 \U0001f600", "<|im_start|>user\nHi<|im_end|>", " ", ""]


@pytest.fixture(scope="module")
def theirs():
    return AutoTokenizer.from_pretrained(Checkpoint.open(None).path)


@pytest.mark.parametrize("prefix", ["", "/v1"])
async def test_texts_are_tokenized_as_hugging_face_does(theirs, prefix):
    async with stack(encoders=0, llms=0, ready=False) as s:
        for text in TEXTS:
            for special in (True, False):
                asked = {"prompt": text, "add_special_tokens": special, "return_token_strs": True}
                told = (await s.client.post(f"{prefix}/tokenize", json=asked)).json()
                expected = theirs(text, add_special_tokens=special)["input_ids"]
                assert told["tokens"] == expected and told["count"] == len(expected)
                assert told["token_strs"] == theirs.convert_ids_to_tokens(expected)
                asked = {"tokens": told["tokens"]}
                back = (await s.client.post(f"{prefix}/detokenize", json=asked)).json()
                assert back["prompt"] == theirs.decode(expected) == text


async def test_a_text_may_be_longer_than_the_context():
    async with stack(encoders=0, llms=0, ready=False) as s:
        text = "a word, " * 12_000
        told = (await s.client.post("/tokenize", json={"prompt": text})).json()
        assert told["count"] == len(told["tokens"]) > told["max_model_len"]
        assert told["token_strs"] is None
        asked = {"tokens": told["tokens"]}
        assert (await s.client.post("/detokenize", json=asked)).json() == {"prompt": text}


async def test_a_chats_tokens_are_those_that_the_model_gets():
    chat = {"messages": [user("What?", data_url())]}
    async with stack() as s:
        told = (await s.client.post("/tokenize", json=chat)).json()
        answer = (await s.chat(*chat["messages"])).json()
        assert told["tokens"] == list(s.llm.starts[0].token_ids)
        assert told["count"] == answer["usage"]["prompt_tokens"]
        asked = {**chat, "add_generation_prompt": False, "add_special_tokens": False}
        shorter = (await s.client.post("/tokenize", json=asked)).json()
        assert told["tokens"][: shorter["count"]] == shorter["tokens"] != told["tokens"]


async def test_the_tokenizers_settings(theirs):
    async with stack(encoders=0, llms=0, ready=False) as s:
        told = (await s.client.get("/tokenizer_info")).json()
        assert told == (await s.client.get("/v1/tokenizer_info")).json()
        for name in ("eos_token", "bos_token", "pad_token", "unk_token"):
            assert told[name] == getattr(theirs, name)
        assert told["chat_template"] == theirs.chat_template
        for token_id, token in theirs.added_tokens_decoder.items():
            assert told["added_tokens_decoder"][str(token_id)]["content"] == token.content
            assert told["added_tokens_decoder"][str(token_id)]["special"] == token.special


@pytest.mark.parametrize(
    ("path", "asked", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [user("b")]}, "prompt"),
        ("/tokenize", {"messages": []}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a" * (2**20 + 1)}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [5, -1]}, "tokens[1]"),
        ("/detokenize", {"tokens": [5, 10**6]}, "tokens[1]"),
        ("/detokenize", {"tokens": "5"}, "tokens"),
    ],
)
async def test_what_is_refused(path, asked, param):
    async with stack(encoders=0, llms=0, ready=False) as s:
        answer = await s.client.post(path, json=asked)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param), error


async def test_a_model_that_is_not_served_and_keys():
    keys = keys_of(ada="sk-ada")
    async with stack(encoders=0, llms=0, ready=False, keys=keys) as s:
        assert (await s.client.get("/tokenizer_info")).status_code == 401
        s.client.headers["authorization"] = "Bearer sk-ada"
        asked = {"model": "other", "prompt": "a"}
        assert (await s.client.post("/tokenize", json=asked)).status_code == 404
        assert (await s.client.post("/tokenize", json={**asked, "model": "model"})).json() == {
            "count": 1,
            "max_model_len": s.gateway.names.max_model_len,
            "tokens": tokenizer().encode("a"),
            "token_strs": None,
        }
