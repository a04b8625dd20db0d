"""``opticnerve bench serve`` without a server: what is asked and when, what answers amount to."""

import base64
import io
import itertools
import json
import random
import statistics

import pytest
from PIL import Image

from opticnerve.benchmark import command, plot
from opticnerve.benchmark.answer import Answer, AnswerStream, error_code
from opticnerve.benchmark.arrivals import arrivals, until
from opticnerve.benchmark.figures import Slo, Spread, load_figures, percentile
from opticnerve.benchmark.load import Record
from opticnerve.benchmark.pictures import Album, draw
from opticnerve.benchmark.serve import LoadSettings, RunSettings, prepare, run_settings
from opticnerve.benchmark.workload import Asking, Shape, body_fields, dialogues, read_prompts
from opticnerve.errors import StartupError

URL = "http://127.0.0.1:1"


def answered(sent, times, tokens=None, **more):
    return Answer(
        sent, times[-1], 200, times=tuple(times), prompt_tokens=10,
        output_tokens=len(times) if tokens is None else tokens, done=True, **more,
    )  # fmt: skip


def chunk(content=None, **more):
    choices = [] if content is None else [{"index": 0, "delta": {"content": content}}]
    return b"data: " + json.dumps({"choices": choices, **more}).encode() + b"\n\n"


def records(*answers, turns=None, measured=True):
    return [
        Record(index, turns[index] if turns else 0, Asking(()), answer, measured)
        for index, answer in enumerate(answers)
    ]


# ---- answers


def test_latencies_of_one_answer():
    answer = answered(10.0, [10.5, 10.6, 10.9], tokens=5)
    assert answer.ttft == pytest.approx(0.5)
    assert answer.gaps == pytest.approx([0.1, 0.3])
    assert answer.tpot == pytest.approx(0.1)  # Chunks may hold several tokens.
    assert answer.e2e == pytest.approx(0.9)
    assert answered(10.0, [10.5]).gaps == [] and answered(10.0, [10.5]).tpot is None
    assert Answer(10.0, 11.0).ttft is None


def test_an_answer_that_was_due_earlier_counts_from_then():
    late = answered(10.0, [10.5], scheduled=8.0)
    assert (late.ttft, late.e2e) == (2.5, 2.5)


def test_a_stream_keeps_when_text_came_and_what_was_used():
    stream = AnswerStream()
    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    usage["prompt_tokens_details"] = {"cached_tokens": 4}
    lines = [chunk(""), chunk("a"), b": a comment\n\n", chunk("b"), chunk(usage=usage)]
    for now, line in enumerate([*lines, b"data: [DONE]\n\n"]):
        stream.feed(line, float(now))
    answer = stream.answer(0.0, 6.0, 200)
    assert answer.times == (1.0, 3.0) and answer.text == "ab"
    assert (answer.prompt_tokens, answer.output_tokens, answer.cached_tokens) == (5, 2, 4)
    assert answer.outcome == "answered"


def test_events_that_arrive_in_pieces_count_when_they_are_whole():
    stream, data = AnswerStream(), chunk("a").replace(b"\n", b"\r\n") + chunk("b")
    for now, at in enumerate(range(0, len(data), 7)):
        stream.feed(data[at : at + 7], float(now))
    assert len(stream.times) == 2 and 0 < stream.times[0] < stream.times[1]


def test_reasoning_and_calls_of_tools_are_text_too():
    stream = AnswerStream()
    for name in ("reasoning_content", "tool_calls"):
        event = {"choices": [{"delta": {name: ["x"]}}, {"delta": None}]}
        stream.feed(b"data:" + json.dumps(event).encode() + b"\n", 1.0)
    assert stream.times == [1.0, 1.0]


WRONG = (
    '[1]', '{', '{"choices":[1]}', '{"choices":7}', '{"choices":[{"delta":"x"}]}',
    '{"choices":[{"delta":{"content":[1]}}]}', '{"usage":[1]}', '{"usage":{"prompt_tokens":"x"}}',
    '{"usage":{"prompt_tokens_details":[1]}}', '{"timings":3}',
)  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_chunk_is_an_error(wrong):
    stream = AnswerStream()
    with pytest.raises(ValueError):
        stream.feed(f"data: {wrong}\n".encode(), 0.0)
    assert stream.answer(0.0, 1.0, 200, "ValueError").outcome == "lost"


