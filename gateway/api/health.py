"""``/health``, ``/ready``, ``/live`` and ``/metrics``. If the server has API keys, a caller without
one sees the status alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired

from fastapi import Query
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import Field
from starlette.responses import PlainTextResponse, Response
from typing_extensions import TypedDict

from gateway.api.http import JSONResponse
from gateway.api.routing import Call, make_router
from gateway.edge.auth import ANONYMOUS
from gateway.workers.pairing import Pairing, revision_of
from gateway.workers.pool import WorkerPool
from gateway.workers.worker import Worker
from opticnerve import __version__
from opticnerve.config.options import public_view
from opticnerve.telemetry.metrics import own_registry

if TYPE_CHECKING:
    from gateway.app import Gateway

HIDDEN = frozenset({"cost", "cost_per_s", "max_cost_in_flight", "max_heavy_cost_in_flight"})
PUBLIC = frozenset({"status", "pictures"})  # Fields for callers without a key.
KEYED = "Hidden from callers without a key, if the server has keys."

router = make_router("server")
metrics_router = make_router("server")  # If metrics have no port of their own.

Missing = Annotated[list[str], Field(description=f"Why a request could not be served now. {KEYED}")]
Details = Annotated[dict[str, Any], Field(description=KEYED)]


class Live(TypedDict):
    status: Literal["live"]


class Readiness(TypedDict):
    status: Literal["ready", "not ready"]
    pictures: Annotated[bool, Field(description="Whether a picture request would be served now.")]
    missing: NotRequired[Missing]


class Health(TypedDict):
    status: Literal["ok", "degraded", "unavailable", "draining"]
    missing: NotRequired[Missing]
    version: NotRequired[Annotated[str, Field(description=KEYED)]]
    encoders: NotRequired[Details]
    llms: NotRequired[Details]
    store: NotRequired[Details]
    gateway: NotRequired[Details]
    config: NotRequired[
        Annotated[
            dict[str, Any],
            Field(description=f"The settings in effect, without secrets. {KEYED}"),
        ]
    ]


@router.get(
    "/health",
    summary="Every worker's state, and the settings in effect; 503 if nothing can be served",
    response_model=Health,
    responses={503: {"description": "The same.", "model": Health}},
)
async def get_health(call: Call) -> Response:
    body = health(call.gateway)
    served = body["status"] in ("ok", "degraded")
    return _answer(call, body, 200 if served else 503)


@router.get("/live", summary="Whether the gateway process answers", response_model=Live)
async def get_live(call: Call) -> Response:
    live: Live = {"status": "live"}
    return JSONResponse(live)


@router.get(
    "/ready",
    summary="Ready once text and pictures could both be served; then while text can be",
    response_model=Readiness,
    responses={503: {"description": "Not yet.", "model": Readiness}},
)
async def get_ready(
    call: Call,
    pictures: Annotated[
        bool | None, Query(description="true: while pictures are served; false: while text is.")
    ] = None,
) -> Response:
    gateway = call.gateway
    pairing, draining = gateway.pipeline.pairing, gateway.running.draining
    body = readiness(pairing, pictures=pictures, draining=draining)
    return _answer(call, body, 200 if body["status"] == "ready" else 503)


@metrics_router.get("/metrics", summary="Prometheus metrics", response_class=PlainTextResponse)
async def get_metrics(call: Call) -> Response:
    return Response(generate_latest(own_registry()), headers={"content-type": CONTENT_TYPE_LATEST})


def _answer(call: Call, body: Mapping[str, Any], status: int) -> Response:
    """Callers without a key get the public fields only: no addresses, limits or settings."""
    if call.gateway.keys.required and call.state.caller is ANONYMOUS:
        body = {name: value for name, value in body.items() if name in PUBLIC}
    return JSONResponse(body, status)


def readiness(pairing: Pairing, *, pictures: bool | None, draining: bool) -> Readiness:
    """Ready once text and pictures could both be served, and from then on while text can be: a
    gateway that lost its encoders can still serve text. If ``pictures`` is given, ready while a
    request with pictures, or one of text, can be served, whatever was before."""
    started = pairing.has_been_ready or pictures is not None
    ready = not draining and started and not pairing.missing(bool(pictures))
    return {
        "status": "ready" if ready else "not ready",
        "pictures": not _missing(pairing, draining, pictures=True),
        "missing": _missing(pairing, draining, pictures or None),
    }


def health(gateway: Gateway) -> Health:
    pairing, admission = gateway.pipeline.pairing, gateway.admission
    store = _store(pairing)
    return {
        "status": _status(pairing, store, draining=gateway.running.draining),
        "missing": _missing(pairing, gateway.running.draining),
        "version": __version__,
        "encoders": _pool(pairing.encoders),
        "llms": _pool(pairing.llms),
        "store": store,
        "gateway": {
            "requests_in_flight": admission.requests.held,
            "bytes_in_flight": admission.bytes.held,
            "known_references": len(gateway.pipeline.encoders.references),
            "process": os.getpid(),
            "processes": gateway.config.workers,
        },
        "config": public_view(gateway.config),
    }


def _status(
    pairing: Pairing, store: Mapping[str, Any], *, draining: bool
) -> Literal["ok", "degraded", "unavailable", "draining"]:
    """Unavailable if not even a text request could be served."""
    if draining:
        return "draining"
    if pairing.missing(pictures=False):
        return "unavailable"
    workers = [*pairing.encoders.workers, *pairing.llms.workers]
    faults = [worker.fault for worker in workers if worker.fault]
    troubles = [*pairing.encoders.troubles, *pairing.llms.troubles]
    degraded = pairing.missing() or store["unreachable_from"] or faults or troubles
    return "degraded" if degraded else "ok"


def _missing(pairing: Pairing, draining: bool, pictures: bool | None = None) -> list[str]:
    return ["the gateway is stopping"] if draining else pairing.missing(pictures)


def _store(pairing: Pairing) -> dict[str, Any]:
    """The embedding store as the serving workers report it. Requests are served even if a worker
    does not reach it: its look-ups are misses, and LLM workers fetch embeddings from encoders."""
    workers = [*pairing.encoders.serving(), *pairing.llms.serving()]
    states = [(w.address, w.description.store) for w in workers if w.description.store]
    return {
        "kinds": sorted({state.kind for _, state in states}),
        "unreachable_from": [address for address, state in states if not state.reachable],
    }


def _pool(pool: WorkerPool) -> dict[str, Any]:
    return {
        "serving": len(pool.serving()),
        "sources": {source.name: source.trouble or None for source in pool.sources},
        "waiting": len(pool.dispatcher.waiting),  # Items or sequences without a worker with room.
        "workers": [_worker(worker) for worker in pool.workers],
    }


def _worker(worker: Worker) -> dict[str, Any]:
    described = asdict(worker.description)
    extra = described.pop("extra")
    return {
        "address": worker.address,
        "sources": sorted({source.kind for source in worker.sources}),
        "state": worker.state.value,
        "revision": revision_of(described["pair_id"]),
        "fault": worker.fault.text if worker.fault else None,
        "pending": worker.pending,
        **{name: value for name, value in described.items() if name not in HIDDEN},
        **extra,
    }
