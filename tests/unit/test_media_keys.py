"""Content keys name everything that decides an embedding, and nothing else."""

from __future__ import annotations

import itertools
import re

from opticnerve.content_keys import content_key, tenant_salt
from opticnerve.media.plan import WHITE, Overrides

SETTINGS = {"family": "f", "min_pixels": 1, "mean": (0.5, 0.25)}


def test_a_key_is_64_lowercase_hex_digits() -> None:
    key = content_key(b"picture", SETTINGS, Overrides(), "fp")
    assert re.fullmatch("[0-9a-f]{64}", key)


def test_the_same_input_has_the_same_key_whatever_its_container() -> None:
    expected = content_key(b"picture", SETTINGS, Overrides(), "fp")
    backwards = dict(reversed(list(SETTINGS.items())))
    backwards["mean"] = [0.5, 0.25]
    assert content_key(memoryview(b"picture"), backwards, Overrides(0, 0), "fp") == expected
    assert content_key(bytearray(b"picture"), SETTINGS, Overrides(None, None), "fp") == expected
    assert content_key(b"picture", SETTINGS, Overrides(background=WHITE), "fp") == expected


def test_keys_survive_releases() -> None:
    """A change of this value needs a new SCHEME_VERSION."""
    key = content_key(b"picture", SETTINGS, Overrides(1, 2, background=None), "fp")
    assert key == "2ade73133add519a5cdcc0f5fefebe86f8599b446e2aadc921e949c9759fbb71"
    key = content_key(b"picture", SETTINGS, Overrides(1, 2), "fp")
    assert key == "1ede5dd19a8a72ff41adbc7525a09be93c07f9a909afee6c970873be7c1563f5"


def test_every_part_counts() -> None:
    inputs = [
        (b"picture", SETTINGS, Overrides(), "fp"),
        (b"pictur", SETTINGS, Overrides(), "efp"),
        (b"picture", {**SETTINGS, "min_pixels": 2}, Overrides(), "fp"),
        (b"picture", SETTINGS, Overrides(min_pixels=1), "fp"),
        (b"picture", SETTINGS, Overrides(max_pixels=1), "fp"),
        (b"picture", SETTINGS, Overrides(1, 1), "fp"),
        (b"picture", SETTINGS, Overrides(background=None), "fp"),
        (b"picture", SETTINGS, Overrides(background=0), "fp"),
        (b"picture", SETTINGS, Overrides(background=0xFF), "fp"),
        (b"picture", SETTINGS, Overrides(0, 0xFF, background=None), "fp"),
        (b"picture", SETTINGS, Overrides(one_of_several=True), "fp"),
        (b"picture", SETTINGS, Overrides(), "fp2"),
        (b"2picture", SETTINGS, Overrides(), "fp"),
        (b"", SETTINGS, Overrides(), "fppicture"),
        (b"picture", SETTINGS, Overrides(), "fp", "salt"),
        (b"picture", SETTINGS, Overrides(), "fp", "salt2"),
        (b"picturesalt", SETTINGS, Overrides(), "fp"),
    ]
    keys = [content_key(*parts) for parts in inputs]
    for one, other in itertools.combinations(keys, 2):
        assert one != other


def test_a_caller_makes_the_salt_of_no_other_tenant() -> None:
    assert tenant_salt("", "") == ""
    acme = tenant_salt("acme", "")
    assert re.fullmatch("[0-9a-f]{64}", acme)
    pairs = [
        ("acme", ""), ("", "acme"), ("acm", "e"), ("acme", "x"), ("acmex", ""), ("acme", acme),
        ("", acme), ("bob", acme), ("bob", "acme"), ("bob", "\x00acme"), ("bob", "\ud83d"),
    ]  # fmt: skip
    salts = [tenant_salt(*pair) for pair in pairs]
    assert len(set(salts)) == len(pairs)
    keys = [content_key(b"picture", SETTINGS, Overrides(), "fp", salt) for salt in salts]
    assert len(set(keys)) == len(pairs)
