"""The encoder as a process: start, the real tower behind the wire, signals, death, refusals."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.cli import commands as cli
from opticnerve.client import EncoderClient
from opticnerve.config.shared import MIN_IMAGE_PIXELS
from opticnerve.errors import OpticNerveError, Unavailable
from opticnerve.media.decode import decode
from opticnerve.media.plan import Overrides
from opticnerve.media.probe import parse_structure
from opticnerve.models.registry import load_tower, make_layout, make_preprocessor
from opticnerve.telemetry import logs
from tests import encoders
from tests.checkpoints import make_checkpoint
from tests.encoders import picture
from tests.services import Process, process

# What gRPC itself prints, in a race, of a call that ends before its handler has begun.
ENDED_EARLY = re.compile(r"Traceback .*\n.*in grpc\S+_schedule_rpc_coro\n\S+CancelledError\n")


def tower_rows(model: Path | None, data: bytes) -> torch.Tensor:
    """What the tower makes of a picture, without a service."""
    checkpoint = Checkpoint.open(None if model is None else str(model), side="encoder")
    tower = load_tower(checkpoint, "float32", "cpu")
    layout = make_layout(checkpoint)
    plan = layout.plan(parse_structure(data), Overrides())
    pixels = make_preprocessor(checkpoint, layout)(decode(data, plan), plan)
    return tower.encode([pixels], [plan])[0]["rows"]


@pytest.mark.process
def test_life_of_a_process(tmp_path: Path) -> None:
    """Serves the tower's rows, dies by kill -9, serves again on the same port, drains."""
    store = f"shm://{tmp_path / 'tier'}"
    flags = ("--store", store, "--dtype", "float32", "--drain-timeout-s", "60")
    data = picture(1, (336, 336), "JPEG")
    with process("encoder_service", *flags) as first, EncoderClient(first.address) as client:
        ref = client.encode(data)
        rows = client.fetch(ref)["rows"]
        assert torch.allclose(rows, tower_rows(None, data), atol=1e-5)
        description = client.describe()
        assert description.dtype == "F32" and description.device == "cpu"
        assert len(description.fingerprint) == 64 and len(description.pair_id) == 64
        with pytest.raises(OpticNerveError) as refused:
            client.encode(data[:2000])
        assert refused.value.http_status == 400
        assert first.end(signal.SIGKILL) == -signal.SIGKILL
        with pytest.raises(Unavailable):
            client.encode(picture(2))
        port = first.address.rpartition(":")[2]
        with process("encoder_service", *flags, "--port", port) as second:
            again = client.encode(data)
            assert again.hit and again.key == ref.key
            answers = _encode_while_stopping(client, second)
            assert second.process.wait(100) == 0
            assert any(answers), "nothing was under way"
        log = second.log()
        assert "threads" in log and "max_batch_patches" in log and "fingerprint" in log
        assert "Traceback" not in ENDED_EARLY.sub("", log)
    assert not list((tmp_path / "tier" / "encoding").glob("*"))


def _encode_while_stopping(client: EncoderClient, process: Process) -> list[bool]:
    """SIGTERM amid many calls: each is answered or refused as unavailable, and none hangs."""
    first_done = threading.Event()

    def encode(seed: int) -> bool:
        try:
            client.encode(picture(seed))
            first_done.set()
            return True
        except (Unavailable, OpticNerveError) as error:
            assert error.http_status in (499, 503), error
            return False

    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(encode, seed) for seed in range(100, 160)]
        assert first_done.wait(60)
        process.process.terminate()
        return [call.result(100) for call in calls]


@pytest.mark.process
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_other_families_are_served(family: str, tmp_path: Path) -> None:
    model = make_checkpoint(family, tmp_path / family)
    data = picture(3, (120, 90))
    with (
        process("encoder_service", str(model), "--store", f"shm://{tmp_path / 'tier'}") as served,
        EncoderClient(served.address, str(model)) as client,
    ):
        ref = client.encode(data)
        rows = client.fetch(ref)["rows"]
        assert rows.shape[0] == ref.num_rows
        assert torch.allclose(rows, tower_rows(model, data), atol=1e-4)
        assert served.end(signal.SIGTERM) == 0


def test_the_least_limit_on_pictures_lets_an_encoder_rehearse(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with encoders.running(tmp_path, max_image_pixels=MIN_IMAGE_PIXELS) as service:
            service.encoder.warm_up()
            assert service.backend.batches == [1]

    asyncio.run(scenario())


def test_what_cannot_start_says_why_and_exits_with_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2"]}')
    monkeypatch.setattr(logs, "configure", lambda level, form: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        cases = {
            "address already in use": ["--port", str(taken.getsockname()[1])],
            "Qwen2-VL": [str(tmp_path), "--store", "memory://"],
            "the store is": ["--store", "ftp://nowhere"],
            "nothing-here": ["/nothing-here", "--store", "memory://"],
            "cuda:99": ["--device", "cuda:99", "--store", "memory://"],
        }
        for text, flags in cases.items():
            assert cli.main(["encoder", "--threads", "1", *flags]) == 2
            error = capsys.readouterr().err
            assert text in error and "Traceback" not in error
    monkeypatch.setenv("OPTICNERVE_NONSENSE", "1")
    assert cli.main(["encoder"]) == 2
    assert "OPTICNERVE_NONSENSE" in capsys.readouterr().err


@pytest.mark.process
def test_a_process_that_cannot_start_exits_with_two(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "encoder_service", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2
    assert "holds no config.json" in done.stderr and "Traceback" not in done.stderr
