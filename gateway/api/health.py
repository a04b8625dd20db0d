"""What /health and /ready say: every pool's workers, and the settings in effect. Where keys are
asked for, who has none is told the status alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from gateway.edge.admission import Admission
from gateway.workers.pairing import Pairing
from gateway.workers.pool import WorkerPool
from gateway.workers.worker import Worker
from opticnerve import __version__
from opticnerve.config import GatewayConfig
from opticnerve.config.options import public_view

HIDDEN = frozenset({"cost", "cost_per_s", "window"})
PUBLIC = frozenset({"status", "pictures"})  # Of a body, for who has no key.


def readiness(pairing: Pairing, *, pictures: bool, draining: bool) -> tuple[int, dict[str, Any]]:
    """(HTTP status, body). 200 from the moment that every kind of request would be served, and
    from then on for as long as text would be: a gateway that lost its encoders still has work
    that it can do. With ``pictures``, exactly while a picture request would be served now."""
    ready = not draining and pairing.been_whole and not pairing.missing(pictures)
    return 200 if ready else 503, {
        "status": "ready" if ready else "not ready",
        "pictures": not _missing(pairing, draining, pictures=True),
        "missing": _missing(pairing, draining, pictures or None),
    }


def health(
    config: GatewayConfig,
    pairing: Pairing,
    admission: Admission,
    known_references: int,
    *,
    draining: bool,
) -> tuple[int, dict[str, Any]]:
    """(HTTP status, body). 503 when no request at all would be served."""
    store = _store(pairing)
    if draining:
        status = "draining"
    elif pairing.missing(pictures=False):
        status = "unavailable"
    else:
        workers = [*pairing.encoders.workers, *pairing.llms.workers]
        hurt = pairing.missing() or store["unreachable_from"] or any(w.fault for w in workers)
        status = "degraded" if hurt else "ok"
    return 503 if status in ("draining", "unavailable") else 200, {
        "status": status,
        "missing": _missing(pairing, draining),
        "version": __version__,
        "encoders": _pool(pairing.encoders),
        "llms": _pool(pairing.llms),
        "store": store,
        "gateway": {
            "requests_in_flight": admission.requests.held,
            "bytes_in_flight": admission.bytes.held,
            "known_references": known_references,
        },
        "config": public_view(config),
    }


def public(body: Mapping[str, Any]) -> dict[str, Any]:
    """What of a body anyone may know: no addresses, limits or settings."""
    return {name: value for name, value in body.items() if name in PUBLIC}


def _missing(pairing: Pairing, draining: bool, pictures: bool | None = None) -> list[str]:
    return ["the gateway is stopping"] if draining else pairing.missing(pictures)


def _store(pairing: Pairing) -> dict[str, Any]:
    """The embedding store as the serving workers see it. Where one does not reach it, requests go
    on: its look-ups are misses, and embeddings travel by Fetch."""
    workers = [*pairing.encoders.serving(), *pairing.llms.serving()]
    told = [(w.address, w.description.store) for w in workers if w.description.store]
    return {
        "kinds": sorted({state.kind for _, state in told}),
        "unreachable_from": [address for address, state in told if not state.reachable],
    }


def _pool(pool: WorkerPool) -> dict[str, Any]:
    return {
        "serving": len(pool.serving()),
        "waiting": pool.waiting,  # Items or sequences that no worker has room for now.
        "workers": [_worker(worker) for worker in pool.workers],
    }


def _worker(worker: Worker) -> dict[str, Any]:
    told = asdict(worker.description)
    extra = told.pop("extra")
    return {
        "address": worker.address,
        "state": worker.state.value,
        "fault": worker.fault.text if worker.fault else None,
        "pending": worker.pending,
        **{name: value for name, value in told.items() if name not in HIDDEN},
        **extra,
    }
