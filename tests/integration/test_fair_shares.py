"""One request with many choices, or many of one key, leave the others their share of the decoder:
others of the same key too.

The real engine on the demo checkpoint. Time is counted in steps, and the tokens of each step by
who got them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from llm_service.policy.messages import GenerateRequest, TokensEvent
from opticnerve.generation.values import Sampling
from tests.local_engine import LocalEngine
from tests.runners import load_demo, tokens

pytestmark = pytest.mark.slow

CHOICES = 32
PLACES = 4
FIRST = 3  # Steps to the first token of a prompt that fits one.


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ask(name: str, length: int, max_tokens: int, n: int = 1, **fields: object) -> GenerateRequest:
    sampling = Sampling(max_tokens=max_tokens, n=n, temperature=1.0, seed=len(name))
    prompt = tokens(length, seed=sum(name.encode()))
    return GenerateRequest(name, prompt, sampling=sampling, **fields)  # type: ignore[arg-type]


class Watched:
    """An engine that is stepped by hand, and what each step gave to whom."""

    def __init__(self, **settings: int) -> None:
        settings = {"max_num_seqs": PLACES, "max_model_len": 640, **settings}
        self.local = LocalEngine(*load_demo(), **settings)
        self.engine = self.local.engine
        self.steps: list[Counter[str]] = []
        self.texts: dict[str, list[int]] = {}

    def submit(self, *requests: GenerateRequest) -> None:
        for request in requests:
            self.engine.submit(request)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.local.messages.clear()
            assert self.engine.step()
            given: Counter[str] = Counter()
            for event in self.local.messages:
                if isinstance(event, TokensEvent):
                    given[event.request_id] += len(event.delta.token_ids)
                    self.texts.setdefault(event.request_id, []).extend(event.delta.token_ids)
            self.steps.append(given)
        self.engine.check_integrity()

    def fill(self) -> None:
        """Steps until every place is taken, and some more."""
        while len(self.engine.scheduler.running) < PLACES:
            self.step()
        self.step(3)

    def alone(self, request: GenerateRequest) -> list[int]:
        local = LocalEngine(*load_demo(), max_model_len=640)
        return local.generate([request])[request.request_id, 0].token_ids

    def watch(self, victim: GenerateRequest) -> tuple[int, int]:
        """Steps from its submission to its first token and to its last, for ``victim``."""
        self.submit(victim)
        before = len(self.steps)
        wanted = victim.sampling.max_tokens
        while len(self.texts.get(victim.request_id, ())) < wanted:
            self.step()
            assert len(self.steps) < before + 60, "the victim gets nothing"
        have = [given[victim.request_id] > 0 for given in self.steps[before:]]
        return have.index(True) + 1, len(have)


@pytest.mark.parametrize("keys", [{}, {"mallory": "mallory", "ada": "ada"}], ids=["none", "keys"])
def test_a_request_with_many_choices_leaves_others_a_place(keys: dict[str, str]) -> None:
    """A victim comes while all places are taken for hundreds of steps, and many more choices
    wait."""
    watched = Watched()
    watched.submit(ask("mallory", 20, 400, CHOICES, share=keys.get("mallory", "")))
    watched.fill()
    victim = ask("ada", 40, 12, share=keys.get("ada", ""))
    first, last = watched.watch(victim)
    assert first <= FIRST
    assert last == first + 11  # A token in each step.
    assert watched.texts["ada"] == watched.alone(victim)
    others = [given["mallory"] for given in watched.steps[-last:]]
    assert min(others) >= PLACES - 2  # All that the victim leaves.


def test_a_key_that_fills_the_cache_gives_pages_back() -> None:
    """Choices grow until the pages are all taken; the victim needs several at once."""
    watched = Watched(kv_cache_tokens=320)
    watched.submit(ask("mallory", 20, 280, CHOICES, share="mallory"))
    watched.fill()
    while not watched.engine.scheduler.num_preemptions:
        watched.step()
    victim = ask("ada", 80, 12, share="ada")
    first, last = watched.watch(victim)
    assert first <= FIRST
    assert last <= first + 12
    assert watched.texts["ada"] == watched.alone(victim)


@pytest.mark.parametrize("settings", [{}, {"kv_cache_tokens": 320}], ids=["places", "pages"])
def test_a_request_with_many_choices_leaves_others_of_its_key_their_part(
    settings: dict[str, int],
) -> None:
    """Users behind one key: the victim lacks a place, or pages as well."""
    watched = Watched(**settings)
    watched.submit(ask("mallory", 20, 280, CHOICES, share="app"))
    watched.fill()
    while settings and not watched.engine.scheduler.num_preemptions:
        watched.step()
    before = watched.engine.scheduler.num_preemptions
    first, last = watched.watch(ask("ada", 80, 12, share="app"))
    assert first <= FIRST
    assert last == first + 11  # A token in each step.
    assert watched.texts["ada"] == watched.alone(ask("ada", 80, 12))
    assert min(given["mallory"] for given in watched.steps[-last:]) >= 1
    if not settings:
        assert watched.engine.scheduler.num_preemptions == before + 1
        assert min(given["mallory"] for given in watched.steps[-last:]) >= PLACES - 2


def test_a_key_with_long_prompts_leaves_others_their_part_of_prefill() -> None:
    """The victim's prompts, one after the other, get half of the tokens beside a queue of 12."""
    watched = Watched(max_num_batched_tokens=64)
    watched.submit(*(ask(f"mallory{i}", 600, 2, share="mallory") for i in range(12)))
    watched.step(5)
    first, last = watched.watch(ask("ada", 50, 8, share="ada"))
    assert first <= FIRST
    assert last == first + 7
    first, _ = watched.watch(ask("ada2", 250, 2, share="ada"))
    assert first <= 2 * 250 // 60 + FIRST


def test_weights_say_who_gets_how_much() -> None:
    watched = Watched()
    watched.submit(ask("light", 20, 400, CHOICES, share="light"))
    watched.fill()
    watched.submit(ask("heavy", 20, 400, CHOICES, share="heavy", weight=3.0))
    watched.step(8)
    watched.step(10)
    given: Counter[str] = sum(watched.steps[-10:], Counter())
    assert given == {"heavy": 10 * 3 * PLACES // 4, "light": 10 * PLACES // 4}


def test_a_key_that_is_alone_may_use_everything() -> None:
    watched = Watched()
    watched.submit(ask("mallory", 20, 400, CHOICES, share="mallory"))
    watched.fill()
    assert watched.steps[-1]["mallory"] == PLACES
    assert watched.engine.scheduler.num_preemptions == 0
