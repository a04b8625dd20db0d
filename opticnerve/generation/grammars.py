"""Grammars of structured output, which the gateway checks and LLM workers apply.

A grammar is a text in llguidance's dialect of Lark, which can also hold JSON schemas (``%json``)
and regular expressions. LIMITS bound its compilation and each step, in the gateway and in workers
alike.
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
STACK_BYTES = 2**28  # Of a compiling thread: compilation recurses along references.

LIMITS = LLParserLimits(
    initial_lexer_fuel=300_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_items_in_row=500,  # An ambiguous grammar's token takes time with its cube: 4 ms.
    max_lexer_states=20_000,  # Each takes 1 to 2 KB.
    max_grammar_size=200_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)

_STARTING = threading.Lock()
_EXCERPT = re.compile(r"^ *(\d+ \|.*|\^+|at \d+\(\d+\): )$", re.MULTILINE)  # Quotes of the grammar.


@dataclass(frozen=True, slots=True)
class Grammar:
    """A compiled grammar. ``matcher`` is in its initial state; each output gets a copy of it."""

    matcher: LLMatcher
    vocabulary: LLTokenizer


def load_vocabulary(
    path: Path, eos_token_ids: Iterable[int] = (), vocab_size: int | None = None
) -> LLTokenizer:
    """The vocabulary of the checkpoint in ``path``; a large one takes about a second.

    ``vocab_size``: the model's, which may have more ids than its tokenizer. Raises
    UnsupportedFeature if tokenizer.json is missing, or of a kind that the library cannot read.
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
    """Compiles ``grammar``; blocks, but releases the GIL. Raises InvalidRequest with the library's
    reason, on the request's field ``param``."""
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
    """The error for a grammar that cannot be compiled, or cannot be applied any further."""
    lines = _EXCERPT.sub("", reason.replace("<non-verbose/>", "")).split()
    said = " ".join(lines)
    if said.startswith("panic") or not said:
        said = "the grammar is too large or too complex"
    shown = printable(said, MAX_REASON)
    return InvalidRequest(
        f"{param}: {shown}", param=param, code="invalid_grammar", logged=f"{param}: a bad grammar"
    )
