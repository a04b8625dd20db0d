"""Compiles the grammars of requests off the engine's thread; each waits for its own."""

from __future__ import annotations

from collections.abc import Callable, Set
from concurrent.futures import Future, ThreadPoolExecutor

from llguidance import LLTokenizer

from llm_service.policy.messages import GenerateRequest, GrammarCompiled
from opticnerve.errors import UnsupportedFeature
from opticnerve.generation.grammars import Grammar, compile_grammar
from opticnerve.lru import LRU

THREADS = 2  # So that a grammar that takes long does not delay all others.
RECENT = 32  # Grammars that are kept: most requests of an application have the same one.


class GrammarCompiler:
    """Used on the engine's thread alone."""

    def __init__(self, load: Callable[[], LLTokenizer] | None = None) -> None:
        """``load`` returns the vocabulary, on a thread that begins at once; what it raises, each
        compilation raises. None: there is no vocabulary."""
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="grammar")
        self._vocabulary = None if load is None else self._pool.submit(load)
        self._compiling: dict[str, Future[Grammar]] = {}  # By request.
        self._recent: LRU[str, Future[Grammar]] = LRU(RECENT)  # By grammar.

    @property
    def waiting(self) -> Set[str]:
        """The requests that wait for their grammars."""
        return self._compiling.keys()

    def begin(self, request: GenerateRequest, send: Callable[[GrammarCompiled], None]) -> None:
        """Compiles the request's grammar, unless that is done or under way for another; ``send`` is
        called on any thread when it is done."""
        request_id, grammar = request.request_id, request.sampling.grammar
        compiling = self._recent.get(grammar)
        if compiling is None or _failed(compiling):
            compiling = self._recent[grammar] = self._pool.submit(self._compile, grammar)
        self._compiling[request_id] = compiling
        compiling.add_done_callback(lambda _: send(GrammarCompiled(request_id)))

    def _compile(self, grammar: str) -> Grammar:
        if self._vocabulary is None:
            raise UnsupportedFeature("structured output is not served here", param="grammar")
        return compile_grammar(grammar, self._vocabulary.result())

    def done(self, request_id: str) -> bool:
        """Whether the request waits, and need not wait longer."""
        compiling = self._compiling.get(request_id)
        return compiling is not None and compiling.done()

    def take(self, request_id: str) -> Grammar:
        """The compiled grammar. Raises InvalidRequest or UnsupportedFeature."""
        return self._compiling.pop(request_id).result()

    def cancel(self, request_id: str) -> None:
        """The request waits no longer."""
        compiling = self._compiling.pop(request_id, None)
        if compiling is not None and compiling not in self._compiling.values():
            compiling.cancel()

    def close(self) -> None:
        """Compiles nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _failed(compiling: Future[Grammar]) -> bool:
    """Whether it is cancelled, or has raised an error, which only the requests of its time get."""
    return compiling.done() and (compiling.cancelled() or compiling.exception() is not None)
