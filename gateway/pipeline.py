"""A request's life from a job to the events of its answer: fetch, plan and name its pictures,
render its prompt, encode and generate. Knows neither HTTP, the APIs' formats nor the wire.
Closing a job's generator frees all it holds."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace

from gateway import metrics
from gateway.clock import Deadline, Stopwatch
from gateway.edge.auth import Caller
from gateway.edge.limits import MAX_TRUNCATED_CONTEXTS
from gateway.edge.threads import off_loop_above
from gateway.grammar import AnswerGrammar, Grammars, name_field
from gateway.job import AnyPrompt, ChatPrompt, GenerationOptions, Job, TokenPrompt
from gateway.media.reader import Fetched, MediaReader
from gateway.output.answer_forms import AnswerForms
from gateway.output.choices import Choices
from gateway.output.detokenizer import Vocabulary
from gateway.output.echo import Echo
from gateway.output.events import AnswerEvent, ChoiceEnd, End, OutputEvent, TokenIds
from gateway.output.thinking import Thinking
from gateway.prompt.completion_prompt import read_plain
from gateway.prompt.placeholders import ExpandedPrompt, truncated
from gateway.prompt.renderer import ChatRenderer, RenderedChat
from gateway.prompt.request_templates import RequestTemplates
from gateway.sampling import (
    Defaults,
    SamplingLimits,
    check_choices,
    check_token_ids,
    prompt_limit,
    resolve_sampling,
)
from gateway.workers.embeddings import RequestEmbeddings
from gateway.workers.encode import Encodable, Encoders
from gateway.workers.generate import FailoverGeneration, GenerateSpec
from gateway.workers.pairing import Pair, Pairing
from gateway.workers.pool import WorkerPool
from opticnerve.content_keys import tenant_salt
from opticnerve.errors import InvalidRequest, UnsupportedFeature
from opticnerve.generation.values import Delta, Done, PromptPiece, Sampling, Timings, Usage
from opticnerve.media.plan import Plan
from opticnerve.telemetry import logs

OFF_LOOP_CHARACTERS = 8_000  # Longer prompts are rendered and tokenized in a thread.
OFF_LOOP_TOKENS = 20_000  # The placeholders of longer prompts are expanded in a thread.
OFF_LOOP_SAMPLING = 2_000  # Characters and entries of sampling fields; likewise.


@dataclass(frozen=True, slots=True)
class Pictures:
    """A request's pictures, in order: their bytes and their plans."""

    items: tuple[Fetched, ...] = ()
    plans: tuple[Plan, ...] = ()


