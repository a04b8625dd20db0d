"""Readiness, metrics, clients that leave, and the end."""

import asyncio
import contextlib
import json
import logging
import socket
import threading

import pytest

from gateway import service
from gateway.api import routing as call
from opticnerve.config import TelemetryConfig
from opticnerve.embeddings.store import StoreState
from opticnerve.pb import embedding_pb2
from tests.fakes import until
from tests.gateways import DEADLINES_S, body, data_url, ids, stack, user

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop"), pytest.mark.slow]


async def turn(s, fake, pool, serving):
    """A worker begins or ends to serve, and the gateway has seen it."""
    await fake.set_serving(serving)
    pool.workers[0].wake.set()
    await until(lambda: bool(pool.serving()) is serving)


async def probe(s, path):
    answer = await s.client.get(path)
    return answer.status_code, answer.json()


BOTH = "/ready?pictures=true"


async def test_ready_is_while_text_is_served_once_all_was():
    """Each step of the workers' lives: what /ready, the same with pictures, and /health say."""
    async with stack(ready=False, encoders_serve=False) as s:
        eyes, mouths = s.gateway.pipeline.encoders.pool, s.gateway.pipeline.llms
        await until(lambda: mouths.serving() and eyes.workers[0].description.fingerprint)
        await turn(s, s.encoder, eyes, False)
        assert not s.gateway.pipeline.pairing.has_been_ready
        for path in ("/ready", BOTH):  # Not yet whole: deployments wait for pictures too.
            code, told = await probe(s, path)
            assert code == 503 and told["status"] == "not ready" and not told["pictures"]
            assert "no encoder is serving" in told["missing"][0]
        assert (await probe(s, "/health"))[0] == 200  # Text is served meanwhile.
        code, told = await probe(s, "/ready?pictures=false")  # Encoders may come later.
        assert (code, told["status"], told["pictures"]) == (200, "ready", False)
        await turn(s, s.encoder, eyes, True)
        for path in ("/ready", BOTH):
            assert await probe(s, path) == (200, ready(pictures=True))
        assert (await probe(s, "/health"))[1]["status"] == "ok"
        await turn(s, s.encoder, eyes, False)  # The only encoder is gone: text goes on.
        code, told = await probe(s, "/ready")
        assert (code, told["status"], told["pictures"]) == (200, "ready", False)
        assert told["missing"] == [f"no encoder is serving ({s.encoder.address} is starting)"]
        code, told = await probe(s, BOTH)
        assert (code, told["status"]) == (503, "not ready")
        code, told = await probe(s, "/health")
        assert (code, told["status"]) == (200, "degraded")
        assert told["llms"]["workers"][0]["state"] == "serving"
        assert told["llms"]["workers"][0]["limits"]["num_kv_blocks"] == 64
        assert told["config"]["max_images"] == 10
        assert (await s.chat()).status_code == 200
        await turn(s, s.llm, mouths, False)  # Nothing is served any more.
        for path in ("/ready", "/ready?pictures=false", BOTH):
            assert (await probe(s, path))[0] == 503
        code, told = await probe(s, "/health")
        assert (code, told["status"], len(told["missing"])) == (503, "unavailable", 2)
        await turn(s, s.llm, mouths, True)  # Text alone is enough the second time.
        assert (await probe(s, "/ready"))[0] == 200
        assert (await probe(s, "/live")) == (200, {"status": "live"})


def ready(**fields):
    return {"status": "ready", "missing": [], **fields}


async def test_ready_needs_workers_of_our_own_checkpoint():
    async with stack() as s:
        s.llm.pair_id = "cd" * 32
        worker = s.gateway.pipeline.llms.workers[0]
        worker.wake.set()
        await until(lambda: worker.description.pair_id == s.llm.pair_id)
        assert (await probe(s, "/ready"))[0] == (await probe(s, "/health"))[0] == 503


async def test_a_gateway_without_encoders_is_ready_for_text():
    async with stack(encoders=0) as s:
        assert await probe(s, "/ready") == (200, ready(pictures=False))
        code, told = await probe(s, BOTH)
        assert code == 503 and told["missing"] == ["no encoder is known"]
        code, told = await probe(s, "/health")
        assert (code, told["status"], told["missing"]) == (200, "ok", [])
        assert (await s.chat()).status_code == 200
        refused = await s.chat(user("What?", data_url()))
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "unsupported"
        assert "--encoder-addresses" in refused.json()["error"]["message"]


async def test_a_gateway_that_drains_is_not_ready():
    async with stack() as s:
        s.gateway.running.draining = True
        for path in ("/ready", BOTH):
            code, told = await probe(s, path)
            assert code == 503 and told["missing"] == ["the gateway is stopping"]
        code, told = await probe(s, "/health")
        assert (code, told["status"]) == (503, "draining")


async def test_a_switch_is_true_or_false():
    async with stack() as s:
        for value in ("true", "1", "false", "0", "True"):
            assert (await probe(s, f"/ready?pictures={value}"))[0] == 200
        code, told = await probe(s, "/ready?pictures=maybe")
        assert code == 400 and told["error"]["param"] == "pictures"


