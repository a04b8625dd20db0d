"""Compiles grammars off the engine's thread, so that only requests that have one wait for it."""

from __future__ import annotations

from collections.abc import Callable, Set
from concurrent.futures import Future, ThreadPoolExecutor

from llguidance import LLTokenizer

from llm_service.policy.messages import GenerateRequest, GrammarCompiled
from opticnerve.errors import UnsupportedFeature
from opticnerve.generation.grammars import Grammar, compile_grammar
from opticnerve.lru import LRU

THREADS = 2  # So that a grammar that takes long does not delay all others.
RECENT = 32  # Compiled grammars that are kept; requests of one application often share one.


class GrammarCompiler:
    """Its methods are called on the engine's thread."""

    def __init__(self, load: Callable[[], LLTokenizer] | None = None) -> None:
        """``load`` returns the vocabulary. It is called at once, on another thread; what it raises,
        every compilation raises. None: no grammar can be compiled."""
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="grammar")
        self._vocabulary = None if load is None else self._pool.submit(load)
        self._compiling: dict[str, Future[Grammar]] = {}  # By request.
        self._recent: LRU[str, Future[Grammar]] = LRU(RECENT)  # By grammar.

    @property
    def waiting(self) -> Set[str]:
        """The requests that wait for their grammars."""
        return self._compiling.keys()

    def begin(self, request: GenerateRequest, send: Callable[[GrammarCompiled], None]) -> None:
        """Starts compiling the request's grammar, or joins a compilation that another request has
        started. ``send`` is called on any thread when it is done or has failed."""
        request_id, grammar = request.request_id, request.sampling.grammar
        compiling = self._recent.get(grammar)
        if compiling is None or _failed(compiling):
            compiling = self._recent[grammar] = self._pool.submit(self._compile, grammar)
        self._compiling[request_id] = compiling
        compiling.add_done_callback(lambda _: send(GrammarCompiled(request_id)))

    def _compile(self, grammar: str) -> Grammar:
        if self._vocabulary is None:
            raise UnsupportedFeature(
                "structured output is not served by this worker; leave the grammar out",
                param="grammar",
            )
        return compile_grammar(grammar, self._vocabulary.result())

    def done(self, request_id: str) -> bool:
        """Whether the request waits for its grammar and can ``take`` it now."""
        compiling = self._compiling.get(request_id)
        return compiling is not None and compiling.done()

    def take(self, request_id: str) -> Grammar:
        """The compiled grammar. Raises InvalidRequest or UnsupportedFeature."""
        return self._compiling.pop(request_id).result()

    def cancel(self, request_id: str) -> None:
        """Stops waiting for the request's grammar; its compilation is cancelled if no other request
        waits for it."""
        compiling = self._compiling.pop(request_id, None)
        if compiling is not None and compiling not in self._compiling.values():
            compiling.cancel()

    def close(self) -> None:
        """Drops waiting compilations; running ones are not awaited."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _failed(compiling: Future[Grammar]) -> bool:
    """Whether it was cancelled or raised an error, so that the next request compiles again."""
    return compiling.done() and (compiling.cancelled() or compiling.exception() is not None)
