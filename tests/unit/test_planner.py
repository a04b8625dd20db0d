"""``opticnerve plan``: simulated workers against what can be computed by hand, and the search."""

import asyncio
import dataclasses
import json
import math
import statistics

import httpx2
import pytest
import simpy

from opticnerve.benchmark import command as bench
from opticnerve.benchmark.answer import Answer
from opticnerve.benchmark.figures import Slo
from opticnerve.cli import commands
from opticnerve.errors import StartupError
from opticnerve.planner import calibrate, command, report
from opticnerve.planner.rates import PictureCost, Rates
from opticnerve.planner.search import Question, propose
from opticnerve.planner.simulation import Cluster, Pools, simulate
from opticnerve.planner.traffic import Traffic, Visit, visits

RATES = Rates(
    gateway_s=0.01, picture_s=0.02, prepare_s=0.03, batch_s=0.04, patch_s=1e-4, step_s=0.02,
    sequence_s=0.001, prefill_token_s=1e-3, sizes={"8x8": PictureCost(100, 25)},
)  # fmt: skip
NOTHING = dataclasses.replace(
    RATES, gateway_s=0, picture_s=0, prepare_s=0, batch_s=0, patch_s=1e-12, step_s=1e-9,
    sequence_s=1e-12, prefill_token_s=1e-12,
)  # fmt: skip


def visit(arrived=0.0, patches=(), prefill=50, output=11):
    return Visit(arrived, list(patches), prefill, prefill, output)


def served(rates, pools, *asked):
    """Serves visits at their times, to their ends."""
    env = simpy.Environment()
    cluster = Cluster(env, rates, pools)

    def arrive():
        for each in asked:
            yield env.timeout(each.arrived - env.now)
            cluster.serve(each)

    env.process(arrive())
    env.run()
    assert all(worker.load == 0 for worker in cluster._llms)
    return asked


# ---- workers, by hand


def test_a_request_alone_takes_the_sum_of_its_stages():
    (one,) = served(RATES, Pools(1, 1), visit(5.0, [100, 100]))
    prepared = 0.02 + 2 * 0.03  # One thread prepares both.
    # The first is encoded while the second is prepared, and is a batch of its own.
    encoded = max(0.02 + 0.03 + 0.05, prepared) + 0.05
    assert one.ttft == pytest.approx(0.01 + encoded + 0.02 + 50 * 1e-3)
    assert one.tpot == pytest.approx(0.021)
    assert one.ended - one.first == pytest.approx(10 * 0.021)


def test_pictures_that_wait_are_one_batch_up_to_its_patches():
    rates = dataclasses.replace(
        RATES, prepare_workers=4, max_batch_patches=250, step_s=1e-9, prefill_token_s=1e-12
    )
    asked = served(rates, Pools(1, 1), *(visit(0.0, [size]) for size in (100, 100, 100, 100, 300)))
    base = 0.01 + 0.02 + 0.03
    ends = [0.06, 0.06, 0.12, 0.12, 0.12 + 0.07]  # The last is larger than a batch, and alone.
    assert [each.ttft - base for each in asked] == pytest.approx(ends, abs=1e-6)


def test_an_arrival_ends_the_steps_that_decoding_would_run_on_alone():
    rates = dataclasses.replace(RATES, gateway_s=0.0)
    one, other = served(rates, Pools(0, 1), visit(0.0), visit(0.1001))
    assert one.first == pytest.approx(0.07)
    # Steps of 0.021 end at 0.091 and 0.112; the next has 50 tokens of the other beside it.
    assert other.first == pytest.approx(0.112 + 0.021 + 0.05)
    # Of ten steps of the first, two were alone, one had the prefill, and seven both sequences.
    assert one.ended == pytest.approx(0.112 + 0.071 + 7 * 0.022)
    assert other.ended == pytest.approx(one.ended + 3 * 0.021)


def test_prefill_beside_decoding_fits_the_step_s_time_and_tokens():
    rates = dataclasses.replace(RATES, gateway_s=0.0, max_step_s=0.101, max_batched_tokens=400)
    _, other = served(rates, Pools(0, 1), visit(0.0, output=4), visit(0.06, prefill=100))
    # 80 tokens fit beside one sequence, and the rest into the next step.
    assert other.first == pytest.approx(0.07 + 0.101 + 0.021 + 0.02)
    (long,) = served(rates, Pools(0, 1), visit(0.0, prefill=1000))
    assert long.ttft == pytest.approx(3 * 0.02 + 1.0)