def test_a_stream_that_ends_in_a_typed_error_is_refused():
    stream = AnswerStream()
    stream.feed(chunk("a"), 1.0)
    stream.feed(b'data: {"error": {"code": "overloaded", "message": "retry"}}\n', 2.0)
    stream.feed(b"data: [DONE]\n", 2.0)
    answer = stream.answer(0.0, 2.0, 200)
    assert (answer.outcome, answer.code) == ("refused", "overloaded")


@pytest.mark.parametrize(
    "answer, outcome",
    [
        (Answer(0, 1, 200, done=True), "answered"),
        (Answer(0, 1, 429, "overloaded"), "refused"),
        (Answer(0, 1, 500, "unknown"), "refused"),
        (Answer(0, 1, 200), "lost"),  # Its stream was cut.
        (Answer(0, 1, 0, "ConnectError"), "lost"),
    ],
)
def test_outcomes(answer, outcome):
    assert answer.outcome == outcome


def test_codes_of_errors_in_any_body():
    assert error_code({"error": {"code": "overloaded", "type": "rate_limit_error"}}) == "overloaded"
    assert error_code({"error": {"code": None, "type": "server_error"}}) == "server_error"
    assert error_code(["not ours"]) == error_code({"error": "text"}) == "unknown"


# ---- figures


def test_percentiles_lie_between_neighbours():
    values = [4.0, 1.0, 3.0, 2.0]
    assert percentile(values, 50) == 2.5
    assert percentile(values, 100) == 4.0
    assert percentile([7.0], 99) == 7.0
    assert percentile(list(map(float, range(101))), 99) == 99.0
    assert Spread.of([]) is None
    assert Spread.of([0.002, 0.004]).milliseconds()["p90"] == 3.8


def test_figures_count_what_was_measured():
    ramp = records(answered(0.0, [90.0]), measured=False)
    asked = records(
        answered(0.0, [1.0, 1.1, 1.2], cached_tokens=5),
        answered(1.0, [2.0, 2.1]),
        Answer(1.0, 1.1, 429, "overloaded"),
        Answer(1.0, 2.0, 0, "ConnectionResetError"),
        Answer(1.0, 2.0, 200),
    )
    found = load_figures(ramp + asked)
    assert found.outcomes == {"answered": 2, "refused": 1, "lost": 2}
    assert found.errors == {"200 cut off": 1, "429 overloaded": 1, "ConnectionResetError": 1}
    assert found.seconds == pytest.approx(2.1)
    assert found.requests_per_s == pytest.approx(2 / 2.1)
    assert found.output_tokens_per_s == pytest.approx(5 / 2.1)
    assert found.latencies["TTFT"].count == 2 and found.latencies["ITL"].count == 3
    assert (found.cached_tokens, found.goodput, found.by_turn) == (5, None, {})
    assert json.dumps(found.document())


def test_nothing_answered_has_no_latencies():
    for asked in ([], records(Answer(0.0, 1.0, 503, "unavailable"))):
        found = load_figures(asked, Slo({"ttft": 1.0}))
        assert (found.requests_per_s, found.latencies, found.good) == (0, {}, 0)


def test_goodput_counts_what_is_whole_and_within_all_limits():
    slo = Slo.parse("ttft=500ms, tpot=0.1s")
    assert slo.limits == {"ttft": 0.5, "tpot": 0.1}
    asked = records(
        answered(0.0, [0.5, 0.6]),  # At the limits.
        answered(0.0, [0.4]),  # One token: no TPOT.
        answered(0.0, [0.6, 0.65]),
        answered(0.0, [0.4, 0.6]),
        answered(0.3, [0.6], scheduled=0.0),  # Sent late.
        Answer(0.0, 1.0, 429, "overloaded"),
    )
    found = load_figures(asked, slo)
    assert found.good == 2 and found.goodput == pytest.approx(2 / 1.0)
    for wrong in ("", "ttft", "ttft=5", "ttft=ms", "itl=5ms", "ttft=5ms,"):
        with pytest.raises(ValueError):
            Slo.parse(wrong)


