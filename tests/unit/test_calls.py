"""Calls of tools in a model's text: how they are read, whatever pieces the text arrives in, and
which form a chat template teaches."""

from __future__ import annotations

import json
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.output.calls.detect import FORMS, find_form
from gateway.output.events import (
    OutputEvent,
    Reasoning,
    Text,
    TextLogprobs,
    TokenLogprob,
    ToolCallArguments,
    ToolCallStart,
)
from gateway.output.sections import MOST_HELD, Sections
from gateway.output.thinking import MARKS, Thinking, ThinkingReader
from opticnerve.config import GatewayConfig
from opticnerve.config.options import options
from tests import vocabularies as v

KNOWN = frozenset({"f", "g"})
Shown = list[tuple[str, ...]]


def sections(form: str, thinking: Thinking | None = None, **settings: Any) -> Sections:
    reader = ThinkingReader(MARKS["think"], thinking) if thinking else None
    return Sections(0, thinking=reader, form=find_form(form, ""), names=KNOWN, **settings)


def read(made: Sections, pieces: list[str]) -> Shown:
    """What a client has of the pieces in the end: texts, reasoning, and calls with arguments."""
    shown: Shown = []
    for number, piece in enumerate(pieces):
        for event in made.push(piece, None, last=number == len(pieces) - 1):
            if isinstance(event, ToolCallStart):
                shown.append(("call", event.name, ""))
            elif isinstance(event, ToolCallArguments):
                assert (
                    shown[-1][0] == "call" and event.index == sum(s[0] == "call" for s in shown) - 1
                )
                shown[-1] = (*shown[-1][:2], shown[-1][2] + event.text)
            else:
                assert isinstance(event, Text | Reasoning)
                kind = "text" if isinstance(event, Text) else "reasoning"
                if not shown or shown[-1][0] != kind:
                    shown.append((kind, ""))
                shown[-1] = (kind, shown[-1][1] + event.text)
    return shown


def hermes(arguments: str, name: str = "f") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


