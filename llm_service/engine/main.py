"""The main function of an engine's thread or process: builds it, runs it, reports its end."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import queue
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

from llm_service.engine.engine import Engine, Message
from llm_service.policy.engine_config import EngineConfig
from llm_service.policy.messages import Command, RowsReady, Stop
from llm_service.policy.row_source import RowSource
from opticnerve.errors import EngineFailure, OpticNerveError

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 10.0  # After which an engine's process is killed if it has not ended.


@dataclass(frozen=True, slots=True)
class EngineReady:
    """The engine's first message: it is built."""

    config: EngineConfig


@dataclass(frozen=True, slots=True)
class EngineEnded:
    """The engine's last message. ``error``: why it died; None after Stop."""

    error: OpticNerveError | None


@dataclass(frozen=True, slots=True)
class RowsDamaged:
    """The engine's process found these rows damaged and deleted them."""

    key: str


FromEngine: TypeAlias = list[Message] | RowsDamaged | EngineReady | EngineEnded
Send: TypeAlias = Callable[[FromEngine], None]

EngineFactory: TypeAlias = Callable[[Any, Send], Engine]
"""Builds an engine from a configuration, on the thread that will run it. The engine sends messages
by calling the Send, from any thread."""


def import_factory(factory: str | EngineFactory) -> EngineFactory:
    """The factory that "module:function" names."""
    if not isinstance(factory, str):
        return factory
    module, _, name = factory.partition(":")
    found: EngineFactory = getattr(importlib.import_module(module), name)
    return found


def run_engine(
    factory: EngineFactory,
    config: Any,
    inbox: queue.SimpleQueue[Command],
    send: Send,
) -> None:
    """Builds an engine, runs it, and reports how it ended; called on the engine's thread."""
    error: OpticNerveError | None = EngineFailure("the engine died; the service's log says why")
    try:
        engine = factory(config, send)
        send(EngineReady(engine.config))
        engine.run(inbox)
        error = None
    except OpticNerveError as failure:
        log.error("the engine ended: %s", failure)
        error = failure
    except Exception:
        log.exception("the engine died")
    finally:
        send(EngineEnded(error))


def run_engine_process(pipe: Connection, factory: str | EngineFactory, config: Any) -> None:
    """Main of the engine's process. It ends with its parent, whose death closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the group; the parent decides.
    inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
    arrived: queue.SimpleQueue[RowsReady] = queue.SimpleQueue()
    sending = threading.Lock()

    def send(message: FromEngine) -> None:
        with sending:
            pipe.send(message)

    def build(settings: Any, send: Send) -> Engine:
        engine = import_factory(factory)(settings, send)
        rows = engine.scheduler.rows
        threading.Thread(target=_load_rows, args=(rows, arrived, inbox), daemon=True).start()
        return engine

    threading.Thread(target=_read_commands, args=(pipe, arrived, inbox), daemon=True).start()
    with contextlib.suppress(BrokenPipeError):
        run_engine(build, config, inbox, send)


def _load_rows(
    rows: RowSource, arrived: queue.SimpleQueue[RowsReady], inbox: queue.SimpleQueue[Command]
) -> None:
    """Loads rows before passing RowsReady on. If loading fails, the engine asks for them again."""
    while True:
        command = arrived.get()
        try:
            rows.load(command.key)
        except Exception:
            log.exception("loading rows failed")
        inbox.put(command)


def _read_commands(
    pipe: Connection,
    arrived: queue.SimpleQueue[RowsReady],
    inbox: queue.SimpleQueue[Command],
) -> None:
    try:
        while True:
            command = pipe.recv()
            if isinstance(command, RowsReady):
                arrived.put(command)
            else:
                inbox.put(command)
    except (EOFError, OSError):
        pass  # The parent is gone, or has closed its end.
    except Exception:
        log.exception("a command to the engine cannot be read")
        os._exit(1)
    inbox.put(Stop())
    threading.Event().wait(STOP_TIMEOUT_S / 2)
    os._exit(1)  # The parent is gone and the engine is stuck: in a step, or still loading.
