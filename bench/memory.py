"""The memory that each side uses for one checkpoint.

    python -m bench.memory [--model DIRECTORY]

Without a model: random weights in the Qwen2-VL architecture, 0.49B parameters of language model
and 0.17B of tower, bf16, one file. Each side starts in a fresh process, imports what its service
imports, opens the checkpoint and loads its half as the service does; "whole" is transformers'
``from_pretrained``. Then ``opticnerve up`` serves the checkpoint, answers questions about pictures,
and its processes are read while they run: activations and KV blocks (of 4,096 tokens) count.

Figures are from /proc/PID/status, in MB of 10^6 bytes: resident memory after loading, its part that
is not mapped from files (RssAnon), its peak (VmHWM), and the weights themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image

from bench import report

READY = "is ready at"
MODULES = {"gateway": "gateway", "encoder_service": "encoder", "llm_service": "llm"}
SIDES = ("gateway", "encoder", "llm", "whole")
GATEWAY_LIMIT_MB = 200
KV_CACHE_TOKENS = 4096  # 50 MB; by default the LLM takes a quarter of the machine's free memory.
SLACK_MB = 100  # Allocator and libraries, beyond the process's own imports and its weights.

TEXT = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
}
VISION = {"depth": 12, "embed_dim": 1024, "num_heads": 16, "mlp_ratio": 4}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a checkpoint directory; none: a random one")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments.model)))
        return 0
    if arguments.model:
        return compare(arguments.model)
    with tempfile.TemporaryDirectory(prefix="opticnerve-bench-") as directory:
        make_model(directory)
        return compare(directory)


def make_model(directory: str, **sizes: Any) -> None:
    """Makes a random checkpoint; ``sizes``: arguments of ``tests.checkpoints.make_checkpoint``.
    Runs in another process, so that this one stays small."""
    sizes = {"text": TEXT, "vision": VISION} | sizes
    code = (
        "import torch; from tests.checkpoints import make_checkpoint; "
        f"make_checkpoint('qwen2_vl', {directory!r}, dtype=torch.bfloat16, tied=True, **{sizes!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def compare(model: str) -> int:
    """Prints and saves the table. Returns 1 if a side holds more than it should."""
    sides = {side: run(side, model) for side in SIDES}
    rows = [
        [side, *(f"{found[key]:.0f}" for key in ("weights", "imports", "rss", "anon", "peak"))]
        for side, found in sides.items()
    ]
    header = ["side", "weights MB", "after imports MB", "loaded MB", "of it anon MB", "peak MB"]
    print(report.table(header, rows))
    serving = serve(model)
    print("\nServing, after answers about pictures:\n")
    print(report.table(["process", "resident MB"], [[k, f"{v:.0f}"] for k, v in serving.items()]))
    excess = {
        side: found["rss"] - found["imports"] - found["weights"] for side, found in sides.items()
    }
    fine = max(sides["gateway"]["rss"], serving["gateway"]) <= GATEWAY_LIMIT_MB and all(
        excess[side] <= SLACK_MB for side in ("encoder", "llm")
    )
    verdict = "each side holds its half and no more" if fine else "a side holds more than it should"
    print(f"\n{verdict}: gateway at most {GATEWAY_LIMIT_MB} MB, others their weights and imports")
    report.save("memory", {"unit": "MB", "sides": sides, "serving": serving, "ok": fine})
    return 0 if fine else 1


def run(side: str, model: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.memory", "--side", side, "--model", model]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def serve(model: str) -> dict[str, float]:
    """Resident memory of each process of ``opticnerve up``, after some requests."""
    command = [sys.executable, "-m", "opticnerve", "up", model, "--port", "0"]
    command += ["--max-pixels", str(512 * 512), "--kv-cache-tokens", str(KV_CACHE_TOKENS)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        lines: list[str] = []
        for line in server.stdout or ():
            lines.append(line)
            if READY in line:
                ask(line.rpartition(" ")[2].strip())
                return {name: resident(pid)["VmRSS"] for name, pid in children(server.pid).items()}
        raise SystemExit("opticnerve up did not start:\n" + "".join(lines[-20:]))
    finally:
        server.terminate()
        server.communicate(timeout=60)


def ask(url: str) -> None:
    """Asks three questions, each about a new picture, and one about none."""
    for seed in range(4):
        content: list[dict[str, Any]] = [{"type": "text", "text": "What is this?"}]
        if seed:
            content.append({"type": "image_url", "image_url": {"url": picture(seed)}})
        body = {
            "model": "model",
            "max_completion_tokens": 8,
            "messages": [{"role": "user", "content": content}],
        }
        answer = httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=300)
        if answer.status_code != 200:
            raise SystemExit(f"{answer.status_code}: {answer.text}")


def picture(seed: int) -> str:
    """A data URL of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def children(parent: int) -> dict[str, int]:
    """The process ids of the services that ``parent`` has started: gateway, encoder, llm."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            stat = (directory / "stat").read_text().rpartition(")")[2].split()
            command = (directory / "cmdline").read_bytes().split(b"\0")
        except OSError:  # It has ended meanwhile.
            continue
        if int(stat[1]) == parent:
            module = next((m for m in MODULES if m.encode() in command), None)
            if module is not None:
                found[MODULES[module]] = int(directory.name)
    return dict(sorted(found.items()))


def measure(side: str, model: str) -> dict[str, float]:
    """Loads one side in this process."""
    if side == "gateway":
        return gateway(model)
    if side == "whole":
        return whole(model)
    return half(side, model)


def gateway(model: str) -> dict[str, float]:
    import gateway.service as service
    from gateway.edge.auth import Keys
    from opticnerve.config import GatewayConfig, ModelConfig

    nowhere = ("127.0.0.1:9",)
    settings = GatewayConfig(
        model=ModelConfig(model=model), encoder_addresses=nowhere, llm_addresses=nowhere
    )

    async def opened() -> dict[str, float]:
        async with service.open_gateway(settings, Keys.load(None)):
            if "torch" in sys.modules:
                raise SystemExit("the gateway imported torch")
            return figures(before, 0)

    before = resident()
    return asyncio.run(opened())


def half(side: str, model: str) -> dict[str, float]:
    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.models import registry

    if side == "encoder":
        import encoder_service.service  # noqa: F401
        import opticnerve.models.qwen2_vl.vision

        before = resident()
        tower: Any = registry.load_tower(Checkpoint.open(model, side="encoder"), "auto", "cpu")
        tensors = list(tower.module.parameters())
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        touch(tensors)
        return figures(before, sum(storages.values()))
    import opticnerve.models.qwen2_vl.language  # noqa: F401
    from llm_service.device.attention.base import ATTENTION_NAME

    before = resident()
    checkpoint = Checkpoint.open(model, side="llm")
    language: Any = registry.load_language(checkpoint, "auto", "cpu", ATTENTION_NAME)
    return figures(before, language.weight_bytes())


def whole(model: str) -> dict[str, float]:
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    before = resident()
    loaded = Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=torch.bfloat16)
    tensors = list(loaded.parameters())
    touch(tensors)
    return figures(before, sum(t.nbytes for t in tensors))


def touch(tensors: list[Any]) -> None:
    """Reads every page: mapped files become resident as they are used."""
    for tensor in tensors:
        if not math.isfinite(tensor.detach().flatten()[::512].float().sum()):
            raise SystemExit("weights are not finite")


def figures(before: dict[str, float], weights: int) -> dict[str, float]:
    now = resident()
    return {
        "weights": weights / 1e6,
        "imports": before["VmRSS"],
        "rss": now["VmRSS"],
        "anon": now["RssAnon"],
        "peak": now["VmHWM"],
    }


def resident(pid: int | str = "self") -> dict[str, float]:
    """Memory fields of a process, in MB."""
    fields = (line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    wanted = ("VmRSS", "VmHWM", "RssAnon", "RssFile")
    return {name: int(value.split()[0]) * 1024 / 1e6 for name, value in fields if name in wanted}


if __name__ == "__main__":
    sys.exit(main())
