"""The figures of bench.load: what is made of the times and ends of streamed answers."""

import pytest

from bench.http_client import figures, medians, order, refusals
from bench.load import ratio_of
from opticnerve.benchmark.answer import Answer


def answered(sent, times, ended=None, tokens=None):
    return Answer(
        sent,
        ended if ended is not None else times[-1],
        200,
        times=tuple(times),
        prompt_tokens=10,
        output_tokens=tokens if tokens is not None else len(times),
        done=True,
    )


def test_figures_count_what_was_answered_alone():
    answers = [
        answered(0.0, [1.0, 1.1, 1.2]),
        answered(1.0, [2.0, 2.1], ended=4.0),
        Answer(1.0, 1.1, 429, "overloaded"),
        Answer(1.0, 1.2, 429, "overloaded"),
        Answer(1.0, 2.0, 0, "ReadError"),
    ]
    found = figures(answers)
    assert found["requests"] == 5
    assert (found["answered"], found["refused"], found["lost"]) == (2, 2, 1)
    assert found["of these 429 overloaded"] == 2
    assert found["of these 0 ReadError"] == 1
    assert found["time, s"] == 4.0
    assert found["requests/s"] == 0.5
    assert found["output tokens/s"] == 1.25
    assert found["TTFT p50, ms"] == pytest.approx(1000)
    assert found["ITL p99, ms"] == pytest.approx(100)


def test_nothing_answered_has_no_latencies():
    found = figures([Answer(0.0, 1.0, 503, "unavailable")])
    assert found["requests/s"] == 0
    assert not any("p50" in name for name in found)
    assert refusals([Answer(0.0, 1.0, 200)]) == {"of these 200": 1}


@pytest.mark.parametrize(
    "ends, correlation, lost",
    [([1, 2, 3, 4], 1, 0), ([4, 3, 2, 1], -1, 3), ([4, 1, 2, 3], -0.2, 3)],
)
def test_order_of_ends_against_order_of_sending(ends, correlation, lost):
    answers = [answered(sent / 10, [float(end)]) for sent, end in enumerate(ends)]
    found = order(reversed(answers))
    assert found["order, rank correlation"] == pytest.approx(correlation)
    assert found["order, places lost at most"] == lost


def test_one_answer_has_no_order():
    assert order([answered(0.0, [1.0])]) == {}


def test_medians_of_runs_take_a_missing_refusal_for_none():
    runs = [{"time, s": 1.0, "of these 429 overloaded": 8.0}, {"time, s": 3.0}, {"time, s": 2.0}]
    assert medians(runs) == {"time, s": 2.0, "of these 429 overloaded": 0.0}
    assert medians([{"ITL p99, ms": 4.0}, {}]) == {"ITL p99, ms": 4.0}


def test_ratios_need_two_sides():
    assert ratio_of(2.0, 1.0) == "0.50x"
    assert ratio_of(0.0, 1.0) == ratio_of(None, 1.0) == ratio_of(1.0, None) == "-"
