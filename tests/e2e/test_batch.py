"""``opticnerve batch`` against real stacks: a running one, and one that it starts itself."""

import json
import subprocess
import sys

from tests.e2e.conftest import bundled, user

CHATS = [
    {
        "custom_id": f"chat-{i}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "model",
            "messages": [user("What is this?", bundled("star.png"))],
            "max_tokens": 4,
            "temperature": 0,
        },
    }
    for i in range(3)
]
OTHERS = [
    {
        "custom_id": "text",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "model", "prompt": "A red", "max_tokens": 2},
    },
    {
        "custom_id": "wrong",
        "method": "POST",
        "url": "/v1/embeddings",
        "body": {"model": "model", "input": "A red"},
    },
]


def run(directory, lines, *flags):
    (directory / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "opticnerve", "batch", "in.jsonl", "out.jsonl", *flags]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    answers = (directory / "out.jsonl").read_text().splitlines()
    return done, {answer["custom_id"]: answer for answer in map(json.loads, answers)}


def test_a_running_stack_answers(stack, tmp_path):
    done, answers = run(tmp_path, [*CHATS, *OTHERS], "--url", stack.url)
    assert done.returncode == 1 and "4 answered, 1 failed" in done.stderr
    statuses = {name: answer["response"]["status_code"] for name, answer in answers.items()}
    assert statuses == {**dict.fromkeys(("chat-0", "chat-1", "chat-2", "text"), 200), "wrong": 404}
    bodies = [answers[f"chat-{i}"]["response"]["body"] for i in range(3)]
    assert len({body["choices"][0]["message"]["content"] for body in bodies}) == 1
    assert answers["text"]["response"]["body"]["object"] == "text_completion"
    assert answers["wrong"]["response"]["body"]["error"]["code"] == "not_served"


def test_a_stack_of_its_own_answers_and_ends(tmp_path):
    flags = ("--dtype", "float32", "--served-model-name", "eyes")
    chats = [{**chat, "body": {**chat["body"], "model": "eyes"}} for chat in CHATS]
    done, answers = run(tmp_path, chats, *flags)
    assert done.returncode == 0, done.stderr
    assert {answer["response"]["status_code"] for answer in answers.values()} == {200}
    assert len(answers) == 3
