"""Token deltas to what a client reads, one choice at a time."""

import pytest
from tokenizers import Tokenizer as Backend

from gateway.api.answer import logprobs_json
from gateway.api.chat import ChatRequest
from gateway.output.answer_forms import AnswerForms
from gateway.output.calls.detect import find_form
from gateway.output.choices import Choices
from gateway.output.detokenizer import Vocabulary
from gateway.output.events import ChoiceEnd, Text, ToolCallArguments, ToolCallStart
from gateway.output.thinking import Thinking
from gateway.prompt.tokenizer import Tokenizer
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.errors import EngineFailure
from opticnerve.generation.values import Delta, FinishReason, Logprob, PositionLogprobs
from tests import vocabularies as v

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


CALLED = {
    "llama3_json": '<|python_tag|>{"name": "f", "parameters": {"a": 1}}',
    "mistral": '[TOOL_CALLS]f[ARGS]{"a": 1}',
}


@pytest.mark.parametrize("form", CALLED)
def test_markers_that_are_special_tokens_are_seen_by_the_reader_of_calls_alone(form):
    """Clients see special tokens only on demand."""
    backend = Backend.from_str(v._byte_level())
    backend.add_special_tokens(["<|python_tag|>", "[TOOL_CALLS]", "[ARGS]"])
    tokenizer = Tokenizer(backend.to_str(), {})
    forms = AnswerForms(tokenizer, find_form(form, ""), shows_tools=True)
    function = {"type": "function", "function": {"name": "f"}}
    ids = tokenizer.encode(tokenizer.aliases.hide(CALLED[form]))
    assert len(set(ids) & tokenizer.skipped_ids) in (1, 2)
    for tools in ([function], []):
        fields = {"messages": [{"role": "user", "content": "x"}], "tools": tools}
        request = ChatRequest.model_validate({"model": "m", **fields})
        made = forms.choices(request.options, Vocabulary(tokenizer), Thinking.NONE)
        given = [event for token in ids for event in made.take(delta([token]))]
        given += made.take(delta([], FinishReason.STOP, END))
        if tools:
            assert isinstance(given[0], ToolCallStart) and given[0].name == "f"
            arguments = [each.text for each in given if isinstance(each, ToolCallArguments)]
            assert "".join(arguments) == '{"a": 1}'
            assert given[-1] == ChoiceEnd(0, "tool_calls")
        else:
            shown = "".join(each.text for each in given if isinstance(each, Text))
            assert "[" not in shown and "<|" not in shown and "f" in shown


@pytest.mark.parametrize("parallel", [True, False])
def test_a_choice_whose_call_cannot_be_read_has_only_stopped(tokenizer, parallel):
    forms = AnswerForms(tokenizer, find_form("hermes", ""), shows_tools=True)
    function = {"type": "function", "function": {"name": "f"}}
    fields = {"tools": [function], "parallel_tool_calls": parallel}
    fields["messages"] = [{"role": "user", "content": "x"}]
    options = ChatRequest.model_validate({"model": "m", **fields}).options
    for arguments, reason in (('{"a": 1}', "tool_calls"), ('{"a": 1, oops}', "stop")):
        made = forms.choices(options, Vocabulary(tokenizer), Thinking.NONE)
        ids = tokenizer.encode(f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>')
        end = made.take(delta([*ids, END], FinishReason.STOP, END))[-1]
        assert end == ChoiceEnd(0, reason)
