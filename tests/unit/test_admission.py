"""Requests and bytes in flight are bounded, and whatever is held is given back."""

import contextlib

import pytest

from gateway.edge.admission import Admission
from gateway.edge.auth import Caller
from gateway.edge.rates import Rate
from opticnerve.errors import Overloaded, RateLimited


def test_requests_are_bounded():
    admission = Admission(max_requests=2, max_bytes=100)
    with (
        admission.arrive("ada") as late,
        admission.arrive("ada") as first,
        admission.arrive("ada") as second,
    ):
        assert admission.requests.held == 0  # Their bodies are still to come.
        first.count_request()
        second.count_request()
        with pytest.raises(Overloaded):
            late.count_request()
        with pytest.raises(Overloaded) as caught, admission.arrive("ada"):
            pass
        assert caught.value.retry_after_s
    assert admission.requests.held == 0
    with admission.arrive("ada") as ticket:
        ticket.count_request()
        assert admission.requests.held == 1


def test_a_key_s_requests_are_bounded_by_what_its_line_allows():
    admission = Admission(max_requests=9, max_bytes=100)
    ada, bob = Caller("ada", "ada", concurrency=1), Caller("bob", "bob")
    with (
        admission.arrive("key ada", ada) as late,
        admission.arrive("key ada", ada) as first,
        admission.arrive("key bob", bob) as other,
    ):
        first.count_request()
        with pytest.raises(RateLimited, match="limited to 1") as caught:
            late.count_request()
        assert caught.value.retry_after_s
        with pytest.raises(RateLimited), admission.arrive("key ada", ada):
            pass
        other.count_request()
    with admission.arrive("key ada", ada) as ticket:
        ticket.count_request()


def test_a_request_that_finds_no_room_does_not_count_against_the_rate():
    admission = Admission(max_requests=1, max_bytes=100)
    ada = Caller("ada", "ada", rate=Rate(2, 60.0))
    with admission.arrive("key ada", ada) as ticket:
        ticket.count_request()
        for _ in range(5):
            with pytest.raises(Overloaded) as caught, admission.arrive("key ada", ada):
                pass
            assert caught.value.code == "overloaded"
    with admission.arrive("key ada", ada):
        pass
    with pytest.raises(RateLimited), admission.arrive("key ada", ada):
        pass


def test_bytes_are_bounded_over_all_requests():
    admission = Admission(max_requests=9, max_bytes=100)
    with admission.arrive("ada") as first, admission.arrive("ada") as second:
        first.hold_bytes(60)
        with pytest.raises(Overloaded):
            second.hold_bytes(41)
        second.hold_bytes(40)
        first.free_bytes(30)
        second.hold_bytes(30)
        assert admission.bytes.held == 100
    assert admission.bytes.held == 0


def test_nothing_more_is_not_refused():
    """The end of an answer holds no bytes: its holder may have more than its share by then."""
    admission = Admission(max_requests=9, max_bytes=100, holders=lambda: 2)
    with admission.arrive("ada") as first, admission.arrive("bob") as second:
        first.hold_bytes(70)
        second.hold_bytes(10)
        with pytest.raises(Overloaded):
            first.hold_bytes(10)
        first.hold_bytes(0)


def test_a_request_that_fails_gives_everything_back():
    admission = Admission(max_requests=1, max_bytes=100)
    with pytest.raises(RuntimeError), admission.arrive("ada") as ticket:
        ticket.count_request()
        ticket.hold_bytes(100)
        raise RuntimeError
    assert (admission.requests.held, admission.bytes.held) == (0, 0)


def test_requests_with_new_pictures_leave_places_to_others():
    admission = Admission(max_requests=4, max_bytes=100)
    with contextlib.ExitStack() as exits:
        tickets = [exits.enter_context(admission.arrive("ada")) for _ in range(4)]
        for ticket in tickets:
            ticket.count_request()
        for ticket in tickets[:3]:
            ticket.count_with_pictures()
        with pytest.raises(Overloaded, match="new pictures"):
            tickets[3].count_with_pictures()
    assert admission.requests.held == admission.with_pictures.held == 0


def shared(holders, **bounds):
    return Admission(**{"max_requests": 8, "max_bytes": 800, **bounds}, holders=lambda: holders)


@contextlib.contextmanager
def served(admission, *holders, num_bytes=0):
    """Requests of so many holders; the tickets that were given."""
    with contextlib.ExitStack() as exits:
        tickets = [exits.enter_context(admission.arrive(holder)) for holder in holders]
        for ticket in tickets:
            ticket.count_request()
            ticket.hold_bytes(num_bytes)
        yield tickets


def test_one_alone_may_have_all():
    admission = shared(1)
    with served(admission, *["ada"] * 8, num_bytes=100):
        assert admission.requests.held == 8 and admission.bytes.held == 800


def test_the_last_quarter_is_for_those_that_have_less_than_an_equal_share():
    admission = shared(2)
    with served(admission, *["ada"] * 6):
        with pytest.raises(Overloaded, match="share"), admission.arrive("ada"):
            pass
        with (
            served(admission, "bob", "bob"),
            pytest.raises(Overloaded, match="too many requests in flight"),
            admission.arrive("bob"),
        ):
            pass
    with served(admission, *["bob"] * 4, *["ada"] * 4):  # Both up to their equal shares.
        assert admission.requests.held == 8


def test_bytes_and_places_for_pictures_are_shared_too():
    admission = shared(2)
    with served(admission, "ada", "bob") as (first, other):
        first.hold_bytes(600)
        with pytest.raises(Overloaded, match="share"):
            first.hold_bytes(1)
        other.hold_bytes(200)
    with served(admission, *["ada"] * 6, "bob") as tickets:
        for ticket in tickets[:5]:
            ticket.count_with_pictures()
        with pytest.raises(Overloaded, match="new pictures"):
            tickets[5].count_with_pictures()
        tickets[6].count_with_pictures()
    assert admission.requests.held == admission.with_pictures.held == admission.bytes.held == 0
    assert not admission.requests._by_holder and not admission.bytes._by_holder


def test_what_one_may_have_at_most():
    admission = shared(1, max_requests_each=2)
    with (
        served(admission, "ada", "ada", "bob"),
        pytest.raises(Overloaded, match="share"),
        admission.arrive("ada"),
    ):
        pass
    with served(admission, "ada", "ada"):
        assert admission.requests.held == 2


def test_a_single_place_is_anybodys():
    admission = shared(3, max_requests=1)
    with served(admission, "ada"), pytest.raises(Overloaded), admission.arrive("bob"):
        pass
    with served(admission, "bob"):
        assert admission.requests.held == 1
