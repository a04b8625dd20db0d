"""Anthropic's SDK for Node."""

import pytest

from tests.clients.programs import needs_node, run_node

pytestmark = needs_node("@anthropic-ai/sdk")


@pytest.mark.parametrize("case", ["text", "picture", "stream", "tool_call", "errors"])
def test_case(server, case):
    run_node(server, "anthropic.mjs", case)


def test_rate_limit(server, busy):
    run_node(server, "anthropic.mjs", "rate_limit")
