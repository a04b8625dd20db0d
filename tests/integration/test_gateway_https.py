"""HTTPS on real sockets, with real certificates: who is served, who is refused, what is renewed,
and what a client that never finishes a handshake can take from others."""

import _ssl
import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import socket
import ssl

import httpx2
import pytest
from websockets.asyncio.client import connect

from gateway.edge import tls
from gateway.edge.connections import Wait
from gateway.edge.http1 import Connection
from gateway.edge.tls import MAX_EMPTY_RECORDS, RECORD_BYTES, Handshake, Https, TlsSession
from opticnerve.certificates import PemFiles, context_trusting
from opticnerve.cli import commands as cli
from opticnerve.cli import health
from opticnerve.config import GatewayConfig
from opticnerve.config.gateway import HttpsConfig
from opticnerve.errors import ConfigError
from tests.certificates import Authority
from tests.fakes import until
from tests.gateways import body, connected, data_url, ids, rest, stack, user

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.usefixtures("one_loop"),
    pytest.mark.slow,
    pytest.mark.process,  # openssl, which makes the certificates.
]
GET = b"GET /live HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


def https_stack(pair, client_ca=None, **settings):
    return stack(https=HttpsConfig(pair.certificate, pair.key, client_ca), **settings)


@contextlib.asynccontextmanager
async def caller(s, context):
    async with httpx2.AsyncClient(
        base_url=s.server.address, verify=context, trust_env=False, timeout=60
    ) as client:
        yield client


async def is_served(s, context):
    """Whether a client with its own connection is answered."""
    try:
        async with caller(s, context) as client:
            return (await client.get("/live")).status_code == 200
    except (httpx2.TransportError, ssl.SSLError):
        return False


def trusting(authority, own=None):
    files = (own.certificate, own.key) if own else (None, None)
    return PemFiles(*files, authority.certificate).client_context()


@contextlib.asynccontextmanager
async def encrypted(s, context):
    """(reader, writer) of an encrypted connection."""
    port = s.client.base_url.port
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_chats_with_pictures_are_answered_over_https(authority):
    async with https_stack(authority.issue("gateway")) as s:
        assert s.server.address.startswith("https://")
        async with caller(s, trusting(authority)) as client:
            picture = data_url(size=(400, 400))
            answer = await client.post(
                "/v1/chat/completions", json=body(user("What?", picture), padding=None)
            )
            assert answer.status_code == 400 and "padding" in answer.text
            answer = await client.post("/v1/chat/completions", json=body(user("What?", picture)))
            assert answer.json()["choices"][0]["message"]["content"] == "Hello there."
            padded = json.dumps(body(stream=True)).encode().ljust(2**21)
            answer = await client.post("/v1/chat/completions", content=padded)
            assert answer.text.endswith("data: [DONE]\n\n")
        async with encrypted(s, trusting(authority)) as (reader, writer):
            tunnel = writer.get_extra_info("ssl_object")
            assert tunnel.version() == "TLSv1.3"
            writer.write(GET + GET)
            for _ in range(2):
                assert b" 200 OK" in await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(len(b'{"status":"live"}'))
            writer.write(b"GET /live HTTP/1.1\n\n")
            assert b"HTTP/1.1 400 " in await rest(reader)


async def test_old_versions_of_tls_are_refused(authority):
    async with https_stack(authority.issue("gateway"), encoders=0) as s:
        context = trusting(authority)
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        with pytest.warns(DeprecationWarning):
            context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")
        assert not await is_served(s, context)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        assert await is_served(s, context)


async def test_clients_prove_who_they_are(authority, tmp_path):
    stranger = Authority(tmp_path, "other").issue("stranger", "client")
    known = authority.issue("client", "client")
    pair = authority.issue("gateway")
    async with https_stack(pair, authority.certificate, encoders=0) as s:
        assert await is_served(s, trusting(authority, known))
        assert not await is_served(s, trusting(authority))
        assert not await is_served(s, trusting(authority, stranger))
        await until(lambda: not s.server.server_state.connections)
        url, flags = s.server.address, ["--live", "--tls-ca", authority.certificate]
        assert await asyncio.to_thread(health.main, [url, *flags]) == 1
        own = ["--tls-certificate", known.certificate, "--tls-key", known.key]
        assert await asyncio.to_thread(health.main, [url, *flags, *own]) == 0


