"""The supervisor over small real processes: order, restart, giving up, nothing left behind."""

import asyncio
import errno
import io
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from opticnerve.config import UpConfig
from opticnerve.errors import StartupError
from opticnerve.local import up
from opticnerve.local.child import HURRY_S, Child, Role
from opticnerve.local.supervisor import Supervisor
from opticnerve.process import ECHO_S
from tests.e2e.processes import processes
from tests.system import alive, wait_for

# A worker that speaks gRPC health, and a gateway that says it is ready; both log their end.
WORKER = """
import asyncio, sys
from opticnerve.config import RpcConfig
from opticnerve.process import follow_parent
from opticnerve.rpc.server import Server
name, log, parent, port = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[5])
follow_parent(parent)
async def main():
    async with Server(RpcConfig(port=port, drain_timeout_s=1), "opticnerve.v1.LLM") as server:
        await server.start()
        await server.ready()
        await server.serve()
asyncio.run(main())
open(log, "a").write(name + "\\n")
"""
GATEWAY = """
import http.server, signal, sys
log = sys.argv[2]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *a):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[5])), Handler)
def stop(*a):
    open(log, "a").write("gateway\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGHUP, lambda *a: print("reads again", file=sys.stderr, flush=True))
print(f"listening http://127.0.0.1:{server.server_port}", flush=True)
print("ready", flush=True)
server.serve_forever()
"""
FAILS = "import sys; print('out of luck', file=sys.stderr); sys.exit(3)"


def service(role, code, log, parent=0):
    name = role.name.lower()
    command = [sys.executable, "-c", code, name, str(log), str(parent)]
    return Child(name, role, command, dict(os.environ))


def supervisor(log, workers=None, max_restarts=2):
    workers = workers or [service(Role.ENCODER, WORKER, log), service(Role.LLM, WORKER, log)]
    return Supervisor(
        workers,
        lambda encoders, llms: service(Role.GATEWAY, GATEWAY, log),
        start_timeout_s=100,
        stop_timeout_s=60,
        max_restarts=max_restarts,
    )


async def until_ready(made, task):
    while not made.url:
        if task.done():
            task.result()
        await asyncio.sleep(0.02)


@pytest.mark.process
def test_stops_gateway_then_llm_then_encoder(tmp_path):
    log = tmp_path / "ends"

    async def run():
        async with supervisor(log) as made:
            task = asyncio.create_task(made.run())
            await until_ready(made, task)
            pids = [child.pid for child in made.children]
            made.stop()
            await task
        return pids

    pids = asyncio.run(run())
    assert log.read_text().split() == ["gateway", "llm", "encoder"]
    assert len(pids) == 3 and not any(alive(pid) for pid in pids)


@pytest.mark.process
def test_a_killed_child_comes_back_at_its_port(tmp_path):
    async def run():
        async with supervisor(tmp_path / "ends") as made:
            task = asyncio.create_task(made.run())
            await until_ready(made, task)
            child = made._workers[1]
            pid, address = child.pid, child.address
            os.kill(pid, signal.SIGKILL)
            while child.pid == pid or not child.running:
                await asyncio.sleep(0.02)
            assert await asyncio.wait_for(child.listening(), 60) == address
            made.stop()
            await task

    asyncio.run(run())


@pytest.mark.process
def test_gives_up_after_repeated_crashes_and_stops_the_rest(tmp_path, caplog):
    log = tmp_path / "ends"
    # Longer than the pause before a restart: what is stopped must not be taken for a crash.
    slow = WORKER.replace("asyncio.run(main())", "asyncio.run(main())\nimport time; time.sleep(1)")

    async def run():
        workers = [service(Role.ENCODER, WORKER, log), service(Role.LLM, slow, log)]
        async with supervisor(log, workers, max_restarts=1) as made:
            task = asyncio.create_task(made.run())
            await until_ready(made, task)
            doomed = made._workers[0]
            doomed.command = [sys.executable, "-c", FAILS]
            os.kill(doomed.pid, signal.SIGKILL)
            with pytest.raises(StartupError, match=r"giving up: encoder .*out of luck"):
                await task

    asyncio.run(run())
    assert log.read_text().split() == ["gateway", "llm"]
    restarted = [text for text in caplog.messages if "starting it again" in text]
    assert len(restarted) == 1 and restarted[0].startswith("encoder ended")


@pytest.mark.process
def test_a_child_that_cannot_start_is_quoted(tmp_path):
    async def run():
        workers = [service(Role.ENCODER, FAILS, tmp_path / "ends")]
        async with supervisor(tmp_path / "ends", workers) as made:
            with pytest.raises(StartupError, match=r"encoder ended with status 3.*out of luck"):
                await made.run()

    asyncio.run(run())


