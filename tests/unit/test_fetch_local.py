"""Media that need no network: data: and file: URLs."""

from __future__ import annotations

import base64
import contextlib
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.media import dataurl
from gateway.media.dataurl import read_data_url
from opticnerve.errors import InvalidRequest, MediaFetchFailed, PayloadTooLarge
from tests.media_server import BODY, fetch_only

# ---- data:


ENCODED = base64.b64encode(bytes(range(256))).decode()


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64," + ENCODED,
        "DATA:IMAGE/PNG;BASE64," + ENCODED,
        "data:;base64," + ENCODED,
        "data:image/png;charset=utf-8;base64," + ENCODED.rstrip("="),
        "data:image/png;base64," + ENCODED.replace("+", "-").replace("/", "_"),
        "data:image/png;base64,\n" + "\r\n ".join(ENCODED[i : i + 60] for i in range(0, 344, 60)),
        "data:image/png;base64," + ENCODED.replace("+", "%2B").replace("=", "%3D"),
        "data:," + "".join(f"%{byte:02x}" for byte in range(256)),
    ],
)
def test_data_urls(url: str) -> None:
    assert fetch_only(url) == bytes(range(256))


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64",
        "data:image/png;base64,secret!secret",
        "data:image/png;base64,AAAAA",
        "data:image/png;base64,AA=AA",
        "data:image/png;base64,ÄÖ",
        "data:image/png;base64,%zz",
        "data:image/png;base64,AAA=%0Asecret",
        "data:,secret%",
        "data:,secret%4",
        "data:,secret%\n",
        "data:,secret%=41",
        "data:" + ";base64" * 1000 + ",AAAA",
    ],
)
def test_data_urls_that_do_not_decode(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        fetch_only(url)
    assert caught.value.param == "here"
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize(
    "make",
    [
        lambda data: "data:;base64," + base64.b64encode(data).decode(),
        lambda data: "data:;base64, " + base64.b64encode(data).decode(),
        lambda data: "data:," + "a" * len(data),
        lambda data: "data:," + "%61" * len(data),
    ],
)
def test_data_urls_have_a_size_cap(make: Callable[[bytes], str], over: int) -> None:
    url = make(bytes(1000 + over))
    if over:
        with pytest.raises(PayloadTooLarge):
            fetch_only(url, max_media_bytes=1000)
    else:
        assert len(fetch_only(url, max_media_bytes=1000)) == 1000


@pytest.mark.parametrize("characters", [3, 4, 5, 7, 64])
@pytest.mark.parametrize(
    "url",
    [
        "data:;base64," + ENCODED,
        "data:;base64," + ENCODED.replace("+", "%2B").replace("=", "%3D"),
        "data:;base64," + " \n".join(ENCODED),
        "data:;base64," + "".join(f"%{ord(char):02X}%20" for char in ENCODED),
        "data:," + "".join(f"%{byte:02x}" for byte in range(256)),
    ],
)
def test_pieces_lose_nothing_where_they_meet(
    url: str, characters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataurl, "PIECE_CHARACTERS", characters)
    assert fetch_only(url) == bytes(range(256))


LONG = 2**21
NASTY = {
    "percent signs": "%",
    "percent-encoding": "%41",
    "spaced": "A ",
    "line breaks": "A\r\n",
    "white space": " ",
    "padding": "=",
    "other alphabets": "é",
}


def spent(work: Callable[[], object]) -> float:
    """Seconds of this thread's CPU that ``work`` takes, at best of three."""
    took = []
    for _ in range(3):
        before = time.thread_time()
        with contextlib.suppress(InvalidRequest, PayloadTooLarge):
            work()
        took.append(time.thread_time() - before)
    return min(took)


@pytest.mark.parametrize("head", ["data:,", "data:;base64,"])
@pytest.mark.parametrize("unit", NASTY.values(), ids=NASTY)
def test_a_long_data_url_takes_little_more_than_its_bytes(head: str, unit: str) -> None:
    """Whatever it is made of: memory for the bytes, twice, and a piece; time as base64 takes."""
    url = head + unit * (LONG // len(unit))
    tracemalloc.start()
    try:
        with contextlib.suppress(InvalidRequest, PayloadTooLarge):
            read_data_url(url, 2 * LONG)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(url.encode()) + 2**20
    plain = spent(lambda: read_data_url("data:;base64," + "A" * LONG, 2 * LONG))
    assert spent(lambda: read_data_url(url, 2 * LONG)) < 12 * plain


def test_the_head_of_a_data_url_is_bounded() -> None:
    url = "data:" + ";" * LONG + ";base64,AAAA"
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest, match="comma"):
            read_data_url(url, LONG)
        assert tracemalloc.get_traced_memory()[1] < LONG
    finally:
        tracemalloc.stop()


# ---- file:


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "outside").write_bytes(b"secret")
    media = tmp_path / "media"
    (media / "deep").mkdir(parents=True)
    (media / "a picture.png").write_bytes(BODY)
    (media / "deep" / "link").symlink_to(media / "a picture.png")
    (media / "escape").symlink_to(tmp_path / "outside")
    (media / "dangling").symlink_to(tmp_path / "nothing")
    os.mkfifo(media / "pipe")
    return media


@pytest.mark.parametrize("path", ["/a%20picture.png", "/deep/link", "/deep/../a%20picture.png"])
@pytest.mark.parametrize("host", ["", "localhost"])
def test_files_under_the_root(root: Path, path: str, host: str) -> None:
    assert fetch_only(f"file://{host}{root}{path}", allowed_media_root=str(root)) == BODY


@pytest.mark.parametrize(
    "path",
    [
        *("/../outside", "/%2e%2e/outside", "/escape", "/dangling", "/nothing", "/deep", "/pipe"),
        *("/\0", "/a%00", "/" + "a" * 5000),
    ],
)
def test_everything_else_looks_missing(root: Path, path: str) -> None:
    with pytest.raises(MediaFetchFailed, match="no such readable file") as caught:
        fetch_only(f"file://{root}{path}", allowed_media_root=str(root))
    assert str(root) not in caught.value.message


def test_other_files_are_refused(root: Path) -> None:
    with pytest.raises(InvalidRequest, match="reads no file"):
        fetch_only(f"file://{root}/deep/link")
    for url in ("file:///etc/passwd", f"file://elsewhere{root}/deep/link", "file:"):
        with pytest.raises(MediaFetchFailed):
            fetch_only(url, allowed_media_root=str(root))


def test_files_have_a_size_cap(root: Path) -> None:
    url = f"file://{root}/deep/link"
    with pytest.raises(PayloadTooLarge):
        fetch_only(url, allowed_media_root=str(root), max_media_bytes=len(BODY) - 1)
    exact = fetch_only(url, allowed_media_root=str(root), max_media_bytes=len(BODY))
    assert exact == BODY
