"""Grammars of structured output: what the gateway checks and LLM workers obey.

A grammar is a text in llguidance's dialect of Lark, which holds JSON schemas (``%json``) and
regular expressions too. Compiling one, and each of its steps, is bounded by LIMITS, the same in
gateway and workers.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from opticnerve.errors import InvalidRequest, UnsupportedFeature
from opticnerve.telemetry.logs import printable

MAX_REASON = 300  # Characters of the library's reason that an error repeats.
STACK_BYTES = 2**28  # Of a compiling thread; compiling recurses along references.

LIMITS = LLParserLimits(
    initial_lexer_fuel=300_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_items_in_row=500,  # A token of an ambiguous grammar takes the cube of it: 4 ms.
    max_lexer_states=20_000,  # Of a kilobyte or two each.
    max_grammar_size=200_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)

_STARTING = threading.Lock()
_EXCERPT = re.compile(r"^ *(\d+ \|.*|\^+|at \d+\(\d+\): )$", re.MULTILINE)  # Of the grammar.


@dataclass(frozen=True, slots=True)
class Grammar:
    """A compiled grammar. ``matcher`` is at its start; each output has a copy of it."""

    matcher: LLMatcher
    vocabulary: LLTokenizer


def load_vocabulary(
    path: Path, eos_token_ids: Iterable[int] = (), vocab_size: int | None = None
) -> LLTokenizer:
    """The vocabulary of the checkpoint in ``path``, which takes about a second for a large one.

    ``vocab_size``: of the model, which may have more ids than its tokenizer. Raises
    UnsupportedFeature if there is no tokenizer.json, or of a kind that the library cannot read.
    """
    try:
        source = (path / "tokenizer.json").read_text(encoding="utf-8")
        return LLTokenizer(source, n_vocab=vocab_size, eos_token=list(eos_token_ids) or None)
    except Exception as error:  # The library raises ValueError and bare Exception.
        raise UnsupportedFeature(
            "structured output is not served for this checkpoint's tokenizer: "
            + printable(str(error), MAX_REASON)
        ) from error


def compile_grammar(grammar: str, vocabulary: LLTokenizer, param: str = "grammar") -> Grammar:
    """Blocks, without the GIL. Raises InvalidRequest with the library's reason; ``param``: the
    request's field."""
    made: list[LLMatcher] = []

    def make() -> None:
        made.append(LLMatcher(vocabulary, grammar, log_level=0, limits=LIMITS))

    with _STARTING:
        usual = threading.stack_size(STACK_BYTES)
        try:
            thread = threading.Thread(target=make, name="compile")
            thread.start()
        finally:
            threading.stack_size(usual)
    thread.join()
    if made[0].is_error():
        raise grammar_error(made[0].get_error(), param)
    return Grammar(made[0], vocabulary)


def grammar_error(reason: str, param: str = "grammar") -> InvalidRequest:
    """The error of a grammar that cannot be compiled, or not be obeyed any further."""
    lines = _EXCERPT.sub("", reason.replace("<non-verbose/>", "")).split()
    said = " ".join(lines)
    if said.startswith("panic") or not said:
        said = "the grammar is too large or too complex"
    shown = printable(said, MAX_REASON)
    return InvalidRequest(
        f"{param}: {shown}", param=param, code="invalid_grammar", logged=f"{param}: a bad grammar"
    )
