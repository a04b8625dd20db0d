"""The policy towards clients is complete, true of what enforces it, and written down."""

import re

import pytest
from pydantic_core import from_json

from gateway.edge.limits import MAX_DEPTH, POLICY
from opticnerve.config import EncoderConfig, GatewayConfig, LLMConfig
from opticnerve.config.options import options
from tests.policy_table import DOCUMENT, size, with_table

NO_BOUNDS = {"min_pixels", "max_pixels"}  # They resize pictures, and refuse none.
BOUNDING = ("Limits of requests", "Pictures", "Media from URLs")  # Titles of flags in --help.
FLAG = re.compile(r"`--([a-z-]+)` \((\d[\d,]*(?: [KMG]iB)?)\)")


def test_every_flag_that_bounds_a_client_is_in_the_policy():
    bounding = {
        item.name
        for item in options(GatewayConfig)
        if item.spec.group in BOUNDING and type(item.default) in (int, float)
    }
    known = {limit.flag for limits in POLICY.values() for limit in limits if limit.flag}
    assert known == bounding - NO_BOUNDS


def test_the_document_has_the_policy():
    text = DOCUMENT.read_text()
    assert with_table(text) == text, "run python -m tests.policy_table"


def test_defaults_in_the_document_are_those_of_the_flags():
    defaults = {}
    for config in (EncoderConfig, LLMConfig, GatewayConfig):
        defaults |= {item.name: item.default for item in options(config)}
    told = FLAG.findall(DOCUMENT.read_text())
    assert len(told) > 10
    for flag, text in told:
        default = defaults[flag.replace("-", "_")]
        assert text in (size(default), f"{default:,}", f"{default:g}"), flag


def test_the_depth_is_the_json_parsers():
    def nested(depth):
        return b"[" * depth + b"]" * depth

    from_json(nested(MAX_DEPTH))
    with pytest.raises(ValueError, match="recursion limit"):
        from_json(nested(MAX_DEPTH + 1))
