"""lm-evaluation-harness, unchanged: a small local task over the server has the results of the
unsplit Hugging Face model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from opticnerve.demo.chats import PICTURES
from tests.clients.server import KEY, MODEL, SEE, SEEN, SPELL, SPELT, Server

pytest.importorskip("lm_eval")
pytest.importorskip("datasets")
from lm_eval import simple_evaluate
from lm_eval.api.model import LM

ROOT = Path(__file__).parents[2]
QUESTIONS = [
    {"question": "What do you see?", "choices": ["a red star", "a blue circle", "O C E A N"]},
    {"question": "Spell OCEAN.", "choices": ["O C E A N", "a red star", "ocean"]},
    {"question": "What color is it?", "choices": ["red", "green", "blue"]},
]


class Unsplit(LM):
    """The reference model, as one of the harness's own."""

    def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        found = _reference(likelihoods=[request.args for request in requests])["likelihoods"]
        return [(total, greedy) for total, greedy in found]

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        asked = [
            (prompt, settings["until"], settings["max_gen_toks"])
            for prompt, settings in (request.args for request in requests)
        ]
        answers: list[str] = _reference(answers=asked)["answers"]
        return answers

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
        raise NotImplementedError


def _reference(**asked: Any) -> Any:
    python = os.environ.get("SERVER_PYTHON", sys.executable)
    command = [python, "-m", "tests.clients.reference_model"]
    told = subprocess.run(command, input=json.dumps(asked).encode(), cwd=ROOT, capture_output=True)
    assert told.returncode == 0, told.stderr.decode()
    return json.loads(told.stdout)


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def make_task(
    directory: Path, name: str, docs: list[dict[str, Any]], **more: Any
) -> dict[str, Any]:
    """The configuration of a task over ``docs``."""
    file = directory / f"{name}.jsonl"
    file.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    files = {"data_files": {"test": str(file)}, "cache_dir": str(directory / "cache")}
    return {
        "task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test",
        "num_fewshot": 0, **more,
    }  # fmt: skip


def run(model: Any, task: dict[str, Any], **more: Any) -> tuple[dict[str, Any], list[Any]]:
    """(the task's results, what the model said of each document)."""
    told = simple_evaluate(model=model, tasks=[task], log_samples=True, bootstrap_iters=0, **more)
    assert told is not None
    name = task["task"]
    samples = sorted(told["samples"][name], key=lambda sample: sample["doc_id"])
    return told["results"][name], [sample["resps"] for sample in samples]


@dataclass(frozen=True)
class Expected:
    """A task, and what comes of it with the unsplit model."""

    task: dict[str, Any]
    results: dict[str, Any]
    said: list[Any]


@pytest.fixture(scope="module")
def choose(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    docs = [{**each, "gold": number % 3} for number, each in enumerate(QUESTIONS)]
    scores = [{"metric": "acc"}, {"metric": "acc_norm"}]
    task = make_task(
        tmp_path_factory.mktemp("choose"), "choose", docs, output_type="multiple_choice",
        doc_to_text="{{question}}", doc_to_choice="choices", doc_to_target="gold",
        metric_list=scores,
    )  # fmt: skip
    return Expected(task, *run(Unsplit(), task))


@pytest.fixture(scope="module")
def spell(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    chat = f"<|im_start|>user\n{SPELL}<|im_end|>\n<|im_start|>assistant\n"
    docs = [{"prompt": prompt, "answer": SPELT} for prompt in (chat, "The star", SPELL)]
    task = make_task(
        tmp_path_factory.mktemp("spell"), "spell", docs, output_type="generate_until",
        doc_to_text="{{prompt}}", doc_to_target="answer", metric_list=[{"metric": "exact_match"}],
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False},
    )  # fmt: skip
    return Expected(task, *run(Unsplit(), task))


@pytest.fixture(params=["token ids", "text", "batches"])
def local(server: Server, request: pytest.FixtureRequest) -> dict[str, Any]:
    """lm-eval's arguments for the server, with its tokenizer from there too."""
    arguments = {
        "model": MODEL, "base_url": f"{server.v1}/completions", "auth_token": KEY,
        "tokenizer_backend": "remote", "max_length": 1024,
        "tokenized_requests": request.param != "text", "num_concurrent": 3,
    }  # fmt: skip
    if request.param == "batches":
        arguments |= {"batch_size": 4, "num_concurrent": 1}
    return {"model": "local-completions", "model_args": arguments}


def test_log_likelihoods(local: dict[str, Any], choose: Expected) -> None:
    results, said = run(**local, task=choose.task)
    assert results == choose.results
    for ours, theirs in zip(said, choose.said, strict=True):
        for (mine,), (reference,) in zip(ours, theirs, strict=True):
            assert float(mine[0]) == pytest.approx(float(reference[0]), abs=1e-3)
            assert str(mine[1]) == str(reference[1])


def test_answers(local: dict[str, Any], spell: Expected) -> None:
    results, said = run(**local, task=spell.task)
    assert (results, said) == (spell.results, spell.said)


def test_pictures(server: Server, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")

    def pictures(doc: dict[str, Any]) -> list[Any]:
        return [image.open(PICTURES / doc["picture"])]

    task = make_task(
        tmp_path, "see", [{"question": SEE, "picture": "star.png", "answer": SEEN}],
        output_type="generate_until", doc_to_text="{{question}}", doc_to_target="answer",
        doc_to_image=pictures, metric_list=[{"metric": "exact_match"}],
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 16, "do_sample": False},
    )  # fmt: skip
    arguments = {"model": MODEL, "base_url": f"{server.v1}/chat/completions", "eos_string": "x"}
    results, said = run(
        "local-chat-completions", task, model_args=arguments, apply_chat_template=True
    )
    assert said[0][0][0] == SEEN and results["exact_match,none"] == 1.0
