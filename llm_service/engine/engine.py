"""The engine: schedule, run, commit. Works on token ids and keys; no text, no gRPC.

One thread owns an Engine. It takes commands from its inbox and passes lists of events to ``emit``.
It uses no file and no network: other threads load embedding rows and compile grammars for it. Every
accepted request ends in exactly one of FinishedEvent, FailedEvent and AbortedEvent.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterable
from typing import TypeAlias

from llm_service.engine.grammar_compiler import GrammarCompiler
from llm_service.policy.block_manager import BlockManager
from llm_service.policy.engine_config import EngineConfig, check_request
from llm_service.policy.messages import (
    Abort,
    AbortedEvent,
    CheckIntegrity,
    Command,
    EngineStats,
    Event,
    FailedEvent,
    FinishedEvent,
    GenerateRequest,
    GrammarCompiled,
    IntegrityReport,
    NeedRowsEvent,
    PrefilledEvent,
    PromptLogprobsEvent,
    RowsAvailable,
    RowsFailed,
    RowsReady,
    Stop,
    TokensEvent,
)
from llm_service.policy.row_source import RowSource
from llm_service.policy.scheduler import Scheduler
from llm_service.policy.sequence import GenerationState, Sequence, Status
from llm_service.policy.step_plan import Runner, StepPlan, Work, WorkResult
from opticnerve.errors import (
    DeviceLost,
    EmbeddingUnavailable,
    EngineFailure,
    OpticNerveError,
    Overloaded,
)
from opticnerve.generation.values import Delta, FinishReason, PositionLogprobs

log = logging.getLogger(__name__)

Message: TypeAlias = Event | IntegrityReport | EngineStats
Emit: TypeAlias = Callable[[list[Message]], None]
Terminal: TypeAlias = FinishedEvent | FailedEvent | AbortedEvent


class Engine:
    """Drives one runner. ``runner`` owns the device, ``rows`` the embeddings. ``grammars`` None:
    requests that have a grammar are refused.

    An error of one request fails that request. An exception of ``runner.execute`` fails every
    request of the step, and the engine continues: blocks computed in that step have not been added
    to the prefix cache. DeviceLost and errors of the engine itself are raised by ``run``.
    """

    clock: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        rows: RowSource,
        emit: Emit,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self.config = config
        self.runner = runner
        self.inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._grammars = grammars or GrammarCompiler()
        self.blocks = BlockManager(config.num_blocks, config.block_size, config.prefix_caching)
        self.scheduler = Scheduler(config, self.blocks, rows)
        self._emit = emit
        self._open: dict[str, GenerationState] = {}
        self._events: list[Message] = []
        self._arrivals = 0
        self._steps = 0
        self._prompt_tokens = 0
        self._completion_tokens = 0

    # ---- the loop

    def run(self, inbox: queue.SimpleQueue[Command]) -> None:
        """Works until Stop. Sleeps on the inbox while nothing can be computed."""
        self.inbox = inbox
        while True:
            idle = not self.step()
            if idle and self.config.check_integrity:
                self.check_integrity()
            while idle or not inbox.empty():
                idle = False
                command = inbox.get()
                if isinstance(command, Stop):
                    for request_id in tuple(self._open):
                        self.abort(request_id)
                    self._flush()
                    self._grammars.close()
                    return
                self.handle(command)

    def step(self) -> bool:
        """Schedules, runs and commits one step; False if nothing can be computed now."""
        plan = self.scheduler.schedule(self.clock())
        if self._ask_for_rows() or plan is None:
            self._flush()  # Before the step runs, so that rows are loaded meanwhile.
        if plan is None:
            return False
        self._steps += 1
        began = self.clock()
        try:
            results = self.runner.execute(plan)
            seconds = self.clock() - began
            whole = all(result.error is None for result in results)
            self.scheduler.costs.learn(plan, seconds, whole)
            self._commit(plan, results)
        except DeviceLost as error:
            for generation in tuple(self._open.values()):
                self._fail(generation, error)
            self._flush()
            raise
        except Exception as error:
            log.exception("step %d failed", plan.step)
            self._fail_step(plan, error)
        self._flush()
        return True

    def handle(self, command: Command) -> None:
        match command:
            case GenerateRequest():
                self.submit(command)
            case Abort():
                self.abort(command.request_id)
            case RowsReady():
                self.rows_ready(command.key)
            case RowsAvailable():
                self.rows_available(command.request_id, command.keys)
            case RowsFailed():
                self.rows_failed(command.request_id, command.key, command.error)
            case GrammarCompiled():
                self.grammar_compiled(command.request_id)
            case CheckIntegrity():
                self._report(command.ticket)

    # ---- commands

    def submit(self, request: GenerateRequest) -> None:
        """Queues a request. One that can never be served fails at once, with a typed error. One
        whose id is in use is dropped: callers keep ids unique."""
        if request.request_id in self._open:
            log.error("request %s is already open", request.request_id)
            return
        try:
            waiting = self.scheduler.num_waiting_for_first_chunk
            if waiting + len(self._grammars.waiting) >= self.config.max_waiting:
                raise Overloaded("too many requests are waiting; retry later", retry_after_s=1.0)
            check_request(request, self.config)
        except Exception as error:
            self._events.append(FailedEvent(request.request_id, _typed_error(error)))
            return
        generation = GenerationState(request, self._arrivals, self.clock())
        self._arrivals += 1
        self._open[request.request_id] = generation
        self._prompt_tokens += len(request.token_ids)
        if request.sampling.grammar:
            self._grammars.begin(request, self.inbox.put)
        else:
            self._begin(generation)

    def grammar_compiled(self, request_id: str) -> None:
        """Queues the request, or fails it if its grammar did not compile; a request that has ended
        is ignored."""
        if not self._grammars.done(request_id):
            return
        generation = self._open[request_id]
        try:
            generation.grammar = self._grammars.take(request_id)
        except Exception as error:
            self._fail(generation, _typed_error(error))
        else:
            self._begin(generation)

    def _begin(self, generation: GenerationState) -> None:
        """Queues the first choice that has tokens left to generate; the others fork from it."""
        if not generation.open_choices:
            self._finish(generation)
        while (seq := generation.begin()) is not None:
            self.scheduler.add(seq)
            if seq.finish_reason is None:
                return
            self._send_tokens(seq)  # The output that it continues is complete: reports its end.

    def abort(self, request_id: str) -> None:
        """Cancels a request; unknown and ended ones are ignored."""
        generation = self._open.get(request_id)
        if generation is not None:
            self._end(generation, AbortedEvent(request_id))

    def rows_ready(self, key: str) -> None:
        self.scheduler.rows_ready(key)

    def rows_available(self, request_id: str, keys: Iterable[str]) -> None:
        generation = self._open.get(request_id)
        if generation is not None:
            generation.available_keys.update(keys)

    def rows_failed(self, request_id: str, key: str, error: Exception) -> None:
        """Fails the request if it still has tokens to compute from the rows of ``key``."""
        generation = self._open.get(request_id)
        if generation is not None and self.scheduler.needs(generation, key):
            self._fail(generation, _typed_error(error))

    # ---- running

    def _ask_for_rows(self) -> bool:
        """Sends NeedRowsEvents for rows that sequences wait for; returns whether there were any."""
        needs = self.scheduler.take_needs()
        for seq, keys in needs:
            self._events.append(NeedRowsEvent(seq.request_id, keys, seq.preemptions > 0))
        return bool(needs)

    def _fail_step(self, plan: StepPlan, error: Exception) -> None:
        failure = _typed_error(error)
        for seq in [*(work.seq for work in plan.works), *self.scheduler.copied]:
            if seq.status is not Status.FINISHED:
                self._fail(seq.generation, failure)

    # ---- committing

    def _commit(self, plan: StepPlan, results: list[WorkResult]) -> None:
        """Records a step's tokens, except those of sequences that have ended or lost their slot."""
        now = self.clock()
        for work, result in zip(plan.works, results, strict=True):
            seq = work.seq
            if seq.status is not Status.RUNNING or seq.slot != work.slot:
                continue
            if result.error is not None:
                self._fail_work(work, result.error)
                continue
            end = work.start + work.num_tokens
            self.scheduler.advance(seq, end)
            if work.prompt_logprobs:
                self._send_prompt_logprobs(work, end, result.prompt_logprobs)
            if result.token_id is not None or result.ends_grammar:
                seq.generation.last_token_at = now
                self._append(seq, result)

    def _fail_work(self, work: Work, error: Exception) -> None:
        """Fails the request, or asks again for rows that were lost before the step used them."""
        seq = work.seq
        keys = {segment.item_key for segment in work.segments}
        if isinstance(error, EmbeddingUnavailable) and keys:
            missing = keys & {error.param} or keys
            self.scheduler.ask(seq, tuple(sorted(missing)))
            self._ask_for_rows()
            return
        failure = _typed_error(error)
        if failure.http_status >= 500:  # Otherwise the request is at fault.
            log.error("request %s failed in a step", seq.request_id, exc_info=error)
        if isinstance(failure, EngineFailure):
            self.blocks.evict_from_prefix_cache(seq)
        self._fail(seq.generation, failure)

    def _send_prompt_logprobs(
        self, work: Work, end: int, found: tuple[PositionLogprobs, ...]
    ) -> None:
        positions = work.seq.generation.take_prompt_logprobs(work.start, end, found)
        if positions:
            self._events.append(PromptLogprobsEvent(work.seq.request_id, positions))

    def _append(self, seq: Sequence, result: WorkResult) -> None:
        """Records a sampled token, or the end of a choice whose grammar allows no further token."""
        if seq.generation.first_token_at is None:
            self._first_token(seq)
        seq.grammar_ended = result.ends_grammar
        token, logprobs = result.token_id, result.logprobs
        if token is None:
            self._send_tokens(seq)
            return
        seq.last_token_on_device = True
        seq.token_ids.append(token)
        self._completion_tokens += 1
        self._send_tokens(seq, (token,), () if logprobs is None else (logprobs,))

    def _send_tokens(
        self,
        seq: Sequence,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[PositionLogprobs, ...] = (),
    ) -> None:
        """Sends new tokens of a choice, and closes the choice if they end it."""
        first = seq.num_output - len(tokens)
        finish = seq.finish_reason
        by_id = finish is FinishReason.STOP and not seq.grammar_ended
        stop = seq.token_ids[-1] if by_id else None
        delta = Delta(seq.choice, first, tokens, logprobs, finish, stop)
        self._events.append(TokensEvent(seq.request_id, delta))
        if finish is not None:
            self._close_choice(seq)

    def _first_token(self, leader: Sequence) -> None:
        """Reports that the prompt is computed, and starts the other choices."""
        generation = leader.generation
        generation.first_token_at = generation.last_token_at
        prefilled = PrefilledEvent(
            leader.request_id, generation.cached_tokens, generation.timings()
        )
        self._events.append(prefilled)
        while (child := generation.begin()) is not None:
            self.scheduler.fork(leader, child)
            if child.finish_reason is not None:
                self._send_tokens(child)

    # ---- ending

    def _close_choice(self, seq: Sequence) -> None:
        self.scheduler.remove(seq)
        generation = seq.generation
        generation.open_choices -= 1
        if generation.open_choices == 0:
            self._finish(generation)

    def _finish(self, generation: GenerationState) -> None:
        request_id = generation.request.request_id
        self._end(generation, FinishedEvent(request_id, generation.usage(), generation.timings()))

    def _fail(self, generation: GenerationState, error: Exception) -> None:
        if generation.request.request_id in self._open:
            self._end(generation, FailedEvent(generation.request.request_id, error))

    def _end(self, generation: GenerationState, event: Terminal) -> None:
        """Ends a request and releases its resources; every request ends here."""
        del self._open[generation.request.request_id]
        self._grammars.cancel(generation.request.request_id)
        for seq in generation.sequences:
            if seq.status is not Status.FINISHED:
                self.scheduler.remove(seq)
        self._events.append(event)

    # ---- reporting

    def _flush(self) -> None:
        if self._events:
            events, self._events = self._events, []
            events.append(self.stats())
            self._emit(events)

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=scheduler.shares.num_waiting,
            blocks=self.blocks.num_blocks,
            free_blocks=self.blocks.num_free,
            cached_blocks=self.blocks.num_cached,
            evicted_blocks=self.blocks.num_evicted,
            preemptions=scheduler.num_preemptions,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=scheduler.num_cached_tokens,
            completion_tokens=self._completion_tokens,
            step_seconds=scheduler.costs.total_s,
            prefill_tokens_per_s=scheduler.costs.prefill_tokens_per_s,
        )

    def check_integrity(self) -> None:
        """Raises RuntimeError if an invariant of the engine is violated."""
        self.scheduler.check_integrity()
        queued = {seq.request_id for seq in self.scheduler.sequences()} | self._grammars.waiting
        if queued != set(self._open):
            raise RuntimeError(f"open requests {set(self._open)} differ from queued ones {queued}")

    def _report(self, ticket: int) -> None:
        try:
            self.check_integrity()
        except RuntimeError as error:
            self._events.append(IntegrityReport(ticket, str(error)))
        else:
            self._events.append(IntegrityReport(ticket))


def _typed_error(error: Exception) -> OpticNerveError:
    """``error`` as a typed error that is safe to send to a client."""
    if isinstance(error, OpticNerveError):
        return error
    return EngineFailure("the engine failed on this request; the service's log has the details")
