"""Formats of answers as grammars: what they accept, and what is refused before a worker hears of
it. Nothing here takes longer than about a second: what would is refused by its size."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from gateway.api.schemas.sampling import SamplingFields
from gateway.grammar import AnswerGrammar, Grammars, grammar_of
from gateway.job import CallMode, FormatKind, GenerationOptions, OutputFormat, Tool, ToolUse
from gateway.output.answer_forms import AnswerForms
from gateway.output.calls.hermes import Hermes
from gateway.output.calls.llama_json import LlamaJson
from gateway.prompt.tokenizer import Tokenizer
from opticnerve.errors import InvalidRequest
from opticnerve.generation.grammars import compile_grammar, load_vocabulary
from tests.checkpoints import DEMO, EOS, VOCAB_SIZE

GRAMMARS = Grammars(AnswerForms(Tokenizer.load(DEMO), LlamaJson()))
VOCABULARY = load_vocabulary(DEMO, (EOS,), VOCAB_SIZE)
PAIR = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def schema(value: Any, **changes: Any) -> OutputFormat:
    return OutputFormat(FormatKind.JSON_SCHEMA, value, **changes)


def accepts(format: OutputFormat, text: str) -> bool:
    """Whether ``text`` is an answer in the format, by a worker's own vocabulary."""
    grammar = grammar_of(format)
    GRAMMARS.check_now(grammar, format.param)
    matcher = compile_grammar(grammar, VOCABULARY).matcher
    ids = VOCABULARY.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def refusal(format: OutputFormat) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        GRAMMARS.check_now(grammar_of(format), format.param)
    assert caught.value.param == format.param
    assert len(caught.value.message) < 500
    return caught.value


# ---- what formats accept


@pytest.mark.parametrize(
    ("format", "right", "wrong"),
    [
        (OutputFormat(FormatKind.JSON_OBJECT, None), '{"a": [1, null]}', "[1]"),
        (schema(PAIR), '{\n  "a": 1\n}', '{"a": "1"}'),
        (schema(PAIR), '{"a": 1, "b": 2}', "{}"),
        (schema({**PAIR, "x-guidance": {"lenient": True}}), '{"a": 1}', "{}"),
        (schema(True), '"x"', "x"),
        (schema(PAIR, whitespace=""), '{"a":1}', '{"a": 1}'),
        (schema(PAIR, whitespace="_"), '{_"a"_:_1_}', '{ "a": 1}'),
        (schema({"$defs": {"n": {"items": {"$ref": "#/$defs/n"}, "type": "array"}},
                 "$ref": "#/$defs/n"}), "[[], [[]]]", "[1]"),
        (OutputFormat(FormatKind.REGEX, r"^[a-c]+/\d{2}$"), "abc/12", "abc/1"),
        (OutputFormat(FormatKind.REGEX, "a\nb\\/c"), "a\nb/c", "ab/c"),
        (OutputFormat(FormatKind.CHOICE, ("yes", 'no "é" 😀', "a/b")), 'no "é" 😀', "no"),
        (OutputFormat(FormatKind.CHOICE, ("a", "ab")), "ab", "b"),
        (OutputFormat(FormatKind.GRAMMAR, 'start: WORD "!"\nWORD: /[a-z]+/'), "abc!", "abc"),
        (OutputFormat(FormatKind.GRAMMAR, 'start: <|im_start|> "a"'), "<|im_start|>a", "a"),
        (OutputFormat(FormatKind.GRAMMAR, 'root ::= ("yes" | no) "/"?\nno ::= "n" [o-p]+'),
         "nop/", "n/"),
    ],
)  # fmt: skip
def test_formats(format: OutputFormat, right: str, wrong: str) -> None:
    assert accepts(format, right)
    assert not accepts(format, wrong)


def test_white_space_between_the_parts_of_json_is_bounded() -> None:
    indented = {"a": 1, "b": [{"c": {}}, [1, 2]]}
    for indent in (None, 0, 2, 4, "\t"):
        assert accepts(schema(PAIR), json.dumps(indented, indent=indent))
    assert accepts(schema(PAIR), '{    "a"\r\n : 1}')
    for space in (" " * 5, "\n\n", "\n" + " " * 33):
        assert not accepts(schema(PAIR), "{" + space + '"a": 1}')


# ---- what is refused, and why


