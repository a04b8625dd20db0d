"""An OpenTelemetry collector in the test's process: keeps the spans that it is sent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc


@dataclass
class CollectedSpan:
    """A span as it came. ``service``: the service.name of its process."""

    name: str
    service: str
    trace_id: str
    span_id: str
    parent_id: str
    began: int
    ended: int
    error: str  # The description of its status, if that is an error.
    attributes: dict[str, Any]
    resource: dict[str, Any]
    children: list[CollectedSpan] = field(default_factory=list)

    def find(self, name: str) -> list[CollectedSpan]:
        """The spans of that name in its tree, in the order of their begins."""
        found = [self] if self.name == name else []
        for child in self.children:
            found += child.find(name)
        return sorted(found, key=lambda each: each.began)

    def size(self) -> int:
        return 1 + sum(child.size() for child in self.children)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.address = ""
        self.spans: list[CollectedSpan] = []

    def Export(self, request: Any, context: Any) -> Any:
        for of_resource in request.resource_spans:
            resource = _values(of_resource.resource.attributes)
            for scope in of_resource.scope_spans:
                self.spans += [_read(span, resource) for span in scope.spans]
        return pb.ExportTraceServiceResponse()

    def roots(self, trace_id: str) -> list[CollectedSpan]:
        """The trees of a trace: spans whose parent was not sent here."""
        spans = {span.span_id: span for span in list(self.spans) if span.trace_id == trace_id}
        for span in spans.values():
            span.children = []
        for span in spans.values():
            if span.parent_id in spans:
                spans[span.parent_id].children.append(span)
        return [span for span in spans.values() if span.parent_id not in spans]


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """A collector at ``address``, a URL."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.address = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()


def _read(span: Any, resource: dict[str, Any]) -> CollectedSpan:
    return CollectedSpan(
        name=span.name,
        service=resource["service.name"],
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        began=span.start_time_unix_nano,
        ended=span.end_time_unix_nano,
        error=span.status.message if span.status.code == 2 else "",
        attributes={
            name.removeprefix("opticnerve."): value
            for name, value in _values(span.attributes).items()
        },
        resource=resource,
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
