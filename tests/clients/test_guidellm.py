"""guidellm, a benchmark of servers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opticnerve.demo.chats import PICTURES
from tests.clients.server import KEY, MODEL

pytest.importorskip("guidellm")

CHECKPOINT = PICTURES.parent / "checkpoint"
REQUESTS, TOKENS = 6, 8


@pytest.mark.parametrize("route", ["chat/completions", "completions", "responses"])
def test_benchmark(server, tmp_path, route):
    report = tmp_path / "report.json"
    backend = f"target={server.url},model={MODEL},api_key={KEY},request_format=/v1/{route}"
    command = [
        Path(sys.executable).with_name("guidellm"), "run", "--disable-console",
        "--backend", f"kind=openai_http,{backend}",
        "--profile", "kind=concurrent,streams=2",
        "--constraint", f"kind=max_requests,count={REQUESTS}",
        "--data", f"kind=synthetic_text,prompt_tokens=16,output_tokens={TOKENS}",
        "--tokenizer", f"kind=hf_auto,model={CHECKPOINT}",
        "--output", f"kind=json,path={report}",
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (measured,) = json.loads(report.read_text())["benchmarks"]
    metrics = measured["metrics"]
    assert metrics["request_totals"]["successful"] == REQUESTS
    assert metrics["output_token_count"]["successful"]["mean"] == TOKENS
