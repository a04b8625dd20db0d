"""docs/api.md is the reference that the routes give, and tells all of it."""

import re

from gateway.api.schemas.parsing import UNSUPPORTED
from tests.api_docs import DOCUMENT, Reference, anchor, bounds, number, with_reference


def test_the_document_has_the_reference():
    text = DOCUMENT.read_text()
    assert with_reference(text) == text, "run python -m tests.api_docs"


def test_every_route_field_and_refusal_is_told():
    reference = Reference()
    text = reference.text()
    for route in reference.routes:
        assert all(f"`{method} {route.path_format}`" in text for method in route.methods), (
            route.path
        )
    for schema in reference.schemas.values():
        assert all(f"| `{name}` |" in text for name in schema.get("properties", ()))
    for body in filter(None, reference.bodies.values()):
        assert all(f"| `{name}` |" in text for name in body.unsupported)
    assert all(f"| `{name}` |" in text for name in UNSUPPORTED)


def test_every_link_has_its_heading():
    text = DOCUMENT.read_text()
    headings = {anchor(line.strip("# ")) for line in text.splitlines() if line.startswith("#")}
    objects = set(re.findall(r'<a id="(\w+)">', text))
    links = set(re.findall(r"\]\(#([\w-]*)\)", text))
    assert len(links) > 50 and links <= headings | objects


def test_bounds_are_words():
    assert [number(n) for n in (2**31 - 1, -(2**63), 1.8446744073709552e19, 0.5, 4096)] == [
        "2^31-1", "-2^63", "2^64", "0.5", "4096"
    ]  # fmt: skip
    assert bounds({"type": "integer", "minimum": 1, "maximum": 128}) == " (1 to 128)"
    assert bounds({"type": "number", "exclusiveMinimum": 0, "maximum": 10}) == " (≤ 10, > 0)"
    most = {"type": "integer", "maximum": 9, "anyOf": [{"minimum": 1}, {"const": -1}]}
    assert bounds(most) == " (≤ 9, ≥ 1 or -1)"
    assert bounds({"type": "string", "maxLength": 3}) == " (≤ 3 characters)"
