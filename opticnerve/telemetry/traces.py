"""OpenTelemetry traces: one trace a request, through the gateway, encoders and LLM workers.

Off unless ``--otlp-endpoint`` or the standard ``OTEL_EXPORTER_OTLP_ENDPOINT`` is set; until then
nothing of OpenTelemetry is imported and every function here does nothing. The SDK reads its other
standard variables, such as ``OTEL_TRACES_SAMPLER`` and ``OTEL_RESOURCE_ATTRIBUTES``.

The trace context is passed as W3C ``traceparent`` and ``tracestate``, in headers of HTTP requests
and metadata of gRPC calls; what does not parse is ignored. The current span belongs to the task,
and to the tasks that it starts. Times are in seconds of ``time.monotonic()``. Exports run on a
thread of their own, and their failures never affect a request.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

import opticnerve
from opticnerve.errors import ConfigError, OpticNerveError, StartupError
from opticnerve.extras import require_extra

if TYPE_CHECKING:
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

Carrier = tuple[tuple[str, str], ...]
"""Headers or metadata that carry the trace context to another process."""

HEADERS = ("traceparent", "tracestate")
ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
CLOSE_S = 3.0  # Time to send the last spans when the process ends.
MAX_STATE = 512  # Most characters of a tracestate, which is passed on to workers.
MAX_DESCRIPTION = 160  # Most characters of an error's description.
PREFIX = "opticnerve."  # Begins the names of our own attributes.

log = logging.getLogger(__name__)

_tracer: trace.Tracer | None = None  # None: tracing is off.
_epoch_ns = 0  # The zero of time.monotonic_ns(), in nanoseconds since 1970.


class TraceSpan:
    """One operation. While tracing is off, ``inner`` is None and all methods do nothing."""

    def __init__(self, inner: trace.Span | None = None) -> None:
        self._inner = inner

    def set(self, standard: Mapping[str, Any] | None = None, **attributes: Any) -> None:
        """Sets our own attributes, and ``standard`` ones, whose names are in OpenTelemetry's
        conventions. None values are left out."""
        if self._inner is not None:
            named = {PREFIX + name: value for name, value in attributes.items()}
            for name, value in {**(standard or {}), **named}.items():
                if value is not None:
                    self._inner.set_attribute(name, value)

    def rename(self, name: str) -> None:
        if self._inner is not None:
            self._inner.update_name(name)

    def fail(self, error: BaseException) -> None:
        """Marks the operation as failed, with the error's code."""
        if self._inner is not None:
            from opentelemetry.trace import Status, StatusCode

            code = description = type(error).__name__
            if isinstance(error, OpticNerveError):
                code, description = error.code or error.type, error.logged
            self._inner.set_attribute("error.type", code)
            self._inner.set_status(Status(StatusCode.ERROR, description[:MAX_DESCRIPTION]))

    def end(self, ended: float | None = None) -> None:
        """``ended``: None: now."""
        if self._inner is not None:
            self._inner.end(_ns(ended))

    @property
    def carrier(self) -> Carrier:
        """The context to send to a process that does a part of the operation."""
        context = self.context
        if context is None:
            return ()
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carried: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carried, context)
        return tuple(carried.items())

    @property
    def context(self) -> Context | None:
        if self._inner is None:
            return None
        from opentelemetry.context import Context
        from opentelemetry.trace import set_span_in_context

        return set_span_in_context(self._inner, Context())

    @property
    def ids(self) -> tuple[str, str] | None:
        """(trace id, span id) in hex, as in logs."""
        if self._inner is None:
            return None
        found = self._inner.get_span_context()
        return f"{found.trace_id:032x}", f"{found.span_id:016x}"


NO_SPAN = TraceSpan()
_current: ContextVar[TraceSpan] = ContextVar("span", default=NO_SPAN)


# ---- spans


def current() -> TraceSpan:
    return _current.get()


def begin(
    name: str, *, calls: bool = False, began: float | None = None, **attributes: Any
) -> TraceSpan:
    """Begins a child of the current span, which the caller ends. It does not become the current
    span. ``calls``: it is a call to another process."""
    parent = _current.get()
    if _tracer is None or parent.context is None:
        return NO_SPAN
    from opentelemetry.trace import SpanKind

    kind = SpanKind.CLIENT if calls else SpanKind.INTERNAL
    span = TraceSpan(_tracer.start_span(name, parent.context, kind, start_time=_ns(began)))
    span.set(**attributes)
    return span


def record(name: str, began: float, ended: float, **attributes: Any) -> None:
    """Records a child of the current span for work that has ended already."""
    if _tracer is not None:
        begin(name, began=began, **attributes).end(ended)


@contextlib.contextmanager
def span(name: str, *, calls: bool = False, **attributes: Any) -> Iterator[TraceSpan]:
    """Makes a span for the context's body, as the current span. An exception marks it as failed."""
    with _entered(begin(name, calls=calls, **attributes)) as entered:
        yield entered


@contextlib.contextmanager
def serving(
    name: str, carried: Iterable[tuple[str, str | bytes]], *, alone: bool = True
) -> Iterator[TraceSpan]:
    """Makes a span for serving another process's request, as the current span: part of the trace in
    the ``carried`` headers or metadata, or else the root of a new one. The caller marks it as
    failed. ``alone``: False: make no root; without a trace there is no span."""
    if _tracer is None:
        yield NO_SPAN
        return
    from opentelemetry.trace import SpanKind

    parent = _extract(carried)
    if parent is None and not alone:
        yield NO_SPAN
        return
    from opentelemetry.context import Context

    inner = _tracer.start_span(name, parent or Context(), SpanKind.SERVER, start_time=_ns(None))
    with _entered(TraceSpan(inner)) as entered:
        yield entered