async def test_a_health_check_knows_the_gateway_by_its_authority_and_name(authority, capsys):
    async with https_stack(authority.issue("gateway", "api.test"), encoders=0) as s:
        flags = [s.server.address, "--live"]
        assert await asyncio.to_thread(health.main, flags) == 1
        flags += ["--tls-ca", authority.certificate]
        assert await asyncio.to_thread(health.main, flags) == 1
        assert "mismatch" in capsys.readouterr().err
        assert await asyncio.to_thread(health.main, [*flags, "--tls-server-name", "api.test"]) == 0


async def test_new_connections_see_the_renewed_certificate(authority, tmp_path, caplog):
    pair = authority.issue("gateway")
    async with https_stack(pair, encoders=0) as s, caller(s, trusting(authority)) as before:
        assert (await before.get("/live")).status_code == 200
        other = Authority(tmp_path, "other")
        renewed = other.issue("renewed")
        shutil.copy(renewed.certificate, pair.certificate)
        assert await is_served(s, trusting(authority)), "with the key of another certificate"
        assert [each for each in caplog.messages if "stay in use" in each]
        shutil.copy(renewed.key, pair.key)
        assert await is_served(s, trusting(other))
        assert not await is_served(s, trusting(authority))
        assert (await before.get("/live")).status_code == 200


async def test_plain_http_is_closed_without_an_answer(authority):
    async with https_stack(authority.issue("gateway"), encoders=0) as s:
        async with connected(s) as (reader, writer):
            writer.write(GET)
            assert not (await rest(reader)).startswith(b"HTTP")
        assert await is_served(s, trusting(authority))


async def test_a_command_says_that_it_does_not_trust_the_certificate(authority, capsys):
    async with https_stack(authority.issue("server")) as s:
        asked = ["ask", "What?", "--url", s.server.address]
        assert await asyncio.to_thread(cli.main, asked) == 1
    error = capsys.readouterr().err
    assert "is not trusted" in error and "SSL_CERT_FILE" in error
    assert "nothing answers" not in error


async def test_commands_show_their_certificate_to_a_gateway_that_asks_for_one(
    authority, tmp_path, capsys
):
    pair, known = authority.issue("gateway", "127.0.0.1"), authority.issue("client")
    requests, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    request = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body()}
    requests.write_text(json.dumps(request) + "\n")
    trusted = ["--tls-ca", authority.certificate]
    own = ["--tls-certificate", known.certificate, "--tls-key", known.key]
    async with https_stack(pair, authority.certificate) as s:
        url = s.server.address
        for command in (
            ["ask", "What?", "--url", url],
            ["batch", str(requests), str(answers), "--url", url],
            ["bench", "serve", url, "--requests", "2", "--pictures", "0", "--warm-up", "0"],
        ):
            assert await asyncio.to_thread(cli.main, [*command, *trusted]) in (1, 2)
            assert await asyncio.to_thread(cli.main, [*command, *own]) in (1, 2)
            assert "Traceback" not in capsys.readouterr().err
            assert await asyncio.to_thread(cli.main, [*command, *trusted, *own]) == 0
    assert "Hello there." in answers.read_text()
    assert "2 answered" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["ask", "What?"], ["bench", "serve", "http://127.0.0.1:9"]])
def test_flags_of_tls_are_refused_where_they_mean_nothing(command, capsys):
    if command[0] == "ask":
        assert cli.main([*command, "--tls-ca", "ca.pem"]) == 2
        assert "--tls-ca is for a gateway at --url" in capsys.readouterr().err
        command = [*command, "--url", "http://127.0.0.1:9"]
    assert cli.main([*command, "--tls-ca", "ca.pem"]) != 0
    assert "--tls-ca is for a URL of https://" in capsys.readouterr().err


async def test_realtime_sessions_are_held_over_https(authority):
    async with https_stack(authority.issue("gateway")) as s:
        url = s.server.address.replace("https", "wss") + "/v1/realtime?model=model"
        async with connect(url, ssl=trusting(authority), proxy=None) as session:
            assert json.loads(await session.recv())["type"] == "session.created"
            content = [{"type": "input_text", "text": "x" * 200_000}]
            item = {"type": "message", "role": "user", "content": content}
            await session.send(json.dumps({"type": "conversation.item.create", "item": item}))
            assert json.loads(await session.recv())["type"].startswith("conversation.item.")