@pytest.mark.parametrize("limit", [{"max_sequences": 1}, {"kv_tokens": 100}])
def test_a_full_worker_lets_requests_wait(limit):
    rates = dataclasses.replace(RATES, gateway_s=0.0, **limit)
    one, other = served(rates, Pools(0, 1), visit(0.0), visit(0.0))
    assert other.first == pytest.approx(one.ended + 0.07)


def test_a_whole_copy_encodes_between_two_steps():
    rates = dataclasses.replace(RATES, gateway_s=0.0, picture_s=0.0, prepare_s=0.0)
    copy, _ = served(rates, Pools(copies=1), visit(0.0), visit(0.08, [100]))
    alone, _ = served(rates, Pools(1, 1), visit(0.0), visit(0.08, [100]))
    assert copy.ended == pytest.approx(alone.ended + 0.05, abs=0.005)


def test_work_goes_to_the_worker_with_the_least():
    rates = dataclasses.replace(RATES, prepare_workers=4)
    asked = served(rates, Pools(2, 2), *(visit(0.0, [100]) for _ in range(2)))
    assert asked[0].ttft == pytest.approx(asked[1].ttft)


# ---- simulations


@pytest.mark.slow
def test_an_encoder_waits_as_queueing_theory_says():
    """Poisson arrivals, a fixed service time, one server: the mean wait is rho / (2 - 2 rho)."""
    service, use = 0.05, 0.7
    rates = dataclasses.replace(
        NOTHING, patch_s=service / 100, max_batch_patches=100, prepare_workers=10**4
    )
    traffic = Traffic(use / service, 1, ("8x8",), output_tokens=(1, 1))
    found = simulate(rates, traffic, Pools(1, 1), 20_000, None)
    wait = statistics.fmean(found.ttft_s) - service
    assert wait == pytest.approx(service * use / (2 - 2 * use), rel=0.15)
    assert found.encoder_use == pytest.approx(use, rel=0.03)
    assert found.requests_per_s == pytest.approx(traffic.rate, rel=0.03)


def test_decoding_sequences_follow_little_s_law():
    traffic = Traffic(5.0, 0, output_tokens=(101, 101), prompt_tokens=(1, 1))
    rates = dataclasses.replace(RATES, max_sequences=1000)
    found = simulate(rates, traffic, Pools(0, 1), 5000, None)
    # n = rate * 100 tokens * a step's time, which is 0.02 + 0.001 n, and little prefill.
    expected = 5 * 100 * 0.02 / (1 - 5 * 100 * 0.001)
    assert found.llm_sequences == pytest.approx(expected, rel=0.1)
    assert not found.unfinished and found.attained == 1


def test_too_much_traffic_is_left_unfinished():
    found = simulate(RATES, Traffic(100.0, 0), Pools(0, 1), 2000, Slo({"ttft": 1.0}))
    assert found.unfinished > 100 and found.attained < 0.5
    assert json.dumps(found.document())


def test_cached_pictures_and_prompts_cost_less():
    traffic = Traffic(5.0, 2, ("8x8",), repeat=0.4, cached_prompt=0.5, prompt_tokens=(10, 30))
    made = visits(traffic, RATES, 1)
    some = [next(made) for _ in range(2000)]
    assert statistics.fmean(len(each.patches) for each in some) == pytest.approx(1.2, abs=0.05)
    assert {each.prompt for each in some} == set(range(60, 81))
    assert all(abs(each.prefill - each.prompt / 2) <= 0.5 for each in some)
    with pytest.raises(StartupError, match="no pictures of 9x9"):
        next(visits(Traffic(1.0, 1, ("9x9",)), RATES, 0))


# ---- the search


def question(**more):
    traffic = Traffic(more.pop("rate", 20.0), 1, ("8x8",), output_tokens=(20, 40))
    rates = dataclasses.replace(RATES, prepare_workers=4, prefill_token_s=1e-4)
    return Question(rates, traffic, Slo.parse("ttft=400ms,tpot=40ms"), requests=1500, **more)


