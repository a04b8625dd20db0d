"""Makes the grammar that LLM workers enforce from a request's format and tools, and checks it
before any worker is involved."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from llguidance import LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import gbnf_to_lark

from gateway.edge.limits import MAX_GRAMMAR_RULES, MAX_LISTED_CHOICES, MAX_SCHEMA_CHARACTERS
from gateway.edge.threads import off_loop_for_grammars
from gateway.grammar_bounds import check_lark, check_length, check_regex, check_schema
from gateway.job import FormatKind, GenerationOptions, OutputFormat
from gateway.output.answer_forms import AnswerForms
from gateway.output.thinking import Thinking
from opticnerve.errors import InvalidRequest
from opticnerve.generation.grammars import compile_grammar, grammar_error
from opticnerve.generation.values import MAX_GRAMMAR_BYTES
from opticnerve.lru import LRU

# White space allowed between the parts of JSON: enough for indented JSON. It is bounded because a
# model that may write endless white space sometimes does.
WHITESPACE = r"(\r?\n[ \t]{0,32}|[ \t]{1,4})"
RECENT = 32  # Grammars kept in memory: most requests of an application use the same one.
_RULE = re.compile(r"::=")  # Marks GBNF; Lark's rules have a single colon.
_LARK_START = re.compile(r"^[ \t]*start[ \t]*:(?!:)", re.MULTILINE)
_IN_REGEX = re.compile(r"\\.|/|\n|\r", re.DOTALL)


@dataclass(frozen=True, slots=True)
class AnswerGrammar:
    """The grammar of an answer; empty: any text is allowed. ``not_enforced``: the parts of the
    request's format and tools that it does not enforce."""

    text: str = ""
    not_enforced: tuple[str, ...] = ()


class Grammars:
    """The grammars of answers in one checkpoint's forms and vocabulary."""

    def __init__(self, forms: AnswerForms) -> None:
        self._forms = forms
        self._tokenizer = forms.tokenizer
        self._recent: LRU[str, Future[AnswerGrammar]] = LRU(RECENT)
        self._lock = threading.Lock()  # Guards ``_recent``.

    async def find(self, options: GenerationOptions, *, chat: bool) -> AnswerGrammar:
        """The checked grammar of a request's answer. ``chat``: whether the answer may begin with
        thinking. Raises InvalidRequest, with the reason, for a grammar that no worker could
        enforce."""
        if options.format is None and options.tools is None:
            return AnswerGrammar()
        return await off_loop_for_grammars(self._find, options, chat)

    def _find(self, options: GenerationOptions, chat: bool) -> AnswerGrammar:
        """A recent grammar, or a new one. Concurrent requests for the same grammar share one
        compilation."""
        asked = repr((options.format, options.tools, chat))
        key = hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()
        with self._lock:
            found = self._recent.get(key)
            if mine := found is None:
                found = self._recent[key] = Future()
        if mine:
            try:
                found.set_result(self._make(options, chat))
            except BaseException as error:
                with self._lock:
                    self._recent.pop(key)
                found.set_exception(error)
        return found.result()

    def _make(self, options: GenerationOptions, chat: bool) -> AnswerGrammar:
        """Checks the format alone first, so that any later error is about the tools; then the whole
        grammar as workers get it, with thinking before the answer."""
        format = options.format
        if options.tools is not None and options.tools.calls_only:
            format = None
        answer = grammar_of(format) if format else ""
        param = field_of_grammar(options)
        not_enforced = self.check_now(answer, param) if answer else []
        grammar = self._forms.grammar(options, answer)
        sent = self._forms.after_thinking(grammar, Thinking.POSSIBLE) if chat else grammar
        if grammar != answer:
            param = "tools"
        if len(sent.encode()) > MAX_GRAMMAR_BYTES:
            raise InvalidRequest(f"{param}: its grammar is too long; send less", param=param)
        if sent != answer:
            not_enforced += self.check_now(sent, param)
        not_enforced += self._forms.not_enforced(options)
        return AnswerGrammar(grammar, tuple(dict.fromkeys(not_enforced)))

    def check_now(self, grammar: str, param: str) -> list[str]:
        """Returns the parts of a grammar that are not enforced. Raises InvalidRequest, with the
        reason, for a grammar that no worker could enforce."""
        matcher = compile_grammar(grammar, self._vocabulary, param).matcher
        allowed = int.from_bytes(matcher.compute_bitmask(), "little")
        if allowed:  # The library reports some limits only at the first token.
            matcher.consume_token((allowed & -allowed).bit_length() - 1)
        if matcher.is_error():
            raise grammar_error(matcher.get_error(), param)
        return matcher.get_grammar_warnings()

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        """A small vocabulary that can spell any text: single bytes, and the checkpoint's special
        tokens under their ids, so that a grammar can refer to them."""
        special = self._tokenizer.special_ids
        size = max(self._tokenizer.vocab_size, *special, 0) + 1
        tokens = [b""] * size + [bytes([byte]) for byte in range(256)]
        for number, text in special.items():
            tokens[number] = text.encode()
        end = self._tokenizer.eos_token_id
        parts = SimpleNamespace(
            eos_token_id=size if end is None else end,
            bos_token_id=None,
            tokens=tokens,
            special_token_ids=[*special],
        )
        return LLTokenizer(TokenizerWrapper(_Bytes(parts, size)))


