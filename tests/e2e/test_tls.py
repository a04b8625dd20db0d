"""A whole stack whose processes prove to each other who they are."""

from __future__ import annotations

from pathlib import Path

import pytest

import opticnerve
from opticnerve.demo.chats import TURNS
from tests.certificates import Authority

pytestmark = [pytest.mark.process, pytest.mark.slow]


def test_a_stack_with_mutual_tls_answers_about_a_picture(tmp_path: Path) -> None:
    """Every process has a store of its own, so the rows come by Fetch from encoder to LLM worker,
    as everything else under TLS."""
    authority = Authority(tmp_path)
    own = authority.issue("service")
    turn = TURNS[0]
    with opticnerve.serve(
        dtype="float32",
        store="memory://",
        tls_certificate=own.certificate,
        tls_key=own.key,
        tls_client_ca=authority.certificate,
        tls_ca=authority.certificate,
    ) as stack:
        assert stack.chat((turn.question, *turn.paths())) == turn.answer
