"""The soak's verdicts: which refusals of pictures the deaths of encoders explain."""

import pytest

from bench.soak.cases import Case, Right, user
from bench.soak.client import Ending
from bench.soak.faults import Fault
from bench.soak.traffic import PLAIN, Asked
from bench.soak.verdict import POISONOUS, judge, refused_too_many
from gateway.workers.encode import DEATHS_REMEMBERED_S

RIGHT = Right(("A red star.",))


def refused(*pictures, at=100.0, gateway=0, right=RIGHT):
    """A request about pictures that ended as if encoders had died with one of them."""
    case = Case("picture", lambda nonce: [user("What?", *(each.encode() for each in pictures))])
    ending = Ending("error", at - 1.0, at, 422, POISONOUS)
    return Asked(case, "again", PLAIN, gateway, right, ending)


def killed(*times, kind="encoder killed"):
    return [Fault(kind, "encoder-1", began, began + 1.0) for began in times]


@pytest.mark.parametrize(
    ("faults", "word"),
    [
        (killed(10.0, 20.0), "excused"),
        (killed(10.0, kind="all encoders killed"), "excused"),
        (killed(10.0), "wrong"),  # One death blames no picture.
        (killed(10.0, 110.0), "wrong"),
        (killed(10.0, 20.0, kind="encoder hangs"), "wrong"),
        (killed(-600.0, 99.0 - DEATHS_REMEMBERED_S), "wrong"),  # Forgotten.
        ([], "wrong"),
    ],
)
def test_a_picture_is_refused_after_two_deaths_of_encoders(faults, word):
    assert judge(refused("a"), faults).word == word


def test_a_gateway_refuses_fewer_pictures_than_encoders_died():
    faults = killed(10.0, 20.0, 30.0)
    two = [refused("a"), refused("b"), refused("a", "c"), refused("b", "a"), refused("a")]
    assert refused_too_many(two, faults) == []
    assert refused_too_many([*two, refused("c", gateway=1)], faults) == []
    (told,) = refused_too_many([*two, refused("c")], faults)
    assert told == "gateway-1 refused 3 pictures after 3 deaths of encoders"
    (told,) = refused_too_many([refused("a", gateway=1)], [])
    assert told == "gateway-2 refused 1 pictures after 0 deaths of encoders"


def test_a_bad_picture_may_be_refused_at_any_time():
    asked = [refused(name, right=Right((), 422, POISONOUS)) for name in "abc"]
    assert refused_too_many(asked, []) == []
    assert all(judge(each, []).word == "right" for each in asked)
