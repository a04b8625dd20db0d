"""The encoder service: loads a checkpoint's vision half and serves it over gRPC."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, closing
from pathlib import Path

from encoder_service.backends.base import VisionModel
from encoder_service.crash_record import CrashRecord
from encoder_service.encoder import Encoder
from encoder_service.model import open_model
from encoder_service.pictures.largest_picture import largest_plan
from encoder_service.publisher import Results
from encoder_service.servicer import SERVICE, EncoderServicer
from opticnerve.config import EncoderConfig
from opticnerve.embeddings.open import OpenStore, local_tier, open_worker_store
from opticnerve.embeddings.shm_store import ShmStore
from opticnerve.embeddings.signing import Seal
from opticnerve.embeddings.store import Store
from opticnerve.owned_directories import base_directory
from opticnerve.pb import encoder_pb2_grpc
from opticnerve.rpc.server import Server, serving

log = logging.getLogger(__name__)

OpenModel = Callable[[EncoderConfig], VisionModel]


def open_worker(
    settings: EncoderConfig,
    open_model: OpenModel = open_model,
    open_store: OpenStore = open_worker_store,
) -> AbstractAsyncContextManager[EncoderServicer]:
    """A serving encoder, closed when the context ends. Raises StartupError."""

    async def load(servicer: EncoderServicer, stack: AsyncExitStack) -> None:
        server, loop = servicer.server, asyncio.get_running_loop()

        def on_lost(error: Exception) -> None:
            log.critical("the device is lost; stopping: %s", error)
            asyncio.run_coroutine_threadsafe(server.give_up(), loop)

        def load_encoder() -> Encoder:
            seal = Seal.load(settings.store.store_key_file)
            store = open_store(settings.store, seal, stack)
            model = open_model(settings)
            stack.callback(model.backend.close)
            record = stack.enter_context(closing(CrashRecord(_record_directory(store))))
            results = Results(store, model.fingerprint, server.address, seal)
            largest = largest_plan(model.layout, settings.max_image_pixels)
            capacity = model.backend.warm(largest, settings.max_batch_patches)
            encoder = Encoder(model, results, record, settings, capacity, on_lost)
            stack.callback(encoder.close)
            encoder.warm_up()
            return encoder

        servicer.loaded = await asyncio.to_thread(load_encoder)
        _announce(servicer.loaded)

    return serving(settings, SERVICE, _register, load)


def _register(server: Server) -> EncoderServicer:
    servicer = EncoderServicer(server)
    encoder_pb2_grpc.add_EncoderServicer_to_server(servicer, server.grpc)
    return servicer


def _record_directory(store: Store) -> Path:
    """The crash record's directory: within the tier's if embeddings are files, so that it is
    deleted together with them; else a directory of this user."""
    tier = local_tier(store)
    if isinstance(tier, ShmStore):
        return tier.directory / "encoding"
    return base_directory() / f"opticnerve-encoding-{os.getuid()}"


def _announce(encoder: Encoder) -> None:
    """Logs what this process serves, in one line."""
    backend, capacity = encoder.model.backend, encoder.capacity
    log.info(
        "%s by %s on %s in %s: %d threads, %d preprocess workers, max_batch_patches %d, "
        "max_item_patches %d, max_queue_patches %d, fingerprint %s",
        encoder.model.name,
        backend.name,
        backend.device,
        backend.precision,
        encoder.settings.model.num_threads,
        encoder.pool.workers,
        capacity.max_batch_patches,
        capacity.max_item_patches,
        encoder.backlog.max_patches,
        encoder.model.fingerprint[:12],
    )
