"""The openai package of npm."""

import pytest

from tests.clients.programs import needs_node, run_node

pytestmark = needs_node("openai")
CASES = ["text", "picture", "stream", "stream_helper", "structured_output", "tool_call"]


@pytest.mark.parametrize("case", [*CASES, "responses", "errors"])
def test_case(server, case):
    run_node(server, "openai.mjs", case)


def test_rate_limit(server, busy):
    run_node(server, "openai.mjs", "rate_limit")
