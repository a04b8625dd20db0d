"""docs/clients.md has a row for every client program that is tested, and says what was tried."""

import ast

import pytest

from tests.clients.table import CLIENTS, DOCUMENT, END, NODE, START, words

TABLE = DOCUMENT.read_text().partition(START)[2].partition(END)[0]
ROWS = [tuple(map(str.strip, line.split("|")[1:-1])) for line in TABLE.splitlines() if line][2:]


def functions(client):
    """Names of a client's tests, without those whose names are their parameters."""
    tree = ast.parse(client.tests.read_text())
    names = [each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)]
    return {name for name in names if name.startswith("test_") and name != "test_case"}


def test_every_test_of_a_client_has_a_row():
    tested = {path.name for path in CLIENTS[0].tests.parent.glob("test_*.py")}
    assert {client.tests.name for client in CLIENTS} == tested
    assert [name for name, *_ in ROWS] == [client.name for client in CLIENTS]


@pytest.mark.parametrize("client", CLIENTS, ids=[client.name for client in CLIENTS])
def test_a_row_is_of_the_tests_as_they_are(client):
    (found,) = [row for row in ROWS if row[0] == client.name]
    _, version, tried, result = found
    if result == "not run":
        return
    assert result == "passes", "run make test-clients"
    assert {words(name) for name in functions(client)} <= set(tried.split(", "))
    if client.environment != NODE:
        requirements = client.tests.parent / "requirements" / f"{client.environment}.txt"
        pinned = [line.partition("==") for line in requirements.read_text().splitlines()]
        versions = {name.partition("[")[0]: version for name, _, version in pinned}
        assert versions[client.package] == version
