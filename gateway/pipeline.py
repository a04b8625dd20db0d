"""One chat request's life: fetch, plan, render, name, encode and generate, and out comes text.

Knows neither HTTP nor the wire. Everything that a request holds is freed when its generator is
closed, at whatever stage that happens.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gateway import metrics
from gateway.api.schemas.chat import ChatRequest, TemplateFields
from gateway.api.schemas.messages import ImageSource, Message
from gateway.edge.admission import Ticket
from gateway.edge.auth import Caller
from gateway.edge.deadline import Deadline
from gateway.edge.lanes import LONG_BYTES, off_loop
from gateway.media.reader import Fetched, MediaReader
from gateway.output.choices import Choices, TextDelta
from gateway.output.detokenizer import Vocabulary
from gateway.prompt.placeholders import Prompt
from gateway.prompt.renderer import ChatRenderer, RenderedChat
from gateway.sampling import Defaults, SamplingLimits, check_choices, resolve_sampling
from gateway.timings import Stopwatch
from gateway.workers.encode import Encodable, Encoders
from gateway.workers.generate import FailoverGeneration, GenerateSpec
from gateway.workers.pairing import Pair, Pairing
from gateway.workers.pool import WorkerPool
from gateway.workers.request_embeddings import RequestEmbeddings
from opticnerve.generation.values import Done, Sampling, Usage
from opticnerve.media.keys import tenant_salt
from opticnerve.media.plan import Plan
from opticnerve.telemetry import events

OFF_LOOP_CHARACTERS = 8_000  # Longer chats are rendered and tokenized in a thread.
OFF_LOOP_TOKENS = 20_000  # Likewise prompts whose pictures are put in.
OFF_LOOP_SAMPLING = 2_000  # Likewise what a request says of sampling: characters and entries.
PIECE_CHARACTERS = 200  # What a message or a part costs besides its text, in characters of text.


@dataclass(frozen=True, slots=True)
class Ended:
    """The last step: usage, and timings for who asked."""

    usage: Usage
    timings: dict[str, Any]


Step = TextDelta | Ended


@dataclass
class Call:
    """One request on its way. ``request`` loses its messages once they are a prompt."""

    request: ChatRequest
    request_id: str
    caller: Caller
    deadline: Deadline
    ticket: Ticket
    body_bytes: int = 0  # That the ticket holds for the messages.
    watch: Stopwatch = field(default_factory=Stopwatch)
    system_fingerprint: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A request's prompt and pictures, before any worker is involved."""

    prompt: Prompt
    items: tuple[Fetched, ...]
    plans: tuple[Plan, ...]


