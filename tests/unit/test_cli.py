"""The command line: help, what is refused, and what our processes inherit."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from opticnerve.checkpoints import hub
from opticnerve.cli import commands as cli
from opticnerve.local import up
from tests.checkpoints import DEMO


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


@pytest.mark.process
@pytest.mark.parametrize(("given", "seen"), [(None, "ERROR"), ("info", "info")])
def test_grpc_is_quiet_unless_the_user_says_otherwise(given, seen, monkeypatch):
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    if given:
        monkeypatch.setenv("GRPC_VERBOSITY", given)
    code = (
        "import os, sys, types\n"
        "from opticnerve.cli import commands as cli\n"
        "assert 'grpc' not in sys.modules\n"
        "fake = types.ModuleType('fake')\n"
        "fake.main = lambda argv: print(os.environ.get('GRPC_VERBOSITY'))\n"
        "sys.modules['fake'] = fake\n"
        "cli.COMMANDS['fake'] = ('fake', '')\n"
        "cli.main(['fake'])\n"
    )
    assert run(code).stdout.split() == [seen]


OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.mark.process
@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, ["None", "2000", "0"]),
        ({"GOMP_SPINCOUNT": "7"}, ["None", "7", "0"]),
        ({"OMP_WAIT_POLICY": "active"}, ["active", "None", "None"]),
    ],
)
def test_threads_that_wait_do_not_spin_for_long(given, seen, monkeypatch):
    for name in OPENMP:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    code = (
        "import os, sys, types\n"
        "from opticnerve.cli import commands as cli\n"
        "assert 'torch' not in sys.modules\n"
        "fake = types.ModuleType('fake')\n"
        f"fake.main = lambda argv: print(*map(os.environ.get, {OPENMP}))\n"
        "sys.modules['fake'] = fake\n"
        "cli.COMMANDS['fake'] = ('fake', '')\n"
        "cli.main(['fake'])\n"
    )
    assert run(code).stdout.split() == seen


IMPORTS = """
import logging, os
before = dict(os.environ), logging.root.level, list(logging.root.handlers)
names = ("opticnerve", "grpc", "httpx2", "asyncio")
levels = {name: logging.getLogger(name).level for name in names}
import opticnerve, opticnerve.client, opticnerve.local.serve
opticnerve.serve
after = dict(os.environ), logging.root.level, list(logging.root.handlers)
assert before == after
assert levels == {name: logging.getLogger(name).level for name in levels}
for name, logger in logging.root.manager.loggerDict.items():
    if name.split(".")[0] == "opticnerve" and isinstance(logger, logging.Logger):
        assert not logger.handlers and logger.level == logging.NOTSET, name
"""


@pytest.mark.process
def test_importing_the_library_prints_nothing_and_configures_nothing(monkeypatch):
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    ended = run(IMPORTS)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )


@pytest.mark.parametrize(
    ("command", "who"), [("up", "up"), ("encoder", "an encoder"), ("llm", "an LLM worker")]
)
def test_a_command_that_lacks_its_extra_says_so_in_one_line(command, who, monkeypatch, capsys):
    monkeypatch.setattr(up, "Supervisor", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main([command, "--port", "0"]) == 2
    assert capsys.readouterr().err == (
        f"opticnerve: {who} needs torch: pip install 'opticnerve[worker]'\n"
    )


# ---- a wrong checkpoint


def wrong_checkpoints(path, monkeypatch):
    """(what MODEL says, what the answer says)"""
    monkeypatch.chdir(path)
    for name, config in (("bare", None), ("bert", '{"model_type": "bert"}'), ("torn", "{")):
        (path / name).mkdir()
        if config is not None:
            (path / name / "config.json").write_text(config)
    (path / "file").write_text("")
    shutil.copytree(DEMO, path / "weightless", ignore=lambda *_: ["model.safetensors"])
    shutil.copytree(DEMO, path / "cut")
    weights = path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    return [
        ("/no/such/model", "there is no directory /no/such/model"),
        ("no-such-model", "there is no directory no-such-model"),
        ("file", "file is a file"),
        ("bare", "holds no config.json"),
        ("bert", "model_type 'bert'"),
        ("torn", "is not valid JSON"),
        ("weightless", "holds neither model.safetensors nor"),
        ("cut", "model.safetensors"),
    ]


@pytest.mark.parametrize("command", ["up", "encoder", "llm"])
def test_a_wrong_checkpoint_is_told_once_before_anything_starts(
    command, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(up, "Supervisor", None)
    for module in ("encoder_service.service", "llm_service.service"):  # They import torch.
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(hub, "download", None)
    for model, text in wrong_checkpoints(tmp_path, monkeypatch):
        assert cli.main([command, model, "--port", "0"]) == 2, model
        told = capsys.readouterr()
        assert told.out == "" and told.err.count("\n") == 1
        assert told.err.startswith("opticnerve: ") and text in told.err


def test_up_tells_early_what_the_gateway_would_tell_late(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(up, "Supervisor", None)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copytree(DEMO, tmp_path / name, ignore=lambda *_, name=name: [name])
    for argv, text in (
        ([str(tmp_path / "tokenizer.json")], "no tokenizer at all"),
        ([str(tmp_path / "chat_template.jinja")], "has no chat template"),
        (["--chat-template", "/no/such/file"], "--chat-template: '/no/such/file' is no file"),
        (["--generation-config", "/no/such/place"], "--generation-config: /no/such/place is"),
    ):
        assert cli.main(["up", *argv, "--port", "0"]) == 2, argv
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and text in told


@pytest.mark.process
def test_a_gateway_tells_a_wrong_checkpoint_once():
    workers = ["--llm-addresses", "127.0.0.1:9", "--encoder-addresses", "127.0.0.1:9"]
    command = [sys.executable, "-m", "opticnerve", "gateway", "/no/such/model", *workers]
    command += ["--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert ended.stderr.startswith("opticnerve: there is no directory /no/such/model")


@pytest.mark.parametrize("command", ["up", "gateway", "encoder", "llm"])
@pytest.mark.parametrize(
    ("given", "hint"),
    [
        (["--model", "my model"], "'my model'"),
        (["--model=x/y"], "x/y"),
        (["-m", "x", "--port", "0"], "x"),
        (["--model"], "MODEL"),
    ],
)
def test_a_model_that_is_given_as_a_flag(command, given, hint, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([command, *given])
    told = capsys.readouterr().err
    assert exit.value.code == 2
    assert told.startswith(f"opticnerve {command}: ") and f": opticnerve {command} {hint}\n" in told
    assert "public-models" not in told
