"""``chat_template`` of requests: rendered as the model's own is, in a process that is bounded."""

import asyncio

import pytest

from gateway.prompt import request_templates
from gateway.prompt.renderer import ChatRenderer
from gateway.prompt.request_templates import RequestTemplates, TemplateProcess
from opticnerve.errors import InvalidRequest, Overloaded
from tests import vocabularies as v
from tests.bodies import chat
from tests.bodies import user as plain_user
from tests.gateways import data_url, stack, user

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.usefixtures("one_loop"),
    pytest.mark.process,
    pytest.mark.slow,
]

PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def templates():
    renderer = ChatRenderer.load(v.DEMO, v.DEMO_LAYOUT, None, "Be brief.")
    made = RequestTemplates(renderer)
    yield made
    made.close()


def render(templates, template, *messages, **fields):
    asked = chat(*messages, chat_template=template, **fields)
    return templates.render(asked.chat, 1)


async def test_a_template_is_rendered_as_a_servers_own(templates):
    fields = {"chat_template_kwargs": {"x": "<|im_end|>"}, "documents": [{"text": "a"}]}
    source = PLAIN + "{{ x }}{{ (documents or [{}])[0].text }}{{ strftime_now('%Y')[:2] }}"
    own = ChatRenderer.load(v.DEMO, v.DEMO_LAYOUT, source, "Be brief.")
    for text in ("hi", "<|im_end|>", "é\n"):
        made = await render(templates, source, plain_user(text), **fields)
        assert made == own.render(chat(plain_user(text), **fields))
    silent = await render(templates, "{{ messages[0].content }}{{ messages | length }}")
    assert silent.prompt == "Be brief.2"
    silent = await render(templates, "{% for m in messages if m.role == 'user' %}{{ m.content }}"
                          "{% endfor %}{{ messages | length }}")  # fmt: skip
    assert silent.prompt == "hi1"  # It shows no system message, so it gets none.


@pytest.mark.parametrize(
    "bad",
    [
        ENDLESS,
        "{{ 9 ** (9 ** 9) }}",
        "{% set x = 9 ** (9 ** 9) %}",
        "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
        "{{ n.x }}",
        "{{ 'x' * 10 ** 12 }}",
        "{{ 'x' | center(10 ** 12) }}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}",
        "{% for %}",
        "(" * 60_000 + "{{" + "(" * 5000,
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception('no') }}",
    ],
)
async def test_what_a_template_may_not_do(bad, templates, monkeypatch):
    monkeypatch.setattr(request_templates, "TEMPLATE_TIMEOUT_S", 2.0)
    with pytest.raises(InvalidRequest):
        await render(templates, bad)
    assert (await render(templates, PLAIN)).num_items == 0  # The next one is rendered.


async def test_the_event_loop_and_other_chats_go_on_meanwhile(templates, monkeypatch):
    monkeypatch.setattr(request_templates, "TEMPLATE_TIMEOUT_S", 3.0)
    work = [asyncio.create_task(render(templates, ENDLESS)) for _ in range(8)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await render(templates, PLAIN)
    for task in work[1:]:
        task.cancel()
    with pytest.raises(InvalidRequest, match="too much time or memory"):
        await work[0]


async def test_the_process_has_no_secrets_and_ends(monkeypatch, templates):
    started = []
    popen = request_templates.subprocess.Popen

    def watched(*args, **kwargs):
        started.append((popen(*args, **kwargs), kwargs["env"]))
        return started[-1][0]

    monkeypatch.setenv("OPTICNERVE_SECRET", "x")
    monkeypatch.setattr(request_templates.subprocess, "Popen", watched)
    await render(templates, PLAIN)
    await render(templates, PLAIN)
    ((process, environment),) = started
    process.kill()
    await asyncio.to_thread(process.wait, 30)
    await render(templates, PLAIN)  # Another one is started.
    process, environment = started[1]
    assert not any(name.startswith("OPTICNERVE") for name in environment)
    templates.close()
    assert await asyncio.to_thread(process.wait, 30) != 0


async def test_a_process_that_does_not_start_is_an_error(monkeypatch, templates):
    monkeypatch.setattr(request_templates.sys, "executable", "/bin/false")
    with pytest.raises(request_templates.Unavailable):
        await render(templates, PLAIN)
    assert templates._process._pipe is None


async def test_requests_with_a_template():
    picture = "{% for m in messages %}{% for p in m.content %}{% if p.type == 'image' %}" \
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}" \
        "{% endfor %}{% endfor %}"  # fmt: skip
    async with stack(allow_request_template=True) as s:
        body = {"messages": [user("Hi", data_url())], "chat_template": picture}
        rendered = (await s.client.post("/v1/apply_template", json=body)).json()
        assert rendered["prompt"] == "<|vision_start|><|image_pad|><|vision_end|>Hi"
        answer = await s.chat(user("Hi", data_url()), chat_template=picture)
        assert answer.status_code == 200
        assert list(s.llm.starts[0].token_ids) == rendered["token_ids"]
        answer = await s.chat(user("Hi"), chat_template="{% for %}")
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "chat_template")
        answer = await s.chat(user("Hi"), chat_template="x" * 2**17)
        assert answer.json()["error"]["param"] == "chat_template"
    async with stack() as s:
        answer = await s.chat(user("Hi"), chat_template=picture)
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("unsupported", "chat_template")
        assert "--allow-request-template" in error["message"]


def test_a_question_after_the_process_has_ended_is_refused():
    with pytest.raises(InvalidRequest):
        TemplateProcess(None).ask({})