@dataclass(frozen=True)
class Pipeline:
    """The steps of a request, with the objects that all requests of a gateway share."""

    renderer: ChatRenderer
    forms: AnswerForms
    grammars: Grammars
    vocabulary: Vocabulary
    media: MediaReader
    pairing: Pairing
    encoders: Encoders
    llms: WorkerPool
    defaults: Defaults
    max_logprobs: int
    max_n: int
    worker_wait_s: float
    request_templates: RequestTemplates | None = None  # None: requests may not have templates.
    share_cache: bool = False  # See --share-cache.

    async def run(self, job: Job) -> AsyncGenerator[AnswerEvent, None]:
        """Runs a job to its end. Yields the prompt (if the job asks for it), text as it is
        generated, the end of each choice, then End. Raises OpticNerveError."""
        spec, embeddings, echo, thinking = await self._start(job)
        async with embeddings:
            if embeddings.encoding:
                job.ticket.count_with_pictures()
            with job.watch.stage("prepare"):
                generation = FailoverGeneration(
                    spec, self.llms, embeddings, job.deadline, self.worker_wait_s, job.watch
                )
                choices = self.forms.choices(job.options, self.vocabulary, thinking)
            finished: Done | None = None
            try:
                async with contextlib.aclosing(generation.events()) as deltas:
                    async for delta in deltas:
                        if isinstance(delta, Done):
                            finished = delta
                            break
                        for echoed in echo.take(delta):
                            yield echoed
                        for event in self._take(job, delta, generation, choices):
                            yield event
                        if choices.ended and not generation.complete:
                            break  # Stop strings ended all choices; closing aborts the call.
                done = finished or _left(generation, job.watch)
                yield _end(job, spec, done, choices, embeddings)
            except InvalidRequest as error:
                name_field(error, job.options)
                raise
            finally:
                logs.note(
                    completion_tokens=choices.num_tokens,
                    finish=[reason for reason in choices.finish_reasons if reason],
                    **job.watch.log_fields(embeddings.outcomes().values()),
                )

    async def read_pictures(
        self,
        prompt: AnyPrompt,
        hold: Callable[[int], None],
        deadline: Deadline,
        watch: Stopwatch,
    ) -> Pictures:
        """The prompt's pictures; ``hold`` counts their bytes. Raises InvalidRequest,
        MediaFetchFailed, PayloadTooLarge, Overloaded, DeadlineExceeded."""
        if not prompt.sources:
            return Pictures()
        self.media.check_count(prompt.sources)
        with watch.stage("fetch"):
            items = await self.media.fetch(prompt.sources, hold, deadline)
        with watch.stage("plan"):
            return Pictures(tuple(items), tuple(await self.media.plan(items)))

    async def render(
        self,
        prompt: AnyPrompt,
        plans: Sequence[Plan],
        watch: Stopwatch,
        contexts: int = 1,
        *,
        locate: bool = False,
    ) -> ExpandedPrompt:
        """The prompt's token ids and spans. ``plans``: one for each picture, in order.
        ``contexts``: the longest prompt accepted, in context lengths; more than 1 if it is
        truncated afterwards. ``locate``: also find where each token begins in the text. Raises
        InvalidRequest, and ContextLengthExceeded for a prompt that no worker could take."""
        with watch.stage("render"):
            renderer, size = self.renderer, prompt.size
            if not isinstance(prompt, ChatPrompt):
                read = functools.partial(read_plain, locate=locate)
                given = prompt, renderer.tokenizer, renderer.layout, contexts, plans
                return await off_loop_above(OFF_LOOP_CHARACTERS, size, read, *given)
            chat = await self._render_chat(prompt, contexts)
            size = len(chat.token_ids)
            return await off_loop_above(OFF_LOOP_TOKENS, size, renderer.build, chat, plans)

    async def _render_chat(self, prompt: ChatPrompt, contexts: int) -> RenderedChat:
        """Raises InvalidRequest, and ContextLengthExceeded."""
        if prompt.chat_template is None:
            return await off_loop_above(
                OFF_LOOP_CHARACTERS, prompt.size, self.renderer.render, prompt, contexts
            )
        if self.request_templates is None:
            raise UnsupportedFeature(
                "chat_template: this server has not been started with --allow-request-template; "
                "leave it out, or render the prompt and send it to /v1/completions",
                param="chat_template",
            )
        return await self.request_templates.render(prompt, contexts)

    # ---- steps

    async def _start(
        self, job: Job
    ) -> tuple[GenerateSpec, RequestEmbeddings, Echo, Thinking | None]:
        """Everything before generation. Returns the generation's request, the embeddings that it
        needs, the part of the prompt that the answer shows, and, for a chat, how the answer
        begins."""
        assert job.prompt is not None
        kind = type(job.prompt)
        with job.watch.stage("check"):
            priority, grammar = await self._check(job, job.prompt, kind is ChatPrompt)
        pictures = await self.read_pictures(
            job.prompt, job.ticket.hold_bytes, job.deadline, job.watch
        )
        pair, items = await self._pair_early(job, pictures)
        contexts = 1 if job.options.truncation is None else MAX_TRUNCATED_CONTEXTS
        prompt = await self.render(
            job.prompt, pictures.plans, job.watch, contexts, locate=job.options.echo
        )
        logs.note(prompt_tokens=len(prompt.token_ids), images=len(pictures.items) or None)
        thinking = self.forms.thinking(job.prompt, prompt.prompt)
        job.drop_prompt()
        if pair is None:
            pair, items = await self._pair(job, pictures)
        job.system_fingerprint = pair.system_fingerprint
        with job.watch.stage("prepare"):
            limits = self._limits(pair)
            prompt = self._truncated(job.options, prompt, limits)
            sampling = await self._sampling(job.options, kind, prompt, limits)
            echo = await self._echo(job.options, prompt)
        spec = GenerateSpec(
            request_id=job.request_id,
            token_ids=prompt.token_ids,
            spans=prompt.spans,
            keys=tuple(item.key for item in items),
            sampling=replace(sampling, grammar=self.forms.after_thinking(grammar.text, thinking)),
            pair_id=pair.pair_id,
            cache_salt=self._cache_salt(job),
            caller=job.caller,
            priority=priority,
        )
        embeddings = RequestEmbeddings(self.encoders, items, job.request_id, job.deadline)
        return spec, embeddings, echo, thinking

    async def _check(self, job: Job, prompt: AnyPrompt, chat: bool) -> tuple[int, AnswerGrammar]:
        """The request's priority, and the grammar of its answer. Raises InvalidRequest."""
        priority = job.caller.priority(job.options.priority)
        check_choices(job.options, self.max_n)
        self.forms.check(job.options.tools, prompt)
        async with job.deadline.timeout():
            grammar = await self.grammars.find(job.options, chat=chat)
        job.not_enforced = grammar.not_enforced
        return priority, grammar

    async def _echo(self, options: GenerationOptions, prompt: ExpandedPrompt) -> Echo:
        """The part of the prompt that the answer shows; a prompt of token ids is shown as text."""
        ids, located = prompt.token_ids, self.vocabulary.located
        shown: tuple[str | None, Sequence[int] | None] = None, None
        if options.echo and prompt.starts is not None:
            shown = prompt.prompt, prompt.starts
        elif options.echo:
            shown = await off_loop_above(OFF_LOOP_CHARACTERS, len(ids), located, ids)
        return Echo(
            self.vocabulary,
            ids,
            *shown,
            as_ids=options.tokens_as_ids,
            show_ids=options.token_ids,
        )

    async def _pair_early(
        self, job: Job, pictures: Pictures
    ) -> tuple[Pair | None, list[Encodable]]:
        """The pair, and the pictures with their content keys under it; (None, []) if there are no
        pictures, or no pair is known yet. Raises Overloaded if the pictures would wait too long for
        an encoder. This check comes before rendering, the gateway's most expensive step, so that no
        request is rendered only to be refused."""
        pair = self.pairing.best(pictures=True) if pictures.items else None
        if pair is None:
            return None, []
        items = await self._name(job, pictures, pair)
        self.encoders.check(items, job.deadline)
        return pair, items

    async def _pair(self, job: Job, pictures: Pictures) -> tuple[Pair, list[Encodable]]:
        """As ``_pair_early``, but waits for a pair. Raises Unavailable, DeadlineExceeded."""
        patches = sum(plan.num_patches for plan in pictures.plans)
        waits = self.encoders.pool.unpaired(patches), self.llms.unpaired(1)
        with job.watch.stage("pair"), waits[0], waits[1]:
            pair = await self.pairing.choose(pictures=bool(pictures.items), deadline=job.deadline)
        return pair, await self._name(job, pictures, pair)

    async def _name(self, job: Job, pictures: Pictures, pair: Pair) -> list[Encodable]:
        """The pictures with their content keys, ready for the pair's encoders."""
        if not pictures.items:
            return []
        salt = self._cache_salt(job)
        with job.watch.stage("name"):
            keys = await self.media.keys(pictures.items, pair.fingerprint, salt)
        return _encodables(pictures, keys, pair, salt, job.caller)

    def _cache_salt(self, job: Job) -> str:
        """The salt of cached prefixes and pictures. Only callers with the same salt share them,
        because usage and timings reveal what is cached."""
        tenant = "" if self.share_cache else job.caller.tenant
        return tenant_salt(tenant, job.options.cache_salt)

    def _limits(self, pair: Pair) -> SamplingLimits:
        return SamplingLimits(
            max_model_len=pair.max_model_len or self.renderer.layout.max_positions,
            max_logprobs=self.max_logprobs,
            vocab_size=pair.vocab_size,
        )

    def _truncated(
        self, options: GenerationOptions, prompt: ExpandedPrompt, limits: SamplingLimits
    ) -> ExpandedPrompt:
        """The part of the prompt that the request keeps. Raises InvalidRequest."""
        kept = prompt_limit(options, limits)
        if kept is None or options.truncation is None or kept >= len(prompt.token_ids):
            return prompt
        return truncated(prompt, kept, first=options.truncation.first)

    async def _sampling(
        self,
        options: GenerationOptions,
        kind: type[AnyPrompt],
        prompt: ExpandedPrompt,
        limits: SamplingLimits,
    ) -> Sampling:
        if kind is TokenPrompt:
            check_token_ids(prompt.token_ids, limits, kind.field)
        resolved = functools.partial(
            resolve_sampling,
            options,
            kind=kind,
            prompt_tokens=len(prompt.token_ids),
            item_tokens=prompt.num_item_tokens,
            defaults=self.defaults,
            limits=limits,
            tokenizer=self.renderer.tokenizer,
        )
        size = options.sampling.sampling_size
        return await off_loop_above(OFF_LOOP_SAMPLING, size, resolved)

    def _take(
        self,
        job: Job,
        delta: PromptPiece | Delta,
        generation: FailoverGeneration,
        choices: Choices,
    ) -> Sequence[TokenIds | OutputEvent | ChoiceEnd]:
        """The events that a delta brings. If they end a choice, no worker continues it after a
        failover."""
        if isinstance(delta, PromptPiece):
            return []
        job.watch.token()
        before = choices.tokens_of(delta.choice)
        made: list[TokenIds | OutputEvent | ChoiceEnd] = [*choices.take(delta)]
        ids = delta.token_ids[: choices.tokens_of(delta.choice) - before]
        if ids and job.options.token_ids:
            made.insert(0, TokenIds(delta.choice, ids))
        if choices.has_ended(delta.choice):
            generation.leave(delta.choice)
        if job.options.running_usage:
            usage = _counted(generation.usage(), choices.num_tokens)
            return [replace(event, usage=usage) for event in made]
        return made


