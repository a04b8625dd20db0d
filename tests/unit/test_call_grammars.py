"""Grammars of calls: whatever they let a model write, their form reads as calls whose arguments
follow the tools' schemas."""

from __future__ import annotations

import contextlib
import functools
import json
import random
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer as Backend

from gateway.api.schemas.messages import Message
from gateway.api.schemas.sampling import SamplingFields
from gateway.grammar import Grammars
from gateway.grammar_bounds import FIXED, INTERSECTED, SQUARED
from gateway.job import (
    CallMode,
    ChatPrompt,
    FormatKind,
    GenerationOptions,
    OutputFormat,
    TextPrompt,
    Tool,
    ToolUse,
)
from gateway.output.answer_forms import AnswerForms
from gateway.output.calls.detect import FORMS
from gateway.output.calls.form import CallForm
from gateway.output.calls.mistral import MistralNamed
from gateway.output.events import Reasoning, Text, ToolCallArguments, ToolCallStart
from gateway.output.thinking import MARKS, Thinking
from gateway.prompt.tokenizer import Tokenizer
from opticnerve.errors import InvalidRequest
from opticnerve.generation.grammars import LIMITS
from tests import vocabularies as v

PAINT = {
    "type": "object",
    "properties": {
        "width": {"type": "integer", "minimum": 0, "maximum": 99},
        "colour": {"enum": ["red", "it's", 'a "b"\n', None, True]},
        "points": {"$ref": "#/$defs/points"},
        "by": {"type": "object", "properties": {"é": {"type": "string", "maxLength": 3}}},
    },
    "required": ["colour"],
    "$defs": {"points": {"type": "array", "items": {"type": "number"}, "maxItems": 2}},
}
TREE = {"type": "object", "properties": {"leaf": {"enum": [1]}, "tree": {"$ref": "#"}}}
EITHER = {"anyOf": [{"properties": {"q": {"maxLength": 2, "type": "string"}}, "required": ["q"]}]}
WIDE = {name: {"enum": [1]} for name in ("größe", "b" * 200)}
TOOLS = (
    Tool("paint", "", PAINT, strict=True),
    Tool("stop.now", "", {"type": "object", "properties": {}}),
    Tool("either", "", EITHER),
    Tool("grow", "", {**TREE, "additionalProperties": False}),
    Tool("wide", "", {"type": "object", "properties": WIDE, "required": [*WIDE]}),
)
SCHEMAS = {tool.name: tool.parameters for tool in TOOLS}
ALL_FORMS: dict[str, CallForm] = {name: form() for name, form in FORMS.items()}
ALL_FORMS["mistral named"] = MistralNamed()
MARKED = [name for name, form in ALL_FORMS.items() if form.trigger]


@functools.cache
def vocabulary() -> tuple[Tokenizer, LLTokenizer, Backend]:
    """One that has some of the forms' markers as tokens, and others not."""
    source = v._byte_level()
    library = LLTokenizer(source, eos_token=[Backend.from_str(source).token_to_id("<|im_end|>")])
    return Tokenizer(source, {}), library, Backend.from_str(source)


def forms(form: str, marks: str | None = None) -> AnswerForms:
    return AnswerForms(vocabulary()[0], ALL_FORMS[form], MARKS.get(marks or ""), True)


def options(use: ToolUse | None = None, format: OutputFormat | None = None) -> GenerationOptions:
    return GenerationOptions(SamplingFields.model_construct(), tools=use, format=format)


