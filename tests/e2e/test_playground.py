"""The playground in a browser, in front of a whole stack that serves the demo checkpoint."""

import json

import pytest
from selenium.webdriver.common.keys import Keys

from tests.browser import needs_browser, open_browser

pytestmark = [needs_browser, pytest.mark.slow]

SCREENS = ((1280, 800), (390, 844), (360, 740))
SHAPE = {
    "type": "object",
    "properties": {"kind": {"enum": ["circle", "square"]}},
    "required": ["kind"],
    "additionalProperties": False,
}
LONG = {"type": "string", "minLength": 3000, "maxLength": 4000}


@pytest.fixture(scope="module")
def page():
    with open_browser() as page:
        yield page


@pytest.fixture
def playground(stack, page):
    page.open(stack.url)
    page.wait(lambda: page.find("#status").get_attribute("data-state") == "ok")
    page.wait(lambda: page.find("#model").is_enabled())
    yield page
    assert page.errors() == []
    assert page.hosts() == {stack.url.removeprefix("http://")}


CHOOSE_SCHEMA = """
const [format, schema] = ["format", "schema"].map((id) => document.getElementById(id));
format.closest("details").open = true;
format.value = "json_schema";
schema.value = arguments[0];
for (const each of [format, schema]) each.dispatchEvent(new Event("input", { bubbles: true }));
"""


WATCH_PREVIEWS = """
const { createObjectURL, revokeObjectURL } = URL;
window.previews = new Set();
URL.createObjectURL = (blob) => {
  const made = createObjectURL(blob);
  previews.add(made);
  return made;
};
URL.revokeObjectURL = (url) => {
  previews.delete(url);
  revokeObjectURL(url);
};
"""


NEVER_ANSWER = """
window.answering = window.fetch;
window.fetch = (path, { signal }) => new Promise((_, reject) => {
  signal.addEventListener("abort", () => reject(signal.reason));
});
"""


def choose_schema(page, text):
    page.run(CHOOSE_SCHEMA, text)


def test_a_chat_about_a_picture(playground):
    page = playground
    assert page.texts("#welcome h2") == ["Ask about a picture"]
    page.find(".example").click()
    assert page.answer(1) == "A large red star in the center."
    assert page.texts(".items li") == ["Picture 19 tokensencoded"]
    stages = page.texts(".stage")
    assert {"fetch", "render", "preprocess", "encode", "put", "get", "prefill", "decode"} <= {
        *stages
    }
    assert stages.index("preprocess") < stages.index("encode") < stages.index("decode")
    assert page.ask("What color is the star?", 2) == "The star is red."
    again = page.all(".answer")[1]
    assert "cache hit" in again.text and "32 cached" in again.text
    assert "encode\n" not in again.text
    assert [each.get_attribute("open") for each in page.all(".timings")] == [None, "true"]
    assert page.texts(".pool h3") == ["Encoders", "LLM workers"]
    assert len(page.all('.pool li[data-state="serving"]')) == 2
    for width, height in SCREENS:
        page.resize(width, height, dark=width < 600)
        assert not page.overflows()
    page.resize(1280, 800)


def test_pictures_are_freed_when_they_are_shown_no_more(playground):
    page = playground
    page.run(WATCH_PREVIEWS)
    page.find(".example").click()
    page.answer(1)
    assert page.run("return previews.size") == 1
    page.run("arguments[0].click()", page.all(".question .actions button")[-1])  # Edit
    page.wait(lambda: len(page.all("#pictures li")) == 1)
    assert page.run("return previews.size") == 1
    assert page.run("return document.querySelector('#pictures img').naturalWidth") > 0
    page.find("#pictures .remove").click()
    assert page.run("return previews.size") == 0
    page.find(".example").click()
    page.answer(1)
    page.find("#new-chat").click()
    assert page.run("return previews.size") == 0


def test_a_gateway_that_does_not_answer_is_shown_as_lost(playground):
    state = playground.find("#status").get_attribute
    playground.run(NEVER_ANSWER)
    playground.wait(lambda: state("data-state") == "lost")
    playground.run("window.fetch = window.answering")
    playground.wait(lambda: state("data-state") == "ok")


def test_a_json_schema_shapes_the_answer(playground):
    for name, value in {"temperature": "1.5", "seed": "7", "max_tokens": "200"}.items():
        playground.write(f'[name="{name}"]', value)
    choose_schema(playground, json.dumps(SHAPE))
    told = json.loads(playground.ask("Hello", 1))
    assert told.keys() == {"kind"} and told["kind"] in ("circle", "square")
    choose_schema(playground, "{")
    playground.write("#question", "Hello" + Keys.ENTER)
    assert "This is no JSON" in playground.find("#schema-error").text
    assert len(playground.all(".answer")) == 1


@pytest.mark.parametrize("way", ["button", "key"])
def test_an_answer_can_be_stopped(playground, stack, way):
    choose_schema(playground, json.dumps(LONG))
    playground.write("#question", "Hello" + Keys.ENTER)
    playground.wait(lambda: len("".join(playground.texts(".answer .text p"))) > 20)
    if way == "button":
        playground.find("#stop").click()
    else:
        playground.find("#question").send_keys(Keys.ESCAPE)
    assert playground.answer(1).endswith("Stopped")
    assert not playground.find("#stop").is_displayed()
    playground.wait(lambda: "idle" in playground.texts(".pool .state")[-1])


def test_the_page_of_the_api_asks_without_another_host(stack, page):
    page.open(f"{stack.url}/docs")
    page.wait(lambda: page.all(".operation"))
    page.write("#filter", "/version")
    (shown,) = [each for each in page.all(".operation") if each.is_displayed()]
    shown.find_element("css selector", "summary").click()
    page.find(".operation[open] .trial button").click()
    page.wait(lambda: '"name": "opticnerve"' in page.texts(".trial pre")[0])
    page.run("document.getElementById('filter').value = ''")
    chat = page.all(".operation summary")[0]
    page.run("arguments[0].click()", chat)
    assert {"messages", "temperature"} <= set(page.texts(".operation[open] th"))
    assert page.errors() == [] and page.hosts() == {stack.url.removeprefix("http://")}
