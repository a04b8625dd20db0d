"""Lines of the log: two forms of one record, and nothing that a caller writes can forge one."""

import json
import logging
import os
import subprocess
import sys
from datetime import datetime

import pytest

from opticnerve.errors import Overloaded, Unavailable
from opticnerve.telemetry import logs

HOSTILE = 'x"\n2026-11-25T16:00:00.000+00:00 I forged [-] \r\x1b[31m\u2028\u202e' + "y" * 5000


def record(message="request", fields=None, exc_info=None):
    made = logging.LogRecord("gateway.x", logging.INFO, __file__, 1, message, (), exc_info)
    if fields:
        made.fields = fields
    return made


def test_a_line_of_text_has_date_zone_level_id_and_fields():
    logs.begin_event("req-1")
    line = logs.Formatter("text").format(
        record(fields={"path": "/v1", "ms": 12.345, "llm": ["a:1", "b:2"], "reason": "no room"})
    )
    when, rest = line.split(" ", 1)
    assert datetime.fromisoformat(when).tzinfo is not None and when[-6] in "+-"
    assert rest == 'I gateway.x [req-1] request path=/v1 ms=12.3 llm=a:1,b:2 reason="no room"'


def test_json_has_the_same_and_one_object_a_line():
    logs.begin_event("req-1")
    fields = {"path": "/v1", "ms": 12.345, "llm": ["a:1"], "hit": True, "odd": float("inf")}
    told = json.loads(logs.Formatter("json").format(record(fields=fields)))
    assert datetime.fromisoformat(told.pop("time")).tzinfo is not None
    assert told == {
        "level": "info", "logger": "gateway.x", "request_id": "req-1", "message": "request",
        "path": "/v1", "ms": 12.3, "llm": ["a:1"], "hit": True, "odd": "inf",
    }  # fmt: skip


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_value_can_forge_a_line_or_drive_a_terminal(form):
    logs.begin_event("-")
    logs.identify(HOSTILE)
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        failed = record(HOSTILE, {"model": HOSTILE, "ids": [HOSTILE] * 100}, sys.exc_info())
    line = logs.Formatter(form).format(failed)
    first, *more = line.split("\n")
    assert all(each.startswith("    ") for each in more) and (not more or form == "text")
    assert all(each.isprintable() for each in (first, *more))
    assert len(line) < 30_000
    if form == "json":
        assert "ValueError" in json.loads(line)["exception"]


def test_an_event_is_written_once_with_what_was_noted_at_any_depth(caplog):
    caplog.set_level(logging.DEBUG)
    event = logs.begin_event("req-1")
    logs.note(tokens=3, nothing=None)
    for worker in "aba":
        logs.append(llm=worker)
    logs.failed(Overloaded("no room", param="messages"))
    event.write(logging.getLogger("x"), logging.INFO, "request", status=429)
    (told,) = caplog.records
    ms = told.fields.pop("ms")
    assert ms >= 0 and told.levelno == logging.INFO and not told.exc_info
    assert told.fields == {
        "status": 429, "tokens": 3, "llm": ["a", "b"],
        "code": "overloaded", "param": "messages", "reason": "no room",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("cause", "level"), [(None, logging.WARNING), (KeyError("x"), logging.ERROR)]
)
def test_a_fault_of_the_service_warns_and_a_bug_is_an_error(cause, level, caplog):
    event = logs.begin_event()
    failure = Unavailable("no worker")
    logs.failed(failure, cause)
    logs.failed(failure)  # Whoever else sees it on its way out knows no cause.
    event.write(logging.getLogger("x"), logging.INFO, "request")
    (told,) = caplog.records
    assert told.levelno == level and (told.exc_info is None) == (cause is None)


def test_what_repeats_a_request_is_not_logged(caplog):
    event = logs.begin_event()
    logs.failed(Unavailable("you said: secret", logged="busy"))
    event.write(logging.getLogger("x"), logging.INFO, "request")
    assert caplog.records[0].fields["reason"] == "busy"


def test_urls_that_are_fetched_are_not_logged(capsys):
    """Their queries may hold keys."""
    logs.configure("info")
    for name in ("httpx2", "httpcore2.http11", "x"):
        logging.getLogger(name).info("GET https://pictures.example/?signature=secret")
    assert capsys.readouterr().err.count("secret") == 1


ENDS = """
import sys, threading, warnings
from opticnerve.cli import commands as cli
from opticnerve.config import TelemetryConfig
from opticnerve.config.command_line import start_logs
from opticnerve.errors import StartupError
class module:
    @staticmethod
    def main(argv):
        start_logs(TelemetryConfig(log_format=argv[0]))
        warnings.warn("careful")
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
        if argv[1] == "bug":
            raise KeyError("a bug\\nof two lines")
        raise StartupError("no room")
sys.modules["fake"] = module
sys.exit(cli.run("fake", sys.argv[1:]))
"""


@pytest.mark.process
@pytest.mark.parametrize("how", ["bug", "refused"])
def test_whatever_ends_a_process_is_json_too(how):
    """Warnings, threads that fail and the last words of a process come from Python itself."""
    environment = {**os.environ, "OPTICNERVE_SERVICE_HOST": "10.0.0.1"}
    ended = subprocess.run(
        [sys.executable, "-c", ENDS, "json", how], capture_output=True, text=True, env=environment
    )
    links, warning, thread, last = [json.loads(line) for line in ended.stderr.splitlines()]
    assert "OPTICNERVE_SERVICE_HOST" in links["message"] and "careful" in warning["message"]
    assert "ZeroDivisionError" in thread["exception"]
    if how == "bug":
        assert ended.returncode == 1 and "KeyError" in last["exception"]
    else:
        assert ended.returncode == 2 and last["message"] == "opticnerve: no room"


@pytest.mark.process
def test_a_call_that_is_cut_before_its_handler_begins_leaves_no_traceback():
    """The record as grpcio makes it; every other error of a call is logged."""
    code = """if True:
        import asyncio, logging
        from opticnerve.telemetry import logs
        logs.configure("info")
        for error in (asyncio.CancelledError(), RuntimeError("kept")):
            logging.getLogger("grpc._cython.cygrpc").error(
                "Exception not handled by _handle_exceptions in servicer method [/a/B]",
                exc_info=error,
            )
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "RuntimeError: kept" in done.stderr and "CancelledError" not in done.stderr


def test_what_children_write_is_passed_on_in_the_form_that_was_asked_for():
    line = logs.Formatter("json").format(record("ready"))
    assert logs.relayed("llm", "ready") == "llm        | ready"
    logs.configure("info", "json")
    told = json.loads(logs.relayed("llm", line))
    assert told["process"] == "llm" and told["message"] == "ready" and told["level"] == "info"
    for raw in ("F0000 a C library", "3", '"x"', "[1]"):
        told = json.loads(logs.relayed("llm", raw))
        assert told["message"] == raw and told["process"] == "llm" and "time" in told
