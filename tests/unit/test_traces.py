"""Spans of one process: parents, errors, a collector that fails, no cost while tracing is off."""

import logging
import subprocess
import sys

import pytest

from opticnerve import extras
from opticnerve.errors import ConfigError, Overloaded
from opticnerve.telemetry import logs, traces
from tests.collector import collecting
from tests.system import free_port, wait_for

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GIVEN = ("traceparent", f"00-{TRACE}-{PARENT}-01")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in (*traces.ENDPOINTS, *traces.PROTOCOLS, "OTEL_TRACES_SAMPLER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")


@pytest.fixture
def collector():
    with collecting() as running, traces.exported("gateway", running.address, "i-1"):
        yield running


def only(collector):
    """The one span that was sent."""
    (span,) = wait_for("a span", lambda: list(collector.spans))
    return span


def test_a_caller_s_trace_is_gone_on_with_and_carried_further(collector):
    with traces.serving("GET /x", [("host", "h"), GIVEN, ("tracestate", "a=1")]) as span:
        carried = dict(span.carrier)
        assert logs._trace_ids() == {"trace_id": TRACE, "span_id": carried["traceparent"][36:52]}
    assert carried["traceparent"].startswith(f"00-{TRACE}-") and carried["tracestate"] == "a=1"
    assert (only(collector).trace_id, only(collector).parent_id) == (TRACE, PARENT)


@pytest.mark.parametrize(
    "carried",
    [
        [],
        [("traceparent", "00-" + "0" * 32 + "-b7ad6b7169203331-01")],
        [("traceparent", "x" * 5000)],
        [("traceparent", b"\xff\xfe")],
        [GIVEN, GIVEN],
        [("tracestate", "a=1")],
    ],
)
def test_a_wrong_context_is_ignored(collector, carried):
    with traces.serving("GET /x", carried):
        pass
    span = only(collector)
    assert span.parent_id == "" and span.trace_id not in ("", "0" * 32, TRACE)


@pytest.mark.parametrize(
    "state", ["a secret, b", ",".join(f"k{i}=v" for i in range(40)), f"a={'v' * 250},b={'v' * 260}"]
)
def test_a_tracestate_that_is_wrong_or_long_goes_no_further(collector, caplog, state):
    """Calls to workers fail with metadata of 8 KiB."""
    with traces.serving("GET /x", [GIVEN, ("tracestate", state)]) as span:
        assert dict(span.carrier).keys() == {"traceparent"}
    assert only(collector).trace_id == TRACE and not caplog.records


def test_what_the_caller_does_not_sample_is_not_sent_and_carried_as_such(collector):
    with traces.serving("GET /x", [("traceparent", f"00-{TRACE}-{PARENT}-00")]) as span:
        assert dict(span.carrier)["traceparent"].endswith("-00")
    with traces.serving("GET /y", []):
        pass
    assert only(collector).name == "GET /y"


def test_spans_have_times_attributes_and_the_codes_of_errors(collector):
    with traces.serving("call", []):
        with pytest.raises(Overloaded), traces.span("stage", patches=4, tier=None):
            raise Overloaded("full", logged="no room")
        traces.record("earlier", 5.0, 5.25, batch_items=2)
    wait_for("three spans", lambda: len(collector.spans) == 3)
    (root,) = collector.roots(collector.spans[0].trace_id)
    stage, earlier = sorted(root.children, key=lambda span: span.name, reverse=True)
    assert stage.attributes == {"patches": 4, "error.type": "overloaded"}
    assert stage.error == "no room" and not root.error
    assert earlier.ended - earlier.began == 250_000_000
    assert root.resource["service.name"] == "opticnerve-gateway"
    assert root.resource["service.instance.id"] == "i-1"


def test_stages_outside_of_a_request_and_parts_of_untraced_ones_are_no_traces(collector):
    with traces.span("stage") as stage, traces.serving("Fetch", [], alone=False) as part:
        traces.record("earlier", 1.0, 2.0)
        assert stage is part is traces.NO_SPAN and not stage.carrier
    with traces.serving("call", []):
        pass
    assert only(collector).name == "call"


def test_a_collector_that_fails_is_told_once(caplog):
    caplog.set_level(logging.INFO)
    exporter = traces._Exporter(Failing(3))
    for _ in range(5):
        exporter.export([])
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and "cannot be exported" in told[0] and "again" in told[1]


def test_spans_that_the_full_queue_drops_are_told(monkeypatch, caplog):
    for name in ("MAX_QUEUE_SIZE", "MAX_EXPORT_BATCH_SIZE"):
        monkeypatch.setenv(f"OTEL_BSP_{name}", "4")
    monkeypatch.setattr(traces, "CLOSE_S", 0.1)
    with traces.exported("gateway", f"http://127.0.0.1:{free_port()}", "i-1"):
        for _ in range(50):
            with traces.serving("call", []):
                pass
    assert any("dropping" in each for each in caplog.messages)


class Failing:
    """An exporter whose first exports fail."""

    def __init__(self, number):
        self.number = number

    def export(self, spans):
        from opentelemetry.sdk.trace.export import SpanExportResult

        self.number -= 1
        if self.number == 1:
            raise ValueError
        return SpanExportResult.FAILURE if self.number >= 0 else SpanExportResult.SUCCESS


def test_it_is_asked_for_by_flag_or_standard_variable(monkeypatch):
    assert not traces.is_wanted(None) and traces.is_wanted("http://x")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://y")
    assert traces.is_wanted(None)
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert not traces.is_wanted("http://x")


def test_what_it_lacks_is_a_configuration_error(monkeypatch):
    with pytest.raises(ConfigError, match="otlp-endpoint is the URL"):
        traces.exported("llm", "localhost:4317", "i").__enter__()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    with pytest.raises(ConfigError, match="http/protobuf"):
        traces.exported("llm", "http://127.0.0.1:4317", "i").__enter__()
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'opticnerve\[otel\]'") as caught:
        traces.exported("llm", "http://127.0.0.1:4317", "i").__enter__()
    assert caught.value.param == "otlp_endpoint"


OFF = """
import sys
from opticnerve.rpc import calls
from opticnerve.telemetry import logs, traces
with traces.exported("llm", None, "i"), traces.serving("call", [("traceparent", "y")]) as span:
    with traces.span("stage", patches=1):
        traces.record("x", 1.0, 2.0)
    assert not span.carrier and span.ids is None
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""


@pytest.mark.process
def test_while_it_is_off_nothing_of_it_is_imported():
    done = subprocess.run([sys.executable, "-c", OFF], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_records_without_a_span_have_no_ids():
    record = logging.LogRecord("x", logging.INFO, "", 0, "hello", None, None)
    assert "trace_id" not in logs.Formatter("json").format(record)