def test_an_open_loop_shows_how_late_it_was_sent_and_turns_are_told_apart():
    asked = [answered(2.0, [2.5], scheduled=1.0), answered(3.0, [3.1], scheduled=3.0)]
    found = load_figures(records(*asked, turns=[0, 1]))
    assert found.latencies["sent late by"].most == 1.0
    assert found.latencies["TTFT from sending"].most == pytest.approx(0.5)
    assert found.latencies["TTFT"].most == pytest.approx(1.5)
    assert {turn: each.most for turn, each in found.by_turn.items()} == {
        0: pytest.approx(1.5),
        1: pytest.approx(0.1),
    }


# ---- arrivals


def gaps(burstiness, count=20_000):
    times = list(itertools.islice(arrivals(50, random.Random(1), burstiness=burstiness), count))
    assert times == sorted(times)
    return [after - before for before, after in itertools.pairwise(times)]


@pytest.mark.parametrize("burstiness", [0.25, 1, 4])
def test_gaps_have_the_mean_of_the_rate_and_the_given_variance(burstiness):
    found = gaps(burstiness)
    assert statistics.fmean(found) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.variance(found) * 50**2 == pytest.approx(burstiness, rel=0.1)


def test_an_even_rate_and_the_same_times_of_the_same_seed():
    assert gaps(0, 100) == pytest.approx([0.02] * 99)
    first, second = (itertools.islice(arrivals(5, random.Random("a")), 9) for _ in range(2))
    assert list(first) == list(second)


def test_a_ramp_has_half_of_its_time_s_arrivals_more_of_them_late():
    times = list(until(arrivals(100, random.Random(2), burstiness=0, ramp_s=10), 20))
    assert len(times) == pytest.approx(500 + 1000, abs=1)
    assert sum(time < 5 for time in times) == pytest.approx(125, abs=1)


# ---- pictures and dialogues


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_pictures_have_their_size_and_come_from_the_seed(form):
    one, other = (draw(random.Random(seed), (64, 48), form) for seed in (1, 2))
    assert one == draw(random.Random(1), (64, 48), form) != other
    shown = [Image.open(io.BytesIO(data)) for data in (one, other)]
    assert all((image.format, image.size) == (form, (64, 48)) for image in shown)
    assert shown[0].tobytes() != shown[1].tobytes()


def test_a_share_of_pictures_was_shown_in_an_earlier_request():
    album = Album(random.Random(3), ((8, 8), (16, 8)), "PNG", repeat=0.3)
    parts, before = [], set()
    for _ in range(500):
        earlier = album.new
        pair = [album.next(earlier) for _ in range(2)]
        new = [part for part in pair if part not in before]
        assert len(set(new)) == len(new)  # A request does not repeat its own.
        before.update(pair)
        parts += pair
    seen = len(parts) - len(set(parts))
    assert seen == album.again and seen / len(parts) == pytest.approx(0.3, abs=0.05)
    assert album.shown == 1000 and album.new == len(set(parts))


def test_no_picture_is_shown_again_unless_it_is_asked_for():
    album = Album(random.Random(4), ((8, 8),), "PNG")
    assert len({album.next() for _ in range(50)}) == 50


def test_sizes_are_taken_in_turn():
    album = Album(random.Random(5), ((8, 8), (16, 4)), "PNG")
    urls = [json.loads(album.next())["image_url"]["url"] for _ in range(3)]
    files = [base64.b64decode(url.partition(",")[2]) for url in urls]
    assert [Image.open(io.BytesIO(file)).size for file in files] == [(8, 8), (16, 4), (8, 8)]


def test_a_conversation_sends_again_what_was_said():
    source = random.Random(6)
    album = Album(source, ((8, 8),), "PNG")
    fields = body_fields("m", {"max_tokens": 3, "ignore_eos": None})
    dialogue = next(dialogues(Shape(3, 2, 5), album, source, fields))
    first, third = (json.loads(dialogue.body(said)) for said in ([], ["one", 'two "\n']))
    assert {**first, "messages": 0} == {
        "model": "m", "max_tokens": 3, "stream": True,
        "stream_options": {"include_usage": True}, "messages": 0,
    }  # fmt: skip
    roles = [message["role"] for message in third["messages"]]
    assert roles == ["user", "assistant", "user", "assistant", "user"]
    assert third["messages"][0] == first["messages"][0]
    assert third["messages"][3]["content"] == 'two "\n'
    kinds = [part["type"] for part in first["messages"][0]["content"]]
    assert kinds == ["image_url", "image_url", "text"]
    assert len(third["messages"][4]["content"].split()) == 5