A = '{"a": 1}'
LLAMA = f'{{"name": "f", "parameters": {A}}}'
UNKNOWN = LLAMA.replace("f", "h", 1)
NO_ARGUMENTS = '<tool_call>{"name": "f"}</tool_call>'
ODD = '{"a": "x\ny\t\\d\\u00e9\\u1"}'
RIGHT = '{"a": "x\\ny\\t\\\\d\\u00e9\\\\u1"}'
LITERALS = '{"a": 1, "b": "it\\"s", "c": [true, null, [-0.5, 2.0]], "d": {"k": false}}'
ESCAPES = '{"a": "\\u0041\\u00e9😀\\\\d\'"}'
CASES: list[tuple[str, str, Shown]] = [
    ("hermes", hermes(A), [("call", "f", A)]),
    ("hermes", hermes(A, "unheard_of"), [("call", "unheard_of", A)]),
    (
        "hermes",
        f"I look.\n\n{hermes(A)}\n{hermes('{}', 'g')}\n",
        [("text", "I look."), ("call", "f", A), ("call", "g", "{}")],
    ),
    ("hermes", f"{hermes(A)} and \n", [("call", "f", A), ("text", " and \n")]),
    ("hermes", " <b> 1 < 2 </tool_call> \n", [("text", " <b> 1 < 2 </tool_call> \n")]),
    ("hermes", f'<tool_call>{{"arguments":{A},"name":"f"}}</tool_call>', [("call", "f", A)]),
    ("hermes", f'<tool_call>{{"id":[1],"name":"f","arguments":{A}}}', [("call", "f", A)]),
    ("hermes", f'<tool_call>{{"name":"f","arguments":{A}\n</tool_call>', [("call", "f", A)]),
    ("hermes", hermes(json.dumps(A)), [("call", "f", A)]),
    ("hermes", hermes("null"), [("call", "f", "{}")]),
    ("hermes", hermes(ODD), [("call", "f", RIGHT)]),
    # What is no call, is one no longer, or is not complete.
    ("hermes", hermes("[1]"), [("text", hermes("[1]"))]),
    ("hermes", hermes(A, "a b"), [("text", hermes(A, "a b"))]),
    ("hermes", NO_ARGUMENTS, [("text", NO_ARGUMENTS)]),
    ("hermes", '<tool_call><tool_call>{"name', [("text", '<tool_call><tool_call>{"name')]),
    ("hermes", f"<tool_call>{hermes(A)}", [("text", "<tool_call>"), ("call", "f", A)]),
    (
        "hermes",
        '<tool_call>{"name":"f","arguments":{"a":+1}}',
        [("call", "f", '{"a":'), ("text", "+1}}")],
    ),
    ("hermes", '<tool_call>{"name":"f","arguments":{"a": "x', [("call", "f", '{"a": "x')]),
    ("llama3_json", LLAMA, [("call", "f", A)]),
    (
        "llama3_json",
        f'<|python_tag|>{{"type": "function", "name": "f", "parameters": {A}}}; '
        '{"name": "g", "parameters": {}}',
        [("call", "f", A), ("call", "g", "{}")],
    ),
    ("llama3_json", UNKNOWN, [("text", UNKNOWN)]),
    ("llama3_json", ' {"name": "Ada", "age": 36}\n', [("text", ' {"name": "Ada", "age": 36}\n')]),
    ("llama3_json", '{"answer": {"name": "f"}}', [("text", '{"answer": {"name": "f"}}')]),
    ("llama3_json", f"So: {LLAMA}", [("text", f"So: {LLAMA}")]),
    ("llama3_json", f"{LLAMA}; done", [("call", "f", A), ("text", "; done")]),
    ("llama3_json", "<|python_tag|>print(1)", [("text", "<|python_tag|>print(1)")]),
    (
        "mistral",
        f'Hm. [TOOL_CALLS] [{{"name": "f", "arguments": {A}}}, {{"arguments":{{}},"name":"g"}}]',
        [("text", "Hm."), ("call", "f", A), ("call", "g", "{}")],
    ),
    ("mistral", f'[TOOL_CALLS]{{"name": "f", "arguments": {A}}}', [("call", "f", A)]),
    (
        "mistral",
        f"[TOOL_CALLS]f[CALL_ID]a1[ARGS]{A}[TOOL_CALLS]g[ARGS]{{}}[TOOL_CALLS]f{A}",
        [("call", "f", A), ("call", "g", "{}"), ("call", "f", A)],
    ),
    ("mistral", "a[0] [TOOL_CALLS] []", [("text", "a[0] [TOOL_CALLS] []")]),
    (
        "pythonic",
        '[f(a=1, b=\'it"s\', c=[True, None, (-.5, 2.)], d={"k": false,}), g()]',
        [("call", "f", LITERALS), ("call", "g", "{}")],
    ),
    ("pythonic", '<|python_start|>[f(**{"a": 1})]<|python_end|>', [("call", "f", A)]),
    ("pythonic", "[f(a='\\x41\\u00e9\\U0001F600\\d\\'')]", [("call", "f", ESCAPES)]),
    ("pythonic", "[f(1)]", [("text", "[f(1)]")]),
    ("pythonic", "[h(a=1)]", [("text", "[h(a=1)]")]),
    ("pythonic", "[1, 2] it is", [("text", "[1, 2] it is")]),
    ("pythonic", "[f(a=x)]", [("call", "f", '{"a": '), ("text", ")]")]),
    ("pythonic", "[f(a=1", [("call", "f", '{"a": 1')]),
]


@pytest.mark.parametrize(("form", "text", "expected"), CASES)
def test_texts_with_calls(form: str, text: str, expected: Shown) -> None:
    assert read(sections(form), [text]) == expected
    assert read(sections(form), [*text]) == expected
    for cut in range(1, len(text)):
        assert read(sections(form), [text[:cut], text[cut:]]) == expected


