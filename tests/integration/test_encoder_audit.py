"""``--audit-share``: a share of what is served is encoded again, and what differs is counted."""

import logging

import pytest

from encoder_service import metrics
from encoder_service.audit import Audit
from opticnerve.errors import ConfigError
from tests.encoders import FakeBackend, picture, running

pytestmark = pytest.mark.anyio


class Shifted(FakeBackend):
    """Its rows are those of FakeBackend in another direction."""

    def encode(self, pixels, plans):
        made = super().encode(pixels, plans)
        return [{name: tensor.flip(-1) + 7 for name, tensor in item.items()} for item in made]


class Broken(FakeBackend):
    """Its rows are not finite."""

    def encode(self, pixels, plans):
        made = super().encode(pixels, plans)
        return [{name: tensor * float("nan") for name, tensor in item.items()} for item in made]


def refuse(plans):
    raise MemoryError("no memory")


def counted(result):
    return metrics.ITEMS_AUDITED.labels(result=result)._value.get()


async def audited(tmp_path, reference, share=1.0):
    """How many of three items were counted as equal, as differing, and as failed."""
    backend = FakeBackend()
    backend.reference = reference
    reference.begin()
    results = ("equal", "differs", "failed")
    before = [counted(result) for result in results]
    async with running(tmp_path, backend=backend, audit_share=share) as live:
        for seed in range(3):
            answer = await live.encode(picture(seed))
            assert answer.ref.num_rows > 0, "the item is served whatever its audit says"
    return [int(counted(result) - then) for result, then in zip(results, before, strict=True)]


async def test_what_differs_is_counted_and_logged(tmp_path, caplog):
    assert await audited(tmp_path, FakeBackend()) == [3, 0, 0]
    with caplog.at_level(logging.WARNING):
        assert await audited(tmp_path, Shifted()) == [0, 3, 0]
    assert "rows too far from the torch tower's: cosine" in caplog.text
    assert await audited(tmp_path, FakeBackend(hidden_size=4)) == [0, 3, 0]
    assert await audited(tmp_path, FakeBackend(fail=refuse)) == [0, 0, 3]


async def test_a_reference_whose_rows_are_not_finite_differs(tmp_path):
    assert await audited(tmp_path, Broken()) == [0, 3, 0]


async def test_without_a_share_nothing_is_encoded_twice(tmp_path):
    reference = FakeBackend()
    assert await audited(tmp_path, reference, share=0.0) == [0, 0, 0]
    assert reference.batches == []


def test_a_share_is_chosen_by_the_key():
    backend = FakeBackend()
    backend.reference = backend
    audit = Audit(backend, 0.25)
    chosen = [audit.chooses(f"{number:08x}{'0' * 56}") for number in range(0, 2**32, 2**24)]
    assert chosen == [True] * 64 + [False] * 192


def test_an_encoder_without_the_torch_tower_cannot_be_audited():
    Audit(FakeBackend(), 0.0)
    with pytest.raises(ConfigError, match="--beyond-buckets torch"):
        Audit(FakeBackend(), 0.1)