def _end(
    job: Job,
    spec: GenerateSpec,
    done: Done,
    choices: Choices,
    embeddings: RequestEmbeddings,
) -> End:
    """The last event: tokens as the gateway counted them, and the timings of gateway and worker."""
    usage = _counted(done.usage, choices.num_tokens)
    for name, milliseconds in done.timings.stages.items():
        job.watch.add(name, milliseconds)
    metrics.TOKENS.labels("prompt").inc(usage.prompt_tokens)
    metrics.TOKENS.labels("cached").inc(usage.cached_tokens)
    metrics.TOKENS.labels("image").inc(usage.embedding_tokens)
    metrics.TOKENS.labels("completion").inc(usage.completion_tokens)
    outcomes = embeddings.outcomes()
    tokens = [0] * len(spec.keys)  # By picture.
    for span in spec.spans:
        tokens[span.item] += span.num_tokens
    items = [outcomes.get(key) for key in spec.keys]
    timings = job.watch.report(items, tokens, embeddings.bytes_sent)
    timings["preemptions"] = done.timings.preemptions
    return End(usage, timings, choices.num_reasoning_tokens)


def _left(generation: FailoverGeneration, watch: Stopwatch) -> Done:
    """The end of a generation that the gateway itself ended: usage by its own count, and those of
    the worker's timings that had arrived."""
    timings = generation.prefilled or Timings()
    return Done(generation.usage(), replace(timings, decode_ms=watch.decode_ms))


def _counted(usage: Usage, completion_tokens: int) -> Usage:
    """Usage with the gateway's completion count, which excludes tokens after a stop string."""
    return replace(usage, completion_tokens=completion_tokens)


def _encodables(
    pictures: Pictures, keys: Sequence[str], pair: Pair, cache_salt: str, caller: Caller
) -> list[Encodable]:
    plans = pictures.plans
    before = (sum(plan.decode_cost for plan in plans[:number]) for number in range(len(plans)))
    return [
        Encodable(
            key,
            pair.fingerprint,
            plan,
            item.overrides,
            item.data,
            cache_salt=cache_salt,
            param=item.param,
            passes_before=passes,
            share=caller.share,
            weight=caller.weight,
        )
        for key, plan, item, passes in zip(keys, plans, pictures.items, before, strict=True)
    ]
