"""The load generators, of ``bench.load`` and of the command line, against a real stack."""

import asyncio
import json

from bench.load import QUICK, run
from opticnerve.cli import commands


def test_one_client_alone_is_measured(stack):
    scenario = QUICK["alone"]
    ended = []
    found = asyncio.run(run(stack.url, scenario, seed=0, say=ended.append))
    assert found["answered"] == found["requests"] == len(ended) == scenario.each
    assert found["refused"] == found["lost"] == 0
    assert found["TTFT p50, ms"] > 0
    # Every token of the fixed length was counted, whatever its text.
    tokens = found["output tokens/s"] * found["time, s"]
    assert round(tokens) == scenario.each * scenario.max_tokens


def test_a_conversation_of_the_command_line_is_measured(stack, tmp_path, capsys):
    """Each turn sends three pictures again: of the later turns, most of the prompt is cached."""
    path = tmp_path / "out.json"
    flags = ["--workload", "conversation", "--turns", "2", "--concurrency", "2", "--requests", "6"]
    flags += ["--output-tokens", "8", "--words", "4", "--picture-sizes", "112x84", "--warm-up", "1"]
    flags += ["--fields", '{"timings": true}', "--json", str(path)]
    assert commands.main(["bench", "serve", stack.url, *flags]) == 0
    (done,) = json.loads(path.read_text())["runs"]
    found = done["figures"]
    assert found["outcomes"] == {"answered": 6, "refused": 0, "lost": 0}
    assert found["output_tokens"] == 6 * 8 and found["pictures"] == 2 * 3
    assert found["cached_tokens"] > found["prompt_tokens"] / 3
    later = [each for each in done["requests"] if each["turn"] > 1]
    assert len(later) == 4 and all(each["cached_tokens"] > 0 for each in later)
    assert all(each["timings"]["prefill_ms"] > 0 for each in done["requests"])
    assert "TTFT of turn 3" in capsys.readouterr().out


def test_a_plan_is_calibrated_on_a_running_stack(stack, tmp_path, capsys):
    path = tmp_path / "out.json"
    flags = ["--rate", "0.5", "--encoders", "1", "--llms", "1", "--picture-sizes", "224x224"]
    assert commands.main(["plan", "--calibrate", stack.url, *flags, "--json", str(path)]) == 0
    kept = json.loads(path.read_text())
    rates, (found,) = kept["rates"], kept["forecasts"]
    costs = ("prepare_s", "patch_s", "step_s", "sequence_s", "prefill_token_s")
    assert all(rates[name] > 0 for name in costs)
    assert rates["sizes"]["224x224"]["patches"] == 4 * rates["sizes"]["224x224"]["tokens"] > 0
    assert (rates["max_sequences"], rates["max_batched_tokens"]) == (64, 2048)
    assert found["ttft_p50_ms"] > 0 and "1 encoder and 1 LLM worker" in capsys.readouterr().out