@pytest.mark.process
def test_children_end_when_the_parent_is_killed(tmp_path):
    code = (
        "import os, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {WORKER!r}, 'x', {str(tmp_path / 'e')!r},"
        " str(os.getpid()), '--port', '0'], stdout=subprocess.PIPE, text=True)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as parent:
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    try:
        wait_for("the child's end", lambda: not alive(pid))
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


UP = """
import asyncio, sys
from opticnerve.local import up
from opticnerve.config import TelemetryConfig
from opticnerve.config.command_line import start_logs
from tests.integration.test_supervisor import GATEWAY, STUBBORN, Role, service
class Commands:
    def __init__(self, settings, given):
        print(given["store"], flush=True)
    def workers(self):
        return [service(Role.LLM, STUBBORN, sys.argv[1])]
    def gateway(self, encoders, llms):
        return service(Role.GATEWAY, GATEWAY, sys.argv[1])
up.Commands = Commands
start_logs(TelemetryConfig())
asyncio.run(up.run({"port": 0}))
"""
STUBBORN = "import functools, os" + WORKER.replace(
    "        await server.serve()",
    "        tell = functools.partial(print, file=sys.stderr, flush=True)\n"
    "        tell('pid', os.getpid())\n"
    "        for number in (2, 15):\n"
    "            asyncio.get_running_loop().add_signal_handler(number, tell, 'deaf to', number)\n"
    "        await asyncio.sleep(600)",
)


class Up:
    """``opticnerve up`` over a worker that does not end when it is asked to."""

    def __init__(self, log):
        self.process = subprocess.Popen(
            [sys.executable, "-c", UP, str(log)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.store = self.process.stdout.readline().strip().removeprefix("shm://")
        assert os.path.isdir(self.store)
        assert "ready" in self.process.stdout.readline()
        self.worker = int(self.read("| pid").split()[-1])

    def read(self, text):
        """The next line on stderr that has ``text``."""
        return next(line for line in self.process.stderr if text in line)

    def signal(self, number):
        time.sleep(ECHO_S * 1.5)  # Sooner, it would be an echo of the one before.
        self.process.send_signal(number)

    def check_nothing_is_left(self):
        assert not os.path.exists(self.store)
        wait_for("the worker's end", lambda: not alive(self.worker))


@pytest.fixture
def deaf(tmp_path):
    made = Up(tmp_path / "ends")
    yield made
    left = processes(made.process.pid) if made.process.poll() is None else ()
    made.process.kill()
    made.process.communicate()
    for pid in left:  # Those of a stack that the test did not end.
        os.kill(pid, signal.SIGKILL)


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_answered_and_a_second_one_hurries(deaf, number):
    deaf.signal(number)
    told = deaf.read("stopping")
    assert "15 s" in told and "Ctrl-C again" in told
    deaf.read("deaf to 15")  # It is being stopped, and has a quarter of a minute.
    deaf.signal(number)
    deaf.read("deaf to 2")
    deaf.read(f"llm did not stop within {HURRY_S:g} s")
    assert deaf.process.wait(60) == 0
    deaf.check_nothing_is_left()


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_third_signal_ends_everything_at_once_and_leaves_no_file(deaf, number):
    deaf.signal(number)
    deaf.read("deaf to 15")
    deaf.signal(number)
    deaf.read("deaf to 2")
    deaf.signal(number)
    assert deaf.process.wait(60) == 128 + number
    deaf.check_nothing_is_left()


@pytest.mark.process
def test_sighup_is_passed_to_the_gateway_and_ends_nothing(deaf):
    for _ in range(2):
        deaf.process.send_signal(signal.SIGHUP)
        assert deaf.read("reads again").startswith("gateway ")
    assert deaf.process.poll() is None and alive(deaf.worker)


@pytest.mark.process
def test_a_child_that_starts_hears_of_a_sighup_once_it_listens(capfd):
    slow = (
        "import signal, sys, time\n"
        "def told(*a): print('told', file=sys.stderr, flush=True); sys.exit(0)\n"
        "signal.signal(signal.SIGHUP, told)\n"
        "print('listening here', flush=True)\n"
        "time.sleep(600)\n"
    )

    async def run():
        child = Child("slow", Role.LLM, [sys.executable, "-c", slow], dict(os.environ))
        await child.start()
        try:
            child.hang_up()
            assert await asyncio.wait_for(child.wait(), 60) == 0
        finally:
            child.kill()

    asyncio.run(run())
    assert "told" in capfd.readouterr().err


@pytest.mark.process
def test_what_a_dead_child_had_started_is_killed_at_once_and_not_again_later(monkeypatch):
    """Later, its process group may be another's."""
    killed = []
    killpg = os.killpg
    monkeypatch.setattr(os, "killpg", lambda *sent: killed.append(sent) or killpg(*sent))
    code = (
        "import subprocess\n"
        "left = subprocess.Popen(['sleep', '600'])  # It has the child's pipes.\n"
        "print('listening', left.pid, flush=True)\n"
    )

    async def run():
        child = Child("short", Role.LLM, [sys.executable, "-c", code], dict(os.environ))
        await child.start()
        assert await asyncio.wait_for(child.wait(), 60) == 0
        sent = (child.pid, signal.SIGKILL)
        assert killed == [sent] and not child.running
        await child.stop(60, asyncio.Event())
        child.hang_up()
        child.kill()
        assert killed == [sent]
        return int(child.address)

    left = asyncio.run(run())
    wait_for("the end of what it started", lambda: not alive(left))


@pytest.mark.process
def test_a_running_child_is_killed_with_what_it_started():
    code = (
        "import subprocess, time\n"
        "print('listening', subprocess.Popen(['sleep', '600']).pid, flush=True)\n"
        "time.sleep(600)\n"
    )

    async def run():
        child = Child("long", Role.LLM, [sys.executable, "-c", code], dict(os.environ))
        await child.start()
        left = int(await asyncio.wait_for(child.listening(), 60))
        child.kill()
        assert await asyncio.wait_for(child.wait(), 60) == -signal.SIGKILL
        return left

    left = asyncio.run(run())
    wait_for("the end of what it started", lambda: not alive(left))


class Closed(io.TextIOBase):
    """stderr after its terminal was closed."""

    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.process
def test_a_closed_terminal_stops_no_child(monkeypatch):
    """Its lines are read all the same: a full pipe would hold it up for ever."""
    monkeypatch.setattr(sys, "stderr", Closed())
    code = (
        "import sys; [print('x' * 99, file=sys.stderr) for _ in range(5000)]; print('listening a')"
    )

    async def run():
        child = Child("chatty", Role.LLM, [sys.executable, "-c", code], dict(os.environ))
        await child.start()
        assert await asyncio.wait_for(child.wait(), 60) == 0
        assert child.address == "a"

    asyncio.run(run())


def test_the_gateways_own_variables_are_kept_from_workers(monkeypatch):
    for name in ("HOST", "PORT", "METRICS_PORT", "ADVERTISE"):
        monkeypatch.setenv(f"OPTICNERVE_{name}", "9100")
    monkeypatch.setenv("OPTICNERVE_THREADS", "3")
    made = up.Commands(UpConfig(), {"parent_pid": 1}).workers()
    for worker in made:
        mine = {name for name in worker.environment if name.startswith("OPTICNERVE_")}
        assert mine == {"OPTICNERVE_THREADS"}
        assert worker.environment["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OPTICNERVE_THREADS", "three")
    with pytest.raises(StartupError, match="OPTICNERVE_THREADS"):
        up.Commands(UpConfig(), {"parent_pid": 1})


@pytest.mark.parametrize(
    ("cores", "encoders", "llms", "of_encoders", "of_llms"),
    [(1, 1, 1, 1, 1), (2, 1, 1, 2, 2), (2, 2, 1, 1, 2), (2, 3, 3, 1, 1), (64, 4, 4, 16, 16)],
)
def test_each_pool_divides_all_cores(cores, encoders, llms, of_encoders, of_llms, monkeypatch):
    """One request alone, encoded and then decoded, has every core; and a pool never has more
    threads than there are cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    settings = UpConfig(encoders=encoders, llms=llms)
    for given, share in (({}, None), ({"threads": 7}, 7)):
        for worker in up.Commands(settings, {"parent_pid": 1, **given}).workers():
            want = share or (of_encoders if worker.name.startswith("encoder") else of_llms)
            assert worker.environment["OMP_NUM_THREADS"] == str(want)
            command = worker.command
            assert command[command.index("--threads") + 1] == str(want)


@pytest.mark.parametrize("flag", ["--port", "--metrics-port"])
def test_a_port_that_is_taken_is_found_before_anything_starts(flag, monkeypatch):
    monkeypatch.setattr(up, "Supervisor", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = rf"cannot listen on 127.0.0.1:{port}: address already in use; .*{flag}"
        with pytest.raises(StartupError, match=message):
            up.main(["--port", "0", flag, str(port)])


def test_a_metrics_host_is_for_every_service_and_is_tried_before_anything_starts(monkeypatch):
    commands = up.Commands(UpConfig(), {"parent_pid": 1, "metrics_host": "127.0.0.2"})
    for made in (*commands.workers(), commands.gateway([], [])):
        command = made.command
        assert command[command.index("--metrics-host") + 1] == "127.0.0.2"
    monkeypatch.setattr(up, "Supervisor", None)
    nobodys = "192.0.2.1"  # Of documentation alone: no interface has it.
    with pytest.raises(StartupError, match=rf"cannot listen on {nobodys}:0: .*--metrics-host"):
        up.main(["--port", "0", "--metrics-host", nobodys])


def test_a_gateway_may_take_the_shutdown_delay_and_the_drain_before_it_is_killed(monkeypatch):
    class Caught(Exception):
        pass

    def supervisor(*services, stop_timeout_s, **settings):
        raise Caught(stop_timeout_s)

    monkeypatch.setattr(up, "Supervisor", supervisor)
    with pytest.raises(Caught) as caught:
        up.main(["--port", "0", "--shutdown-delay-s", "60", "--drain-timeout-s", "100"])
    assert caught.value.args[0] > 160


def test_a_key_file_that_is_missing_is_found_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(up, "Supervisor", None)
    with pytest.raises(StartupError, match="key file"):
        up.main(["--port", "0", "--api-key-file", str(tmp_path / "none")])
