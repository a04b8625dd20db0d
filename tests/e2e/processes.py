"""Finding the processes of a stack, and doing them harm at the right moment."""

import contextlib
import itertools
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from examples.demo_training.scenes import Item
from tests.e2e.conftest import data_url, png, scene, user
from tests.system import wait_for


def processes(root):
    """Child processes of the stack: command line by pid."""
    found = {}
    for pid in Path(f"/proc/{root}/task/{root}/children").read_text().split():
        try:
            found[int(pid)] = (
                Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            )
        except OSError:
            continue
    return found


def pids(stack, module):
    return [pid for pid, line in processes(stack.process.pid).items() if f"-m {module}" in line]


def pid_at(stack, module, address):
    """The child that listens there."""
    port = f":{int(address.rsplit(':', 1)[1]):04X}"
    tables = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    lines = [line.split() for line in tables.splitlines()]
    (inode,) = [line[9] for line in lines if line[1].endswith(port) and line[3] == "0A"]
    for pid in pids(stack, module):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(link) == f"socket:[{inode}]":
                    return pid
    raise AssertionError(f"nobody listens on {address}")


def stopped_at_work(stack, module):
    """The process id of a worker that has work and cannot go on with it (SIGSTOP); None where no
    worker has any."""
    kind = {"encoder_service": "encoders", "llm_service": "llms"}[module]

    def busy():
        workers = stack._http.get("/health").json()[kind]["workers"]
        return [worker["address"] for worker in workers if worker["pending"]]

    for address in busy():
        pid = pid_at(stack, module, address)
        os.kill(pid, signal.SIGSTOP)
        if address in busy():  # What it has not answered by now, it will not answer.
            return pid
        os.kill(pid, signal.SIGCONT)
    return None


def end_at_work(stack, module, number):
    """Sends a signal to a worker that has work."""
    pid = wait_for("a worker with work", lambda: stopped_at_work(stack, module))
    os.kill(pid, number)
    os.kill(pid, signal.SIGCONT)
    return pid


@contextlib.contextmanager
def load(question, threads=8):
    """Asks ``question(0)``, ``question(1)``, ... from several threads for as long as the context
    lasts: a worker that has work is found however fast it works. Yields the list of answers, in
    no order, which is complete afterwards. Raises what a question raised."""
    numbers, ended, answers = itertools.count(), threading.Event(), []

    def ask_on():
        while not ended.is_set():
            answers.append(question(next(numbers)))

    with ThreadPoolExecutor(threads) as pool:
        asking = [pool.submit(ask_on) for _ in range(threads)]
        try:
            yield answers
        finally:
            ended.set()
        for each in asking:
            each.result()


def wait_for_return(stack, module, ended, number=2):
    """Waits for as many workers as before, without the one that ended."""

    def back():
        found = pids(stack, module)
        return len(found) == number and ended not in found

    wait_for("the worker's return", back)


def picture(seed, color="red"):
    return data_url(png(scene(seed, Item("star", color, "large", (1, 1)))))


def ask(stack, *urls, text="What do you see?", **parameters):
    body = {"model": "model", "messages": [user(text, *urls)], "temperature": 0, **parameters}
    answer = stack._http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def idle(stack):
    """No sequence runs and every KV block is free, as the LLM workers say themselves."""
    health = stack._http.get("/health").json()
    workers = health["llms"]["workers"]
    return all(
        w["load"]["running"] == 0 and w["load"]["waiting"] == 0
        and w["load"]["free_kv_blocks"] == w["limits"]["num_kv_blocks"]
        for w in workers
    )  # fmt: skip
