"""What /health and /ready say: every pool's workers, and the settings in effect."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from gateway.admission import Admission
from gateway.pairing import Pairing
from gateway.pools import WorkerPool
from gateway.worker import Worker
from opticnerve import __version__
from opticnerve.config import GatewayConfig
from opticnerve.options import public_view

HIDDEN = frozenset({"cost", "cost_per_s", "window"})


def readiness(pairing: Pairing, *, draining: bool) -> tuple[int, dict[str, Any]]:
    """(HTTP status, body): 200 exactly when a picture request would be served."""
    missing = ["the gateway is stopping"] if draining else pairing.missing()
    if missing:
        return 503, {"status": "not ready", "missing": missing}
    return 200, {"status": "ready"}


def health(
    config: GatewayConfig,
    pairing: Pairing,
    admission: Admission,
    known_references: int,
    *,
    draining: bool,
) -> dict[str, Any]:
    missing = pairing.missing()
    store = _store(pairing)
    degraded = missing or store["unreachable_from"]
    status = "draining" if draining else "degraded" if degraded else "ok"
    return {
        "status": status,
        "missing": missing,
        "version": __version__,
        "encoders": _pool(pairing.encoders),
        "llms": _pool(pairing.llms),
        "store": store,
        "gateway": {
            "requests_in_flight": admission.requests,
            "bytes_in_flight": admission.bytes,
            "known_references": known_references,
        },
        "config": public_view(config),
    }


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
        "pending": worker.pending,
        **{name: value for name, value in told.items() if name not in HIDDEN},
        **extra,
    }