async def test_records_may_come_in_crumbs_and_hold_crumbs(authority):
    """A handshake and a request, byte by byte; then a body of tiny chunks in few records."""
    sent = json.dumps(body()).encode().ljust(20_000)
    crumbs = b"".join(b"1\r\n%c\r\n" % byte for byte in sent) + b"0\r\n\r\n"
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        b"transfer-encoding: chunked\r\n\r\n"
    )
    async with https_stack(authority.issue("gateway")) as s, connected(s) as (reader, writer):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = trusting(authority).wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")

        async def send(step=1):
            data = outgoing.read()
            for begin in range(0, len(data), step):
                writer.write(data[begin : begin + step])
                await writer.drain()

        async def go_on(call):
            while True:
                try:
                    return call()
                except ssl.SSLWantReadError:
                    await send()
                    incoming.write(await reader.read(2**16))

        await go_on(client.do_handshake)
        client.write(head)
        await send()
        client.write(crumbs)
        await send(2**20)
        assert (await go_on(lambda: client.read(2**14))).startswith(b"HTTP/1.1 200 ")


async def test_what_a_client_has_not_read_is_unsent(authority):
    """The connection waits for its reader, and is closed if that stalls."""
    settings = {"stall_timeout_s": 1.0, "tokens": ids("Hello there. ") * 500}
    asked = json.dumps(body(stream=True, n=16, logprobs=True, top_logprobs=20)).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n"
    async with https_stack(authority.issue("gateway"), **settings) as s:
        port = s.client.base_url.port
        with socket.socket() as plain:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await asyncio.to_thread(plain.connect, ("127.0.0.1", port))
            context = trusting(authority)
            client = await asyncio.to_thread(
                context.wrap_socket, plain, server_hostname="127.0.0.1"
            )
            with client:
                client.sendall(head % len(asked) + asked)
                await until(lambda: s.server.server_state.connections)
                (held,) = s.server.server_state.connections
                await until(lambda: held.wait is Wait.READER)
                assert held.transport.get_write_buffer_size() > 0
                await until(lambda: not s.server.server_state.connections)
        await until(s.idle)


async def test_a_connection_s_buffers_hold_one_record(authority, monkeypatch):
    """However large an answer is: OpenSSL does not shrink them."""
    flush, unsent = TlsSession._flush, []

    def counted(session):
        unsent.append(session._outgoing.pending)
        flush(session)

    monkeypatch.setattr(TlsSession, "_flush", counted)
    async with (
        https_stack(authority.issue("gateway"), tokens=ids("Hello there. ") * 100) as s,
        caller(s, trusting(authority)) as client,
    ):
        asked = body(n=16, logprobs=True, top_logprobs=20)
        answer = await client.post("/v1/chat/completions", json=asked)
        assert len(answer.content) > 8 * RECORD_BYTES
    assert RECORD_BYTES < max(unsent) < RECORD_BYTES + 2**10


def renew_keys(client):
    """Sends a record that renews a connection's keys, and asks the server to renew its own."""
    library, field = ctypes.CDLL(_ssl.__file__), ctypes.sizeof(ctypes.c_void_p)
    if not hasattr(library, "SSL_key_update"):
        pytest.skip("this Python does not show its OpenSSL")
    session = ctypes.c_void_p.from_address(id(client._sslobj) + object.__basicsize__ + field)
    assert library.SSL_key_update(session, 1) == 1
    client.do_handshake()


async def test_records_without_data_are_bounded(authority):
    """A record of new keys is small, and takes much time."""
    async with https_stack(authority.issue("gateway"), encoders=0) as s:

        def ask(renewals):
            there = ("127.0.0.1", s.client.base_url.port)
            with (
                socket.create_connection(there, 30) as plain,
                trusting(authority).wrap_socket(plain, server_hostname="127.0.0.1") as client,
                contextlib.suppress(OSError),
            ):
                for most in renewals:
                    for _ in range(most):
                        renew_keys(client)
                    client.sendall(GET)
                    if not client.recv(2**14):
                        return False
                return True
            return False

        assert await asyncio.to_thread(ask, [MAX_EMPTY_RECORDS] * 2)
        assert not await asyncio.to_thread(ask, [MAX_EMPTY_RECORDS + 1])


