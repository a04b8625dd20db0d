"""A request's stages on one time axis."""

import pytest

from gateway import clock
from gateway.clock import Stopwatch
from gateway.workers.encode import Encoded

ENCODED = {"queue": 1.0, "preprocess": 2.0, "encode": 30.0, "put": 4.0}

GENERATED = {"queue": 5.0, "embedding_wait": 9.0, "get": 6.0, "prefill": 40.0, "decode": 28.0}


@pytest.fixture
def now(monkeypatch):
    """Sets the time, in milliseconds after the request's begin."""

    class Time:
        ms = 0.0

    monkeypatch.setattr(clock.time, "monotonic", lambda: 100.0 + Time.ms / 1000)
    return lambda ms: setattr(Time, "ms", ms)


def placed(watch, items=(), tokens=()):
    told = watch.report(items, tokens, 0)["stages"]
    return {(each["stage"], each.get("item")): (each["begin_ms"], each["ms"]) for each in told}


def test_own_stages_are_where_they_were_measured(now):
    watch = Stopwatch()
    now(5)
    with watch.stage("render"):
        now(8)
    assert placed(watch) == {("render", None): (5, 3)}


def test_workers_stages_are_placed_by_when_their_answers_came(now):
    watch = Stopwatch()
    for at in (90, 120):
        now(at)
        watch.token()
    for name, ms in GENERATED.items():
        watch.add(name, ms)
    now(130)
    items = [Encoded(None, "no", 7, ENCODED, answered=100.06), Encoded(None, "ref"), None]
    assert placed(watch, items, [9, 9, 4]) == {
        ("encoder_queue", 0): (23, 1),
        ("preprocess", 0): (24, 2),
        ("encode", 0): (26, 30),
        ("put", 0): (56, 4),
        ("get", None): (60, 6),
        ("queue", None): (45, 5),
        ("prefill", None): (50, 40),
        ("decode", None): (90, 28),
    }
    report = watch.report(items, [9, 9, 4], 7)
    begins = [each["begin_ms"] for each in report["stages"]]
    assert begins == sorted(begins)
    assert [item["tokens"] for item in report["items"]] == [9, 9, 4]


def test_an_answer_that_a_stop_string_ended_shows_the_tokens_time(now):
    watch = Stopwatch()
    for at in (90, 120):
        now(at)
        watch.token()
    watch.add("queue", 0.0)
    assert placed(watch) == {("decode", None): (90, 30)}


def test_work_that_another_request_began_has_a_negative_begin(now):
    watch = Stopwatch()
    now(10)
    item = Encoded(None, "no", 0, ENCODED, answered=100.01)
    assert placed(watch, [item], [9])["encoder_queue", 0] == (-27, 1)
