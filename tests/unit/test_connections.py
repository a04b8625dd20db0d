"""Who loses a connection where they run short, and how long one may wait: policy, without sockets
and on a clock of its own."""

import heapq
import itertools

import pytest

from gateway.edge.connections import CHECK_S, Connections, Wait, holder_of
from gateway.edge.limits import (
    BODY_CHUNKS_PER_S,
    FIRST_HEAD_TIMEOUT_S,
    FREE_BODY_CHUNKS,
    IDLE_TIMEOUT_S,
    NO_PROGRESS_S,
    PROGRESS_BYTES,
)


class Clock:
    """An event loop's, moved by hand."""

    def __init__(self):
        self.now = 1000.0
        self._timers = []
        self._order = itertools.count()

    def time(self):
        return self.now

    def call_later(self, seconds, call, *args):
        timer = Timer(call, args)
        heapq.heappush(self._timers, (self.now + seconds, next(self._order), timer))
        return timer

    def pass_by(self, seconds):
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            self.now, _, timer = heapq.heappop(self._timers)
            if not timer.cancelled:
                timer.call(*timer.args)
        self.now = end


class Timer:
    def __init__(self, call, args):
        self.call, self.args = call, args
        self.cancelled = False

    def cancel(self):
        self.cancelled = True


class Line:
    """A connection: ``does`` and ``key`` are set by tests."""

    def __init__(self, owner, loop, address):
        self.owner, self.loop = owner, loop
        self.address = self.holder = address
        self.wait = self.timer = self.key = None
        self.head_timeout_s = FIRST_HEAD_TIMEOUT_S
        self.since, self.progress_before, self.count = 0.0, 0, 0
        self.does = Wait.HEAD
        self.open = True
        owner.add(self)

    def expects(self):
        return self.does

    def current_holder(self):
        return self.key or self.holder

    def progress(self):
        return self.count

    def close(self):
        self.owner.remove(self)
        self.open = False

    def turn(self, does, key=None):
        """It begins a request, goes on with it or ends it."""
        self.head_timeout_s, self.does, self.key = IDLE_TIMEOUT_S, does, key
        self.owner.update(self)
        return self


class Crowd:
    def __init__(self, most, **settings):
        self.loop = Clock()
        self.owner = Connections(most, **settings)

    def line(self, address="a", does=Wait.HEAD, key=None):
        line = Line(self.owner, self.loop, address)
        return line if does is Wait.HEAD else line.turn(does, key)

    def lines(self, number, *args):
        return [self.line(*args) for _ in range(number)]


def are_open(lines):
    return [line.open for line in lines]


def test_whoever_has_most_loses_one_to_others_at_once():
    for does in (Wait.BODY, Wait.READER, Wait.HEAD):
        crowd = Crowd(4)
        theirs = crowd.lines(4, "a", does)
        ours = crowd.lines(2, "b")
        assert are_open(ours) == [True, True]
        assert are_open(theirs) == [False, False, True, True]


def test_what_is_at_work_is_lost_to_nobody():
    crowd = Crowd(4)
    theirs = [*crowd.lines(3, "a", None), crowd.line("a", Wait.READER)]
    ours = crowd.line("b").turn(None)
    assert ours.open and are_open(theirs) == [True, True, True, False]
    assert not crowd.line("a").open
    assert not crowd.line("c").open  # Of those that wait it alone is left.


def test_one_holder_alone_has_all_and_its_uploads_are_left_alone():
    crowd = Crowd(4)
    first, idle, *uploads = [crowd.line(), crowd.line(), *crowd.lines(2, "a", Wait.BODY)]
    assert first.turn(None).turn(Wait.READER).turn(Wait.HEAD).wait is Wait.HEAD
    new = crowd.line()
    assert new.open and not idle.open  # At rest for longest.
    new.turn(None), first.turn(None)
    for _ in range(10):
        crowd.loop.pass_by(CHECK_S)
        for upload in uploads:
            upload.count += PROGRESS_BYTES
        assert not crowd.line().open
    uploads[1].count += 10**6
    crowd.loop.pass_by(NO_PROGRESS_S + CHECK_S)
    uploads[0].count += PROGRESS_BYTES - 1
    last = crowd.line()
    assert last.open and are_open(uploads) == [False, True]


