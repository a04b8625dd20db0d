"""``opticnerve ask`` (and ``demo --url``) as commands: what is typed, and what is said to it."""

import http.server
import json
import threading
from contextlib import contextmanager

import pytest
from PIL import Image

from opticnerve.addresses import gateway_url
from opticnerve.cli import ask
from opticnerve.cli import commands as cli
from tests.system import free_port

QUESTION = "What is this?"
CHUNKS = [{"choices": [{"delta": {"content": text}}]} for text in ("A ", "star.")]


@contextmanager
def gateway(status=200, kind="text/event-stream", text=None):
    """(its URL, what it was asked: path and body of each request)"""
    asked = []
    lines = [*map(json.dumps, CHUNKS), "[DONE]"]
    answer = text if text is not None else "".join(f"data: {line}\n\n" for line in lines)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            asked.append((self.path, json.loads(body)))
            self.send_response(status)
            self.send_header("content-type", kind)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with a picture, a text, a directory and what has the name of a question."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30)).save("photo.png")
    Image.new("RGB", (40, 30)).save("a:b.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "photos").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "behind", ["", "/", "/v1", "/v1/", "/v1/chat/completions", "/v1/chat/completions/"]
)
def test_a_url_with_and_without_its_route(behind, here, capsys):
    with gateway() as (url, asked):
        assert cli.main(["ask", "photo.png", "a:b.png", QUESTION, "--url", url + behind]) == 0
        assert cli.main(["ask", QUESTION, "--url", url.removeprefix("http://") + behind]) == 0
    assert [path for path, _ in asked] == ["/v1/chat/completions"] * 2
    *pictures, text = asked[0][1]["messages"][0]["content"]
    assert text["text"] == QUESTION and len(pictures) == 2
    assert capsys.readouterr().out == "A star.\n" * 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("https://host/proxy/v1", "https://host/proxy"),
        ("HTTP://[::1]:8000/v1", "http://[::1]:8000"),
        ("host", "http://host"),
        ("http://name:word@host:8000", "http://name:word@host:8000"),
        ("http://host/v1beta", "http://host/v1beta"),
    ],
)
def test_addresses_of_gateways(given, expected):
    assert gateway_url(given) == expected


@pytest.mark.parametrize("command", [["ask", "hi"], ["demo"]])
@pytest.mark.parametrize(
    "url", ["ftp://host", "http://", "", "host:99999", "http://host:x", "http://[::1", "host?a=1"]
)
def test_what_is_no_address_is_refused_at_once(command, url, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([*command, "--url", url])
    assert exit.value.code == 2
    assert f"--url: {url!r} is no address such as http://" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([QUESTION, "photo.png"], f"which comes last: opticnerve ask photo.png '{QUESTION}'"),
        (
            [QUESTION, "photo.png", "a:b.png"],
            f"which comes last: opticnerve ask photo.png a:b.png '{QUESTION}'",
        ),
        (
            [QUESTION, "https://example.com/a.png"],
            f"which comes last: opticnerve ask https://example.com/a.png '{QUESTION}'",
        ),
        (["photo.png"], "there is no question: opticnerve ask photo.png 'What is"),
        (["photo.png", "a:b.png"], "there is no question: opticnerve ask photo.png a:b.png 'What"),
        (["photos", QUESTION], "photos is a directory; give the pictures in it"),
        ([QUESTION, "photos"], "photos is a directory; give the pictures in it"),
        (["photos"], "photos is a directory; give the pictures in it"),
        (["none.png", QUESTION], "none.png: no such file"),
        (["c:none.png", QUESTION], "c:none.png: no such file"),
        (["photo.png", "none.png", QUESTION], "none.png: no such file"),
        (["ftp://host/a.png", QUESTION], "no such file; a URL begins with http:// or https://"),
        (["notes.txt", QUESTION], "notes.txt: the bytes are no known picture format; PNG, JPEG"),
        (["photo.png", "empty.png", QUESTION], "empty.png: the picture is empty"),
    ],
)
def test_what_is_typed_wrongly_is_told_before_anything_starts(
    words, told, here, capsys, monkeypatch
):
    monkeypatch.setattr(ask, "serve", None)
    with gateway() as (url, asked):
        for more in ([], ["--url", url]):
            assert cli.main(["ask", *words, *more]) == 2
            error = capsys.readouterr().err
            assert error.startswith("opticnerve: ") and told in error and error.count("\n") == 1
    assert not asked


def test_a_file_that_may_not_be_read(here, capsys, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    assert cli.main(["ask", "photo.png", QUESTION]) == 2
    assert capsys.readouterr().err == (
        "opticnerve: cannot read the picture photo.png: Permission denied\n"
    )


@pytest.mark.parametrize("command", [["ask", QUESTION], ["demo"]])
def test_no_gateway_at_the_url(command, capsys):
    url = f"http://127.0.0.1:{free_port()}"
    assert cli.main([*command, "--url", f"{url}/v1"]) == 1
    error = capsys.readouterr().err
    assert f"nothing answers at {url} (" in error and "opticnerve up" in error
    assert "Traceback" not in error and "v1" not in error


@pytest.mark.parametrize("command", [["ask", QUESTION], ["demo"]])
@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"kind": "text/html", "text": "<html>"}, "no gateway; check --url"),
        ({"status": 404, "kind": "text/html", "text": "<html>"}, "status 404"),
        ({"text": "data: {\n\n"}, "no gateway; check --url"),
        ({"text": "data: [1]\n\n"}, "no gateway; check --url"),
        ({"text": "data: {}\n\n"}, "no gateway; check --url"),
        ({"text": ""}, "ended early"),
        (
            {"status": 400, "text": '{"error": {"message": "too long", "type": "t"}}'},
            "opticnerve: too long\n",
        ),
    ],
)
def test_what_answers_is_no_gateway(command, answer, told, capsys):
    with gateway(**answer) as (url, _):
        assert cli.main([*command, "--url", url]) == 1
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