@pytest.mark.slow
def test_the_pools_are_the_smallest_that_keep_the_slo():
    asked, said = question(), []
    found = propose(asked, said.append)
    pools = found.split.pools
    assert found.slices == 1 and found.split.attained >= 0.99 and said
    assert not asked.keeps(Pools(pools.encoders - 1, pools.llms))
    assert not asked.keeps(Pools(pools.encoders, pools.llms - 1))
    assert found.whole.attained >= 0.99
    assert not asked.keeps(Pools(copies=found.whole.pools.copies - 1))
    told = report.text(found)
    assert str(pools) in told and "Not modelled" in told and "splitting" in told


@pytest.mark.slow
def test_much_traffic_is_simulated_in_parts():
    asked = question(rate=2000.0)
    found = propose(asked)
    assert found.slices > 5 and found.split.pools.encoders % found.slices == 0
    assert found.split.requests_per_s == pytest.approx(2000, rel=0.1)
    assert "equal parts" in report.text(found)


@pytest.mark.slow
def test_text_needs_no_encoder_and_an_slo_below_a_request_alone_is_refused():
    asked = question()
    text = dataclasses.replace(asked, traffic=dataclasses.replace(asked.traffic, pictures=0))
    assert propose(text).split.pools.encoders == 0
    with pytest.raises(StartupError, match="a request alone has ttft"):
        propose(dataclasses.replace(asked, slo=Slo({"ttft": 0.05})))
    blocked = dataclasses.replace(asked.rates, kv_tokens=1)
    with pytest.raises(StartupError, match="cannot be kept"):
        propose(dataclasses.replace(asked, rates=blocked))


# ---- rates and the command


class KnownServer:
    """Answers take what ``RATES`` say; so many LLM workers have so many slots each."""

    def __init__(self, llms=1, slots=64):
        self.llms, self.slots, self.open = llms, slots, 0

    async def ask(self, body):
        self.open += 1
        await asyncio.sleep(0)  # Those of one moment are open together.
        decoding = min(max(1, self.open / self.llms), self.slots)
        await asyncio.sleep(0)
        self.open -= 1
        asked = json.loads(body)
        content, output = asked["messages"][0]["content"], asked["max_tokens"]
        text = content if isinstance(content, str) else content[-1]["text"]
        cost = RATES.sizes["8x8"] if isinstance(content, list) else PictureCost(0, 0)
        prompt = len(text.split()) + cost.tokens
        prefill = RATES.step_s + prompt * RATES.prefill_token_s
        first = RATES.gateway_s + prefill
        encode = RATES.batch_s + RATES.patch_s * cost.patches
        if cost.patches:
            first += RATES.picture_s + RATES.prepare_s + encode
        ended = first + (output - 1) * (RATES.step_s + RATES.sequence_s * decoding)
        told = {"prefill": prefill, "preprocess": RATES.prepare_s, "encode": encode}
        return Answer(
            0.0, ended, 200, times=(first, ended), prompt_tokens=prompt, output_tokens=output,
            done=True, cached_tokens=0, timings={f"{k}_ms": 1000 * v for k, v in told.items()},
        )  # fmt: skip

    def http(self, request):
        if request.url.path == "/v1/apply_template":
            spans = [{"num_tokens": 25, "grid_thw": [1, 10, 10]}]
            return httpx2.Response(200, json={"spans": spans})
        workers = [{"limits": {"max_num_seqs": self.slots}}] * self.llms
        return httpx2.Response(200, json={"llms": {"workers": workers, "serving": self.llms}})

    async def rates(self, *sizes):
        transport = httpx2.MockTransport(self.http)
        async with httpx2.AsyncClient(base_url="http://a", transport=transport) as http:
            found = calibrate.Calibration(self, http, "model", lambda text: None)
            return await found.rates(sizes)


@pytest.mark.parametrize(("llms", "slots"), [(1, 64), (1, 4), (3, 64), (2, 1)])
def test_a_calibration_finds_what_stages_cost(llms, slots):
    found = asyncio.run(KnownServer(llms, slots).rates((8, 8)))
    sequence_s = RATES.sequence_s if slots > 1 else 0.0
    assert found.sequence_s == pytest.approx(sequence_s, abs=1e-8)
    assert found.step_s + found.sequence_s == pytest.approx(RATES.step_s + RATES.sequence_s)
    assert found.prefill_token_s == pytest.approx(RATES.prefill_token_s)
    assert found.prepare_s == pytest.approx(RATES.prepare_s)
    (alone,) = served(found, Pools(1, 1), visit(0.0, [100]))
    (known,) = served(RATES, Pools(1, 1), visit(0.0, [100]))
    assert alone.ttft == pytest.approx(known.ttft)
    assert alone.ended == pytest.approx(known.ended)


