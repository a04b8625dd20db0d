"""The command line: help, what is refused, and what our processes inherit."""

import os
import re
import subprocess
import sys

import pytest

from opticnerve import cli


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help(command, capsys, monkeypatch):
    """Grouped under titles, no internal flags, no placeholder that repeats its flag."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("GRPC_VERBOSITY", "ERROR")
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0
    assert text.startswith(f"usage: opticnerve {command} ")
    assert max(map(len, text.splitlines())) <= 100
    assert "parent-pid" not in text and "``" not in text and "options:" not in text
    for flag, placeholder in re.findall(r"^  --(\S+) ([A-Z_]+)", text, re.MULTILINE):
        assert "_" not in placeholder, flag


def test_help_of_up_has_each_flag_once_and_none_that_it_decides(capsys):
    with pytest.raises(SystemExit):
        cli.main(["up", "--help"])
    shown = re.findall(r"^  (--\S+)", capsys.readouterr().out, re.MULTILINE)
    assert len(shown) == len(set(shown)) > 40
    assert not {"--encoder-addresses", "--llm-addresses", "--advertise"} & set(shown)


def test_flags_that_mean_nothing_to_a_service_are_refused(capsys):
    for argv in (["gateway", "--dtype", "float32"], ["up", "--advertise", "a:1"]):
        with pytest.raises(SystemExit) as exit:
            cli.main(argv)
        assert exit.value.code == 2
        assert f"unknown flag {argv[1]}" in capsys.readouterr().err


def test_a_command_that_is_misspelt(capsys):
    assert cli.main(["gatewai"]) == 2
    assert "did you mean gateway?" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "seen"), [(None, "ERROR"), ("info", "info")])
def test_grpc_is_quiet_unless_the_user_says_otherwise(given, seen, monkeypatch):
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    if given:
        monkeypatch.setenv("GRPC_VERBOSITY", given)
    code = (
        "import os, sys, types\n"
        "from opticnerve import cli\n"
        "assert 'grpc' not in sys.modules\n"
        "fake = types.ModuleType('fake')\n"
        "fake.main = lambda argv: print(os.environ.get('GRPC_VERBOSITY'))\n"
        "sys.modules['fake'] = fake\n"
        "cli.COMMANDS['fake'] = ('fake', '')\n"
        "cli.main(['fake'])\n"
    )
    assert run(code).stdout.split() == [seen]


IMPORTS = """
import logging, os
before = dict(os.environ), logging.root.level, list(logging.root.handlers)
names = ("opticnerve", "grpc", "httpx2", "asyncio")
levels = {name: logging.getLogger(name).level for name in names}
import opticnerve, opticnerve.client, opticnerve.stack
opticnerve.serve
after = dict(os.environ), logging.root.level, list(logging.root.handlers)
assert before == after
assert levels == {name: logging.getLogger(name).level for name in levels}
for name, logger in logging.root.manager.loggerDict.items():
    if name.split(".")[0] == "opticnerve" and isinstance(logger, logging.Logger):
        assert not logger.handlers and logger.level == logging.NOTSET, name
"""


def test_importing_the_library_prints_nothing_and_configures_nothing(monkeypatch):
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    ended = run(IMPORTS)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