class _Bytes:
    """A tokenizer of single bytes, whose token ids begin at ``first``."""

    def __init__(self, parts: SimpleNamespace, first: int) -> None:
        vars(self).update(vars(parts))
        self._first = first

    def __call__(self, text: bytes) -> list[int]:
        return [self._first + byte for byte in text]


def field_of_grammar(options: GenerationOptions) -> str:
    """The request's field that its grammar comes from."""
    tools, format = options.tools, options.format
    return "tools" if format is None or (tools and tools.calls_only) else format.param


def name_field(error: InvalidRequest, options: GenerationOptions) -> None:
    """Makes a worker's error about the grammar name the request's field that it comes from, since
    clients do not know the grammar."""
    if error.param == "grammar":
        reason = error.message.removeprefix("grammar").lstrip(": ")
        error.param = field_of_grammar(options)
        error.message = f"{error.param}: {reason}"


def grammar_of(format: OutputFormat) -> str:
    """The format in llguidance's dialect of Lark. Raises InvalidRequest."""
    match format.kind:
        case FormatKind.JSON_OBJECT:
            return _json_grammar({"type": "object"}, format)
        case FormatKind.JSON_SCHEMA:
            return _json_grammar(format.value, format)
        case FormatKind.REGEX:
            check_regex(format.value, format.param)
            return f"start: /{_IN_REGEX.sub(_escaped, format.value)}/"
        case FormatKind.CHOICE:
            return _choice_grammar(format.value, format.param)
        case FormatKind.GRAMMAR:
            return _lark(format.value, format.param)


def _json_grammar(schema: Any, format: OutputFormat) -> str:
    """A grammar of JSON. Properties come in the schema's order."""
    if schema is False:
        raise InvalidRequest(f"{format.param}: no value satisfies it", param=format.param)
    space = WHITESPACE if format.whitespace is None else format.whitespace
    options = {
        "whitespace_flexible": False,
        **({"whitespace_pattern": space} if space else {}),
        "lenient": not format.strict,
    }
    stated = schema if isinstance(schema, Mapping) else {}
    return f"start: %json {check_schema({**stated, 'x-guidance': options}, format.param)}"


def _escaped(found: re.Match[str]) -> str:
    """A character that cannot stand between the slashes of a Lark regular expression, escaped."""
    return {"/": r"\/", "\n": r"\n", "\r": r"\r", "\\\n": r"\n"}.get(found.group(), found.group())


def _choice_grammar(texts: Sequence[str], param: str) -> str:
    if len(texts) > MAX_LISTED_CHOICES:
        raise InvalidRequest(f"{param}: at most {MAX_LISTED_CHOICES} choices", param=param)
    quoted = " | ".join(json.dumps(text) for text in texts)
    check_length(quoted, MAX_SCHEMA_CHARACTERS, param)
    return f"start: CHOICE\nCHOICE: {quoted}"


def _lark(grammar: str, param: str) -> str:
    """``grammar``, or its translation if it is GBNF (llama.cpp's and xgrammar's EBNF)."""
    check_length(grammar, MAX_SCHEMA_CHARACTERS, param)
    if grammar.lstrip().startswith("{"):
        raise InvalidRequest(f"{param}: should be Lark or GBNF, not JSON", param=param)
    if _RULE.search(grammar) and not _LARK_START.search(grammar):
        if len(_RULE.findall(grammar)) > MAX_GRAMMAR_RULES:
            raise InvalidRequest(f"{param}: at most {MAX_GRAMMAR_RULES} rules", param=param)
        try:
            grammar = gbnf_to_lark(grammar)
        except Exception as error:  # The library's converter raises bare exceptions.
            raise grammar_error(f"as GBNF: {error}", param) from error
    check_lark(grammar, param)
    return grammar
