"""The client programs that are tested, and their table in docs/clients.md.

`make test-clients` writes the table from the JUnit reports of its runs; a unit test holds its rows
to the tests.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as xml
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "clients.md"
NODE = "node"  # The environment of clients from npm.
NODE_MODULES = Path(__file__).parent / "node" / "node_modules"
ENVIRONMENTS = ROOT / ".venv-clients"
START, END = "<!-- clients: make test-clients -->\n", "<!-- end of clients -->\n"
HEAD = "| client | version | what was tried | result |\n|---|---|---|---|\n"


@dataclass(frozen=True)
class Client:
    """A row. ``module``: of its tests, without ``test_``. ``package``: of PyPI, or of npm if the
    environment is NODE; the others are named like their file in ``requirements``."""

    name: str
    module: str
    package: str
    environment: str

    @property
    def tests(self) -> Path:
        return Path(__file__).with_name(f"test_{self.module}.py")

    @property
    def version(self) -> str:
        """The installed version; empty if there is none."""
        if self.environment == NODE:
            installed = NODE_MODULES / self.package / "package.json"
            return json.loads(installed.read_text())["version"] if installed.exists() else ""
        folders = (ENVIRONMENTS / self.environment).glob("lib/python3.*/site-packages")
        found = metadata.distributions(name=self.package, path=list(map(str, folders)))
        return next((each.version for each in found), "")


CLIENTS = (
    Client("openai, Python", "openai_python", "openai", "newest"),
    Client("openai 2, Python", "openai_python", "openai", "openai2"),
    Client("openai, Node", "openai_node", "openai", NODE),
    Client("AI SDK (`@ai-sdk/openai`, `@ai-sdk/openai-compatible`)", "ai_sdk", "ai", NODE),
    Client("anthropic, Python", "anthropic_python", "anthropic", "newest"),
    Client("`@anthropic-ai/sdk`, Node", "anthropic_node", "@anthropic-ai/sdk", NODE),
    Client("LiteLLM (`openai/`, `hosted_vllm/`)", "litellm", "litellm", "newest"),
    Client("LangChain (`langchain-openai`)", "langchain", "langchain-openai", "newest"),
    Client("LlamaIndex", "llama_index", "llama-index-llms-openai-like", "openai2"),
    Client("instructor", "instructor", "instructor", "openai2"),
    Client("lm-evaluation-harness", "lm_eval", "lm-eval", "evaluation"),
    Client("guidellm", "guidellm", "guidellm", "evaluation"),
    Client("schemathesis", "schemathesis", "schemathesis", "newest"),
)


def report(environment: str) -> Path:
    """The JUnit report of the last run in an environment."""
    return ENVIRONMENTS / f"{environment}.xml"


def words(test: str) -> str:
    """``test_tool_call[json]`` and ``test_case[tool_call-json]``: tool call."""
    name, _, parameters = test.removeprefix("test_").partition("[")
    return (parameters.strip("]").partition("-")[0] if name == "case" else name).replace("_", " ")


def cases(client: Client) -> list[xml.Element]:
    """What its environment's report has of it."""
    if not report(client.environment).exists():
        return []
    found = xml.parse(report(client.environment)).iter("testcase")
    # The case of a module that was skipped as a whole has no class, but the module's name.
    named = [(case.get("classname") or case.get("name") or "", case) for case in found]
    return [case for name, case in named if name.endswith(f".test_{client.module}")]


def row(client: Client) -> str:
    ran = [case for case in cases(client) if case.find("skipped") is None]
    if not ran:
        return f"| {client.name} | | | not run |\n"
    failed = [case for case in ran if {"failure", "error"} & {told.tag for told in case}]
    return f"| {client.name} | {client.version} | {_named(ran)} | {_result(failed)} |\n"


def _named(tests: Iterable[xml.Element]) -> str:
    return ", ".join(dict.fromkeys(words(each.get("name", "")) for each in tests))


def _result(failed: list[xml.Element]) -> str:
    return f"**fails:** {_named(failed)}" if failed else "passes"


def with_table(text: str) -> str:
    """The document with the table between its marks."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return before + START + "\n" + HEAD + "".join(map(row, CLIENTS)) + "\n" + END + after