@dataclass(frozen=True)
class Pipeline:
    """What every request uses; one a gateway."""

    renderer: ChatRenderer
    vocabulary: Vocabulary
    media: MediaReader
    pairing: Pairing
    encoders: Encoders
    llms: WorkerPool
    defaults: Defaults
    max_logprobs: int
    max_n: int
    worker_wait_s: float
    share_cache: bool = False  # See --share-cache.

    async def prepare(
        self,
        request: TemplateFields,
        hold: Callable[[int], None],
        deadline: Deadline,
        watch: Stopwatch,
    ) -> Prepared:
        """The prompt that a chat becomes. Raises InvalidRequest and its kin."""
        with watch.stage("render"):
            rendered, sources = await self._render(request)
        with watch.stage("fetch"):
            items = await self.media.fetch(sources, hold, deadline)
        with watch.stage("plan"):
            plans = await self.media.plan(items)
            build = functools.partial(self.renderer.build, rendered, plans)
            size = len(rendered.token_ids)
            prompt = await off_loop(size, build) if size > OFF_LOOP_TOKENS else build()
        return Prepared(prompt, tuple(items), tuple(plans))

    async def chat(self, call: Call) -> AsyncGenerator[Step, None]:
        """Runs a chat to its end: text as it comes, then Ended. Raises typed errors."""
        priority = call.caller.priority(call.request.priority)
        check_choices(call.request, self.max_n)
        prepared = await self.prepare(call.request, call.ticket.hold, call.deadline, call.watch)
        events.note(
            prompt_tokens=len(prepared.prompt.token_ids), images=len(prepared.items) or None
        )
        call.request = _without_messages(call.request)
        call.ticket.drop(call.body_bytes)
        with call.watch.stage("pair"):
            pair = await self.pairing.choose(pictures=bool(prepared.items), deadline=call.deadline)
        call.system_fingerprint = pair.system_fingerprint
        sampling = await self._sampling(call.request, prepared.prompt, pair)
        salt = self._cache_salt(call)
        with call.watch.stage("name"):
            keys = await self.media.keys(prepared.items, pair.fingerprint, salt)
        embeddings = RequestEmbeddings.begin(
            self.encoders,
            _encodables(prepared, keys, pair, salt, call.caller),
            call.request_id,
            call.deadline,
        )
        spec = GenerateSpec(
            request_id=call.request_id,
            token_ids=prepared.prompt.token_ids,
            spans=prepared.prompt.spans,
            keys=tuple(keys),
            sampling=sampling,
            pair_id=pair.pair_id,
            cache_salt=salt,
            caller=call.caller,
            priority=priority,
        )
        async with embeddings:
            if embeddings.encoding:
                call.ticket.enter_with_pictures()
            generation = FailoverGeneration(
                spec, self.llms, embeddings, call.deadline, self.worker_wait_s
            )
            async with contextlib.aclosing(self._told(call, generation, embeddings)) as steps:
                async for step in steps:
                    if isinstance(step, TextDelta):
                        yield step
                        continue
                    yield Ended(step.usage, _timings(call, step, embeddings, keys))

    async def _told(
        self, call: Call, generation: FailoverGeneration, embeddings: RequestEmbeddings
    ) -> AsyncGenerator[TextDelta | Done, None]:
        """What ``_write`` yields; however it ends, the request's line in the log says how far."""
        choices = Choices(call.request, self.vocabulary)
        try:
            async with contextlib.aclosing(self._write(call, generation, choices)) as steps:
                async for step in steps:
                    yield step
        finally:
            events.note(
                completion_tokens=choices.num_tokens,
                finish=[reason for reason in choices.finish_reasons if reason],
                **call.watch.told(embeddings.outcomes().values()),
            )

    async def _write(
        self, call: Call, generation: FailoverGeneration, choices: Choices
    ) -> AsyncGenerator[TextDelta | Done, None]:
        """Text deltas, then Done; a generation whose choices have all ended is left."""
        finished: Done | None = None
        async with contextlib.aclosing(generation.events()) as deltas:
            async for event in deltas:
                if isinstance(event, Done):
                    finished = event
                    break
                call.watch.token()
                delta = choices.take(event)
                if choices.has_ended(event.choice):
                    generation.leave(event.choice)
                if delta is not None and call.request.running_usage:
                    delta = replace(delta, usage=_counted(generation.usage(), choices))
                if delta is not None:
                    yield delta
                if choices.ended and not generation.complete:
                    break  # By stop strings: nothing more is wanted of the worker.
        yield self._account(call, generation, choices, finished)

    def _account(
        self, call: Call, generation: FailoverGeneration, choices: Choices, finished: Done | None
    ) -> Done:
        """Usage by our own count of tokens, with what the worker told where it came to its end."""
        told = finished or Done(generation.usage())
        usage = _counted(told.usage, choices)
        for name, milliseconds in told.timings.stages.items():
            call.watch.add(name, milliseconds)
        call.watch.observe()
        for kind, count in (
            ("prompt", usage.prompt_tokens),
            ("cached", usage.cached_tokens),
            ("image", usage.embedding_tokens),
            ("completion", usage.completion_tokens),
        ):
            metrics.TOKENS.labels(kind).inc(count)
        return Done(usage, told.timings)

    # ---- steps

    async def _render(self, request: TemplateFields) -> tuple[RenderedChat, Sequence[ImageSource]]:
        def render() -> tuple[RenderedChat, Sequence[ImageSource]]:
            self.media.check_count(request.images)
            return self.renderer.render(request), request.images

        size = _characters(request)
        return await off_loop(size, render) if size > OFF_LOOP_CHARACTERS else render()

    def _cache_salt(self, call: Call) -> str:
        """What callers share whose requests may tell them of each other's, by usage, timings or
        time: prefixes and pictures alike."""
        tenant = "" if self.share_cache else call.caller.tenant
        return tenant_salt(tenant, call.request.cache_salt or "")

    async def _sampling(self, request: ChatRequest, prompt: Prompt, pair: Pair) -> Sampling:
        limits = SamplingLimits(
            max_model_len=pair.max_model_len or self.renderer.layout.max_positions,
            max_logprobs=self.max_logprobs,
            vocab_size=pair.vocab_size,
        )
        resolved = functools.partial(
            resolve_sampling,
            request,
            prompt_tokens=len(prompt.token_ids),
            image_tokens=prompt.num_image_tokens,
            defaults=self.defaults,
            limits=limits,
            tokenizer=self.renderer.tokenizer,
        )
        size = request.sampling_size
        return await off_loop(size, resolved) if size > OFF_LOOP_SAMPLING else resolved()


