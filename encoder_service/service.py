"""The encoder process: start, serve, drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch

from encoder_service import metrics
from encoder_service.backends.torch import TorchBackend
from encoder_service.encoder import Encoder
from encoder_service.item import Identity, Limits
from encoder_service.pictures.sizing import largest_plan, shrink
from encoder_service.poison import PoisonRecord
from encoder_service.servicer import SERVICE, EncoderServicer, Loaded
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.checkpoints.fingerprint import fingerprint
from opticnerve.config import EncoderConfig
from opticnerve.embeddings.open import open_store
from opticnerve.embeddings.redis_store import RedisStore
from opticnerve.embeddings.seal import Seal
from opticnerve.embeddings.shm_store import ShmStore
from opticnerve.embeddings.store import Store
from opticnerve.embeddings.tier import base_directory
from opticnerve.errors import StartupError, StoreError
from opticnerve.models.registry import load_tower, make_layout
from opticnerve.pb import encoder_pb2_grpc
from opticnerve.rpc.server import Server

log = logging.getLogger(__name__)

OnLost = Callable[[Exception], None]


class Service:
    """One encoder process."""

    def __init__(self, settings: EncoderConfig) -> None:
        self._settings = settings
        self._status = 0
        self._threads = settings.model.num_threads
        cores = settings.model.threads or len(os.sched_getaffinity(0))
        self._workers = settings.preprocess_workers or cores

    async def run(self) -> int:
        """Startup, serve, shutdown; the exit status. 1: the device was lost."""
        async with Server(self._settings.rpc, SERVICE) as server:
            servicer = EncoderServicer(server)
            encoder_pb2_grpc.add_EncoderServicer_to_server(servicer, server.grpc)
            await server.start()
            with contextlib.ExitStack() as stack:
                on_lost = self._when_lost(server)
                servicer.loaded = await asyncio.to_thread(self._load, stack, server, on_lost)
                await server.ready()
                await server.serve()
        return self._status

    def _load(self, stack: contextlib.ExitStack, server: Server, on_lost: OnLost) -> Loaded:
        """All that takes long; ``stack`` closes what it opens. Raises StartupError."""
        settings = self._settings
        shown = settings.telemetry
        if shown.metrics_port >= 0:
            where = shown.metrics_host or settings.rpc.host
            log.info("metrics at %s", metrics.serve(shown.metrics_port, where))
        torch.set_num_threads(self._threads)
        seal = Seal.load(settings.store.store_key_file)
        store = stack.enter_context(contextlib.closing(_open_store(settings, seal)))
        stack.enter_context(metrics.reading(lambda: metrics.of_store(store)))
        source = settings.model
        checkpoint = Checkpoint.open(
            source.model, source.revision, source.download_dir, side="encoder"
        )
        checkpoint.read_ahead()
        layout = make_layout(checkpoint)
        tower = load_tower(checkpoint, source.dtype, source.device)
        backend = TorchBackend(tower, lambda plan, patches: shrink(layout, plan, patches))
        stack.callback(backend.close)
        largest = largest_plan(layout, settings.max_image_pixels)
        capacity = backend.warm(largest, settings.max_batch_patches)
        poison = stack.enter_context(contextlib.closing(PoisonRecord(_record_directory(store))))
        encoder = Encoder(
            backend,
            layout,
            store,
            poison,
            Identity(fingerprint(checkpoint, tower, backend.name), server.address, seal),
            Limits(
                settings.max_item_bytes,
                settings.max_image_pixels,
                settings.max_queue_patches,
                settings.max_decode_passes,
                settings.max_decode_bytes,
                settings.decode_timeout_s,
            ),
            capacity,
            self._workers,
            on_lost,
        )
        stack.callback(encoder.close)
        encoder.rehearse()
        self._announce(checkpoint, encoder)
        return Loaded(encoder, checkpoint.family, checkpoint.pair_id)

    def _announce(self, checkpoint: Checkpoint, encoder: Encoder) -> None:
        """What this process took, in one line."""
        log.info(
            "%s on %s in %s: %d threads, %d preprocess workers, max_batch_patches %d, "
            "max_item_patches %d, max_queue_patches %d, fingerprint %s",
            checkpoint.name,
            encoder.backend.device,
            encoder.backend.dtype,
            self._threads,
            self._workers,
            encoder.capacity.max_batch_patches,
            encoder.capacity.max_item_patches,
            encoder.backlog.max_patches,
            encoder.identity.fingerprint[:12],
        )

    def _when_lost(self, server: Server) -> OnLost:
        """For the device's thread: no more work, and an exit for the supervisor to restart."""
        loop = asyncio.get_running_loop()

        async def leave() -> None:
            await server.not_ready()
            server.stop()

        def lost(error: Exception) -> None:
            log.critical("the device is lost; stopping: %s", error)
            self._status = 1
            asyncio.run_coroutine_threadsafe(leave(), loop)

        return lost


def _open_store(settings: EncoderConfig, seal: Seal | None) -> Store:
    try:
        return open_store(settings.store.read_url(), ttl_s=settings.store.store_ttl_s, seal=seal)
    except StoreError as error:
        raise StartupError(error.message) from error


def _record_directory(store: Store) -> Path:
    """Beside the embeddings where they are files, so that what removes them removes the record;
    else a directory for this user of the machine."""
    tier = store.local if isinstance(store, RedisStore) else store
    if isinstance(tier, ShmStore):
        return tier.directory / "encoding"
    return base_directory() / f"opticnerve-encoding-{os.getuid()}"
