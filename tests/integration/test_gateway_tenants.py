"""What a key may do, and what its holder learns of others: a gateway with keys."""

import pytest

from gateway.auth import Keys
from tests.gateways import stack

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop")]

KEY_FILE = """\
ada: sk-ada tenant=acme
eve: sk-eve tenant=acme priority=-10
bob: sk-bob priority=5
"""


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text(KEY_FILE)
    return Keys.load(str(path))


def of(name):
    return {"authorization": f"Bearer sk-{name}"}


async def test_requests_run_at_what_their_key_may_use(keys):
    async with stack(keys=keys, host="127.0.0.1") as s:
        for name, asked, runs_at in (
            ("ada", {}, 0), ("ada", {"priority": 3}, 3), ("eve", {"priority": -10}, -10),
            ("bob", {}, 5), ("bob", {"priority": None}, 5), ("bob", {"priority": 6}, 6),
        ):  # fmt: skip
            assert (await s.chat(headers=of(name), **asked)).status_code == 200
            assert s.llm.starts[-1].priority == runs_at, (name, asked)
        count = len(s.llm.starts)
        for name, asked in (("ada", -1), ("eve", -11), ("bob", 0)):
            for stream in (False, True):
                answer = await s.chat(headers=of(name), priority=asked, stream=stream)
                assert answer.status_code == 400
                assert answer.json()["error"]["param"] == "priority"
        assert len(s.llm.starts) == count


async def test_without_keys_nobody_goes_before_others():
    async with stack() as s:
        assert (await s.chat(priority=-1)).status_code == 400
        assert (await s.chat(priority=2)).status_code == 200
        assert [start.priority for start in s.llm.starts] == [2]