async def test_a_bug_in_a_later_turn_closes_the_connection(authority, monkeypatch):
    receive, loop, bugs = Connection.data_received, asyncio.get_running_loop(), []
    handler = loop.get_exception_handler()

    def failing(connection, data):
        if connection._received:
            raise RuntimeError("a bug")
        receive(connection, data)

    monkeypatch.setattr(Connection, "data_received", failing)
    async with (
        https_stack(authority.issue("gateway"), encoders=0) as s,
        encrypted(s, trusting(authority)) as (_, writer),
    ):
        loop.set_exception_handler(lambda _, context: bugs.append(context["exception"]))
        try:
            writer.write(GET[:5])  # Both records arrive at once.
            writer.write(GET[5:])
            await until(lambda: bugs)
        finally:
            loop.set_exception_handler(handler)
        await until(lambda: not s.server.server_state.connections)


# ---- handshakes that do not end


async def test_a_handshake_that_does_not_end_is_closed(authority, monkeypatch):
    monkeypatch.setattr(tls, "HANDSHAKE_TIMEOUT_S", 0.3)
    async with https_stack(authority.issue("gateway"), encoders=0) as s:
        async with connected(s) as (silent, _), connected(s) as (partial, writer):
            writer.write(b"\x16\x03\x01")
            assert await rest(silent) == await rest(partial) == b""
        assert await is_served(s, trusting(authority))


async def test_handshakes_are_bounded_with_all_connections_and_keep_nobody_out(authority):
    def files():
        return len(os.listdir("/proc/self/fd"))

    most = 20
    async with (
        https_stack(authority.issue("gateway"), encoders=0, max_connections=most) as s,
        encrypted(s, trusting(authority)) as (reader, writer),
    ):
        before = files()
        served, there = s.server.server_state.connections, ("127.0.0.1", s.client.base_url.port)
        silent = [socket.create_connection(there, None, ("127.0.0.2", 0)) for _ in range(99)]
        try:
            await until(lambda: len(served) == most)
            assert sum(isinstance(each, Handshake) for each in served) == most - 1
            await until(lambda: files() - before <= len(silent) + most)
            assert await is_served(s, trusting(authority))
            writer.write(GET)
            assert b" 200 OK" in await reader.readuntil(b"\r\n")
        finally:
            for each in silent:
                each.close()


async def test_one_address_has_its_bound_in_handshakes_too(authority):
    pair = authority.issue("gateway")
    async with (
        https_stack(pair, encoders=0, max_connections_per_address=1) as s,
        connected(s, "127.0.0.2"),
        connected(s, "127.0.0.2") as (second, _),
    ):
        assert await rest(second) == b""
        assert await is_served(s, trusting(authority))


async def test_a_stopped_gateway_waits_for_no_handshake(authority):
    pair = authority.issue("gateway")
    async with (
        https_stack(pair, encoders=0, drain_timeout_s=60.0) as s,
        connected(s) as (reader, _),
    ):
        await until(lambda: s.server.server_state.connections)
        s.server.running.stop()
        assert await asyncio.wait_for(rest(reader), 30) == b""


# ---- files


def test_files_that_make_no_server_are_refused(authority, tmp_path):
    one, other = authority.issue("one"), authority.issue("other")
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    with pytest.raises(ConfigError, match="cannot read"):
        Https(str(tmp_path / "none"), one.key)
    with pytest.raises(ConfigError, match="are not a certificate in PEM and its private key"):
        Https(one.certificate, other.key)
    with pytest.raises(ConfigError, match="holds no certificates"):
        Https(one.certificate, one.key, str(nonsense))
    with pytest.raises(ConfigError, match="holds no certificate"):
        context_trusting(nonsense)
    for wrong in ({"https_key": one.key}, {"https_client_ca": authority.certificate}):
        with pytest.raises(ConfigError, match="--https"):
            GatewayConfig(https=HttpsConfig(**wrong))


def test_an_expired_certificate_is_served_with_a_warning(authority, caplog):
    valid, expired = authority.issue("valid"), authority.issue_expired("expired")
    Https(valid.certificate, valid.key)
    assert not caplog.messages
    Https(expired.certificate, expired.key)
    assert "expired.pem: certificate has expired" in caplog.text
