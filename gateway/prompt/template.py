"""The model's own chat template, rendered as Hugging Face renders it, in a sandbox.

A template is compiled three times: unchanged, and twice with aliases instead of its special tokens
(see ``gateway.prompt.special_token_guard``). The unchanged one renders the prompt; the others show
where its special tokens come from.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gateway.edge.limits import MAX_PROMPT_CHARACTERS, TEMPLATE_TIMEOUT_S
from gateway.prompt.special_token_guard import Aliases
from opticnerve.checkpoints.json_files import read_object
from opticnerve.errors import CheckpointError, ConfigError, ContextLengthExceeded, InvalidRequest

MAX_MESSAGE = 500  # Characters of a template's own error message that ours quotes.
COMPARING_METHODS = frozenset(
    {"split", "rsplit", "partition", "rpartition", "startswith", "endswith", "strip", "lstrip"}
    | {"rstrip", "find", "rfind", "index", "rindex", "count", "removeprefix", "removesuffix"}
)
COMPARING_FILTERS = frozenset({"replace", "selectattr", "rejectattr", "select", "reject", "trim"})


class GenerationBlock(Extension):
    """``{% generation %}``, which marks the assistant's text for training. Renders its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class TemplateNamespace(jinja2.utils.Namespace):
    """``namespace()`` without private names."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # ``self=`` may be a name.
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} begins with _")


def _raise_exception(message: Any) -> None:
    raise jinja2.exceptions.TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def make_environment() -> ImmutableSandboxedEnvironment:
    """Configured as in Hugging Face. ``strftime_now`` is passed to each rendering, so that all
    renderings of one request see the same time."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["namespace"] = TemplateNamespace
    return environment


class Renderable(Protocol):
    """A template in three forms, which ``render`` takes; see ``ChatTemplate``."""

    source: str
    plain: Any
    written: Any
    everywhere: Any

    @property
    def variables(self) -> frozenset[str]: ...

    @property
    def reserved_names(self) -> frozenset[str]: ...

    def render(self, template: Any, variables: Mapping[str, Any]) -> str: ...


class ChatTemplate:
    """One template, compiled three times: ``plain`` unchanged, ``written`` with aliases in the text
    that it writes, ``everywhere`` with aliases also in strings that it compares with text."""

    def __init__(self, source: str, aliases: Aliases) -> None:
        """Raises CheckpointError for a template that does not parse."""
        self.source = source
        self._aliases = aliases
        self._environment = make_environment()
        try:
            self.plain = self._environment.from_string(source)
            self.written = self._compile(compared=False)
            self.everywhere = self._compile(compared=True)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"the chat template does not parse: line {error.lineno}: {error.message}"
            ) from error

    @property
    def reserved_names(self) -> frozenset[str]:
        """Names that no variable may have: Jinja's ``self``, and the functions of templates."""
        return frozenset({"self", *self._environment.globals})

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names of the variables that the template reads."""
        return frozenset(meta.find_undeclared_variables(self._environment.parse(self.source)))

    def _compile(self, *, compared: bool) -> jinja2.Template:
        """The template with aliases for special tokens in the text that it writes, and with
        ``compared`` also in the strings with which it compares, splits or replaces."""
        environment = self._environment
        tree = environment.parse(self.source)
        unchanged = set() if compared else {id(node) for node in _compared(tree)}
        for text in tree.find_all(nodes.TemplateData):
            text.data = self._aliases.hide(text.data)
        for constant in tree.find_all(nodes.Const):
            if isinstance(constant.value, str) and id(constant) not in unchanged:
                constant.value = self._aliases.hide(constant.value)
        code = environment.compile(tree)
        return environment.template_class.from_code(environment, code, environment.make_globals({}))

    def render(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """The rendered text. Raises InvalidRequest with the template's own message, and
        ContextLengthExceeded if the text is too long or takes longer than TEMPLATE_TIMEOUT_S."""
        deadline = time.monotonic() + TEMPLATE_TIMEOUT_S
        pieces: list[str] = []
        size = 0
        try:
            for piece in template.generate(**variables):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_PROMPT_CHARACTERS or time.monotonic() > deadline:
                    raise ContextLengthExceeded(
                        f"{ContextLengthExceeded.lead}; the chat template wrote too much; send "
                        "a shorter conversation",
                        param="messages",
                    )
        except InvalidRequest:
            raise
        except Exception as error:  # A template can raise any exception.
            raise self._refusal(error) from error
        return "".join(pieces)

    def _refusal(self, error: Exception) -> InvalidRequest:
        if isinstance(error, jinja2.TemplateError):
            said = self._aliases.redact(error.message or type(error).__name__)[:MAX_MESSAGE]
            refuses = "the model's chat template refuses these messages"
            # A template's message may quote the request, so it is not logged.
            return InvalidRequest(
                f"{refuses}: {said}", param="messages", code="template_refusal", logged=refuses
            )
        return InvalidRequest(
            "the model's chat template cannot render these messages "
            f"({type(error).__name__}); check roles, their order, each message's fields, and "
            "chat_template_kwargs",
            param="messages",
        )


def clock(now: datetime) -> Any:
    """``strftime_now``, which templates call with a format, for one request."""
    return now.strftime


def _compared(tree: nodes.Template) -> Iterator[nodes.Const]:
    """String constants that a template compares text with, and does not write."""
    for compare in tree.find_all(nodes.Compare):
        yield from _constants(compare.expr)
        for operand in compare.ops:
            yield from _constants(operand.expr)
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in COMPARING_METHODS:
            for argument in call.args:
                yield from _constants(argument)
        elif isinstance(call.node, nodes.Getattr) and call.node.attr == "replace" and call.args:
            yield from _constants(call.args[0])
    for used in tree.find_all(nodes.Filter):
        if used.name in COMPARING_FILTERS and used.args:
            args = used.args[:1] if used.name == "replace" else used.args
            for argument in args:
                yield from _constants(argument)
    for test in tree.find_all(nodes.Test):
        for argument in test.args or ():
            yield from _constants(argument)


def _constants(node: nodes.Node) -> Iterator[nodes.Const]:
    if isinstance(node, nodes.Const):
        yield node
    yield from node.find_all(nodes.Const)


# ---- finding a checkpoint's template


DEFAULT = "default"  # The template that a checkpoint with several uses.
ADDITIONAL = "additional_chat_templates"  # A directory of others, beside chat_template.jinja.


def load_template(path: Path, config: Mapping[str, Any], override: str | None = None) -> str:
    """The template's source; see ``find_template``."""
    return find_template(path, config, override)[0]