@contextlib.contextmanager
def _entered(entered: TraceSpan) -> Iterator[TraceSpan]:
    if entered is NO_SPAN:
        yield entered
        return
    token = _current.set(entered)
    try:
        yield entered
    except Exception as error:
        entered.fail(error)
        raise
    finally:
        _current.reset(token)
        entered.end()


def _extract(carried: Iterable[tuple[str, str | bytes]]) -> Context | None:
    """The trace context in headers or metadata; None if it is missing, repeated or invalid. A long
    tracestate is dropped, as the specification allows."""
    from opentelemetry.context import Context
    from opentelemetry.trace import get_current_span
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    found: dict[str, list[str]] = {}
    for name, value in carried:
        if name in HEADERS:
            text = value if isinstance(value, str) else value.decode("latin-1")
            found.setdefault(name, []).append(text)
    if len(found.get("traceparent", ())) != 1:
        return None
    if sum(map(len, found.get("tracestate", ()))) > MAX_STATE:
        del found["tracestate"]
    context = TraceContextTextMapPropagator().extract(found, Context())
    return context if get_current_span(context).get_span_context().is_valid else None


def _ns(at: float | None) -> int:
    """The time ``at``, or now, in nanoseconds since 1970."""
    return _epoch_ns + (time.monotonic_ns() if at is None else int(at * 1e9))


# ---- a process


def is_wanted(endpoint: str | None) -> bool:
    """Whether this process should export traces. ``endpoint``: the value of ``--otlp-endpoint``."""
    if os.environ.get("OTEL_TRACES_EXPORTER", "otlp") == "none":
        return False
    return bool(endpoint or any(os.environ.get(name) for name in ENDPOINTS))


@contextlib.contextmanager
def exported(service: str, endpoint: str | None, instance_id: str) -> Iterator[None]:
    """Exports this process's spans while the context lasts, if configured. With several services in
    one process, all spans get the first one's name.

    Raises ConfigError if the packages are not installed, or the endpoint is wrong.
    """
    global _tracer, _epoch_ns
    if _tracer is not None or not is_wanted(endpoint):
        yield
        return
    provider = _provider(service, endpoint, instance_id)
    _epoch_ns = time.time_ns() - time.monotonic_ns()
    _tracer = provider.get_tracer("opticnerve", opticnerve.__version__)
    try:
        yield
    finally:
        _tracer = None
        # A collector that does not answer must not delay the process's exit: the thread is
        # abandoned.
        closing = threading.Thread(target=provider.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(CLOSE_S)


def _provider(service: str, endpoint: str | None, instance_id: str) -> TracerProvider:
    try:
        require_extra("otel", "tracing (--otlp-endpoint, OTEL_EXPORTER_OTLP_ENDPOINT)")
    except StartupError as error:
        raise ConfigError(error.message, param="otlp_endpoint") from error
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # ``_Exporter`` logs failures once. The API's own logs would quote tracestates that clients
    # send. The SDK's queue still logs, at most once a minute, that it is full and drops spans.
    for library in ("opentelemetry.exporter", "opentelemetry.sdk.trace", "opentelemetry.trace"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    resource = Resource.create(
        {
            "service.name": os.environ.get("OTEL_SERVICE_NAME") or f"opticnerve-{service}",
            "service.version": opticnerve.__version__,
            "service.instance.id": instance_id,
        }
    )
    exporter = cast("SpanExporter", _Exporter(_exporter(endpoint)))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _exporter(endpoint: str | None) -> SpanExporter:
    """Sends over gRPC, or HTTP if the standard variables say so. Raises ConfigError."""
    protocol = next(filter(None, map(os.environ.get, PROTOCOLS)), "grpc")
    if protocol not in ("grpc", "http/protobuf"):
        raise ConfigError(f"{PROTOCOLS[1]} is grpc or http/protobuf", param="otlp_endpoint")
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        raise ConfigError(
            "--otlp-endpoint is the URL of an OpenTelemetry collector, such as "
            "http://127.0.0.1:4317",
            param="otlp_endpoint",
        )
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(endpoint)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
        OTLPSpanExporter as HttpExporter,
    )

    return HttpExporter(endpoint and f"{endpoint.rstrip('/')}/v1/traces")


class _Exporter:
    """Exports with ``inner``. Logs when a series of failures begins and ends, whereas the SDK would
    log each."""

    def __init__(self, inner: SpanExporter) -> None:
        self._inner = inner
        self._failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        from opentelemetry.sdk.trace.export import SpanExportResult

        try:
            result = self._inner.export(spans)
        except Exception:  # Otherwise the SDK would log it.
            result = SpanExportResult.FAILURE
        failing = result is SpanExportResult.FAILURE
        if failing and not self._failing:
            log.warning(
                "traces cannot be exported: the collector of --otlp-endpoint does not take them; "
                "requests are served as before"
            )
        elif self._failing and not failing:
            log.info("traces are exported again")
        self._failing = failing
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._inner.force_flush(timeout_millis)
