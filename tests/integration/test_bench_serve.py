"""``opticnerve bench serve`` against a server whose answers take known times."""

import asyncio
import contextlib
import json
import signal
import threading
import time

import pytest

from opticnerve.benchmark import command
from opticnerve.cli import commands
from tests.fake_openai import FakeOpenAI

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def serving(**settings):
    """A fake server on a thread of its own, and its URL."""
    server, ready, ended, found = FakeOpenAI(**settings), threading.Event(), asyncio.Event(), []

    async def run():
        async with server.serve() as url:
            found[:] = [url, asyncio.get_running_loop()]
            ready.set()
            await ended.wait()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert ready.wait(10)
    try:
        yield server, found[0]
    finally:
        found[1].call_soon_threadsafe(ended.set)
        thread.join(10)


def bench(url, tmp_path, *flags):
    """(exit status, the document that is kept)"""
    path = tmp_path / "out.json"
    flags = ["--seed", "1", "--picture-sizes", "8x8", "--json", str(path), *flags]
    status = commands.main(["bench", "serve", url, *flags])
    return status, json.loads(path.read_text())


def test_a_server_without_usage_is_told_why_it_has_no_tpot(tmp_path, capsys):
    with serving(usage=False) as (_, url):
        status, kept = bench(url, tmp_path, "--requests", "3", "--slo", "tpot=1ms")
    assert status == 0
    (run,) = kept["runs"]
    found, (note, *_) = run["figures"], run["notes"]
    assert found["without_usage"] == found["outcomes"]["answered"] == found["good"] == 3
    assert "TTFT" in found["latencies"] and "TPOT" not in found["latencies"]
    assert note.startswith("3 of 3 answers came without usage") and "TPOT" in note
    assert f"note: {note}" in capsys.readouterr().out


def test_a_closed_loop_is_measured(tmp_path, capsys):
    with serving(first_s=0.1, gap_s=0.02, cached=4) as (server, url):
        status, kept = bench(
            f"{url}/v1", tmp_path, "--requests", "9", "--concurrency", "3", "--output-tokens", "4",
            "--repeat", "0.5", "--slo", "e2e=60s",
            "--plot", str(tmp_path / "out.html"),
        )  # fmt: skip
    assert status == 0 and server.most_at_once == 3
    (run,) = kept["runs"]
    found, asked = run["figures"], run["requests"]
    assert found["outcomes"] == {"answered": 9, "refused": 0, "lost": 0}
    assert len(server.bodies) == 9 + 2  # Two that warm up.
    assert len({json.dumps(body) for body in server.bodies}) == 11
    assert [len(each["text_s"]) for each in asked] == [4] * 9
    assert (found["output_tokens"], found["prompt_tokens"], found["cached_tokens"]) == (36, 90, 36)
    assert found["pictures"] == 9 and found["pictures_again"] > 0 and found["good"] == 9
    # What the server waits is the least that can be measured.
    least = {"TTFT": 100, "TPOT": 19, "ITL": 0, "E2E": 160}
    for name, ms in least.items():
        values = found["latencies"][name]
        assert ms <= values["p50"] <= values["p90"] <= values["p95"] <= values["p99"] < 20_000
    assert found["requests_per_s"] == pytest.approx(9 / found["seconds"])
    assert all(each["due_s"] == each["sent_s"] < each["ended_s"] for each in asked)
    told = capsys.readouterr().out
    assert "3 at once: 9 requests" in told and "| TTFT" in told and "goodput" in told
    assert kept["command"].startswith(f"opticnerve bench serve {url}/v1 --seed 1")
    assert "<svg" in (tmp_path / "out.html").read_text()


def test_an_open_loop_sends_when_requests_are_due(tmp_path):
    with serving(first_s=0.3) as (server, url):
        status, kept = bench(
            url, tmp_path, "--rate", "20,40", "--requests", "10", "--burstiness", "0",
            "--output-tokens", "1",
        )  # fmt: skip
    assert status == 0 and server.most_at_once > 3
    for run, gap in zip(kept["runs"], (1 / 20, 1 / 40), strict=True):
        due = [each["due_s"] for each in run["requests"]]
        assert due == pytest.approx([gap * (index + 1) for index in range(10)], abs=1e-3)
        assert all(each["sent_s"] >= each["due_s"] for each in run["requests"])
        assert run["figures"]["latencies"]["sent late by"]["count"] == 10


def test_requests_that_wait_for_a_place_count_from_when_they_were_due(tmp_path):
    with serving(first_s=0.1) as (server, url):
        _, kept = bench(
            url, tmp_path, "--rate", "100", "--concurrency", "1", "--requests", "5",
            "--output-tokens", "1",
        )  # fmt: skip
    assert server.most_at_once == 1
    found = kept["runs"][0]["figures"]["latencies"]
    assert found["TTFT"]["max"] > 350 > found["TTFT from sending"]["p50"]


