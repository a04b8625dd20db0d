"""The exception tree: each class knows its statuses, and survives the wire."""

import grpc
import pytest

from opticnerve import errors
from opticnerve.rpc import errors as rpc_errors

CLASSES = sorted(errors.by_name().values(), key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_has_valid_statuses_and_stands_in_the_drawing(cls):
    assert cls.grpc_status in rpc_errors.STATUS_BY_NUMBER
    assert 400 <= cls.http_status < 600
    assert cls.__name__ in errors.__doc__
    assert f" {cls.http_status} " in errors.__doc__


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_wire_keeps_class_and_fields(cls):
    sent = cls("what to do", param="messages[0]", code="some_code", retry_after_s=2.5)
    got = rpc_errors.from_detail(rpc_errors.to_detail(sent))
    assert type(got) is cls
    assert (got.message, got.param, got.code, got.retry_after_s) == (
        "what to do", "messages[0]", "some_code", 2.5,
    )  # fmt: skip


def test_an_unknown_kind_becomes_the_base_class():
    detail = rpc_errors.to_detail(errors.NotFound("x"))
    detail.kind = "FromTheFuture"
    assert type(rpc_errors.from_detail(detail)) is errors.OpticNerveError


def test_openai_shape():
    body = errors.ModelNotFound("no such model", param="model").to_openai()
    assert body == {
        "error": {
            "message": "no such model",
            "type": "not_found_error",
            "param": "model",
            "code": "model_not_found",
        }
    }


def test_a_bare_status_becomes_a_typed_error():
    class Dead(grpc.RpcError):
        def code(self):
            return grpc.StatusCode.UNAVAILABLE

        def details(self):
            return "connection refused"

        def trailing_metadata(self):
            return None

    got = rpc_errors.from_rpc(Dead())
    assert isinstance(got, errors.Unavailable)
    assert "connection refused" in got.message


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_http_answer_keeps_status_and_fields(cls):
    sent = cls("what to do", param="messages[0]", code="some_code", retry_after_s=2.5)
    got = errors.from_openai(sent.to_openai(), cls.http_status, 2.5)
    assert isinstance(sent, type(got)) or type(got) is errors.Unavailable  # Of two with one status.
    assert got.http_status == cls.http_status
    assert (got.message, got.param, got.code, got.retry_after_s) == (
        "what to do", "messages[0]", "some_code", 2.5,
    )  # fmt: skip


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls.default_code])
def test_a_code_tells_the_class_with_and_without_a_status(cls):
    for status in (cls.http_status, None):
        got = errors.from_openai(cls("what to do").to_openai(), status)
        assert got.code == cls.default_code
        assert isinstance(cls("x"), type(got)) and type(got) is not errors.OpticNerveError


@pytest.mark.parametrize("body", [None, [], "bad gateway", {"error": "x"}, {"error": {}}])
def test_any_answer_makes_an_error(body):
    got = errors.from_openai(body, 502)
    assert type(got) is errors.OpticNerveError and "502" in got.message
