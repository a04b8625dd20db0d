"""Vercel's AI SDK, over /v1/responses, which is its default, and over chats."""

import pytest

from tests.clients.programs import needs_node, run_node

pytestmark = [
    needs_node("ai"),
    pytest.mark.parametrize("provider", ["responses", "chat", "compatible"]),
]
CASES = ["text", "picture", "stream", "structured_output", "tool_call", "errors"]


@pytest.mark.parametrize("case", CASES)
def test_case(server, case, provider):
    run_node(server, "ai_sdk.mjs", case, provider)


def test_rate_limit(server, busy, provider):
    run_node(server, "ai_sdk.mjs", "rate_limit", provider)
