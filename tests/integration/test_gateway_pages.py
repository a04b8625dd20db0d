"""The pages for browsers, as the gateway serves them; tests/e2e/test_playground.py uses them."""

import re

import pytest

from gateway.playground.pages import FILES
from tests.gateways import keys_of, stack

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop")]

BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
LINK = re.compile(r'(?:src|href|from) ?=? ?"([^"#]+)"')


def alone(**settings):
    return stack(encoders=0, llms=0, ready=False, **settings)


async def test_a_browser_gets_the_page_and_a_program_the_versions():
    async with alone(keys=keys_of(ada="sk-ada")) as s:
        page = await s.client.get("/", headers=BROWSER)
        assert page.status_code == 200 and page.headers["vary"] == "Accept"
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "<title>OpticNerve playground" in page.text
        told = await s.client.get("/")
        assert told.json()["docs"] == "/docs" and told.headers["vary"] == "Accept"
        docs = await s.client.get("/docs/")
        assert docs.status_code == 200 and "<title>OpticNerve API" in docs.text


async def test_pages_allow_no_script_or_request_beyond_this_server():
    async with alone() as s:
        for path in ("/", "/docs", "/playground/main.js"):
            answer = await s.client.get(path, headers=BROWSER)
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
            assert "unsafe" not in policy and "http" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"


async def test_every_file_that_a_page_names_is_served_without_a_key():
    async with alone(keys=keys_of(ada="sk-ada")) as s:
        for name, file in FILES.items():
            for link in LINK.findall(file.body.decode()):
                answer = await s.client.get(link, headers=BROWSER)
                assert answer.status_code == 200, f"{name}: {link}"
        assert (await s.client.get("/playground/other.js")).status_code == 404
        assert (await s.client.get("/playground/..%2Fpages.py")).status_code == 404


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_file_names_another_host_or_makes_markup_of_text(name):
    text = FILES[name].body.decode()
    text = text.replace("http://www.w3.org/2000/svg", "")
    assert "http:" not in text and "https:" not in text
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert unsafe not in text
    if name.endswith(".html"):
        assert not re.search(r"<script>|\son[a-z]+=|\sstyle=", text)


async def test_a_browser_that_has_a_file_gets_it_once():
    async with alone() as s:
        first = await s.client.get("/playground/style.css")
        tag = {"if-none-match": f'"other", W/{first.headers["etag"]}'}
        again = await s.client.get("/playground/style.css", headers=tag)
        assert again.status_code == 304 and not again.content
        assert again.headers["etag"] == first.headers["etag"]
        other = await s.client.get("/playground/main.js", headers=tag)
        assert other.status_code == 200
