"""The table of client programs in docs/clients.md.

    python -m tests.clients.table REPORT

writes it from the JUnit report of a run of these tests, in the clients' environment, whose
installed versions it names. A unit test holds its rows to the tests.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as xml
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "clients.md"
NODE_MODULES = Path(__file__).parent / "node" / "node_modules"
START, END = "<!-- clients: make test-clients -->\n", "<!-- end of clients -->\n"
HEAD = "| client | version | tried | result |\n|---|---|---|---|\n"


@dataclass(frozen=True)
class Client:
    """A row. ``packages``: the distribution of Python, or of Node if ``node``."""

    name: str
    module: str  # Of its tests, without ``test_``.
    package: str
    node: bool = False

    def version(self) -> str:
        """Raises PackageNotFoundError, or FileNotFoundError, where it is not installed."""
        if not self.node:
            return metadata.version(self.package)
        installed = (NODE_MODULES / self.package / "package.json").read_text()
        return str(json.loads(installed)["version"])


CLIENTS = (
    Client("openai (Python)", "openai_python", "openai"),
    Client("openai (Node)", "openai_node", "openai", node=True),
    Client("Vercel AI SDK (`ai`)", "ai_sdk", "ai", node=True),
    Client("anthropic (Python)", "anthropic_python", "anthropic"),
    Client("@anthropic-ai/sdk (Node)", "anthropic_node", "@anthropic-ai/sdk", node=True),
    Client("LiteLLM", "litellm", "litellm"),
    Client("LangChain (`langchain-openai`)", "langchain", "langchain-openai"),
    Client("LlamaIndex (`openai-like`)", "llama_index", "llama-index-llms-openai-like"),
    Client("instructor", "instructor", "instructor"),
    Client("lm-evaluation-harness", "lm_eval", "lm-eval"),
    Client("guidellm", "guidellm", "guidellm"),
    Client("schemathesis, on `/openapi.json`", "schemathesis", "schemathesis"),
)


def words(test: str) -> str:
    """``test_tool_call[json]`` and ``test_case[tool_call-json]``: tool call."""
    name, _, parameters = test.removeprefix("test_").partition("[")
    return (parameters.strip("]").partition("-")[0] if name == "case" else name).replace("_", " ")


def rows(report: Path) -> str:
    """Raises KeyError for tests of a client that has no row."""
    cases: dict[str, list[xml.Element]] = {client.module: [] for client in CLIENTS}
    for case in xml.parse(report).iter("testcase"):
        name = case.get("classname") or case.get("name") or ""  # A skipped module has no class.
        cases[name.rpartition(".test_")[2]].append(case)
    return "".join(row(client, cases[client.module]) for client in CLIENTS)


def row(client: Client, cases: list[xml.Element]) -> str:
    ran = [case for case in cases if case.find("skipped") is None]
    failed = [
        case for case in ran if case.find("failure") is not None or case.find("error") is not None
    ]
    tried = ", ".join(dict.fromkeys(words(case.get("name", "")) for case in ran))
    if not ran:
        return f"| {client.name} | | | not run |\n"
    result = "; ".join(f"**fails: {words(case.get('name', ''))}**" for case in failed) or "passes"
    return f"| {client.name} | {client.version()} | {tried} | {result} |\n"


def with_table(text: str, table: str) -> str:
    """The document with the table between its marks."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return before + START + "\n" + HEAD + table + "\n" + END + after


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(), rows(Path(sys.argv[1]))))
