"""The chart's scaling rules under simulated load: a Prometheus scrapes scripted values of what
services export, and the rules' queries say how many pods each pool gets."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

from tests.manifests import EXAMPLE, NAME, render
from tests.prometheus import Prometheus, find_prometheus, running
from tests.system import wait_for

pytestmark = [pytest.mark.process, pytest.mark.slow]

TOLERANCE = 0.1  # Of an autoscaler: smaller differences change nothing.
GATEWAY, ENCODER, LLM, LARGE = (f"{NAME}-{n}" for n in ("gateway", "encoder", "llm", "llm-large"))


class Exporter:
    """``/SERVICE`` has the values that a service's pods are said to export, with the number of the
    script's step."""

    def __init__(self) -> None:
        self.step = 0
        self.values: dict[str, dict[str, float]] = {}
        exporter = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                values = exporter.values.get(self.path.strip("/"), {})
                lines = [f"{name} {value}" for name, value in values.items()]
                text = "\n".join([*lines, f"step {exporter.step}", ""])
                self.send_response(200)
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # A scrape that took too long.
                    self.wfile.write(text.encode())

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def configuration(self, pods: tuple[str, ...]) -> str:
        """A Prometheus' configuration, with the labels that the Prometheus operator gives pods."""
        target = f"127.0.0.1:{self.server.server_port}"
        jobs = [
            {
                "job_name": pod,
                "metrics_path": f"/{pod}",
                "static_configs": [
                    {
                        "targets": [target],
                        "labels": {"namespace": NAME, "service": pod.partition("/")[0]},
                    }
                ],
            }
            for pod in pods
        ]
        return yaml.safe_dump({"global": {"scrape_interval": "1s"}, "scrape_configs": jobs})

    @contextlib.contextmanager
    def serving(self) -> Iterator[Exporter]:
        thread = threading.Thread(target=self.server.serve_forever)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            thread.join()
            self.server.server_close()


class Autoscaler:
    """How many pods a ScaledObject asks for, by a horizontal autoscaler's arithmetic.

    Source: Kubernetes' "Horizontal Pod Autoscaling", algorithm details; KEDA's "Scaling
    Deployments", activation, and "Fallback". Windows of time are left out.
    """

    def __init__(self, scaled_object: dict, prometheus: Prometheus) -> None:
        self.spec = scaled_object["spec"]
        self.prometheus = prometheus

    def pods(self, current: int, at: float) -> int:
        wanted, values = [], []
        for trigger in self.spec["triggers"]:
            found = self.prometheus.query(trigger["metadata"]["query"], at)
            if not found and trigger["metadata"].get("ignoreNullValues") == "false":
                return max(current, self.spec["fallback"]["replicas"])
            value = found[0][1] if found else 0.0
            threshold = float(trigger["metadata"]["threshold"])
            values.append(value)
            wanted.append(self._wanted(trigger["metricType"], value / threshold, current))
        lowest, highest = self.spec["minReplicaCount"], self.spec["maxReplicaCount"]
        if current == 0:
            return max(lowest, int(any(value > 0 for value in values)))
        lowest = max(lowest, int(any(value > 0 for value in values)))
        return min(highest, max(lowest, *wanted))

    @staticmethod
    def _wanted(kind: str, ratio: float, current: int) -> int:
        """``ratio``: of a query's value to its threshold."""
        if kind == "Value":
            return current if abs(ratio - 1) <= TOLERANCE else math.ceil(ratio * current)
        if current and abs(ratio / current - 1) <= TOLERANCE:
            return current
        return math.ceil(ratio)


@pytest.fixture(scope="module")
def exporter():
    with Exporter().serving() as exporter:
        yield exporter


@pytest.fixture(scope="module")
def scalers(exporter, tmp_path_factory):
    """The Autoscaler of each pool in the example of a release."""
    if find_prometheus() is None:
        pytest.skip("prometheus is not installed")
    if importlib.util.find_spec("helm_python") is None:
        pytest.skip("Helm's engine has no wheel for this kind of machine")
    objects = render(EXAMPLE)["scaledobjects.yaml"]
    pods = (GATEWAY, f"{ENCODER}/0", f"{ENCODER}/1", f"{LLM}/0", f"{LLM}/1", f"{LARGE}/0")
    with running(tmp_path_factory.mktemp("scaling"), exporter.configuration(pods)) as prometheus:
        yield {o["metadata"]["name"]: Autoscaler(o, prometheus) for o in objects}


