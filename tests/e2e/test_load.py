"""The load generator of bench.load against a real stack, at its smallest."""

import asyncio

from bench.load import QUICK, run


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
