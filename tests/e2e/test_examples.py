"""Every file of examples/ does what it says, run as its reader would run it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.services import process

ROOT = Path(__file__).parents[2]
STAR = "A large red star in the center."
PRINTED = {  # A part of what each prints, with the demo checkpoint.
    "stream": STAR,
    "conversation": r"The triangle is green\.",
    "structured_output": r"shape: circle, large: (True|False)",
    "tools": r"drew a (circle|star|triangle) with \d sides",
    "log_probabilities": r"-?\d\.\d\d  A large red star",
    "realtime": STAR,
    "script": r'The text says "OCEAN"\.',
}
OTHERS = {"picture", "batch", "services", "one_process"}


def run(name, *args, **environment):
    ended = subprocess.run(
        [sys.executable, "-m", f"examples.{name}", *args],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_every_example_is_run():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"__init__"}
    assert names == PRINTED.keys() | OTHERS
    listed = re.findall(r"^\| `(\w+)\.py`", (ROOT / "examples" / "README.md").read_text(), re.M)
    assert set(listed) == names - {"picture"}


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_prints_the_answer(stack, name):
    printed = run(name, SERVER_URL=stack.url)
    assert re.search(PRINTED[name], printed), printed


def test_services_are_called_without_a_gateway(tmp_path):
    store = ("--store", f"shm://{tmp_path}")
    with process("encoder_service", *store) as encoder, process("llm_service", *store) as llm:
        assert STAR in run("services", ENCODER=encoder.address, LLM=llm.address)


def test_the_likelier_answer_is_the_right_one(stack):
    printed = run("log_probabilities", SERVER_URL=stack.url)
    scores = [float(line.split()[0]) for line in printed.splitlines() if line.endswith("center.")]
    assert len(scores) == 2 and scores[0] > scores[1] + 1


def test_a_batch_of_pictures(stack, tmp_path):
    requests, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text(run("batch"))
    command = [sys.executable, "-m", "opticnerve", "batch", str(requests), str(answers)]
    subprocess.run([*command, "--url", stack.url], check=True, timeout=200)
    texts = {
        answer["custom_id"]: answer["response"]["body"]["choices"][0]["message"]["content"]
        for answer in map(json.loads, answers.read_text().splitlines())
    }
    assert texts["star.png"] == STAR and len(texts) == 5
