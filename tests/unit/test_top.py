"""``opticnerve top``: what it reads from metrics, and what it shows of it."""

import pytest
from rich.console import Console

from opticnerve.cli import top, top_view
from opticnerve.cli.snapshot import Change, Snapshot, is_health, read_samples
from opticnerve.errors import Unavailable

METRICS = """
# TYPE process_start_time_seconds gauge
process_start_time_seconds 90.0
# TYPE opticnerve_requests_total counter
opticnerve_requests_total{{route="/v1/chat/completions",status="200"}} {served}
opticnerve_requests_total{{route="/v1/chat/completions",status="429"}} {refused}
opticnerve_requests_total{{route="/health",status="200"}} {looked}
# TYPE opticnerve_requests_in_flight gauge
opticnerve_requests_in_flight 2.0
# TYPE opticnerve_tokens_total counter
opticnerve_tokens_total{{kind="completion"}} {written}
# TYPE opticnerve_embedding_lookups_total counter
opticnerve_embedding_lookups_total{{tier="reference",result="hit"}} {hits}
opticnerve_embedding_lookups_total{{tier="reference",result="miss"}} {misses}
# TYPE opticnerve_time_to_first_token_seconds histogram
opticnerve_time_to_first_token_seconds_bucket{{le="0.1"}} 8.0
opticnerve_time_to_first_token_seconds_bucket{{le="0.2"}} {fast}
opticnerve_time_to_first_token_seconds_bucket{{le="+Inf"}} {begun}
opticnerve_time_to_first_token_seconds_count {begun}
opticnerve_time_to_first_token_seconds_sum {waited}
# TYPE opticnerve_stage_seconds histogram
opticnerve_stage_seconds_bucket{{stage="fetch",le="0.1"}} 4.0
opticnerve_stage_seconds_bucket{{stage="fetch",le="+Inf"}} 4.0
opticnerve_stage_seconds_count{{stage="fetch"}} 4.0
opticnerve_stage_seconds_sum{{stage="fetch"}} 0.04
"""
COUNTED = {
    "served": 10, "refused": 3, "written": 100, "hits": 1, "misses": 3, "fast": 10, "begun": 10,
    "waited": 1.0, "looked": 5,
}  # fmt: skip
LATER = {
    "served": 30, "refused": 1, "written": 350, "hits": 7, "misses": 5, "fast": 20, "begun": 20,
    "waited": 2.5, "looked": 99,
}  # fmt: skip
FIRST = METRICS.format(**COUNTED)
SECOND = METRICS.format(**LATER)  # Fewer are refused: a process was started again.
TTFT = "opticnerve_time_to_first_token_seconds"
URL = "http://gateway"
HEALTH = {
    "status": "degraded",
    "missing": [],
    "encoders": {
        "waiting": 4,
        "workers": [
            {
                "address": "encoder-1:7001",
                "state": "serving",
                "fault": None,
                "load": {"queued_items": 2, "queued_patches": 512},
            },
            {"address": "encoder-2:7001", "state": "unusable", "fault": "other weights"},
        ],
    },
    "llms": {
        "waiting": 0,
        "workers": [
            {
                "address": "llm-1:7002",
                "state": "serving",
                "load": {"running": 3, "waiting": 1, "free_kv_blocks": 25},
                "limits": {"num_kv_blocks": 100},
            }
        ],
    },
}


@pytest.fixture
def change():
    first = Snapshot(HEALTH, read_samples("a", FIRST), at=100.0)
    return Change(first, Snapshot(HEALTH, read_samples("a", SECOND), at=110.0))


def drawn(renderable, width=120):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    console.print(renderable)
    return console.export_text()


def test_rates_are_differences_of_counters(change):
    assert change.rate("opticnerve_tokens_total", kind="completion") == 25.0
    probes = ("route", {"/health"})
    asked = change.by("opticnerve_requests_total", "status", without=probes)
    assert asked == {"200": 20.0, "429": 1.0}
    assert change.rate("opticnerve_none_total") == 0.0


def test_quantiles_and_means_are_those_of_the_observations_between(change):
    assert change.mean(TTFT) == pytest.approx(0.15)
    assert change.quantile(TTFT, 0.5) == pytest.approx(0.15)
    assert change.quantile("opticnerve_stage_seconds", 0.5, stage="fetch") is None
    assert change.mean("opticnerve_stage_seconds", stage="fetch") is None
    whole = Change(change.now.start(), change.now)
    assert whole.seconds == 20.0 and whole.quantile(TTFT, 0.2) == pytest.approx(0.05)