def test_a_sequence_alone_costs_what_it_took_alone_whatever_several_took():
    assert calibrate._step(0.02, 0.034, 8) == pytest.approx((0.018, 0.002))
    assert sum(calibrate._step(0.02, 0.4, 8)) == pytest.approx(0.02)
    assert sum(calibrate._step(0.02, 0.01, 8)) == pytest.approx(0.02)


def test_rates_are_read_again_as_they_were_kept(tmp_path):
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(RATES.document()))
    assert Rates.read(path) == RATES
    for wrong in ("[]", "{", "{}", '{"step": 1}', '{"step_s": -1}', '{"sizes": {"8x8": {}}}'):
        path.write_text(wrong)
        with pytest.raises(StartupError, match="--rates"):
            Rates.read(path)
    with pytest.raises(StartupError, match="cannot read"):
        Rates.read(tmp_path / "none")


def test_a_line_through_costs_is_never_below_zero():
    assert calibrate._line([100, 200, 400], [0.3, 0.4, 0.6]) == pytest.approx((0.2, 0.001))
    assert calibrate._line([100, 100], [0.2, 0.4]) == pytest.approx((0.0, 0.003))
    assert calibrate._line([100, 200], [0.1, 0.4])[0] == 0.0
    assert calibrate._line([100, 200], [0.4, 0.2]) == pytest.approx((0.3, 0), abs=1e-8)


def plan(tmp_path, *flags):
    path = tmp_path / "rates.json"
    rates = dataclasses.replace(RATES, prepare_workers=4, prefill_token_s=1e-4)
    path.write_text(json.dumps(rates.document()))
    out = tmp_path / "out.json"
    given = ["--rates", str(path), "--picture-sizes", "8x8", "--json", str(out), *flags]
    return commands.main(["plan", *given]), json.loads(out.read_text())


@pytest.mark.slow
def test_given_pools_are_forecast(tmp_path, capsys):
    flags = ["--rate", "2", "--encoders", "1", "--llms", "1", "--output-tokens", "10-20"]
    status, kept = plan(tmp_path, *flags, "--slo", "ttft=1s")
    (found,) = kept["forecasts"]
    assert status == 0 and (found["encoders"], found["llms"]) == (1, 1)
    assert 0 < found["ttft_p50_ms"] <= found["ttft_p99_ms"] < math.inf
    assert kept["traffic"]["output_tokens"] == [10, 20] and kept["rates"]["step_s"] == 0.02
    assert kept["not_modelled"]
    assert "1 encoder and 1 LLM worker" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        ["--rates", "x", "--calibrate", "http://a:1"],
        [],
        ["--rates", "x"],
        ["--rates", "x", "--llms", "1"],
        ["--rates", "x", "--llms", "1", "--encoders", "0"],
        ["--rates", "/no/such", "--slo", "ttft=1s"],
        ["--calibrate", "http://127.0.0.1:9", "--slo", "ttft=1s"],
    ],
)
def test_flags_that_do_not_go_together(flags, capsys):
    assert commands.main(["plan", "--rate", "1", *flags]) == 2
    assert capsys.readouterr().err.startswith("opticnerve: ")


def test_without_simpy_the_command_says_which_extra_brings_it(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "simpy", None)
    assert commands.main(["plan", "--rate", "1", "--rates", "x"]) == 2
    assert "pip install 'opticnerve[plan]'" in capsys.readouterr().err


def test_flags_that_bench_serve_has_too_mean_the_same():
    def flags(made):
        return {each.option_strings[0]: each for each in made._actions if each.option_strings}

    ours, theirs = flags(command.parser()), flags(bench.parser())
    for flag in bench.SHARED:
        one, other = ours[flag], theirs[flag]
        assert one.help.partition(" (default")[0] == other.help.partition(" (default")[0]
        assert (one.metavar, one.type) == (other.metavar, other.type)
        assert one.default == other.default or flag == "--pictures"
