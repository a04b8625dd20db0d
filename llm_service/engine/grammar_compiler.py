"""Compiles the grammars of requests off the engine's thread; each request waits for its own."""

from __future__ import annotations

from collections.abc import Callable, Set
from concurrent.futures import Future, ThreadPoolExecutor

from llguidance import LLTokenizer

from llm_service.policy.messages import GenerateRequest, GrammarCompiled
from opticnerve.errors import UnsupportedFeature
from opticnerve.generation.grammars import Grammar, compile_grammar
from opticnerve.lru import LRU

THREADS = 2  # Two, so that one slow grammar does not delay all others.
RECENT = 32  # Grammars kept in memory: most requests of an application use the same one.


class GrammarCompiler:
    """Used on the engine's thread alone."""

    def __init__(self, load: Callable[[], LLTokenizer] | None = None) -> None:
        """``load`` returns the vocabulary; it is called at once, on a thread, and every compilation
        raises what it raises. None: there is no vocabulary."""
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="grammar")
        self._vocabulary = None if load is None else self._pool.submit(load)
        self._compiling: dict[str, Future[Grammar]] = {}  # By request.
        self._recent: LRU[str, Future[Grammar]] = LRU(RECENT)  # By grammar.

    @property
    def waiting(self) -> Set[str]:
        """The requests that wait for their grammars."""
        return self._compiling.keys()

    def begin(self, request: GenerateRequest, send: Callable[[GrammarCompiled], None]) -> None:
        """Compiles the request's grammar, unless another request has done or begun that. ``send``
        is called when it is done, on any thread."""
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
        """Whether the request was waiting, and its grammar is compiled or has failed."""
        compiling = self._compiling.get(request_id)
        return compiling is not None and compiling.done()

    def take(self, request_id: str) -> Grammar:
        """The compiled grammar. Raises InvalidRequest or UnsupportedFeature."""
        return self._compiling.pop(request_id).result()

    def cancel(self, request_id: str) -> None:
        """The request no longer waits."""
        compiling = self._compiling.pop(request_id, None)
        if compiling is not None and compiling not in self._compiling.values():
            compiling.cancel()

    def close(self) -> None:
        """Compiles nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _failed(compiling: Future[Grammar]) -> bool:
    """Whether the compilation was cancelled or failed. Failures are not kept for later requests."""
    return compiling.done() and (compiling.cancelled() or compiling.exception() is not None)
