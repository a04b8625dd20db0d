"""Media fetch against every way around its guards: addresses, redirects, names, TLS."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

import pytest

from gateway.media.fetch import MediaFetcher
from opticnerve.errors import InvalidRequest, MediaFetchFailed
from tests.media_server import BODY, FakeResolver, Server, fails, run

# ---- addresses


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "0.0.0.0",
        "169.254.169.254",
        "10.1.2.3",
    ],
)
def test_private_addresses_are_refused(host: str) -> None:
    async def work(server: Server, fetch: MediaFetcher) -> None:
        with pytest.raises(InvalidRequest, match="not public") as caught:
            await fetch.fetch(server.url("/ok", host))
        assert caught.value.code == "media_address_not_allowed"
        assert server.heads == []

    run(work, allow_private_media=False)


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "0x7f.1", "127.1", "1."])
def test_odd_numbers_for_hosts_are_refused(host: str) -> None:
    async def work(server: Server, fetch: MediaFetcher) -> None:
        with pytest.raises(InvalidRequest, match="dotted decimal"):
            await fetch.fetch(server.url("/ok", host))

    run(work)


def test_a_name_with_one_private_address_is_refused() -> None:
    resolver = FakeResolver(mixed_example=["93.184.216.34", "10.0.0.1"])

    async def work(server: Server, fetch: MediaFetcher) -> None:
        with pytest.raises(InvalidRequest, match="not public") as caught:
            await fetch.fetch("http://mixed.example/x")
        assert "10.0.0.1" not in caught.value.message

    run(work, allow_private_media=False, resolve=resolver)


def test_a_redirect_to_a_private_address_is_refused() -> None:
    """The server stands for a public one: its address alone is allowed."""
    resolver = FakeResolver(public_example=["127.0.0.1"], inner_example=["127.0.0.2"])

    async def work(server: Server, fetch: MediaFetcher) -> None:
        for inner in ("http://inner.example/ok", "http://169.254.169.254/latest/meta-data"):
            resolver.names["169.254.169.254"] = ["169.254.169.254"]
            with pytest.raises(InvalidRequest, match="not public"):
                await fetch.fetch(server.url(f"/to/{inner}", "public.example"))
        assert len(server.heads) == 2

    only = {"is_allowed": lambda address: address == "127.0.0.1"}
    run(work, allow_private_media=False, resolve=resolver, fetcher=only)


@pytest.mark.parametrize(
    "to", ["file:///etc/passwd", "ftp://host/x", "http://user:secret@host/", "data:,secret"]
)
def test_redirects_to_other_schemes_are_refused(to: str) -> None:
    fails(f"/to/{to}", MediaFetchFailed, "redirected to a URL that is not fetched")


def test_the_checked_address_is_the_one_connected_to() -> None:
    """A name that changes its answer between check and fetch gains nothing: it is asked once a
    hop, and every hop is checked."""
    resolver = FakeResolver(rebinding_example=[["127.0.0.1"], ["127.0.0.2"]])
    only = {"is_allowed": lambda address: address == "127.0.0.1"}

    async def work(server: Server, fetch: MediaFetcher) -> None:
        assert await fetch.fetch(server.url("/ok", "rebinding.example")) == BODY
        assert resolver.asked == ["rebinding.example"]
        resolver.names["rebinding.example"] = [["127.0.0.1"], ["127.0.0.2"]]
        with pytest.raises(InvalidRequest, match="not public"):
            await fetch.fetch(server.url("/hops/1", "rebinding.example"))
        assert len(server.heads) == 2

    run(work, allow_private_media=False, resolve=resolver, fetcher=only)


def test_only_allowed_domains() -> None:
    resolver = FakeResolver(
        img_good_example=["127.0.0.1"], good_example=["127.0.0.1"], notgood_example=["127.0.0.1"]
    )

    async def work(server: Server, fetch: MediaFetcher) -> None:
        for host in ("good.example", "img.good.example"):
            assert await fetch.fetch(server.url("/ok", host)) == BODY
        bad = server.url("/ok", "notgood.example")
        for url in (bad, server.url(f"/to/{bad}", "good.example")):
            with pytest.raises(InvalidRequest, match="not fetched from this host"):
                await fetch.fetch(url)

    run(work, allowed_media_domains=("Good.example",), resolve=resolver)


def test_remote_media_switched_off() -> None:
    fails("/ok", InvalidRequest, "fetches no URLs", allow_remote_media=False)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "picture.png",
        "/etc/passwd",
        "ftp://host/x",
        "gopher://host/x",
        "http://",
        "http:///path",
        "http://user:pass@127.0.0.1/x",
        "http://user@127.0.0.1/x",
        "https://a\\@b/",
        "http://ex%61mple.com/",
        "http://[fe80::1%25eth0]/",
        "http://[::1/",
        "http://a:0/",
        "http://a:99999/",
        "http://a:b/",
        "http://a b/",
        "http://a\nb/",
        "http://" + "a" * 20_000,
        "http://①②⑦.0.0.1/",
    ],
)
def test_urls_that_are_not_read(url: str) -> None:
    async def work(server: Server, fetch: MediaFetcher) -> None:
        with pytest.raises(InvalidRequest) as caught:
            await fetch.fetch(url)
        assert len(caught.value.message) < 300

    run(work, resolve=FakeResolver())


# ---- TLS


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(certificate, key) of pictures.example, signed by itself."""
    where = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=pictures.example"),
            *("-addext", "subjectAltName=DNS:pictures.example"),
            *("-keyout", str(where / "key.pem"), "-out", str(where / "cert.pem")),
        ],
        check=True,
        capture_output=True,
    )
    return where / "cert.pem", where / "key.pem"


@pytest.mark.process
def test_tls_is_checked_against_the_name_not_the_address(certificate: tuple[Path, Path]) -> None:
    serving_tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    serving_tls.load_cert_chain(*certificate)
    names: list[str | None] = []
    serving_tls.sni_callback = lambda _socket, name, _context: names.append(name)
    trusting = ssl.create_default_context(cafile=str(certificate[0]))
    resolver = FakeResolver(pictures_example=["127.0.0.1"], other_example=["127.0.0.1"])

    async def work(server: Server, fetch: MediaFetcher) -> None:
        good = server.url("/ok", "pictures.example", "https")
        assert await fetch.fetch(good) == BODY
        assert names == ["pictures.example"]
        with pytest.raises(MediaFetchFailed, match="could not connect"):
            await fetch.fetch(server.url("/ok", "other.example", "https"))

    run(work, tls=serving_tls, resolve=resolver, fetcher={"tls": trusting})


@pytest.mark.process
def test_unknown_certificates_are_refused(certificate: tuple[Path, Path]) -> None:
    serving_tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    serving_tls.load_cert_chain(*certificate)

    async def work(server: Server, fetch: MediaFetcher) -> None:
        with pytest.raises(MediaFetchFailed, match="could not connect"):
            await fetch.fetch(server.url("/ok", "pictures.example", "https"))

    run(work, tls=serving_tls, resolve=FakeResolver(pictures_example=["127.0.0.1"]))