@pytest.mark.parametrize(
    ("format", "says"),
    [
        (schema({"type": "strin"}), "Invalid type"),
        (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (schema({"$ref": "http://localhost/x"}), "http://localhost/x"),
        (schema({"$ref": "#/nowhere"}), "nowhere"),
        (schema(False), "no value"),
        (schema({"type": "object", "properties": {"a": False}, "required": ["a"]}), "satisf"),
        (OutputFormat(FormatKind.REGEX, "(a"), "unclosed group"),
        (OutputFormat(FormatKind.REGEX, "a(?=b)"), "look-ahead"),
        (OutputFormat(FormatKind.REGEX, "(?x) a # ("), "flag x"),
        (OutputFormat(FormatKind.GRAMMAR, "start: nowhere"), "nowhere"),
        (OutputFormat(FormatKind.GRAMMAR, "start: <|nowhere|>"), "unknown special token"),
        (OutputFormat(FormatKind.GRAMMAR, 'root ::= "a'), "as GBNF"),
        (OutputFormat(FormatKind.GRAMMAR, "root ::= nowhere"), "as GBNF"),
        (OutputFormat(FormatKind.GRAMMAR, '{"grammars": []}'), "not JSON"),
        (OutputFormat(FormatKind.GRAMMAR, "A: B\nB: A\nstart: A"), "refers to itself"),
        (OutputFormat(FormatKind.GRAMMAR, 'start: "a'), 'a " in the grammar is not closed'),
        (OutputFormat(FormatKind.GRAMMAR, 'start: "a" < b'), "a < in the grammar is not closed"),
    ],
)
def test_refusals_give_the_reason(format: OutputFormat, says: str) -> None:
    assert says in refusal(format).message


def test_what_cannot_be_enforced_is_named_unless_the_schema_is_strict() -> None:
    loose = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    assert "uniqueItems" in refusal(schema(loose)).message
    grammar = grammar_of(schema(loose, strict=False))
    (warning,) = GRAMMARS.check_now(grammar, "response_format")
    assert "uniqueItems" in warning


def refs(number: int, more: Any = None) -> dict[str, Any]:
    """Definitions that refer to the next one, the last to the first."""
    return {
        "$defs": {
            str(i): {"items": {"$ref": f"#/$defs/{(i + 1) % number}"}, **(more or {})}
            for i in range(number)
        },
        "$ref": "#/$defs/0",
    }


def nested(depth: int) -> dict[str, Any]:
    return {"type": "array", "items": nested(depth - 1)} if depth else {"type": "string"}


def properties(number: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(number)}}


def terminals(number: int, body: str) -> str:
    """Terminals of which each is made of the next."""
    lines = [f"X{i}: {body.replace('NEXT', f'X{i + 1}')}" for i in range(number)]
    return "\n".join(["start: X0", *lines, f'X{number}: "a"'])


