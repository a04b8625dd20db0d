"""Sampling fields, against the real model: what they forbid is not written."""

import pytest

QUESTION = [{"role": "user", "content": "What is red?"}]


def ask(stack, **fields):
    body = {"model": "model", "messages": QUESTION, "max_tokens": 8, "temperature": 0, **fields}
    answer = stack._http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def written(stack, **fields):
    """The ids of an answer's tokens."""
    named = ask(stack, logprobs=True, return_tokens_as_token_ids=True, **fields)
    shown = named["logprobs"]["content"]
    return [int(each["token"].removeprefix("token_id:")) for each in shown]


def test_tokens_that_are_allowed_favoured_and_forbidden(stack):
    free = written(stack)
    assert set(written(stack, allowed_token_ids=[20, 21])) <= {20, 21}
    assert written(stack, logit_bias={"25": 100}, min_tokens=4)[:4] == [25] * 4
    word = ask(stack)["message"]["content"].split()[0]
    assert word not in ask(stack, bad_words=[word])["message"]["content"].split()
    assert free[0] not in written(stack, logit_bias={str(free[0]): -100})


@pytest.mark.parametrize("shown", [False, True])
def test_tokens_and_texts_that_stop(stack, shown):
    free, text = written(stack), ask(stack)["message"]["content"]
    fields = {"include_stop_str_in_output": shown}
    by_id = ask(stack, stop_token_ids=[free[1]], **fields)
    assert (by_id["finish_reason"], by_id["stop_reason"]) == ("stop", free[1])
    assert len(written(stack, stop_token_ids=[free[1]], **fields)) == 1 + shown
    by_text = ask(stack, stop=[text[1:3]], **fields)
    assert by_text["message"]["content"] == (text[:3] if shown else text[:1])
    assert by_text["stop_reason"] == text[1:3]