# ---- prompts of a file


def test_prompts_of_both_forms(tmp_path):
    (tmp_path / "a.png").write_bytes(draw(random.Random(7), (8, 8), "PNG"))
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "model": "theirs"}
    lines = [{"prompt": "what?", "images": ["a.png", "https://x/y.png"]}, body]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    picture, chat = read_prompts(path, "m", {"seed": 1}, {"max_tokens": 9})
    sent = json.loads(picture.body([]))
    urls = [part["image_url"]["url"] for part in sent["messages"][0]["content"][:-1]]
    assert urls[0].startswith("data:") and urls[1] == "https://x/y.png"
    assert (sent["max_tokens"], sent["seed"], picture.askings[0].pictures) == (9, 1, 2)
    sent = json.loads(chat.body([]))
    assert (sent["max_tokens"], sent["model"], sent["stream"]) == (2, "m", True)
    assert sent["messages"] == body["messages"]


@pytest.mark.parametrize(
    "line", ["", "{", "[]", "{}", '{"prompt": 1}', '{"prompt": "a", "images": ["b"]}']
)
def test_a_wrong_prompt_is_told_with_its_line(line, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(StartupError, match="line 1" if line else "has no line"):
        read_prompts(path, "m", {}, {})
    with pytest.raises(StartupError, match="cannot read"):
        read_prompts(tmp_path, "m", {}, {})


# ---- settings


def test_runs_of_the_workloads():
    assert run_settings(LoadSettings(URL)) == [RunSettings(8, None, 0)]
    talk = LoadSettings(URL, workload="conversation")
    assert [(run.turns, run.concurrency) for run in run_settings(talk)] == [
        (0, 1), (0, 32), (2, 1), (2, 32),
    ]  # fmt: skip
    rates = LoadSettings(URL, rate=(1.0, 2.0), concurrency=(5,))
    assert run_settings(rates) == [RunSettings(5, 1.0, 0), RunSettings(5, 2.0, 0)]
    assert RunSettings(5, 1.5, 2).label == "1.5 requests/s, 2 earlier turns"


@pytest.mark.parametrize(
    "flags",
    [
        {"rate": (1.0,), "concurrency": (1, 2)},
        {"turns": (1,)},
        {"prompts": "x", "workload": "conversation"},
        {"prompts": "x", "pictures": 2},
        {"ramp_s": 5.0, "duration_s": 5.0},
    ],
)
def test_flags_that_do_not_go_together(flags):
    with pytest.raises(StartupError):
        run_settings(LoadSettings(URL, **flags))


def test_what_is_prepared_follows_from_the_seed():
    settings = LoadSettings(URL, requests=7, picture_sizes=((8, 8),), words=3)
    run = RunSettings(2, None, 2)
    one, again, other = (
        [each.body([]) for each in prepare(settings, run, "m", seed).dialogues]
        for seed in ("1", "1", "2")
    )
    assert one == again != other
    assert len(one) == 3  # Of three turns each.


def test_an_open_loop_prepares_what_is_due_in_its_duration():
    settings = LoadSettings(URL, duration_s=10.0, burstiness=0, pictures=0)
    work = prepare(settings, RunSettings(None, 3.0, 0), "m", "1")
    assert len(work.dialogues) == len(work.times) == 29
    few = prepare(LoadSettings(URL, requests=4, pictures=0), RunSettings(None, 3.0, 0), "m", "1")
    assert len(few.times) == 4


@pytest.mark.parametrize(
    "argv",
    [
        ["--picture-sizes", "8"], ["--picture-sizes", "0x8"], ["--pictures", "65"],
        ["--repeat", "1.5"], ["--rate", "0"], ["--concurrency", "0"], ["--header", "x"],
        ["--fields", "[]"], ["--slo", "x"], ["--plot", "a.pdf"], ["--concurrency", "1,,2"],
    ],
)  # fmt: skip
def test_wrong_values_of_flags_are_told_in_one_line(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        command.main(["serve", URL, *argv])
    assert exit.value.code == 2
    assert argv[0] in capsys.readouterr().err.splitlines()[0]


def test_a_plot_without_matplotlib_says_which_extra_brings_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(StartupError, match=r"opticnerve\[plot\]"):
        plot.plot_path("a.png")