def test_the_highest_bound_stands_for_what_is_beyond_it():
    text = METRICS.format(**{**COUNTED, "begun": 40})
    now = Snapshot({}, read_samples("a", text), at=100.0)
    assert Change(now.start(), now).quantile(TTFT, 0.99) == 0.2


def test_samples_of_several_sources_are_added():
    samples = {**read_samples("a", FIRST), **read_samples("b", FIRST)}
    assert Snapshot({}, samples).total("opticnerve_requests_in_flight") == 4.0


def test_the_screen_shows_pools_traffic_and_latencies(change):
    text = drawn(top_view.screen(URL, change))
    for part in (
        "http://gateway  degraded  the last 10 s",
        "2 pictures, 512 patches",
        "other weights",
        "3 running, 1 waiting, KV 75%",
        "200: 2.00/s",
        "429: 0.10/s",
        "completion: 25.0/s",
        "reference: 75%",
        "in flight: 2",
    ):
        assert part in text
    (first,) = [line for line in text.splitlines() if line.startswith("first token")]
    assert first.split()[2:] == ["1.00", "150.0", "150.0", "190.0", "199.0"]


def test_without_a_time_of_start_counts_are_shown():
    text = FIRST.replace("process_start_time_seconds", "something_else")
    now = Snapshot(HEALTH, read_samples("a", text), at=100.0)
    shown = drawn(top_view.screen(URL, Change(now.start(), now)))
    assert "counts, not rates" in shown and "/s" not in shown and "per s" not in shown
    (statuses,) = [line for line in shown.splitlines() if line.startswith("requests")]
    assert "200: " in statuses and "200: -" not in statuses


def test_the_screen_says_what_it_cannot_show():
    silent = {f"{URL}/metrics": "it needs a key: OPENAI_API_KEY"}
    now = Snapshot({"status": "ok"}, silent=silent)
    text = drawn(top_view.screen(URL, Change(now.start(), now)))
    assert "shown to holders of a key" in text and "it needs a key: OPENAI_API_KEY" in text


def test_what_servers_say_is_neither_markup_nor_commands_of_the_terminal():
    workers = [
        {"address": "[fd00::5]:7001", "state": "serving"},
        {"address": "[/b]", "state": "unusable", "fault": "\x1b]0;title\x07 [red]"},
    ]
    health = {"status": "ok", "missing": ["[/x]"], "encoders": {"workers": workers}}
    samples = read_samples("a", FIRST.replace('"fetch"', '"[/fetch]"'))
    now = Snapshot(health | {"llms": {"workers": []}}, samples, {URL: "[/why]\x1b[2J"})
    text = drawn(top_view.screen(URL, Change(now.start(), now)))
    for part in ("[fd00::5]:7001", "[/b]", "]0;title", "[red]", "[/x]", "[/fetch]", "[/why]"):
        assert part in text
    assert "\x1b" not in text


def test_answers_that_are_no_gateway_s_are_refused():
    assert is_health(HEALTH) and is_health({"status": "ok"})
    pools = {"encoders": {"workers": []}, "llms": {"workers": [{}]}}
    for wrong in ([], {}, {"status": 1}, {"status": "ok", "missing": 3}, {"status": "ok", **pools}):
        assert not is_health(wrong)
    assert not is_health({"status": "ok", "encoders": {"workers": []}})
    for text in ("a_bucket 1", 'a_bucket{le="x"} 1', "{"):
        with pytest.raises(ValueError):
            read_samples("a", text)


def test_a_lost_gateway_is_shown_and_asked_again(monkeypatch):
    looked, shown = [], []

    class Source:
        url = URL

        def look(self):
            looked.append(len(looked))
            if len(looked) == 2:
                raise Unavailable("nothing answers")
            if len(looked) == 4:
                raise KeyboardInterrupt
            return Snapshot(HEALTH, read_samples("a", FIRST))

    monkeypatch.setattr(top.time, "sleep", lambda seconds: None)
    monkeypatch.setattr("rich.live.Live.update", lambda live, it, refresh: shown.append(drawn(it)))
    with pytest.raises(KeyboardInterrupt):
        top.watch(Source(), 1.0)
    assert "since the start" in shown[0]
    assert "unreachable since" in shown[1] and "nothing answers" in shown[1]
    assert "the last 0 s" in shown[2]


def test_once_without_a_gateway_is_an_error(capsys):
    assert top.main(["http://127.0.0.1:1", "--once"]) == 1
    assert "nothing answers at http://127.0.0.1:1" in capsys.readouterr().err