def test_a_new_connection_is_not_lost_while_a_request_stalls():
    crowd = Crowd(3)
    stalled = crowd.lines(2, "a", Wait.READER)
    crowd.loop.pass_by(NO_PROGRESS_S)
    fresh = crowd.line()
    assert crowd.line().open and fresh.open and are_open(stalled) == [False, True]


def test_behind_one_address_keys_are_told_apart():
    crowd = Crowd(4)
    theirs = crowd.lines(3, "proxy", Wait.BODY)
    ours = crowd.line("proxy").turn(Wait.HEAD, "key ada")
    for line in theirs:
        line.turn(Wait.BODY, "key bob")  # Known soon after its head.
    assert crowd.owner.holders == 2
    new = crowd.line("proxy")
    assert new.open and ours.open and are_open(theirs) == [False, True, True]


def test_a_bound_for_each_address_counts_all_its_keys():
    crowd = Crowd(10, most_per_address=2)
    first = crowd.lines(2, "a", None, "key ada")
    assert not crowd.line("a").open and crowd.line("b").open
    first[0].close()
    assert crowd.line("a").open and not crowd.line("a").open


@pytest.mark.parametrize("served", [False, True])
def test_a_head_must_be_whole_in_time_however_many_bytes_come(served):
    crowd = Crowd(4)
    line = crowd.line()
    if served:
        line.turn(None).turn(Wait.HEAD)
    for _ in range(9):
        crowd.loop.pass_by((IDLE_TIMEOUT_S if served else FIRST_HEAD_TIMEOUT_S) / 10)
        line.count += 10 * PROGRESS_BYTES
        crowd.owner.update(line)
        assert line.open
    crowd.loop.pass_by(IDLE_TIMEOUT_S)
    assert not line.open and crowd.owner.holders == 0


def test_who_reads_slowly_is_served_and_who_reads_nothing_is_not():
    crowd = Crowd(4, stall_timeout_s=20.0)
    slow, still, late = crowd.lines(3, "a", Wait.READER)
    for _ in range(20):
        slow.count += PROGRESS_BYTES // 2
        still.count += 1
        crowd.loop.pass_by(9)
        assert slow.open
    assert not still.open and not late.open
    slow.turn(None)
    crowd.loop.pass_by(100)
    assert slow.open


def test_an_ipv6_network_is_one_address():
    def holder(*host):
        return holder_of(tuple(host))

    assert holder("2001:db8::1", 1) == holder("2001:db8::ffff:1", 2) != holder("2001:db8:1::1", 1)
    assert holder("::ffff:10.0.0.1", 1) == holder("10.0.0.1", 1) == "10.0.0.1"
    assert holder("fe80::1%eth0", 1) == "fe80::/64"
    assert holder_of(None) == ""
    assert holder_of(("10.0.0.1", 1), "10.0.0.1") != "10.0.0.1"


def test_connections_of_one_holder_rest_in_turn_for_their_crumbs():
    clock, owner = Clock(), Connections(10)
    one, two = Line(owner, clock, "1"), Line(owner, clock, "1")
    other = Line(owner, clock, "2")
    assert owner.pacing_delay_s(one, BODY_CHUNKS_PER_S) == 1
    assert owner.pacing_delay_s(two, BODY_CHUNKS_PER_S) == 2
    assert owner.pacing_delay_s(other, BODY_CHUNKS_PER_S) == 1
    assert owner.pacing_delay_s(other, FREE_BODY_CHUNKS) == 0
    clock.pass_by(10)
    assert owner.pacing_delay_s(one, BODY_CHUNKS_PER_S) == 1
    one.close()
    assert owner.pacing_delay_s(one, BODY_CHUNKS_PER_S) == 0
