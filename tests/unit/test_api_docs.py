"""docs/api.md is the reference that the routes give, and tells all of it."""

import re

from gateway.api.schemas.parsing import UNSUPPORTED
from tests.api_docs import DOCUMENT, SHARED, Reference, anchor, bounds, number, with_reference


def test_the_document_has_the_reference():
    text = DOCUMENT.read_text()
    assert with_reference(text) == text, "run python -m tests.api_docs"


def parts(text, mark):
    """What follows each line with a mark, which is a regular expression of one group, by that."""
    _, *found = re.split(mark, text, flags=re.MULTILINE)
    return dict(zip(found[::2], found[1::2], strict=True))


def test_every_route_field_and_refusal_is_told():
    reference = Reference()
    sections = parts(reference.text(), r"^## (.*)$")
    for route in filter(lambda route: route.include_in_schema, reference.routes):
        for method in route.methods:
            assert f"`{method} {route.path_format}`" in sections["Routes"]
    for path, body in reference.bodies.items():
        if body is None:
            continue
        section = sections[f"POST {path}"]
        shared = [each for part, each in SHARED.items() if issubclass(body, part)]
        assert all(f"](#{anchor(each)})" in section for each in shared)
        told = section + "".join(sections[each] for each in shared)
        for name in {*body.model_fields, *body.unsupported}:
            assert f"| `{name}` |" in told, (path, name)
    assert all(f"| `{name}` |" in sections["Refused fields"] for name in UNSUPPORTED)


def test_every_object_has_its_fields():
    reference = Reference()
    objects = parts(reference.text(), r'^\| <a id="\w+"></a>\*\*(\w+)\*\*')
    bodies = {body.__name__ for body in reference.bodies.values() if body}
    for title, schema in reference.schemas.items():
        if title not in bodies:
            for name in schema.get("properties", ()):
                assert f"| `{name}` |" in objects[title], (title, name)


def test_every_link_has_its_heading():
    text = DOCUMENT.read_text()
    headings = {anchor(line.strip("# ")) for line in text.splitlines() if line.startswith("#")}
    objects = set(re.findall(r'<a id="(\w+)">', text))
    links = set(re.findall(r"\]\(#([\w-]*)\)", text))
    assert len(links) > 50 and links <= headings | objects


def test_bounds_are_words():
    assert [number(n) for n in (2**31 - 1, -(2**63), 2.0**64, 0.5, 2**20, 2.0)] == [
        "2^31-1", "-2^63", "2^64", "0.5", "1048576", "2"
    ]  # fmt: skip
    assert bounds({"type": "integer", "minimum": 1, "maximum": 128}) == " (1 to 128)"
    assert bounds({"type": "number", "exclusiveMinimum": 0, "maximum": 10}) == " (≤ 10, > 0)"
    most = {"type": "integer", "maximum": 9, "anyOf": [{"minimum": 1}, {"const": -1}]}
    assert bounds(most) == " (≤ 9, ≥ 1 or -1)"
    assert bounds({"type": "string", "maxLength": 3}) == " (≤ 3 characters)"
