"""``pip install opticnerve`` without extras: a gateway and the Python client run without torch."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from opticnerve.demo.chats import PICTURES, TURNS
from tests.checkpoints import DEMO
from tests.services import Process, process

ROOT = Path(__file__).parents[2]
IMAGE_BYTES = 400e6  # Of the gateway's image.
BASE_BYTES = 150e6  # Of the layers below, unpacked: Debian's slim image with Python.
SOURCES = ("gateway", "encoder_service", "llm_service", "opticnerve", "protos")

pytestmark = pytest.mark.slow


def copy_sources(to: Path) -> None:
    """What a wheel is built of, so that the build writes nothing into the checkout."""
    for name in SOURCES:
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to / name)


@pytest.fixture(scope="module")
def bare(request: pytest.FixtureRequest) -> Path:
    """The ``bin`` directory of an environment with this checkout and its base dependencies.

    It is cached by the versions that it holds; the product's own wheel is installed anew.
    """
    versions = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    name = f"bare_install_{hashlib.sha256(versions).hexdigest()[:12]}"
    venv = request.config.cache.mkdir(name) / "venv"
    bin, constraints = venv / "bin", str(ROOT / "constraints.txt")
    complete = venv / "complete"
    with tempfile.TemporaryDirectory() as sources:
        copy_sources(Path(sources))
        run(
            sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
            "--wheel-dir", sources, sources,
        )  # fmt: skip
        (wheel,) = Path(sources).glob("*.whl")
        if not complete.exists():
            run(sys.executable, "-m", "venv", "--clear", str(venv))
            run(str(bin / "pip"), "install", "--quiet", "-c", constraints, str(wheel))
            complete.touch()
        run(str(bin / "pip"), "install", "--quiet", "--no-deps", "--force-reinstall", str(wheel))
    return bin


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr


def environment() -> dict[str, str]:
    """Ours, without the path that would bring this checkout into the bare environment."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, Process]]:
    """An encoder and an LLM worker of this, the full environment."""
    store = f"shm://{tmp_path_factory.mktemp('store')}?capacity=64MiB"
    encoder = process("encoder_service", "--store", store)
    with encoder as encoder, process("llm_service", "--store", store) as llm:
        yield encoder, llm


def test_a_gateway_without_torch_answers_a_picture_request(
    bare: Path, workers: tuple[Process, Process]
) -> None:
    encoder, llm = workers
    command = [
        str(bare / "opticnerve"), "gateway", "--port", "0",
        "--encoder-addresses", encoder.address, "--llm-addresses", llm.address,
    ]  # fmt: skip
    turn = TURNS[0]
    data = base64.b64encode((PICTURES / turn.pictures[0]).read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    content = [image, {"type": "text", "text": turn.question}]
    body = {
        "model": "model",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
    }
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as gateway:
        try:
            line = gateway.stdout.readline()
            assert line.startswith("listening "), gateway.communicate()[1]
            answer = httpx2.post(
                f"{line.split()[1]}/v1/chat/completions", json=body, timeout=200, trust_env=False
            )
        finally:
            gateway.terminate()
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == turn.answer


CLIENT = """
import json, sys
from tokenizers import Tokenizer
from opticnerve.client import EncoderClient, LLMClient, Sampling
from opticnerve.errors import StartupError

encoder_address, llm_address, model, picture, prompt = sys.argv[1:]
tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
with (
    EncoderClient(encoder_address, model) as encoder,
    LLMClient(llm_address, encoder=encoder) as llm,
):
    ref = encoder.encode(picture)
    layout = encoder.layout()
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    placeholder = layout.item_token_ids["image"]
    at = ids.index(placeholder)
    ids[at : at + 1] = layout.expand(ref.plan).token_ids
    for content in (ref, picture):
        answer = llm.generate(ids, {placeholder: content}, Sampling(max_tokens=64))
        print(tokenizer.decode(answer.token_ids))
    import numpy
    for use in (
        lambda: encoder.fetch(ref),
        lambda: llm.generate(ids, {placeholder: numpy.zeros((1, 8), "f4")}),
    ):
        try:
            use()
        except StartupError as error:
            print(error.message)
assert "torch" not in sys.modules
"""


def test_the_client_without_torch_encodes_and_generates(
    bare: Path, workers: tuple[Process, Process]
) -> None:
    turn = TURNS[0]
    prompt = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|><|image_pad|><|vision_end|>{turn.question}<|im_end|>\n<|im_start|>assistant\n"
    )
    done = subprocess.run(
        [
            str(bare / "python"), "-c", CLIENT, *(worker.address for worker in workers),
            str(DEMO), str(PICTURES / turn.pictures[0]), prompt,
        ],
        capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    needs = "needs torch: pip install 'opticnerve[worker]'"
    assert done.stdout.splitlines() == [
        turn.answer, turn.answer, f"fetch() {needs}", f"a content that is a tensor {needs}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "who"),
    [("encoder", "an encoder"), ("llm", "an LLM worker"), ("up", "up"), ("demo", "up")],
)
def test_a_command_that_needs_torch_says_so_in_one_line(bare: Path, command: str, who: str) -> None:
    done = subprocess.run(
        [str(bare / "opticnerve"), command], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 2
    message = f"opticnerve: {who} needs torch: pip install 'opticnerve[worker]'"
    assert done.stderr.splitlines() == [message]


def test_check_needs_no_extra_and_says_what_it_left_out(bare: Path) -> None:
    done = subprocess.run(
        [str(bare / "opticnerve"), "check", "--json"],
        capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["vision"]["source"] == "headers", done.stderr
    assert "needs torch" in report["left_out"][0]


def test_serve_raises_what_up_says(bare: Path) -> None:
    code = (
        "import opticnerve\nfrom opticnerve.errors import StartupError\n"
        "try:\n with opticnerve.serve(): pass\n"
        "except StartupError as error: print(error.message)"
    )
    done = subprocess.run(
        [str(bare / "python"), "-c", code], capture_output=True, text=True, env=environment()
    )
    assert done.stdout == "up needs torch: pip install 'opticnerve[worker]'\n", done.stderr


def test_nothing_of_the_worker_extra_is_installed(bare: Path) -> None:
    code = """
import importlib, json
from opticnerve.extras import PACKAGES

def installed(name):
    try:
        return importlib.import_module(name)
    except ImportError:  # Or its namespace, which others share.
        return None

print(json.dumps([name for names in PACKAGES.values() for name in names if installed(name)]))
"""
    done = subprocess.run(
        [str(bare / "python"), "-c", code], capture_output=True, text=True, env=environment()
    )
    assert json.loads(done.stdout) == [], done.stderr


def test_the_gateways_image_is_small(bare: Path) -> None:
    """It has this environment on top of its base."""
    files = [path for path in bare.parent.rglob("*") if not path.is_symlink()]
    size = sum(path.stat().st_blocks * 512 for path in files)
    assert BASE_BYTES + size < IMAGE_BYTES