TOO_MUCH = {
    "deep": schema(nested(190)),
    "long": schema({"const": ["x" * 1000] * 200}),
    "properties": schema(properties(5000)),
    "properties that may follow": schema(properties(200)),
    "a list of objects": schema({"enum": [{"a": i} for i in range(4000)]}),
    "intersections of alternatives": schema(
        {"allOf": [{"anyOf": [properties(i + j) for j in range(10)]} for i in range(10)]}
    ),
    "itself": schema({"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}),
    "multiples": schema({"items": {"multipleOf": 10**9 + 7}}),
    "fractions": schema({"multipleOf": 0.123456789}),
    "ranges": schema({"prefixItems": [{"minimum": i, "maximum": 10**15} for i in range(2000)]}),
    "patterns": schema({"allOf": [{"pattern": f".*a.{{{i}}}b"} for i in range(99)]}),
    "a pattern's repetitions": schema({"pattern": "^(a{1000}){1000}$"}),
    "a long constant": schema({"const": "x" * 2**15}),
    "white space": schema(PAIR, whitespace="((( ?){1000}){1000}){1000}"),
    "repetitions": OutputFormat(FormatKind.REGEX, "(([ab]{100}|c){100}){100}"),
    "repetitions of nothing": OutputFormat(FormatKind.REGEX, "((((a?){99}){99}){99}){99}"),
    "groups": OutputFormat(FormatKind.REGEX, "(" * 4000 + "a" + ")" * 4000),
    "a long pattern": OutputFormat(FormatKind.REGEX, "a" * 2**14),
    "choices": OutputFormat(FormatKind.CHOICE, tuple(map(str, range(5000)))),
    "rules": OutputFormat(FormatKind.GRAMMAR, terminals(20_000, 'NEXT "a"')),
    "rules of GBNF": OutputFormat(
        FormatKind.GRAMMAR, "root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1}" for i in range(5000))
    ),
    "groups of GBNF": OutputFormat(FormatKind.GRAMMAR, "root ::= " + "(" * 9999),
    "groups of a grammar": OutputFormat(FormatKind.GRAMMAR, "start: " + "(" * 50_000),
    "doubled terminals": OutputFormat(FormatKind.GRAMMAR, terminals(60, "NEXT NEXT")),
    "repeated terminals": OutputFormat(FormatKind.GRAMMAR, terminals(3, "NEXT{1000}")),
    "repeated groups": OutputFormat(FormatKind.GRAMMAR, 'start: X\nX: (("a"~999){999})~999..1000'),
    "patterns in a grammar": OutputFormat(
        FormatKind.GRAMMAR, 'start: %json {"pattern": "(a{1000}){1000}"}'
    ),
    "new lines": OutputFormat(FormatKind.GRAMMAR, "::=" + "\n" * 10**6),
    "an open string": OutputFormat(FormatKind.GRAMMAR, "start: " + r'\"' * 60_000),
    "an open pattern": OutputFormat(FormatKind.GRAMMAR, "start: /" + r"\/" * 60_000),
    "open tokens": OutputFormat(FormatKind.GRAMMAR, "start: " + "<" * 120_000),
    "an open repetition": OutputFormat(FormatKind.GRAMMAR, 'start: "a"{1,' + " " * 120_000),
    "alternatives": OutputFormat(FormatKind.GRAMMAR, "start: " + '"a"|' * 30_000 + '"b"'),
    "many schemas": OutputFormat(
        FormatKind.GRAMMAR, "start: " + ' %json {"multipleOf": 50000}' * 30
    ),
    "names twice": OutputFormat(
        FormatKind.GRAMMAR, 'start: %json {"pattern": "(a{1000}){1000}", "pattern": "a"}'
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOO_MUCH)
def test_too_much_is_refused(name: str) -> None:
    refusal(TOO_MUCH[name])


COMPILED = {
    "references": schema(refs(1200)),
    "a long string": schema({"type": "string", "minLength": 10**9}),
    "a long list": schema({"type": "array", "minItems": 10**9}),
    "ranges of repetitions": OutputFormat(FormatKind.REGEX, "(a{1,1000}){1,1000}"),
    "many states": OutputFormat(FormatKind.REGEX, "(a|b)*a(a|b){40}"),
    "a large enum": schema({"enum": [f"value {i}" for i in range(2000)]}),
    "many choices": OutputFormat(FormatKind.CHOICE, tuple(f"choice {i}" for i in range(4000))),
    "many properties": schema({**properties(300), "required": [f"p{i}" for i in range(200)]}),
    "many alternatives": OutputFormat(
        FormatKind.GRAMMAR, "start: " + "|".join(f'"{i}"' for i in range(400))
    ),
    "a terminal of words": OutputFormat(
        FormatKind.GRAMMAR, "start: WORD\nWORD: " + "|".join(f'"{i}"' for i in range(14_000))
    ),
    "comments": OutputFormat(
        FormatKind.GRAMMAR, 'start: "a" // an open "\n  | /b\n/ # and <\n  | "//"i'
    ),
    "decimals": schema({"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 1e6}),
}


@pytest.mark.parametrize("name", COMPILED)
def test_what_is_large_and_not_too_much_compiles(name: str) -> None:
    GRAMMARS.check_now(grammar_of(COMPILED[name]), "response_format")


def asked(format: OutputFormat | None, tools: ToolUse | None = None) -> GenerationOptions:
    return GenerationOptions(SamplingFields.model_construct(), format=format, tools=tools)


@pytest.mark.anyio
async def test_the_same_grammar_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def counting(grammar: str, *args: Any) -> Any:
        compiled.append(grammar)
        return compile_grammar(grammar, *args)

    monkeypatch.setattr("gateway.grammar.compile_grammar", counting)
    grammars = Grammars(GRAMMARS._forms)
    same = (grammars.find(asked(schema(dict(PAIR))), chat=False) for _ in range(9))
    first, *others = await asyncio.gather(*same)
    assert json.dumps(PAIR["properties"]) in first.text and compiled == [first.text]
    assert others == [first] * 8
    bad = asked(schema({"type": "strin"}))
    for _ in range(2):
        with pytest.raises(InvalidRequest):
            await grammars.find(bad, chat=False)
    assert await grammars.find(asked(None), chat=True) == AnswerGrammar()


@pytest.mark.anyio
async def test_errors_name_the_field_at_fault() -> None:
    good, bad = schema(PAIR), schema({"type": "strin"})
    tool = Tool("f", "", {"properties": {"a": {"type": "string", "pattern": "(?=x)"}}}, strict=True)
    for mode in (CallMode.AUTO, CallMode.REQUIRED):
        with pytest.raises(InvalidRequest) as caught:
            grammars = Grammars(replace(GRAMMARS._forms, calls=Hermes()))
            await grammars.find(asked(good, ToolUse((tool,), mode)), chat=True)
        assert caught.value.param == "tools"
    with pytest.raises(InvalidRequest) as caught:
        await GRAMMARS.find(asked(bad, ToolUse((tool,), CallMode.NONE)), chat=True)
    assert caught.value.param == "response_format"
    void = await GRAMMARS.find(asked(bad, ToolUse((Tool("f"),), CallMode.REQUIRED)), chat=True)
    assert void.not_enforced == ("response_format (tool_choice demands calls alone)",)