def test_a_conversation_sends_its_pictures_and_answers_again(tmp_path):
    with serving() as (server, url):
        status, kept = bench(
            url, tmp_path, "--workload", "conversation", "--turns", "2", "--concurrency", "2",
            "--requests", "6", "--output-tokens", "2", "--warm-up", "0",
        )  # fmt: skip
    assert status == 0 and len(server.bodies) == 6
    asked = kept["runs"][0]["requests"]
    assert sorted((each["dialogue"], each["turn"]) for each in asked) == [
        (dialogue, turn) for dialogue in (0, 1) for turn in (1, 2, 3)
    ]
    assert set(kept["runs"][0]["figures"]["by_turn"]) == {"1", "2", "3"}
    last = max(server.bodies, key=lambda body: len(body["messages"]))["messages"]
    assert [part["type"] for part in last[0]["content"]] == ["image_url"] * 3 + ["text"]
    assert [last[1], last[3]] == [{"role": "assistant", "content": "t0 t1 "}] * 2


def test_errors_are_told_by_status_and_code(tmp_path, capsys):
    with serving(refuse=3, cut=5) as (_, url):
        status, kept = bench(
            url, tmp_path, "--requests", "15", "--concurrency", "1", "--output-tokens", "2",
            "--warm-up", "0",
        )  # fmt: skip
    found = kept["runs"][0]["figures"]
    assert status == 1 and found["outcomes"] == {"answered": 8, "refused": 5, "lost": 2}
    assert found["errors"]["429 overloaded"] == 5 and len(found["errors"]) == 2
    assert "5 x 429 overloaded" in capsys.readouterr().out


def test_a_request_that_takes_too_long_is_lost_and_a_ramp_is_not_measured(tmp_path):
    with serving(first_s=0.2) as (_, url):
        status, kept = bench(
            url, tmp_path, "--requests", "3", "--concurrency", "3", "--timeout", "0.1",
            "--warm-up", "0", "--ramp", "0.3",
        )  # fmt: skip
    run = kept["runs"][0]
    assert status == 1 and {each["code"] for each in run["requests"]} == {"timeout"}
    assert [each["measured"] for each in run["requests"]] == [False] * 3
    assert run["figures"]["requests"] == 0


def test_a_server_that_closes_connections_loses_nothing(tmp_path):
    with serving(close=True) as (server, url):
        status, _ = bench(url, tmp_path, "--requests", "6", "--concurrency", "2")
    assert status == 0 and len(server.bodies) == 8


def test_nothing_is_sent_after_the_duration(tmp_path, capsys):
    with serving(first_s=0.2) as (server, url):
        flags = ["--concurrency", "2", "--output-tokens", "1", "--warm-up", "0", "--pictures", "0"]
        _, kept = bench(url, tmp_path, "--duration", "0.5", "--requests", "50", *flags)
        assert 2 <= len(server.bodies) <= 6
        assert max(each["sent_s"] for each in kept["runs"][0]["requests"]) < 0.5
        bench(url, tmp_path, "--duration", "30", "--requests", "2", *flags)
    assert "raise --requests" in capsys.readouterr().out


def test_keys_and_headers_are_sent_and_not_kept(tmp_path, capsys):
    with serving(key="secret") as (server, url):
        flags = ["--requests", "2", "--output-tokens", "1", "--header", "X-Team: blue"]
        status, kept = bench(url, tmp_path, *flags, "--api-key", "secret")
        assert status == 0 and all("x-team: blue" in head for head in server.heads)
        assert "secret" not in json.dumps(kept) and "blue" not in json.dumps(kept)
        assert commands.main(["bench", "serve", url, "--api-key=wrong"]) == 2
    assert "/v1/models: " in capsys.readouterr().err
    assert commands.main(["bench", "serve", url]) == 2
    assert "nothing answers at" in capsys.readouterr().err


def test_ctrl_c_prints_what_was_measured(tmp_path, capsys):
    with serving(first_s=0.05) as (server, url):

        def interrupt():
            while len(server.bodies) < 25:
                time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        status, kept = bench(url, tmp_path, "--duration", "60", "--pictures", "0")
    run = kept["runs"][0]
    assert status == 130 and not run["complete"] and run["requests"]
    assert "interrupted: " in capsys.readouterr().out


def test_help_of_serve_shows_its_flags(capsys):
    with pytest.raises(SystemExit) as exit:
        command.main(["serve", "--help"])
    told = capsys.readouterr().out
    assert exit.value.code == 0 and told.startswith("usage: opticnerve bench serve URL [flags]")
    assert max(map(len, told.splitlines())) <= 100 and "headers" not in told