def written(grammar: str, seed: int, most: int = 1500) -> str | None:
    """A random text of the grammar; None if it has no end yet. Ends are taken where they may be,
    and simple characters more often than others, so that texts are short."""
    library = vocabulary()[1]
    matcher = LLMatcher(library, grammar, log_level=0, limits=LIMITS)
    chance, ids = random.Random(seed), []
    for _ in range(most):
        assert not matcher.is_error(), matcher.get_error()
        if matcher.is_stopped() or (matcher.is_accepting() and chance.random() < 0.5):
            return str(library.decode_str(ids))
        mask = matcher.compute_bitmask()
        allowed = [i for i in ids_of_texts() if mask[i // 8] >> (i % 8) & 1]
        short = [i for i in allowed if i in closing_ids()]
        ids.append(chance.choice(short if short and chance.random() < 0.4 else allowed))
        matcher.consume_token(ids[-1])
    return None


@functools.cache
def ids_of_texts() -> list[int]:
    library = vocabulary()[1]
    return [i for i in range(library.vocab_size) if i != library.eos_token]


@functools.cache
def closing_ids() -> frozenset[int]:
    """Tokens that end something, and markers."""
    library = vocabulary()[1]
    return frozenset(i for i in ids_of_texts() if library.decode_str([i]) in '"}])>,' or i > 430)


def read(made: AnswerForms, use: ToolUse | None, thinking: Thinking, text: str) -> list[Any]:
    make = made._sections(options(use), thinking)
    assert make is not None
    shown: list[Any] = []
    for event in make(0).push(text, None, last=True):
        if isinstance(event, ToolCallStart):
            shown.append((event.name, ""))
        elif isinstance(event, ToolCallArguments):
            shown[-1] = (shown[-1][0], shown[-1][1] + event.text)
        else:
            assert isinstance(event, Text | Reasoning)
            shown.append(event)
    return shown


def check(calls: list[Any], use: ToolUse) -> None:
    assert calls and (use.parallel or len(calls) == 1)
    for name, arguments in calls:
        assert use.mode is not CallMode.NAMED or name == use.name
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("mode", [CallMode.REQUIRED, CallMode.NAMED])
def test_what_a_grammar_writes_is_read_as_calls(form: str, mode: CallMode) -> None:
    made, texts = forms(form), set()
    for seed in range(12):
        use = ToolUse(TOOLS, mode, "paint", parallel=seed % 2 == 0)
        text = written(made.grammar(options(use), ""), seed)
        if text is not None:
            texts.add(text)
            check(read(made, use, Thinking.NONE, text), use)
    assert len(texts) > 3


@pytest.mark.parametrize("form", ALL_FORMS)
def test_arguments_that_are_no_names_of_python(form: str) -> None:
    made, use = forms(form), ToolUse(TOOLS, CallMode.NAMED, "wide")
    text = written(made.grammar(options(use), ""), 1)
    assert text is not None
    check(read(made, use, Thinking.NONE, text), use)


@pytest.mark.parametrize("form", ALL_FORMS)
def test_the_gateway_accepts_its_own_grammars(form: str) -> None:
    made = forms(form, "think")
    for mode in (CallMode.REQUIRED, CallMode.AUTO):
        grammar = made.grammar(options(ToolUse(TOOLS, mode)), "")
        assert bool(grammar) == (mode is CallMode.REQUIRED or form in MARKED)
        for text in {grammar, made.after_thinking(grammar, Thinking.POSSIBLE)} - {""}:
            assert Grammars(forms(form)).check_now(text, "tools") == []


@pytest.mark.parametrize("form", ["hermes", "pythonic"])
@pytest.mark.parametrize("marks", ["think", "kimi"])
@pytest.mark.parametrize("thinking", Thinking)
def test_calls_follow_the_reasoning(form: str, marks: str, thinking: Thinking) -> None:
    made, kinds = forms(form, marks), set()
    use = ToolUse(TOOLS, CallMode.REQUIRED, parallel=False)
    grammar = made.after_thinking(made.grammar(options(use), ""), thinking)
    opening, closing = MARKS[marks]
    call = written(made.grammar(options(use), ""), 3)
    texts = [f"{opening}hm {{}} <b></b>{closing}\n\n{call}", f"h<b>m{closing}{call}", str(call)]
    expected = {Thinking.POSSIBLE: (0, 2), Thinking.INSIDE: (1,), Thinking.NONE: (2,)}
    for number, text in enumerate(texts):
        if thinking is Thinking.INSIDE and number == 0:
            continue  # The marker again: text, if it is no token.
        assert fits(grammar, text) == (number in expected[thinking])
        if number in expected[thinking]:
            *before, last = read(made, use, thinking, text)
            check([last], use)
            kinds.add(bool(before))
    assert kinds == {Thinking.POSSIBLE: {True, False}, Thinking.INSIDE: {True}}.get(
        thinking, {False}
    )


@pytest.mark.parametrize(
    ("rendered", "continued", "thinking"),
    [
        ("<|im_start|>assistant\n", None, Thinking.POSSIBLE),
        ("<|im_start|>assistant\n<think>\n", None, Thinking.INSIDE),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", None, Thinking.NONE),
        ("<think>?<|im_start|>assistant\n", None, Thinking.POSSIBLE),
        ("<|im_start|>assistant\n<think>\nFirst,", "<think>\nFirst,", Thinking.INSIDE),
        ("<|im_start|>assistant\n<think>\n", "<think>", Thinking.INSIDE),
        ("<|im_start|>assistant\n<think>\nFirst,", "First, ", Thinking.INSIDE),
        (
            "<|im_start|>assistant\n<think>\nFirst.</think> Yes",
            "<think>\nFirst.</think> Yes",
            Thinking.NONE,
        ),
        ("<|im_start|>assistant\n<think>\n</think>\nYes", "Yes", Thinking.NONE),
        ("<|im_start|>assistant\nYes", "Yes", Thinking.NONE),
        ("What is <think>?<|im_start|>assistant\nIt", "It", Thinking.NONE),
        ("</think> <think>: hm<|im_start|>assistant\nIt", "It", Thinking.NONE),
    ],
)
def test_how_an_answer_begins(rendered: str, continued: str | None, thinking: Thinking) -> None:
    messages = (Message(role="assistant", content=continued or ""),)
    prompt = ChatPrompt(messages, 1, continue_final_message=continued is not None)
    assert forms("hermes", "think").thinking(prompt, rendered) is thinking
    assert forms("hermes").thinking(prompt, rendered) is Thinking.NONE
    assert forms("hermes", "think").thinking(TextPrompt(rendered), rendered) is None


def test_markers_that_a_user_wrote_begin_no_reasoning() -> None:
    think = forms("hermes", "think")
    asked = Message(role="user", content="What is <think>")
    prompt = ChatPrompt((asked,), 1, add_generation_prompt=False)
    assert think.thinking(prompt, "<|user|>\nWhat is <think>") is Thinking.POSSIBLE
    prompt = replace(prompt, continue_final_message=True)
    assert think.thinking(prompt, "<|user|>\nWhat is <think>") is Thinking.NONE


def fits(grammar: str, text: str) -> bool:
    """Whether a model that writes special tokens for markers can write the text."""
    _, library, backend = vocabulary()
    matcher = LLMatcher(library, grammar, log_level=0, limits=LIMITS)
    ids = backend.encode(text).ids
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@pytest.mark.parametrize("form", MARKED)
def test_a_strict_tool_is_constrained_within_text(form: str) -> None:
    made = forms(form)
    use = ToolUse(TOOLS)
    grammar = made.grammar(options(use), "")
    required = made.grammar(options(replace(use, mode=CallMode.REQUIRED)), "")
    calls = [each for seed in range(20) if (each := written(required, seed)) and "paint" in each]
    for call in calls[:4]:
        assert fits(grammar, call) and fits(grammar, f"I paint.\n{call}\nDone")
        assert not fits(grammar, call.replace("paint", "erase"))
        assert not fits(grammar, call.replace("colour", "color"))
    assert calls and fits(grammar, "No calls { [ <tool } at all.")
    loose = replace(use, tools=TOOLS[1:])
    assert made.grammar(options(loose), "") == ""


def test_a_format_or_calls() -> None:
    format = OutputFormat(FormatKind.CHOICE, ("yes",))
    asked = options(ToolUse(TOOLS), format)
    grammar = forms("hermes").grammar(asked, 'start: "yes"')
    call = '<tool_call>\n{"name": "stop.now", "arguments": {}}\n</tool_call>'
    assert fits(grammar, "yes") and fits(grammar, call) and not fits(grammar, "no")
    with pytest.raises(InvalidRequest, match="cannot be told") as caught:
        forms("pythonic").grammar(asked, 'start: "yes"')
    assert caught.value.param == "response_format"
    must = replace(asked, tools=ToolUse(TOOLS, CallMode.REQUIRED))
    assert not fits(forms("hermes").grammar(must, 'start: "yes"'), "yes")


def test_without_tools_the_format_stays_alone() -> None:
    assert forms("hermes").grammar(options(), "start: x") == "start: x"
    assert forms("hermes").after_thinking("", Thinking.INSIDE) == ""


def test_a_large_set_of_tools_stays_a_small_grammar() -> None:
    """Rules take the library quadratic time, so that keyword arguments are for small sets."""
    many = tuple(Tool(f"f{i}", "", PAINT) for i in range(128))
    grammar = forms("pythonic").grammar(options(ToolUse(many, CallMode.REQUIRED)), "")
    assert grammar.count("\n") < 300
    assert LLMatcher.validate_grammar(grammar, limits=LIMITS) == ""


def test_definitions_that_compile_slowly_are_not_repeated_for_each_keyword() -> None:
    slow = {"allOf": [{"anyOf": [PAINT, EITHER, {"type": "integer"}]}] * 3}
    properties = {f"p{i}": {"$ref": "#/$defs/slow"} for i in range(20)}
    tool = Tool("f", "", {"type": "object", "properties": properties, "$defs": {"slow": slow}})
    use = ToolUse((tool, TOOLS[0]), CallMode.REQUIRED)
    assert forms("pythonic").grammar(options(use), "").count("allOf") == 1


NONSENSE: list[Any] = [5, None, "x", [[]], {"a": 5}, {"é b": {}}, {"a": {"type": 5}}, True]
NONSENSE += [float("nan"), float("inf"), 10**4000, -1, 0]
KEYS = {"required", "additionalProperties", "multipleOf", "const", *SQUARED, *FIXED, *INTERSECTED}


@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("key", sorted(KEYS))
def test_schemas_without_sense_are_the_librarys_to_refuse(form: str, key: str) -> None:
    """What is refused earlier, by its size, has a typed error."""
    for value in [*NONSENSE, *({key: each} for each in NONSENSE)]:
        schema = {"properties": {"a": {}}, key: value}
        use = ToolUse((Tool("f", "", schema),), CallMode.REQUIRED)
        with contextlib.suppress(InvalidRequest):
            forms(form).grammar(options(use), "")


def test_a_schema_that_is_too_large() -> None:
    wide = {"type": "object", "properties": {f"p{i}": {} for i in range(10_000)}}
    with pytest.raises(InvalidRequest) as caught:
        forms("hermes").grammar(options(ToolUse((Tool("f", "", wide),), CallMode.REQUIRED)), "")
    assert caught.value.param == "tools"
