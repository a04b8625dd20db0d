"""``opticnerve top --once`` against a gateway."""

import asyncio

import pytest

from opticnerve.cli import top
from opticnerve.config import TelemetryConfig
from tests.gateways import data_url, keys_of, stack, user

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop"), pytest.mark.slow]


async def test_what_a_gateway_has_counted(capsys, monkeypatch):
    settings = {"keys": keys_of(ada="sk-ada"), "telemetry": TelemetryConfig(metrics_port=-1)}
    async with stack(**settings) as s:
        key = {"authorization": "Bearer sk-ada"}
        assert (await s.chat(user("What?", data_url()), headers=key)).status_code == 200
        arguments = [str(s.client.base_url), "--once"]
        assert await asyncio.to_thread(top.main, arguments) == 0
        assert "it needs a key" in capsys.readouterr().out
        monkeypatch.setenv("OPENAI_API_KEY", "sk-ada")
        assert await asyncio.to_thread(top.main, arguments) == 0
        shown = capsys.readouterr().out
        assert s.encoder.address in shown and s.llm.address in shown
        assert "200: " in shown and "reference: " in shown
        assert any(line.startswith("first token") for line in shown.splitlines())
