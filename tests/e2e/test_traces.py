"""Traces of real requests: one tree each, from three services, read from a collector."""

import json
import os
import secrets
import signal

import pytest

import opticnerve
from tests.collector import collecting
from tests.e2e.conftest import user
from tests.e2e.processes import picture, stopped_at_work
from tests.system import wait_for

CHAT = "/v1/chat/completions"
SERVICES = {"opticnerve-gateway", "opticnerve-encoder", "opticnerve-llm"}
ENCODER_STAGES = ("encoder_queue", "preprocess", "encode", "put")


@pytest.fixture(scope="module")
def collector():
    with collecting() as running:
        yield running


@pytest.fixture(scope="module")
def traced(collector):
    """Two LLM workers, whose spans are exported."""
    os.environ["OTEL_BSP_SCHEDULE_DELAY"] = "100"  # Milliseconds.
    try:
        with opticnerve.serve(
            dtype="float32", llms=2, threads=1, log_format="json", otlp_endpoint=collector.address
        ) as stack:
            yield stack
    finally:
        del os.environ["OTEL_BSP_SCHEDULE_DELAY"]


def send(stack, *urls, text="What is this?", parent=None, **fields):
    """Asks within a trace of ours. (the trace's id, the answer)"""
    trace_id = secrets.token_hex(16)
    headers = {"traceparent": parent or f"00-{trace_id}-{secrets.token_hex(8)}-01"}
    body = {"model": "model", "messages": [user(text, *urls)], "max_tokens": 4, **fields}
    headers["x-request-id"] = f"r-{trace_id}"
    return trace_id, stack._http.post(CHAT, json=body, headers=headers)


def tree(collector, trace_id):
    """The trace's root, once all is there: a process sends what contains others last. A worker that
    was killed may have sent stages of a call whose span it did not send."""

    def whole():
        roots = collector.roots(trace_id)
        found = [root for root in roots if root.service == "opticnerve-gateway"]
        if len(found) != 1:
            return None
        calls = [*found[0].find("Encode"), *found[0].find("Generate")]
        sent = [call for call in calls if call.service == "opticnerve-gateway"]
        return found if all(call.children or call.error for call in sent) else None

    (root,) = wait_for("the trace", whole)
    return root


def test_a_request_is_one_tree_of_three_services(collector, traced):
    trace_id, answer = send(traced, picture(41), timings=True, ignore_eos=True)
    assert answer.status_code == 200
    root = tree(collector, trace_id)
    assert collector.roots(trace_id) == [root]
    assert root.name == f"POST {CHAT}" and root.service == "opticnerve-gateway"
    assert root.attributes["http.response.status_code"] == 200
    assert {span.service for span in collector.spans} == SERVICES
    gateway = {child.name for child in root.children}
    assert gateway >= {
        "read",
        "check",
        "fetch",
        "plan",
        "name",
        "render",
        "prepare",
        "picture",
        "worker_wait",
    }
    (shown,) = root.find("picture")
    (call,), (encoded,) = [shown.find("Encode")[:1], shown.find("Encode")[1:]]
    assert shown.attributes["cached"] == "no" and shown.attributes["patches"] > 0
    assert call.attributes["retry"] == 0 and ":" in call.attributes["worker"]
    assert (call.service, encoded.service) == ("opticnerve-gateway", "opticnerve-encoder")
    assert (encoded.attributes["tier"], encoded.attributes["cache"]) == ("shm", "miss")
    assert {span.name for span in encoded.children} == set(ENCODER_STAGES)
    (tower,) = encoded.find("encode")
    assert tower.attributes["batch_items"] == 1
    assert tower.attributes["batch_patches"] == shown.attributes["patches"]
    asked, generated = root.find("Generate")
    assert asked.attributes["retry"] == 0 and generated.parent_id == asked.span_id
    assert generated.service == "opticnerve-llm"
    assert generated.attributes["request_id"] == root.attributes["request_id"]
    stages = {span.name for span in generated.children}
    assert stages == {"queue", "get", "prefill", "decode"}
    (prefill,), (decode,) = generated.find("prefill"), generated.find("decode")
    assert prefill.attributes["tokens"] > 0 and decode.attributes["tokens"] == 4
    assert generated.find("get")[-1].attributes["cache"] == "hit"
    for parent in (root, call, encoded, asked, generated):
        assert all(parent.began <= child.began for child in parent.children)
    assert root.resource["service.version"] == opticnerve.__version__
    assert root.resource["service.instance.id"] != generated.resource["service.instance.id"]


def test_a_stage_takes_as_long_as_the_timings_say(collector, traced):
    trace_id, answer = send(traced, picture(42), timings=True)
    timings = answer.json()["timings"]
    root = tree(collector, trace_id)
    for stage in (*ENCODER_STAGES, "queue", "prefill", "decode"):
        spent = sum(span.ended - span.began for span in root.find(stage)) / 1e6
        assert spent == pytest.approx(timings[f"{stage}_ms"], abs=0.1), stage


def test_a_picture_that_was_seen_before_is_a_hit(collector, traced):
    url = picture(43)
    send(traced, url)
    trace_id, _ = send(traced, url)
    root = tree(collector, trace_id)
    (shown,) = root.find("picture")
    assert shown.attributes["cached"] == "ref" and not shown.children
    assert not root.find("Encode")
    assert root.find("prefill")[0].attributes["cache"] in ("hit", "miss")


def test_an_error_has_its_code(collector, traced):
    trace_id, answer = send(traced, max_tokens=100_000)
    assert answer.status_code == 400
    root = tree(collector, trace_id)
    assert root.attributes["error.type"] == "context_length_exceeded" and root.error
    assert root.attributes["http.response.status_code"] == 400


def test_a_wrong_parent_is_ignored(collector, traced):
    before = len(collector.spans)
    _, answer = send(traced, parent="00-" + "0" * 32 + "-x-01")
    assert answer.status_code == 200
    wait_for("a trace of its own", lambda: len(collector.spans) > before + 5)
    assert all(len(span.trace_id) == 32 and int(span.trace_id, 16) for span in collector.spans)


def test_the_last_line_of_each_process_has_the_trace(collector, traced):
    trace_id, _ = send(traced, picture(44))
    root = tree(collector, trace_id)

    def lines():
        text = traced.log()
        told = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        found = {line["process"]: line for line in told if line.get("trace_id") == trace_id}
        return found if len(found) == 3 else None

    found = wait_for("the lines", lines)
    servers = {"gateway": root, "encoder": root.find("Encode")[1]}
    for process, span in servers.items():
        assert found[process]["span_id"] == span.span_id
        assert found[process]["request_id"] == f"r-{trace_id}"


def test_a_failover_shows_both_workers(collector, traced):
    trace_id = secrets.token_hex(16)
    body = {
        "model": "model", "messages": [user("Count to 20.")], "max_tokens": 240,
        "ignore_eos": True, "stream": True,
    }  # fmt: skip
    headers = {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}
    killed = None
    with traced._http.stream("POST", CHAT, json=body, headers=headers) as answer:
        for number, _ in enumerate(answer.iter_lines()):
            if number >= 10 and killed is None:
                killed = stopped_at_work(traced, "llm_service")
                if killed is not None:
                    os.kill(killed, signal.SIGKILL)
    assert killed is not None
    root = tree(collector, trace_id)
    lost, again, generated = root.find("Generate")
    assert lost.attributes["error.type"] == "unavailable" and lost.attributes["retry"] == 0
    assert again.attributes["retry"] == 1 and generated.parent_id == again.span_id
    assert again.attributes["worker"] != lost.attributes["worker"]
    assert not root.error
