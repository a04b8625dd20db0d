"""A Redis that cannot be reached: said at start, once a process, without its password."""

from __future__ import annotations

import logging
from pathlib import Path

import grpc
import pytest

from opticnerve.embeddings.open import open_local_tier, open_store
from opticnerve.embeddings.shm_store import ShmStore
from opticnerve.embeddings.store import StoreState
from opticnerve.pb import encoder_pb2, encoder_pb2_grpc, llm_pb2, llm_pb2_grpc
from tests.services import Process

NOWHERE = "redis://ada:s3cret@127.0.0.1:1/3?password=s3cret&local="
SHOWN = "redis://127.0.0.1:1/3 fails"


def test_opening_says_it_once_and_names_what_follows(caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(NOWHERE + "memory://")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and SHOWN in record.getMessage()
    assert "misses" in record.getMessage() and "Fetch" in record.getMessage()
    assert store.state == StoreState("redis", reachable=False)
    assert store.get("0" * 64) is None
    store.close()
    assert len(caplog.records) == 1
    assert "s3cret" not in caplog.text and "ada" not in caplog.text


def test_other_stores_are_reachable(tmp_path: Path) -> None:
    for url, kind in (("memory://", "memory"), (f"shm://{tmp_path}/tier", "shm")):
        store = open_store(url)
        assert store.state == StoreState(kind, reachable=True)
        store.close()


def test_the_local_tier_alone_asks_no_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tier = open_local_tier(f"{NOWHERE}shm://{tmp_path}/tier")
    assert isinstance(tier, ShmStore) and not caplog.records
    tier.close()


@pytest.mark.process
@pytest.mark.parametrize("flags", [["encoder_service"], ["llm_service", "--engine", "process"]])
def test_a_worker_says_it_once_and_tells_the_gateway(flags: list[str], tmp_path: Path) -> None:
    store = f"{NOWHERE}shm://{tmp_path}/tier"
    started = Process(*flags, "--store", store, "--registry", "none")  # Which would say so too.
    with started.until_ready(), grpc.insecure_channel(started.address) as channel:
        if flags[0] == "encoder_service":
            encoder = encoder_pb2_grpc.EncoderStub(channel)
            told = encoder.Describe(encoder_pb2.DescribeEncoderRequest(), timeout=60)
        else:
            llm = llm_pb2_grpc.LLMStub(channel)
            told = llm.Describe(llm_pb2.DescribeLLMRequest(), timeout=60)
    assert (told.store.kind, told.store.reachable) == ("redis", False)
    log = started.log()
    assert log.count(SHOWN) == 1
    assert "s3cret" not in log
