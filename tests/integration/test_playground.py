"""The playground in a browser, in front of a gateway with scripted workers: keys, pictures, turns,
and everything that may go wrong."""

import asyncio
import base64
import contextlib

import pytest
from selenium.webdriver.common.keys import Keys

from tests.browser import needs_browser, open_browser
from tests.fakes import until
from tests.gateways import END, data_url, ids, keys_of, stack

pytestmark = [
    needs_browser,
    pytest.mark.anyio,
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.usefixtures("one_loop"),
]

ADD = """
const [kind, ...pictures] = arguments;
const data = new DataTransfer();
for (const [name, bytes] of pictures) {
  data.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
}
const target = kind === "paste" ? document : document.getElementById("question");
const event = kind === "paste"
  ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true })
  : new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true });
target.dispatchEvent(event);
"""


def png(color="red", size=(56, 56)):
    return base64.b64decode(data_url(color, size).partition(",")[2])


@pytest.fixture(scope="module")
def page():
    with open_browser() as page:
        yield page


@contextlib.asynccontextmanager
async def opened(page, **settings):
    """A gateway, and ``use(function, ...)``, which runs a function that uses the browser."""
    async with stack(**settings) as s:
        await asyncio.to_thread(page.open, str(s.client.base_url))
        yield s, asyncio.to_thread


def picture(name, color="red", size=(56, 56)):
    return [name, list(png(color, size))]


def failure(page):
    return page.wait(lambda: page.texts(".failure"))[0]


async def test_a_key_is_asked_for_and_kept_in_the_tab(page):
    async with opened(page, keys=keys_of(ada="sk-ada")) as (s, use):

        def visit():
            page.wait(lambda: page.texts("#model option") == ["needs an API key"])
            assert "holders of an API key" in page.texts("#pools")[0]
            assert page.errors() == []
            page.ask("Hello", 1)
            assert "This server needs an API key" in failure(page)
            page.find(".failure button").click()
            page.find("#key").send_keys("sk-other" + Keys.TAB)
            page.find(".answer .actions button").click()
            page.wait(lambda: "It does not know the key" in "".join(page.texts(".failure")))
            page.write("#key", "sk-ada" + Keys.TAB)
            page.wait(lambda: page.find("#model").is_enabled())
            page.wait(lambda: page.all('.pool li[data-state="serving"]'))
            page.find(".answer .actions button").click()
            page.wait(lambda: page.texts(".answer > .text p") == ["Hello there."])
            kept = "return [Object.values(sessionStorage), Object.values(localStorage)]"
            in_tab, in_browser = page.run(kept)
            assert "sk-ada" in in_tab and "sk-ada" not in in_browser

        await use(visit)
        assert len(s.llm.starts) == 1


async def test_pictures_are_pasted_dropped_chosen_taken_and_removed(page, tmp_path):
    chosen = tmp_path / "chosen.png"
    chosen.write_bytes(png("green"))
    async with opened(page) as (s, use):

        def visit():
            page.run(ADD, "paste", picture("pasted.png"))
            page.run(ADD, "drop", picture("one.png", "blue"), picture("two.png", "pink"))
            page.find("#files").send_keys(str(chosen))
            page.wait(lambda: len(page.all("#pictures li")) == 4)
            page.find('#pictures [aria-label="Remove one.png"]').click()
            page.find("#camera").click()
            page.wait(lambda: page.run("return document.getElementById('video').videoWidth"))
            page.find("#camera-take").click()
            page.wait(lambda: len(page.all("#pictures li")) == 4)
            shown = [each.get_attribute("alt") for each in page.all("#pictures img")]
            assert shown == ["pasted.png", "two.png", "chosen.png", "camera.jpg"]
            page.run(ADD, "drop", ["notes.png", [1, 2, 3]])
            page.wait(lambda: "notes.png is no picture" in page.texts("#composer-note")[0])
            page.ask("What?", 1)
            assert len(page.texts(".items li")) == 4 and not page.all("#pictures li")

        await use(visit)
        assert len(s.llm.starts[0].items) == 4


