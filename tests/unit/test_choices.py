"""Token deltas to what a client reads, one choice at a time."""

import pytest

from gateway.api.answer import logprobs_json
from gateway.api.chat import ChatRequest
from gateway.output.choices import Choices
from gateway.output.detokenizer import Vocabulary
from gateway.output.events import ChoiceEnd, Text
from gateway.prompt.tokenizer import Tokenizer
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.errors import EngineFailure
from opticnerve.generation.values import Delta, FinishReason, Logprob, PositionLogprobs

END = 629  # <|im_end|> of the demo checkpoint.


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(Checkpoint.open(None).path)


@pytest.fixture
def choices(tokenizer):
    def make(**fields):
        messages = [{"role": "user", "content": "x"}]
        request = ChatRequest.model_validate({"model": "m", "messages": messages, **fields})
        return Choices(request.options, Vocabulary(tokenizer))

    return make


def one(events):
    """All that a delta gives: (text, log-probabilities, finish reason, stop reason)."""
    *texts, last = events
    end = last if isinstance(last, ChoiceEnd) else None
    (text,) = texts or ([] if end else [last]) or [Text(end.choice, "")]
    return text.text, text.logprobs, end and end.finish_reason, end and end.stop_reason


def delta(ids, finish=None, stop=None, choice=0, first=0, logprobs=()):
    return Delta(choice, first, tuple(ids), tuple(logprobs), finish, stop)


def test_the_end_of_sequence_is_counted_and_not_shown(choices, tokenizer):
    ids = tokenizer.encode("Hi")
    for fields in ({}, {"skip_special_tokens": False}):
        made = choices(**fields)
        text, _, reason, stop = one(made.take(delta([*ids, END], FinishReason.STOP, END)))
        assert (text, reason, stop) == ("Hi", "stop", None)
        assert made.ended and made.num_tokens == len(ids) + 1


def test_a_stop_id_of_the_request_is_told_and_shown_on_demand(choices, tokenizer):
    ids = tokenizer.encode("ab")
    made = choices(stop_token_ids=[ids[-1]])
    text, _, _, stop = one(made.take(delta(ids, FinishReason.STOP, ids[-1])))
    assert (text, stop) == ("a", ids[-1])
    shown = choices(stop_token_ids=[ids[-1]], include_stop_str_in_output=True)
    assert one(shown.take(delta(ids, FinishReason.STOP, ids[-1])))[0] == "ab"


def test_a_stop_string_ends_a_choice_and_what_follows_is_ignored(choices, tokenizer):
    made = choices(stop=[" c"], n=2)
    ids = tokenizer.encode("a b c d")
    text, _, reason, stop = one(made.take(delta(ids)))
    assert (text, reason, stop) == ("a b", "stop", " c")
    assert made.take(delta(ids, first=len(ids))) == []
    assert not made.ended and made.num_tokens < len(ids)
    assert one(made.take(delta(ids[:1], FinishReason.LENGTH, choice=1)))[2] == "length"
    assert made.ended


def test_text_that_a_stop_string_could_begin_with_waits(choices, tokenizer):
    made = choices(stop=["abc"])
    ids = [tokenizer.encode(letter)[0] for letter in "xab"]
    got = [made.take(delta([token], first=i)) for i, token in enumerate(ids)]
    assert got == [[Text(0, "x")], [], []]
    text, _, reason, _ = one(made.take(delta([], FinishReason.LENGTH, first=3)))
    assert (text, reason) == ("ab", "length")


def test_log_probabilities_stop_with_the_text(choices, tokenizer):
    ids = tokenizer.encode("a b c d")
    places = [PositionLogprobs(Logprob(i, float("-inf"), 1), (Logprob(i, -0.5, 1),)) for i in ids]
    made = choices(stop=[" c"], logprobs=True, top_logprobs=1)
    logprobs = one(made.take(delta(ids, logprobs=places)))[1]
    assert len(logprobs) == made.num_tokens < len(ids)
    assert logprobs_json(logprobs)["content"][0]["logprob"] == -9999.0
    assert len(logprobs[0].top) == 1


def test_an_abort_is_no_answer(choices):
    with pytest.raises(EngineFailure):
        choices().take(delta([], FinishReason.ABORT))