def find_template(
    path: Path, config: Mapping[str, Any], override: str | None = None
) -> tuple[str, str]:
    """The template's source, and where it is from: ``--chat-template`` (a file, the text itself, or
    the name of one of the checkpoint's templates), else the checkpoint's own.

    Raises ConfigError for an override that is none of these, CheckpointError for a checkpoint
    without a template.
    """
    if override is not None and re.search(r"\{[{%#]", override):
        return override, "--chat-template"
    if override is not None and Path(override).is_file():
        return _read(Path(override)), override
    named = named_templates(path, config)
    found = named.get(override or DEFAULT)
    if found is not None:
        return found
    names = f"; its templates are {', '.join(sorted(named))}" if named else ""
    if override is not None:
        raise ConfigError(
            f"--chat-template: {override[:200]!r} is no file, no template, and no name of a "
            f"template of the model{names}",
            param="chat_template",
        )
    raise CheckpointError(
        f"{path} has no {'default ' if named else ''}chat template; give one with --chat-template: "
        f"a file, the text itself, or a name{names}"
    )


def named_templates(path: Path, config: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The checkpoint's templates by name, each with its file. Of several with one name, the first
    counts of those in chat_template.jinja and ``ADDITIONAL``, chat_template.json,
    processor_config.json, and ``chat_template`` of tokenizer_config.json, as Hugging Face's
    processors look for them."""
    found = _named(config.get("chat_template"), "tokenizer_config.json")
    for name in ("processor_config.json", "chat_template.json"):
        found |= _named((read_object(path / name) or {}).get("chat_template"), name)
    for file in sorted((path / ADDITIONAL).glob("*.jinja")):
        found[file.stem] = (_read(file), f"{ADDITIONAL}/{file.name}")
    file = path / "chat_template.jinja"
    if file.is_file():
        found[DEFAULT] = (_read(file), file.name)
    return found


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _named(entry: Any, file: str) -> dict[str, tuple[str, str]]:
    """Templates by name: one, which is the default, a list of names and templates, or a mapping."""
    if isinstance(entry, str):
        entry = {DEFAULT: entry}
    if isinstance(entry, list):
        entry = {item["name"]: item["template"] for item in entry if isinstance(item, dict)}
    if not isinstance(entry, Mapping):
        return {}
    return {name: (text, file) for name, text in entry.items() if isinstance(text, str)}
