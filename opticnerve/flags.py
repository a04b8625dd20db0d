"""Command lines: flags from configurations, help by topic, errors of one line."""

from __future__ import annotations

import argparse
import difflib
import logging
import shlex
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from opticnerve.config import (
    GROUPS,
    EncoderConfig,
    GatewayConfig,
    LLMConfig,
    begin_logs,
    check_environment,
)
from opticnerve.options import Option, Spec, build, options

log = logging.getLogger(__name__)

EPILOG = (
    "Every flag has an environment twin: --log-level is OPTICNERVE_LOG_LEVEL. A flag wins over "
    "its twin. What Kubernetes sets for a Service called opticnerve is ignored. Sizes may have a "
    "unit: 512M, 2GiB."
)
MAX_WIDTH = 100
MODEL_FLAGS = {"--model", "--model-path", "--model-name", "-m"}  # As other servers have them.

C = TypeVar("C", EncoderConfig, LLMConfig, GatewayConfig)


def read(command: str, description: str, cls: type[C], argv: Sequence[str] | None) -> C:
    """A service's configuration, from its command line and the environment; its logs begin.

    Ends the process with status 2 for flags that are wrong, with 0 for --help. Raises ConfigError
    for variables that are.
    """
    given = vars(service_parser(command, description, [cls]).parse_args(argv))
    check_environment()
    settings = build(cls, given)
    begin_logs(settings.telemetry)
    warn_of_passwords(cls, given)
    return settings


def warn_of_passwords(cls: type, given: Mapping[str, Any]) -> None:
    """Warns of flags with a password in them: every user of the machine reads command lines."""
    for item in options(cls):
        if item.has_password(given.get(item.name)):
            log.warning(
                "the password in %s is seen by every user of this machine, in `ps`; set %s "
                "instead, or write the URL to a file that only you read and give %s file:///PATH",
                item.flag, item.variable, item.flag,
            )  # fmt: skip


def service_parser(
    command: str, description: str, classes: Sequence[type], without: Collection[str] = ()
) -> Parser:
    """A parser with a flag for every option of ``classes``; None stands for what is not given.

    Of options with one name the first counts. ``without``: options that this command has not.
    """
    parser = Parser(command, description, "[MODEL] [flags]", EPILOG)
    found: dict[str, Option] = {}
    for cls in classes:
        for item in options(cls):
            if item.name not in without:
                found.setdefault(item.name, item)
    for title in GROUPS:
        mine = [item for item in found.values() if item.spec.group == title]
        group = parser.add_argument_group(title)  # Not printed while it is empty.
        for item in mine:
            _add(group, item)
    return parser


def _add(group: argparse._ArgumentGroup, item: Option) -> None:
    spec, default = item.spec, item.show_default()
    text = spec.help + (f" (default: {default})" if default else "")
    text = argparse.SUPPRESS if spec.hidden else text.replace("%", "%%")
    if item.name == "model":
        group.add_argument("model", nargs="?", metavar="MODEL", help=text)
    elif item.is_switch:
        group.add_argument(item.flag, action="store_true", default=None, help=text)
    elif item.is_bool:
        group.add_argument(item.flag, action=argparse.BooleanOptionalAction, help=text)
    else:
        choices = "{" + ",".join(spec.choices) + "}" if spec.choices else None
        metavar = choices or spec.metavar
        group.add_argument(item.flag, type=typed(item.parse), metavar=metavar, help=text)


def typed(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """``parse`` for argparse: the text of its ValueError is what the user reads."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def number(kind: type[int] | type[float], least: int = 0) -> Callable[[str], Any]:
    """The type of a flag that is in no configuration."""
    return typed(Option("", (), kind, None, Spec("", "", least=least)).parse)


class Parser(argparse.ArgumentParser):
    """A command's parser. Flags are written in full; an error is one line, without the usage."""

    def __init__(
        self, command: str, description: str, usage: str, epilog: str | None = None
    ) -> None:
        super().__init__(
            prog=f"opticnerve {command}",
            usage=f"%(prog)s {usage}",
            description=description,
            epilog=epilog,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Ends the process where a flag is not known, and names the nearest that is."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            given, _, value = unknown[0].partition("=")
            if given in MODEL_FLAGS and hasattr(parsed, "model"):
                model = shlex.quote(value or parsed.model or "MODEL")
                self.error(f"there is no flag {given}; the model stands alone: {self.prog} {model}")
            near = difflib.get_close_matches(given, flags, 1)
            kind = "flag" if given.startswith("-") else "argument"
            self.error(f"unknown {kind} {given}" + (f", did you mean {near[0]}?" if near else ""))
        return parsed

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        print(f"{self.prog}: {message}\nSee `{self.prog} --help`.", file=sys.stderr)
        raise SystemExit(2)


class HelpFormatter(argparse.HelpFormatter):
    """Wide where the terminal is, and ``--[no-]flag`` for a switch that has both."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size((MAX_WIDTH, 24)).columns, MAX_WIDTH)
        super().__init__(prog, max_help_position=32, width=width)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return "--[no-]" + action.option_strings[0][2:]
        return super()._format_action_invocation(action)