def _timings(
    call: Call, finished: Done, embeddings: RequestEmbeddings, keys: Sequence[str]
) -> dict[str, Any]:
    had = embeddings.outcomes()
    timings = call.watch.report([had.get(key) for key in keys], embeddings.bytes_sent)
    timings["preemptions"] = finished.timings.preemptions
    return timings


def _counted(usage: Usage, choices: Choices) -> Usage:
    """With the tokens that count: those of a stop string's delta that follow it do not."""
    return replace(usage, completion_tokens=choices.num_tokens)


def _encodables(
    prepared: Prepared, keys: Sequence[str], pair: Pair, cache_salt: str, caller: Caller
) -> list[Encodable]:
    plans = prepared.plans
    before = (sum(plan.passes for plan in plans[:number]) for number in range(len(plans)))
    return [
        Encodable(
            key,
            pair.fingerprint,
            plan,
            item.overrides,
            item.data,
            item.param,
            cache_salt=cache_salt,
            passes_before=passes,
            share=caller.share,
            weight=caller.weight,
        )
        for key, plan, item, passes in zip(keys, plans, prepared.items, before, strict=True)
    ]


def _characters(request: TemplateFields) -> int:
    """What there is to render, in characters of text; of much, no more than that it is much."""
    total = len(str(request.chat_template_kwargs)) if request.chat_template_kwargs else 0
    for message in request.messages:
        total += _of_message(message)
        if total > LONG_BYTES:
            break
    return total


def _of_message(message: Message) -> int:
    content, total = message.content, PIECE_CHARACTERS
    for name in ("name", "tool_call_id", "refusal", "reasoning_content", "reasoning"):
        total += len(getattr(message, name) or "")
    if isinstance(content, str):
        total += len(content)
    for part in content if isinstance(content, list) else ():
        said = vars(part)  # A part that is a picture has neither.
        total += PIECE_CHARACTERS + len(said.get("text") or said.get("refusal") or "")
    for call in message.tool_calls or ():
        arguments = call.function.arguments
        total += OFF_LOOP_CHARACTERS  # Its arguments are parsed, and may be objects of any depth.
        total += len(arguments) if isinstance(arguments, str) else 0
        total += len(call.id or "") + len(call.function.name)
    return total


def _without_messages(request: ChatRequest) -> ChatRequest:
    """The request without its messages: the base64 in them may be most of what it holds."""
    fields = {name: getattr(request, name) for name in request.model_fields_set - {"messages"}}
    return ChatRequest.model_construct(_fields_set=set(fields), messages=[], **fields)