async def test_turns_are_edited_retried_and_forgotten(page):
    async with opened(page) as (s, use):

        def visit():
            page.run("document.getElementById('system').closest('details').open = true")
            page.write("#system", "Be brief.")
            page.write('[name="temperature"]', "0.5")
            page.write('[name="seed"]', "7")
            page.run(ADD, "paste", picture("red.png"))
            page.wait(lambda: page.all("#pictures li"))
            page.ask("First", 1)
            page.ask("Second" + Keys.SHIFT + Keys.ENTER + Keys.SHIFT + "line", 2)
            assert page.texts(".question > p") == ["First", "Second\nline"]
            page.all(".answer .actions button")[-1].click()
            page.answer(2)
            page.wait(lambda: len(page.all(".answer .timings")) == 2)
            edit = page.all(".question .actions button")[1]
            page.run("arguments[0].click()", edit)
            assert page.find("#question").get_attribute("value") == "First"
            assert len(page.all("#pictures li")) == 1 and not page.all(".exchange")
            page.find("#question").send_keys(" again" + Keys.ENTER)
            page.answer(1)
            page.find("#new-chat").click()
            assert page.find("#welcome").is_displayed() and not page.all(".exchange")
            assert page.errors() == []

        await use(visit)
        starts = s.llm.starts
        assert [len(start.items) for start in starts] == [1, 1, 1, 1]
        assert starts[1].token_ids == starts[2].token_ids  # The second question, and its retry.
        assert len(starts[1].token_ids) > len(starts[0].token_ids)
        assert (starts[0].sampling.temperature, starts[0].sampling.seed) == (0.5, 7)


async def test_what_a_model_says_is_text(page):
    said = "<img src=x onerror=alert(1)> **bold**\n\n```\n<b>code</b>\n```"
    async with opened(page, tokens=[*ids(said), END]) as (_, use):

        def visit():
            page.ask("Hello", 1)
            assert not page.all(".answer > .text img") and not page.all(".answer > .text b")
            assert page.texts(".answer > .text strong") == ["bold"]
            assert page.texts(".answer > .text pre") == ["<b>code</b>"]

        await use(visit)


async def test_refusals_say_what_to_do(page):
    async with opened(page, max_request_bytes=20_000) as (_, use):

        def visit():
            page.run("document.getElementById('question').value = 'x'.repeat(30000)")
            page.find("#send").click()
            page.answer(1)
            assert "Too large" in failure(page) and "413 payload_too_large" in failure(page)

        await use(visit)
    async with opened(page, llms=0, ready=False, worker_wait_s=0.1) as (_, use):

        def visit():
            page.wait(lambda: page.texts("#status-text") == ["Not serving"])
            page.ask("Hello", 1)
            assert "Nothing can answer now" in failure(page)

        await use(visit)


async def test_pictures_beyond_a_limit_are_shrunk_on_wish(page):
    async with opened(page, max_image_pixels=64 * 64) as (_, use):

        def visit():
            page.wait(lambda: page.find("#status").get_attribute("data-state") == "ok")
            page.run(ADD, "paste", picture("large.png", size=(100, 100)))
            page.wait(lambda: page.all("#pictures .wrong"))
            page.write("#question", "What?" + Keys.ENTER)
            assert "large.png is too large" in page.texts("#composer-note")[0]
            page.find("#pictures .wrong button").click()
            page.wait(lambda: page.all("#pictures li:not(.wrong)"))
            page.find("#send").click()
            page.answer(1)
            assert len(page.texts(".items li")) == 1

        await use(visit)


async def test_a_busy_server_and_a_lost_connection(page):
    go_on = asyncio.Event()

    async def wait(_, place):
        if place == 1:
            await go_on.wait()

    async with opened(page, max_concurrent_requests=1) as (s, use):
        s.llm.step = wait
        other = asyncio.create_task(s.chat())
        await s.llm.started.wait()
        await use(page.ask, "Hello", 1)
        text = await use(failure, page)
        assert "The server is busy" in text and "tried again in 1 s" in text
        go_on.set()
        await other
        go_on.clear()
        s.llm.started.clear()
        await use(page.write, "#question", "Again" + Keys.ENTER)
        await s.llm.started.wait()
        await use(page.wait, lambda: page.texts(".answer > .text")[-1])
        s.server._abort_connections()
        await use(page.answer, 2)
        assert "The connection was lost" in (await use(page.texts, ".failure"))[-1]
        go_on.set()
        await until(s.idle)
    await use(page.wait, lambda: page.texts("#status-text") == ["No connection"])
    await use(page.ask, "Hello", 3)
    assert "No connection" in (await use(page.texts, ".failure"))[-1]
