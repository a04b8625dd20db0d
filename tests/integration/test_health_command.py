"""``opticnerve health`` against workers and a gateway: the line that it prints, and its status."""

import asyncio
import contextlib
import socket
import threading

import pytest

from opticnerve.cli import health
from tests.fakes import until
from tests.gateways import stack
from tests.system import free_port

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop"), pytest.mark.slow]


async def ask(capsys, address, *flags):
    """(exit status, the line that was printed without the address)"""
    status = await asyncio.to_thread(health.main, [address, *flags])
    told = capsys.readouterr()
    lines = [line for line in (told.out, told.err)[status].splitlines() if address in line]
    return status, lines[-1].removeprefix(address).strip()


async def test_a_worker_serves_or_is_only_live(capsys):
    async with stack() as s:
        address = s.encoder.address
        assert await ask(capsys, address) == (0, "is serving")
        await s.encoder.set_serving(False)
        status, told = await ask(capsys, address)
        assert status == 1 and told.startswith("is not serving: ")
        assert await ask(capsys, address, "--live") == (0, "is live")
    status, told = await ask(capsys, address, "--live")
    assert status == 1 and told.startswith("does not answer: UNAVAILABLE: ")
    assert "Connection refused" in told


async def test_a_gateway_is_ready_or_only_live(capsys):
    async with stack(ready=False, encoders_serve=False) as s:
        url = s.server.address
        status, told = await ask(capsys, url)
        assert status == 1 and told.startswith("is not ready: ") and "encoder" in told
        assert await ask(capsys, url, "--live") == (0, "is live")
        await s.encoder.set_serving(True)
        await until(lambda: not s.gateway.pipeline.pairing.missing())
        assert await ask(capsys, url) == (0, "is ready")


async def test_what_is_no_gateway(capsys):
    status, told = await ask(capsys, f"http://127.0.0.1:{free_port()}")
    assert status == 1 and told.startswith("does not answer: ")


async def test_an_answer_that_never_ends_is_given_up(capsys):
    """Each byte comes within the time limit, the answer does not."""
    ended = threading.Event()

    def drip(listener):
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nx: ")
                while not ended.wait(0.02):
                    connection.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        port = listener.getsockname()[1]
        try:
            status, told = await ask(capsys, f"http://127.0.0.1:{port}", "--timeout", "0.2")
        finally:
            ended.set()
            thread.join()
    assert (status, told) == (1, "does not answer within 0.2 s")


@pytest.mark.parametrize("address", ["", "worker", "worker:0", "ftp://worker:1", "http://"])
def test_a_wrong_address_is_refused(address, capsys):
    with pytest.raises(SystemExit) as exit:
        health.main([address])
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("opticnerve health: ADDRESS: ")