MARKERS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]"]
CALLS = [hermes(A), f"[f(a=1, b={A})]", f"[TOOL_CALLS]f[ARGS]{A}", "<|python_tag|>"]
JSON = [f'{{"name": "f", "{key}": ' for key in ("arguments", "parameters")]
SIGNS = ["{}", "}", ",", '"', "\\", "[", "]", "; ", "<", "\x00", " ", "\n", "[f(", "g(", "a=", ")"]
VALUES = [A, "'x'", "1", "true", "True", "text", "é"]
PIECES = st.sampled_from([*MARKERS, *CALLS, *JSON, *SIGNS, *VALUES])


@given(
    st.lists(PIECES, max_size=12),
    st.sampled_from(sorted(FORMS)),
    st.sampled_from(Thinking),
    st.data(),
)
def test_every_split_shows_the_same(
    words: list[str], form: str, thinking: Thinking, data: st.DataObject
) -> None:
    text = "".join(words)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = read(sections(form, thinking), [text])
    assert read(sections(form, thinking), pieces) == whole
    if thinking is Thinking.NONE and not any(kind == "call" for kind, *_ in whole):
        assert whole == ([("text", text)] if text else [])


@pytest.mark.parametrize("form", ["hermes", "llama3_json", "pythonic"])
def test_arguments_may_be_nested_however_deep(form: str) -> None:
    """A grammar of a recursive schema has no bound either."""
    deep = '{"a": [' * 1000 + "]}" * 1000
    text = {"llama3_json": LLAMA.replace(A, deep), "pythonic": f"[f(**{deep})]"}
    assert read(sections(form), [text.get(form, hermes(deep))]) == [("call", "f", deep)]


def test_only_one_call() -> None:
    made = sections("hermes", several=False)
    shown = read(made, [f"Look. {hermes(A)}", f"\n{hermes('{}', 'g')} more"])
    assert shown == [("text", "Look."), ("call", "f", A)]
    assert made.ended and made.called


@pytest.mark.parametrize(
    ("text", "called"),
    [
        ("x", False),
        (hermes(A), True),
        (hermes(A)[:-20], False),
        (hermes('{"a": 1, oops}'), False),
        (hermes('{"a": 1, oops}') + hermes(A), False),
    ],
)
def test_whether_calls_are_complete(text: str, called: bool) -> None:
    made = sections("hermes")
    read(made, [text])
    assert made.called == called and not made.ended


def test_ids_of_calls() -> None:
    ids = {name: find_form(name, "").call_id() for name in FORMS}  # type: ignore[union-attr]
    assert len(ids["mistral"]) == 9 and ids.pop("mistral").isalnum()
    assert all(each.startswith("call_") for each in ids.values())


# ---- thinking

THOUGHTS: list[tuple[Thinking, str, Shown]] = [
    (Thinking.POSSIBLE, "<think>\nhm\n</think>\n\nYes.", [("reasoning", "hm"), ("text", "Yes.")]),
    (Thinking.POSSIBLE, "\n<think>a < b </b></think>", [("reasoning", "a < b </b>")]),
    (Thinking.POSSIBLE, " Yes. <think>", [("text", " Yes. <think>")]),
    (Thinking.POSSIBLE, "<think>so on \n", [("reasoning", "so on \n")]),
    (Thinking.POSSIBLE, "<think></think>Yes", [("text", "Yes")]),
    (Thinking.INSIDE, "\nhm\n</think>\n\nYes.", [("reasoning", "hm"), ("text", "Yes.")]),
    (Thinking.INSIDE, f"hm</think>{hermes(A)}", [("reasoning", "hm"), ("call", "f", A)]),
    (Thinking.INSIDE, hermes(A), [("reasoning", hermes(A))]),
    (Thinking.NONE, "hm</think>Yes", [("text", "hm</think>Yes")]),
]


@pytest.mark.parametrize(("thinking", "text", "expected"), THOUGHTS)
def test_texts_with_thoughts(thinking: Thinking, text: str, expected: Shown) -> None:
    assert read(sections("hermes", thinking), [text]) == expected
    assert read(sections("hermes", thinking), [*text]) == expected


