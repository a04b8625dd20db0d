"""Command lines: flags from configurations, help grouped by topic, one-line errors."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from opticnerve.config import EncoderConfig, GatewayConfig, LLMConfig, TelemetryConfig
from opticnerve.config.options import PREFIX, Group, Option, Spec, build, is_service_link, options
from opticnerve.config.up import UpConfig
from opticnerve.errors import ConfigError, did_you_mean
from opticnerve.telemetry import logs

log = logging.getLogger(__name__)

EPILOG = (
    "Every flag has an environment twin: --log-level is OPTICNERVE_LOG_LEVEL. A flag wins over "
    "its twin. What Kubernetes sets for a Service called opticnerve is ignored. Sizes may have a "
    "unit: 512M, 2GiB."
)
MAX_WIDTH = 100
MODEL_FLAGS = {"--model", "--model-path", "--model-name", "-m"}  # Flags of other servers.
OTHER_VARIABLES = {"OPTICNERVE_CACHE_DIR"}  # opticnerve.checkpoints.digests reads it.

C = TypeVar("C", EncoderConfig, LLMConfig, GatewayConfig)


# ---- start of a command


def read_config(command: str, description: str, cls: type[C], argv: Sequence[str] | None) -> C:
    """A service's configuration, from its command line and the environment. Starts its logs.

    Ends the process with status 2 for wrong flags, with 0 for --help. Raises ConfigError for wrong
    variables.
    """
    known = list(options(cls))
    given = vars(service_parser(command, description, known).parse_args(argv))
    check_environment()
    settings = build(cls, given)
    start_logs(settings.telemetry)
    warn_of_passwords(known, given)
    return settings


def check_environment(environment: Mapping[str, str] | None = None) -> None:
    """Raises ConfigError for an ``OPTICNERVE_`` variable that no service knows, unless it is a
    service link of Kubernetes."""
    environment = os.environ if environment is None else environment
    known = set(OTHER_VARIABLES)
    for cls in (EncoderConfig, LLMConfig, GatewayConfig, UpConfig):
        known.update(item.variable for item in options(cls))
    for name in sorted(environment):
        link = is_service_link(name, environment[name])
        if name.startswith(PREFIX) and name not in known and not link:
            hint = did_you_mean(name, known)
            raise ConfigError(f"unknown environment variable {name}{hint}", param=name)


def start_logs(settings: TelemetryConfig, environment: Mapping[str, str] | None = None) -> None:
    """Configures the process's logs, and warns of service links, which are ignored."""
    logs.configure(settings.log_level, settings.log_format)
    environment = os.environ if environment is None else environment
    links = sorted(name for name, value in environment.items() if is_service_link(name, value))
    if links:
        log.warning(
            "ignoring Kubernetes' service links (%s); `enableServiceLinks: false` in the pod's "
            "spec leaves them out",
            ", ".join(links),
        )


def warn_of_passwords(known: Iterable[Option], given: Mapping[str, Any]) -> None:
    """Warns of passwords in the given flags: every user of the machine can read command lines."""
    for item in known:
        if item.has_password(given.get(item.name)):
            log.warning(
                "the password in %s is seen by every user of this machine, in `ps`; set %s "
                "instead, or write the URL to a file that only you read and give %s file:///PATH",
                item.flag, item.variable, item.flag,
            )  # fmt: skip


# ---- parsers


def service_parser(command: str, description: str, known: Iterable[Option]) -> Parser:
    """A parser with a flag for each option; a flag that is not given is None."""
    parser = Parser(command, description, "[MODEL] [flags]", EPILOG)
    add_options(parser, known)
    return parser


def add_options(parser: Parser, known: Iterable[Option]) -> None:
    """Adds a flag for each option, under the title of its group."""
    groups = {title: parser.add_argument_group(title) for title in Group}  # Printed if not empty.
    for item in known:
        _add(groups[Group(item.spec.group)], item)


def _add(group: argparse._ArgumentGroup, item: Option) -> None:
    spec, default = item.spec, item.default_text()
    text = spec.help + (f" (default: {default})" if default else "")
    text = argparse.SUPPRESS if spec.hidden else text.replace("%", "%%")
    if item.is_positional:
        group.add_argument(item.name, nargs="?", metavar="MODEL", help=text)
    elif item.is_switch:
        group.add_argument(item.flag, action="store_true", default=None, help=text)
    elif item.kind is bool:
        group.add_argument(item.flag, action=argparse.BooleanOptionalAction, help=text)
    else:
        choices = "{" + ",".join(spec.choices) + "}" if spec.choices else None
        metavar, parse = choices or item.metavar, argument_type(item.parse)
        group.add_argument(item.flag, type=parse, metavar=metavar, help=text)


def argument_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """``parse`` as a ``type`` of argparse, which shows users the text of its ValueError."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def number_type(kind: type[int] | type[float], minimum: int = 0) -> Callable[[str], Any]:
    """An argparse ``type`` for a number, for flags that are not part of a configuration."""
    return argument_type(Option("", kind, None, Spec("", "", minimum=minimum)).parse)


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
        """Ends the process for an unknown flag, and suggests the nearest known one."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            given, _, value = unknown[0].partition("=")
            if given in MODEL_FLAGS and hasattr(parsed, "model"):
                model = shlex.quote(value or parsed.model or "MODEL")
                self.error(f"there is no flag {given}; the model stands alone: {self.prog} {model}")
            kind = "flag" if given.startswith("-") else "argument"
            self.error(f"unknown {kind} {given}{did_you_mean(given, flags)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        print(f"{self.prog}: {message}\nSee `{self.prog} --help`.", file=sys.stderr)
        raise SystemExit(2)


class HelpFormatter(argparse.HelpFormatter):
    """As wide as the terminal, up to ``MAX_WIDTH``; ``--[no-]flag`` for a switch with both."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size((MAX_WIDTH, 24)).columns, MAX_WIDTH)
        super().__init__(prog, max_help_position=32, width=width)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return "--[no-]" + action.option_strings[0][2:]
        return super()._format_action_invocation(action)
