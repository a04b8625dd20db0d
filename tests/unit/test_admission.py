"""Requests and bytes in flight are bounded, and whatever is held is given back."""

import contextlib

import pytest

from gateway.admission import Admission
from opticnerve.errors import Overloaded


def test_requests_are_bounded():
    admission = Admission(max_requests=2, max_bytes=100)
    with admission.arrive() as late, admission.arrive() as first, admission.arrive() as second:
        assert admission.requests == 0  # Their bodies are still to come.
        first.enter()
        second.enter()
        with pytest.raises(Overloaded):
            late.enter()
        with pytest.raises(Overloaded) as caught, admission.arrive():
            pass
        assert caught.value.retry_after_s
    assert admission.requests == 0
    with admission.arrive() as ticket:
        ticket.enter()
        assert admission.requests == 1


def test_bytes_are_bounded_over_all_requests():
    admission = Admission(max_requests=9, max_bytes=100)
    with admission.arrive() as first, admission.arrive() as second:
        first.hold(60)
        with pytest.raises(Overloaded):
            second.hold(41)
        second.hold(40)
        first.drop(30)
        second.hold(30)
        assert admission.bytes == 100
    assert admission.bytes == 0


def test_a_request_that_fails_gives_everything_back():
    admission = Admission(max_requests=1, max_bytes=100)
    with pytest.raises(RuntimeError), admission.arrive() as ticket:
        ticket.enter()
        ticket.hold(100)
        raise RuntimeError
    assert (admission.requests, admission.bytes) == (0, 0)


def test_requests_with_new_pictures_leave_places_to_others():
    admission = Admission(max_requests=4, max_bytes=100)
    with contextlib.ExitStack() as exits:
        tickets = [exits.enter_context(admission.arrive()) for _ in range(4)]
        for ticket in tickets:
            ticket.enter()
        for ticket in tickets[:3]:
            ticket.enter_with_pictures()
        with pytest.raises(Overloaded, match="new pictures"):
            tickets[3].enter_with_pictures()
    assert admission.requests == admission.with_pictures == 0