def test_thoughts_that_are_not_shown() -> None:
    made = sections("hermes", Thinking.INSIDE, show_reasoning=False)
    assert read(made, ["hm", "</think> Yes"]) == [("text", "Yes")]


TOKENS = ["<think>", "a", "b", "</thi", "nk>", "\n", "", "Y", "es"]


@pytest.mark.parametrize("size", [1, 2, 4, 9])
@pytest.mark.parametrize("shown", [True, False])
def test_tokens_of_reasoning_in_any_pieces(size: int, shown: bool) -> None:
    """Each token of reasoning counts, and those that are hidden have no log-probabilities."""
    starts = [*accumulate(map(len, TOKENS[:-1]), initial=0)]
    logprobs = [TextLogprobs(TokenLogprob(b"", -1.0), (), start) for start in starts]
    made = sections("hermes", Thinking.POSSIBLE, show_reasoning=shown)
    events: list[OutputEvent] = []
    for at in range(0, 9, size):
        part = slice(at, at + size)
        text = "".join(TOKENS[part])
        events += made.push(text, logprobs[part], starts[part], last=at + size >= 9)
    assert made.num_reasoning_tokens == 5
    found = [entry for event in events for entry in event.logprobs or ()]
    assert found == (logprobs if shown else logprobs[5:])


def test_log_probabilities_wait_in_small_numbers_for_text_that_is_held_back() -> None:
    made = sections("hermes")
    found: list[int] = []
    for at, char in enumerate([*"<tool_call>", *" " * 200, *hermes(A)[11:], ""]):
        entry = TextLogprobs(TokenLogprob(b"", -1.0), (), at)
        for event in made.push(char, (entry,), last=not char):
            assert len(event.logprobs or ()) <= MOST_HELD
            found += [each.start for each in event.logprobs or ()]
    assert made.called and found == [*range(len(found))] and len(found) > 200


# ---- which form

OTHERS = {
    "hermes": "{% for t in tools %}{{ t | tojson }}{% endfor %} Answer in <tool_call></tool_call>.",
    "llama3_json": 'Write {"name": function name, "parameters": arguments}. {{ tools }}',
    "mistral": "[AVAILABLE_TOOLS] {{ tools }}[/AVAILABLE_TOOLS]{{ '[TOOL_CALLS] [' }}",
    "pythonic": "Call as [func_name1(params_name1=params_value1, ...)]: {{ tools | tojson }}",
    None: "{{ tools }}{{ messages[0].content }}",
}


@pytest.mark.parametrize("templates", [v.TOOL_TEMPLATES, OTHERS])
def test_the_form_that_a_template_teaches(templates: dict[str | None, str]) -> None:
    for name, template in templates.items():
        found = find_form("auto", template)
        assert (found and found.name) == name
        assert find_form("none", template) is None


def test_forms_that_only_resemble_one() -> None:
    assert find_form("auto", "<tool_call><function=f><parameter=a>1</tool_call>{{ tools }}") is None
    named = find_form("auto", "{{ '[TOOL_CALLS]' + name + '[ARGS]' }}")
    assert type(named).__name__ == "MistralNamed"


def test_the_flags_name_what_there_is() -> None:
    choices = {each.name: each.spec.choices for each in options(GatewayConfig)}
    assert choices["tool_parser"] == ("auto", "none", *FORMS)
    assert choices["reasoning_parser"] == ("auto", "none", *MARKS)


@pytest.mark.parametrize("form", FORMS)
def test_a_call_that_must_be_made_and_is_cut_before_its_name_is_no_text(form: str) -> None:
    for cut in ('{"name": "f", "para', '<tool_call>\n{"name": "f', '[TOOL_CALLS][{"na', "[f"):
        assert read(sections(form, calls_only=True), [cut]) == []
    thought = sections(form, Thinking.INSIDE, calls_only=True)
    assert read(thought, ["Hm.</think>\n\n", '{"na']) == [("reasoning", "Hm.")]
