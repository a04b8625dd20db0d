"""Requests in a time: what a key may send, what is left, and what is told of it."""

import errno
import os
import shutil
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.edge.rates import KeyRates, Rate, SharedPlaces, duration
from opticnerve.errors import RateLimited


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def rates():
    made = KeyRates()
    made.clock = Clock()
    return made


def test_all_of_a_period_at_once_and_then_each_after_its_part(rates):
    rate = Rate.read("3/m")
    assert [rates.take("ada", rate).remaining for _ in range(3)] == [2, 1, 0]
    with pytest.raises(RateLimited) as caught:
        rates.take("ada", rate)
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.type == "requests"
    assert caught.value.retry_after_s == pytest.approx(20)
    assert "3/m" in caught.value.message and "20s" in caught.value.message
    assert rates.take("bob", rate).remaining == 2  # Another key's.
    rates.clock.now += 20
    assert rates.take("ada", rate).remaining == 0
    rates.clock.now += 60
    assert rates.left("ada", rate).remaining == 3


def test_what_is_told(rates):
    rates.take("ada", Rate.read("60/m"))
    assert rates.left("ada", Rate.read("60/m")).headers == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
    }


def test_a_key_with_another_rate_keeps_its_count(rates):
    for _ in range(60):
        rates.take("ada", Rate.read("60/m"))
    assert rates.left("ada", Rate.read("120/m")).remaining == 0
    assert rates.left("ada", Rate.read("10/s")).remaining == 0
    rates.keep({"bob"})
    assert rates.left("ada", Rate.read("60/m")).remaining == 60


@settings(max_examples=30)
@given(st.integers(1, 9), st.sampled_from("smh"), st.lists(st.floats(0, 500), max_size=50))
def test_no_window_has_more_than_twice_the_rate(requests, unit, pauses):
    rate, rates = Rate.read(f"{requests}/{unit}"), KeyRates()
    rates.clock = clock = Clock()
    taken = []
    for pause in pauses:
        clock.now += pause
        try:
            rates.take("ada", rate)
        except RateLimited as error:
            clock.now += error.retry_after_s + 1e-6  # Then it is admitted.
            rates.take("ada", rate)
        taken.append(clock.now)
    for begin in taken:
        window = [at for at in taken if begin <= at < begin + rate.period_s]
        assert len(window) <= 2 * requests


@pytest.mark.parametrize("text", ["", "60", "60/", "/m", "0/m", "-1/m", "1.5/s", "60/d", "9" * 400])
def test_what_is_no_rate(text):
    with pytest.raises(ValueError, match="such as 60/m"):
        Rate.read(text)


def test_durations_are_written_as_openai_writes_them():
    seconds = (0, 0.08, 0.9996, 1, 1.5, 59.9999, 60, 360, 3600, 3661.5)
    assert [duration(each) for each in seconds] == [
        "0ms", "80ms", "1s", "1s", "1.5s", "1m0s", "1m0s", "6m0s", "1h0m0s", "1h1m1.5s"
    ]  # fmt: skip


def test_processes_count_together_in_one_directory(tmp_path):
    one, other = KeyRates(tmp_path / "rates"), KeyRates(tmp_path / "rates")
    rate = Rate.read("2/h")
    assert [one.take("ada", rate).remaining, other.take("ada", rate).remaining] == [1, 0]
    for each in (one, other):
        with pytest.raises(RateLimited):
            each.take("ada", rate)
    assert one.left("bob", rate).remaining == 2
    one.keep({"bob"})
    assert other.left("ada", rate).remaining == 0


def test_a_directory_that_was_cleaned_away_is_made_again(tmp_path):
    one, other = KeyRates(tmp_path / "rates"), KeyRates(tmp_path / "rates")
    rate = Rate.read("2/h")
    one.take("ada", rate)
    shutil.rmtree(tmp_path / "rates")
    assert other.left("ada", rate).remaining == 2
    assert [one.take("ada", rate).remaining, other.take("ada", rate).remaining] == [1, 0]


def test_while_the_directory_fails_each_process_counts_for_itself(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "rates").write_text("no directory")
    one, other = KeyRates(tmp_path / "rates"), KeyRates(tmp_path / "rates")
    rate = Rate.read("2/h")
    for each in (one, other):
        assert [each.take("ada", rate).remaining for _ in range(2)] == [1, 0]
        assert each.left("ada", rate).remaining == 0
        with pytest.raises(RateLimited):
            each.take("ada", rate)
    assert len(caplog.messages) == 2 and "for itself" in caplog.text
    (tmp_path / "rates").unlink()
    assert [one.take("ada", rate).remaining, other.take("ada", rate).remaining] == [1, 0]
    assert len(caplog.messages) == 4 and "together again" in caplog.text


OTHER = """
import sys, pathlib
from gateway.edge.rates import SharedPlaces
places = SharedPlaces(pathlib.Path(sys.argv[1]))
print([places.take("ada", 3) for _ in range(2)], flush=True)
input()
"""


@pytest.mark.process
def test_processes_share_the_places_of_a_key_and_one_that_is_killed_leaves_its_own(tmp_path):
    places = SharedPlaces(tmp_path / "places")
    assert places.take("ada", 3) == 0
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", OTHER, str(tmp_path / "places")]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as other:
        assert other.stdout.readline() == b"[1, 2]\n"
        assert places.take("ada", 3) is None and places.take("bob", 3) == 0
        assert places.take("ada", 4) == 3
        other.kill()
    assert [places.take("ada", 3) for _ in range(3)] == [1, 2, None]
    places.give_back("ada", 1)
    assert places.take("ada", 3) == 1


def test_while_their_directory_fails_places_are_of_one_process(tmp_path, caplog):
    places = SharedPlaces(tmp_path / "none" / "places")
    assert [places.take("ada", 2) for _ in range(3)] == [0, 1, None]
    places.give_back("ada", 0)
    assert places.take("ada", 2) == 0
    assert len(caplog.messages) == 1 and "for itself" in caplog.text


def test_a_full_disk_is_no_fault_of_a_request(tmp_path, monkeypatch, caplog):
    rates, rate = KeyRates(tmp_path), Rate.read("2/h")

    def full(name, at):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(rates._shared, "write", full)
    assert rates.take("ada", rate).remaining == rates.left("ada", rate).remaining == 1
    assert rates.take("ada", rate).remaining == rates.left("ada", rate).remaining == 0
    with pytest.raises(RateLimited):
        rates.take("ada", rate)
    assert len(caplog.messages) == 1 and "No space left" in caplog.text