def gateway(patches=0.0, encoder_s=0.0, llm_s=0.0):
    return {
        "opticnerve_patches_waiting": patches,
        'opticnerve_work_waiting_seconds{pool="encoder"}': encoder_s,
        'opticnerve_work_waiting_seconds{pool="llm"}': llm_s,
    }


def encoder(patches):
    return {"opticnerve_patches_pending": patches}


def llm(waiting=0.0, kv_use=0.0):
    return {
        'opticnerve_sequences{state="waiting"}': waiting,
        'opticnerve_sequences{state="running"}': 64.0,
        "opticnerve_kv_blocks": 1000.0,
        "opticnerve_kv_blocks_free": 1000.0 * (1 - kv_use),
    }


IDLE = {GATEWAY: gateway(), f"{ENCODER}/0": encoder(0), f"{LLM}/0": llm(), f"{LARGE}/0": llm()}


@pytest.mark.parametrize(
    ("exported", "current", "expected"),
    [
        pytest.param(
            IDLE, {ENCODER: 3, LLM: 4, LARGE: 4}, {ENCODER: 0, LLM: 1, LARGE: 2}, id="idle"
        ),
        pytest.param(
            IDLE | {
                GATEWAY: gateway(patches=60_000, encoder_s=9),
                f"{ENCODER}/0": encoder(25_000), f"{ENCODER}/1": encoder(15_000),
            },
            {ENCODER: 2, LLM: 1, LARGE: 2}, {ENCODER: 5, LLM: 1, LARGE: 2},
            id="a burst of pictures grows the encoders alone",
        ),
        pytest.param(
            IDLE | {GATEWAY: gateway(patches=900_000, encoder_s=300)},
            {ENCODER: 2, LLM: 1, LARGE: 2}, {ENCODER: 6, LLM: 1, LARGE: 2},
            id="no pool grows beyond its largest size",
        ),
        pytest.param(
            IDLE | {f"{LLM}/0": llm(waiting=30), f"{LARGE}/0": llm(waiting=30)},
            {ENCODER: 1, LLM: 1, LARGE: 2}, {ENCODER: 0, LLM: 4, LARGE: 2},
            id="sequences that wait grow the pool at which they wait",
        ),
        pytest.param(
            IDLE | {f"{LLM}/0": llm(kv_use=0.95), f"{LLM}/1": llm(kv_use=0.97)},
            {ENCODER: 1, LLM: 2, LARGE: 2}, {ENCODER: 0, LLM: 3, LARGE: 2},
            id="full KV caches grow their pool",
        ),
        pytest.param(
            IDLE | {f"{LLM}/0": llm(kv_use=0.82), f"{LLM}/1": llm(kv_use=0.84)},
            {ENCODER: 1, LLM: 2, LARGE: 2}, {ENCODER: 0, LLM: 2, LARGE: 2},
            id="a small difference changes nothing",
        ),
        pytest.param(
            {GATEWAY: gateway(encoder_s=0.4), f"{LLM}/0": llm(), f"{LARGE}/0": llm()},
            {ENCODER: 0, LLM: 1, LARGE: 2}, {ENCODER: 1, LLM: 1, LARGE: 2},
            id="a picture wakes a pool without encoders",
        ),
        pytest.param(
            IDLE | {GATEWAY: gateway(llm_s=12.0)},
            {ENCODER: 0, LLM: 2, LARGE: 2}, {ENCODER: 0, LLM: 5, LARGE: 4},
            id="work that waits for decoders grows every pool of them",
        ),
        pytest.param(
            {f"{ENCODER}/0": encoder(0), f"{LLM}/0": llm(), f"{LARGE}/0": llm()},
            {ENCODER: 3, LLM: 1, LARGE: 4}, {ENCODER: 3, LLM: 1, LARGE: 4},
            id="without a gateway's metrics all pools stay as they are",
        ),
    ],
)  # fmt: skip
def test_pools_get_the_pods_that_their_load_needs(exporter, scalers, exported, current, expected):
    exporter.values, exporter.step = exported, exporter.step + 1
    prometheus = scalers[ENCODER].prometheus
    scraped = f"min(step) == {exporter.step} and count(step) == 6"
    at = wait_for("the values to be scraped", lambda: prometheus.time_of(scraped))
    found = {name: scaler.pods(current[name], at) for name, scaler in scalers.items()}
    assert found == expected