async def test_health_tells_who_does_not_reach_the_store():
    async with stack() as s:
        worker = s.gateway.pipeline.llms.workers[0]
        for reachable, status in ((True, "ok"), (False, "degraded")):
            s.llm.store = embedding_pb2.StoreState(kind="redis", reachable=reachable)
            worker.wake.set()
            await until(lambda r=reachable: worker.description.store == StoreState("redis", r))
            told = (await s.client.get("/health")).json()
            assert told["status"] == status
            assert told["store"] == {
                "kinds": ["redis"],
                "unreachable_from": [] if reachable else [s.llm.address],
            }
            state = {"kind": "redis", "reachable": reachable, "key_id": ""}
            assert told["llms"]["workers"][0]["store"] == state
        assert (await s.chat()).status_code == 200  # Requests go on.
        assert (await s.client.get("/ready")).status_code == 200


async def test_no_worker_within_the_wait_is_a_503():
    async with stack(worker_wait_s=0.2) as s:
        await s.llm.die()
        answer = await s.chat()
        assert answer.status_code == 503 and answer.headers["retry-after"]


async def test_metrics_count_what_happened():
    async with stack(telemetry=TelemetryConfig(metrics_port=-1)) as s:
        await s.chat(user("What?", data_url("green")))
        text = (await s.client.get("/metrics")).text
        assert 'opticnerve_requests_total{route="/v1/chat/completions",status="200"}' in text
        assert 'opticnerve_tokens_total{kind="image"}' in text
        assert "opticnerve_requests_in_flight 0.0" in text  # This look at it is none.


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("stage", ["body", "encode", "prefill", "decode"])
async def test_a_client_that_leaves_frees_everything(stage, stream):
    async with stack() as s:
        forever = asyncio.Event()
        if stage == "encode":
            s.encoder.script = lambda _: forever.wait()
        else:
            hold_at = 0 if stage == "prefill" else 2
            s.llm.step = lambda fake, index: (
                forever.wait() if index == hold_at else asyncio.sleep(0)
            )
        payload = json.dumps(body(user("What?", data_url()), stream=stream)).encode()
        reader, writer = await asyncio.open_connection(
            s.client.base_url.host, s.client.base_url.port
        )
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
            "content-type: application/json\r\n"
            f"content-length: {len(payload)}\r\n\r\n"
        )
        half = len(payload) // 2 if stage == "body" else len(payload)
        writer.write(head.encode() + payload[:half])
        if stage == "body":
            await until(lambda: s.gateway.admission.bytes.held)
        elif stage == "encode":
            await s.encoder.started.wait()
        else:
            await s.llm.started.wait()
            await until(lambda: s.llm.running == 1)
        if stage == "decode" and stream:
            await reader.readuntil(b"data: ")
        assert not s.idle()
        writer.close()
        await until(s.idle)
        if stage == "encode":
            await until(s.encoder.cancelled.is_set)
        assert (await s.client.get("/live")).status_code == 200


async def test_small_packets_are_not_held_back():
    """Of a socket without its protocol named, asyncio accepts connections with Nagle's delay."""
    async with stack(encoders=0, llms=0, ready=False) as s:
        await s.client.get("/live")
        (connection,) = s.server.server_state.connections  # Kept alive.
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_a_stop_lets_running_requests_end():
    async with stack(drain_timeout_s=20.0) as s:
        go = asyncio.Event()
        s.llm.step = lambda fake, index: go.wait()
        asked = asyncio.create_task(s.chat())
        await s.llm.started.wait()
        s.gateway.running.draining = True
        assert (await s.client.get("/ready")).status_code == 503
        go.set()
        assert (await asked).status_code == 200


@contextlib.asynccontextmanager
async def silent_client(s, payload):
    """Sends a chat, and reads nothing."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, (s.client.base_url.host, s.client.base_url.port))
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Length: {len(payload)}\r\n\r\n"
        )
        await loop.sock_sendall(client, head.encode() + payload)
        yield


def told(caplog, name):
    """One field of each request's line in the log."""
    return [r.fields.get(name) for r in caplog.records if r.name == "gateway.edge.middleware"]


async def test_a_client_that_does_not_read_is_left_after_the_deadline(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    service.quiet_uvicorn()
    monkeypatch.setattr(call, "ERROR_DELIVERY_S", 0.1)
    payload = json.dumps(body(stream=True, n=16, logprobs=True, top_logprobs=20)).encode()
    for seconds in DEADLINES_S:
        caplog.clear()
        held = stack(request_timeout_s=seconds, tokens=ids("Hello there. ") * 500)
        async with held as s, silent_client(s, payload):
            await until(lambda s=s: s.llm.starts or told(caplog, "code") == ["deadline_exceeded"])
            await until(s.idle)
        if told(caplog, "ended") == [call.UNREAD]:
            assert not [record for record in caplog.records if record.levelno > logging.INFO]
            return
    raise AssertionError("no deadline was long enough to fill the connection's buffers")


async def test_many_empty_messages_hold_nobody_up(monkeypatch):
    async with stack() as s:
        threads = []

        def render(*given, render=s.gateway.pipeline.renderer.render):
            threads.append(threading.current_thread())
            return render(*given)

        monkeypatch.setattr(s.gateway.pipeline.renderer, "render", render)
        answer = await s.chat(*[{"role": "user", "content": ""}] * 4_000)
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert threading.current_thread() not in threads and len(threads) == 1
