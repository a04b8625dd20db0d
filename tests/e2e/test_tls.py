"""A whole stack whose processes prove to each other who they are."""

from __future__ import annotations

from pathlib import Path

import pytest

import opticnerve
from opticnerve.demo.chats import TURNS
from tests.certificates import Authority

pytestmark = [pytest.mark.process, pytest.mark.slow]


def test_a_stack_with_mutual_tls_answers_about_a_picture_over_https(tmp_path: Path) -> None:
    """Every process has a store of its own, so the rows come by Fetch from encoder to LLM worker,
    as everything else under TLS. The gateway's certificate names another host than loopback."""
    authority = Authority(tmp_path)
    own, public = authority.issue("service"), authority.issue("public", "api.test")
    turn = TURNS[0]
    with opticnerve.serve(
        dtype="float32",
        store="memory://",
        tls_certificate=own.certificate,
        tls_key=own.key,
        tls_client_ca=authority.certificate,
        tls_ca=authority.certificate,
        https_certificate=public.certificate,
        https_key=public.key,
    ) as stack:
        assert stack.url.startswith("https://127.0.0.1:")
        assert stack.chat((turn.question, *turn.paths())) == turn.answer
        answers = stack.openai.chat.completions.create(
            model="model", messages=[{"role": "user", "content": "Hello"}], max_tokens=1
        )
        assert answers.usage is not None and answers.usage.completion_tokens == 1
