"""``opticnerve batch``: what a file may hold, what is asked and written, and how it goes on."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from opticnerve.cli import commands as cli
from opticnerve.cli.batch_files import LINE_START, AnswerFile
from tests.system import free_port, wait_for

CHAT = "/v1/chat/completions"


def line(name, url=CHAT, **changes):
    return {"custom_id": name, "method": "POST", "url": url, "body": {"of": name}, **changes}


def write(path, *lines):
    texts = [each if isinstance(each, str) else json.dumps(each) for each in lines]
    path.write_text("".join(text + "\n" for text in texts))
    return path


def read(path):
    return [json.loads(each) for each in path.read_text().splitlines()]


class Server:
    """Answers each request with its own body, unless ``script`` tells (status, headers, body) of a
    request, or None to hang up. ``asked``: each path and body; ``keys``: each Authorization."""

    def __init__(self, script=None):
        self.script = script or (lambda path, body: (200, {}, json.dumps({"echo": body})))
        self.asked = []
        self.keys = set()
        self.lock = threading.Lock()

    def answer(self, handler):
        self.keys.add(handler.headers["authorization"])
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self.lock:
            self.asked.append((handler.path, body))
        told = self.script(handler.path, body)
        if told is None:
            handler.connection.close()
            return
        status, headers, text = told
        handler.send_response(status)
        for name, value in {
            "content-length": len(text),
            "x-request-id": "req-1",
            **headers,
        }.items():
            handler.send_header(name, str(value))
        handler.end_headers()
        handler.wfile.write(text.encode())

    @contextmanager
    def url(self, status=200):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler):
                handler.send_response(status)
                handler.send_header("content-length", "0")
                handler.end_headers()

            def do_POST(handler):
                self.answer(handler)

            def log_message(self, *_):
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            server.daemon_threads = True
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_port}"
            finally:
                server.shutdown()
                thread.join()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return tmp_path


def batch(*arguments):
    return cli.main(["batch", "in.jsonl", "out.jsonl", *map(str, arguments)])


# ---- answers


def test_each_request_has_its_answer(here, capsys):
    names = [f"né-{i}" for i in range(50)]
    write(here / "in.jsonl", *(line(name, ["/v1/completions", CHAT][i % 2])
                               for i, name in enumerate(names)), "")  # fmt: skip
    server = Server()
    with server.url() as url:
        assert batch("--url", url + "/v1", "--concurrency", 7, "--api-key", "sk-1") == 0
    assert server.keys == {"Bearer sk-1"}
    assert sorted(server.asked, key=str) == sorted(
        [(["/v1/completions", CHAT][i % 2], {"of": name}) for i, name in enumerate(names)], key=str
    )
    answers = read(here / "out.jsonl")
    assert sorted(each["custom_id"] for each in answers) == sorted(names)
    for each in answers:
        assert set(each) == {"id", "custom_id", "response", "error"} and each["error"] is None
        told = {"echo": {"of": each["custom_id"]}}
        assert each["response"] == {"status_code": 200, "request_id": "req-1", "body": told}
        assert each["id"].startswith("batch_req_")
    assert "50 requests: 50 answered, 0 failed" in capsys.readouterr().err


def test_a_request_that_fails_has_the_servers_answer(here, capsys):
    told = {"error": {"message": "no", "type": "invalid_request_error", "param": "n", "code": None}}

    def script(path, body):
        if body["of"] == "html":
            return 200, {}, "<html>"
        return (200, {}, "{}") if body["of"] == "good" else (400, {}, json.dumps(told))

    write(here / "in.jsonl", line("good"), line("bad"), line("html"))
    with Server(script).url() as url:
        assert batch("--url", url, "--errors", "errors.jsonl") == 1
        assert "1 answered, 2 failed, see errors.jsonl" in capsys.readouterr().err
        assert [each["custom_id"] for each in read(here / "out.jsonl")] == ["good"]
        failed = {each["custom_id"]: each for each in read(here / "errors.jsonl")}
        assert failed["bad"]["response"] == {
            "status_code": 400, "request_id": "req-1", "body": told
        }  # fmt: skip
        assert failed["html"]["error"]["code"] == "invalid_answer"
        assert batch("--url", url, "--errors", "errors.jsonl") == 1  # Nothing is asked again.
        assert len(read(here / "errors.jsonl")) == 2
    with Server().url() as url:
        (here / "errors.jsonl").unlink()
        assert batch("--url", url, "--errors", "errors.jsonl") == 0
    assert len(read(here / "out.jsonl")) == 3


@pytest.mark.parametrize("status", [429, 503, None])
def test_a_server_that_is_busy_or_away_is_asked_again(status, here):
    refused = set()

    def script(path, body):
        if body["of"] not in refused:
            refused.add(body["of"])
            return None if status is None else (status, {"retry-after": "0"}, "{}")
        return 200, {}, "{}"

    write(here / "in.jsonl", *map(line, "abcdef"))
    server = Server(script)
    with server.url() as url:
        assert batch("--url", url) == 0
    assert len(server.asked) == 12
    assert sorted(each["custom_id"] for each in read(here / "out.jsonl")) == list("abcdef")


def test_retry_after_is_obeyed(here, monkeypatch):
    waited = []

    async def sleep(seconds):
        waited.append(seconds)

    monkeypatch.setattr("opticnerve.cli.batch.asyncio.sleep", sleep)
    server = Server(lambda *_: (429, {"retry-after": "7"}, "{}") if len(server.asked) < 3 else
                    (200, {}, "{}"))  # fmt: skip
    write(here / "in.jsonl", line("a"))
    with server.url() as url:
        assert batch("--url", url) == 0
    assert len(waited) == 2 and all(7 <= seconds <= 8.75 for seconds in waited)


LOST = [(429, {}, '{"error": {"message": "busy"}}'), (503, {}, "{}"), None]


@pytest.mark.parametrize("lost", LOST)
def test_one_request_that_is_lost_does_not_end_the_batch(lost, here, capsys):
    """Neither where another is answered while it is asked, nor where the next one is."""
    answered = threading.Event()

    def script(path, body):
        if body["of"] == "lost":
            assert answered.wait(10)
            return lost
        answered.set()
        return 200, {}, "{}"

    write(here / "in.jsonl", *map(line, ["lost", "a"]))
    with Server(script).url() as url:
        for concurrency, retry_s in ((2, 0.1), (1, 0)):
            (here / "out.jsonl").unlink(missing_ok=True)
            assert batch("--url", url, "--retry-s", retry_s, "--concurrency", concurrency) == 1
            assert "2 requests: 1 answered, 1 failed" in capsys.readouterr().err
            answers = {each["custom_id"]: each for each in read(here / "out.jsonl")}
            assert len(answers) == 2
            if lost is None:
                assert answers["lost"]["error"]["code"] == "connection_lost"
            else:
                assert answers["lost"]["response"]["status_code"] == lost[0]


@pytest.mark.parametrize("lost", LOST)
def test_a_server_that_is_lost_ends_the_batch_which_goes_on_later(lost, here, capsys):
    write(here / "in.jsonl", *map(line, "abc"))

    def script(path, body):
        return (200, {}, "{}") if body["of"] == "a" else lost

    with Server(script).url() as url:
        for left in (2, 2):
            assert batch("--url", url, "--retry-s", 0, "--concurrency", 1) == 1
            said = capsys.readouterr().err
            assert "no answer from the server for 0 s" in said
            assert f"{left} of 3 requests are left" in said
    assert [each["custom_id"] for each in read(here / "out.jsonl")] == ["a"]
    server = Server()
    with server.url() as url:
        assert batch("--url", url) == 0
    assert sorted(body["of"] for _, body in server.asked) == ["b", "c"]


def test_the_only_request_is_lost(here, capsys):
    write(here / "in.jsonl", line("a"))
    with Server(lambda *_: None).url() as url:
        assert batch("--url", url, "--retry-s", 0) == 1
    assert "1 of 1 requests are left" in capsys.readouterr().err
    assert read(here / "out.jsonl") == []


def test_a_key_that_is_refused_asks_nothing(here, capsys):
    write(here / "in.jsonl", line("a"))
    server = Server()
    with server.url(status=401) as url:
        assert batch("--url", url) == 2
    assert "see --api-key" in capsys.readouterr().err and not server.asked


def test_nobody_at_the_url(here, capsys):
    write(here / "in.jsonl", line("a"))
    assert batch("--url", f"http://127.0.0.1:{free_port()}") == 2
    assert "nothing answers at" in capsys.readouterr().err


def test_a_batch_that_is_interrupted_says_what_is_left(here, capsys, monkeypatch):
    def interrupted(work):
        work.close()
        raise KeyboardInterrupt

    write(here / "in.jsonl", *map(line, "abc"))
    monkeypatch.setattr("opticnerve.cli.batch.asyncio.run", interrupted)
    assert batch("--url", "http://127.0.0.1:1") == 130
    assert "interrupted; 3 of 3 requests are left" in capsys.readouterr().err


# ---- what is refused before anything is asked


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "line 2: not valid JSON"),
        ("[" * 100_000, "line 2: not valid JSON: too many levels"),
        ("[]", "line 2: should be an object"),
        ({**line("b"), "custom_id": 5}, "line 2: custom_id should be a text"),
        ({"url": CHAT, "body": {}}, "line 2: custom_id should be a text"),
        (line("\ud800"), "half of a surrogate pair"),
        (line("b", method="GET"), "line 2: method should be POST"),
        (line("b", url="http://elsewhere/v1"), "line 2: url should be a route's path"),
        (line("b", body=[]), "line 2: body should be an object"),
        (line("b", body={"stream": True}), "line 2: body.stream should be false"),
        (line("a"), "line 2: custom_id 'a' is that of line 1"),
    ],
)
def test_a_line_that_is_wrong_is_named(text, said, here, capsys):
    write(here / "in.jsonl", line("a"), text, line("c"))
    assert batch("--url", "http://127.0.0.1:1") == 2
    assert said in capsys.readouterr().err
    assert not (here / "out.jsonl").exists()


def test_many_wrong_lines_and_none(here, capsys):
    write(here / "in.jsonl", *["{"] * 100)
    assert batch() == 2
    said = capsys.readouterr().err
    assert "line 10: " in said and "there are more" in said and "line 11: " not in said
    write(here / "in.jsonl", "")
    assert batch() == 2
    assert "holds no requests" in capsys.readouterr().err
    (here / "in.jsonl").unlink()
    assert batch() == 2
    assert "in.jsonl cannot be read: No such file" in capsys.readouterr().err


def test_files_and_flags_that_do_not_go_together(here, capsys):
    write(here / "in.jsonl", line("a"))
    url = ["--url", "http://127.0.0.1:1"]
    for wrong, said in (
        (["in.jsonl", "in.jsonl", *url], "different files"),
        (["in.jsonl", "out.jsonl", "--errors", "out.jsonl", *url], "different files"),
        (["in.jsonl", "out.jsonl", "model", *url], "MODEL is for a server that is started here"),
        (["in.jsonl", "out.jsonl", "--llms", "2", *url], "--llms is for a server"),
        (["in.jsonl", "no/out.jsonl", *url], "cannot be written"),
    ):
        assert cli.main(["batch", *wrong]) == 2
        assert said in capsys.readouterr().err


# ---- going on


@pytest.mark.parametrize("rest", [b"", b"{", LINE_START, LINE_START + b'1","custom_id":"c","resp'])
def test_a_torn_line_is_cut(rest, here):
    write(here / "in.jsonl", *map(line, "abc"))
    server = Server()
    with server.url() as url:
        write(here / "out.jsonl", {"custom_id": "a", "response": {"status_code": 200}})
        with (here / "out.jsonl").open("ab") as file:
            file.write(rest)
        assert batch("--url", url) == 0
    assert sorted(body["of"] for _, body in server.asked) == ["b", "c"]
    assert sorted(each["custom_id"] for each in read(here / "out.jsonl")) == ["a", "b", "c"]


def test_a_whole_line_without_its_end_is_kept(here):
    write(here / "in.jsonl", *map(line, "ab"))
    (here / "out.jsonl").write_text('{"custom_id": "a", "response": {"status_code": 200}}')
    server = Server()
    with server.url() as url:
        assert batch("--url", url) == 0
    assert [body["of"] for _, body in server.asked] == ["b"]
    assert [each["custom_id"] for each in read(here / "out.jsonl")] == ["a", "b"]


@pytest.mark.parametrize("text", ["my notes", "my notes\n", '{"custom_id": "z"}\n', "{}\n"])
def test_a_file_of_something_else_is_not_touched(text, here, capsys):
    write(here / "in.jsonl", line("a"))
    (here / "out.jsonl").write_text(text)
    assert batch("--url", "http://127.0.0.1:1") == 2
    assert "out.jsonl, line 1: no answer to a request of this batch" in capsys.readouterr().err
    assert (here / "out.jsonl").read_text() == text


def test_an_answer_that_is_there_twice(here, capsys):
    write(here / "in.jsonl", line("a"))
    write(here / "out.jsonl", *[{"custom_id": "a", "response": {"status_code": 200}}] * 2)
    assert batch("--url", "http://127.0.0.1:1") == 2
    assert "answers the request of line 1 twice" in capsys.readouterr().err


def test_two_processes_do_not_write_one_file(here, capsys):
    write(here / "in.jsonl", line("a"))
    with AnswerFile(here / "out.jsonl"):
        assert batch("--url", "http://127.0.0.1:1") == 2
    assert "another process writes out.jsonl" in capsys.readouterr().err


@pytest.mark.process
def test_a_batch_that_is_killed_twice_loses_and_doubles_nothing(here):
    names = [f"r{i}" for i in range(60)]
    write(here / "in.jsonl", *map(line, names))
    limit, go = [20], threading.Event()
    server = Server()

    def script(path, body):
        if len(server.asked) > limit[0]:
            go.wait(60)
        return 200, {}, json.dumps({"long": "x" * 5000})

    server.script = script
    out = here / "out.jsonl"
    with server.url() as url:
        command = [sys.executable, "-m", "opticnerve", "batch", "in.jsonl", out.name, "--url", url]
        for round_ in range(2):
            process = subprocess.Popen([*command, "--concurrency", "4"], stderr=subprocess.DEVNULL)
            limit[0] = len(server.asked) + 20
            wait_for("answers", lambda known=limit[0] - 3: len(server.asked) >= known)
            wait_for("lines", lambda least=15 * (round_ + 1): out.exists() and
                     out.read_bytes().count(b"\n") >= least)  # fmt: skip
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            whole = out.read_bytes()
            out.write_bytes(whole[:-7])  # As if it had been killed while it wrote.
        go.set()
        assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    assert sorted(each["custom_id"] for each in read(out)) == sorted(names)
