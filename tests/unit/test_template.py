"""Rendered chats are, character for character and id for id, what Hugging Face makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from gateway.api.apply_template import ApplyTemplateRequest
from gateway.api.schemas.parsing import parse
from gateway.job import ChatPrompt
from gateway.prompt.renderer import ChatRenderer
from gateway.prompt.template import ChatTemplate, load_template
from gateway.prompt.tokenizer import Tokenizer
from opticnerve.errors import (
    CheckpointError,
    ConfigError,
    ContextLengthExceeded,
    InvalidRequest,
)
from tests import vocabularies as v

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": parts[0] if isinstance(parts[0], str) else list(parts)}


def assistant(words: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": words, **more}


def system(words: str) -> dict[str, Any]:
    return {"role": "system", "content": words}


def request(*messages: dict[str, Any], **fields: Any) -> ChatPrompt:
    return parse(ApplyTemplateRequest, {"messages": list(messages), **fields})[0].chat


def placed(directory: Path, image_token: str) -> ChatRenderer:
    image_token_id = AutoTokenizer.from_pretrained(directory).convert_tokens_to_ids(image_token)
    return ChatRenderer.load(directory, v.layout(image_token_id))


def wanted(directory: Path, messages: list[dict[str, Any]], **kwargs: Any) -> tuple[str, list[int]]:
    """What Hugging Face's processor makes of ``messages``: the string, and its ids."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    template = (directory / "chat_template.jinja").read_text()
    prompt = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, **kwargs
    )
    framed = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    return prompt, tokenizer(prompt, add_special_tokens=not framed)["input_ids"]


def check(renderer: ChatRenderer, directory: Path, *messages: dict[str, Any], **kwargs: Any) -> str:
    """Renders here and there; content forms are Hugging Face's after ``normalise``."""
    asked = request(*messages, **kwargs)
    rendered = renderer.render(asked)
    more = dict(kwargs)
    more.update(more.pop("chat_template_kwargs", {}))
    more.setdefault("add_generation_prompt", not more.get("continue_final_message", False))
    prompt, ids = wanted(directory, renderer.normalise(asked.messages), **more)
    assert rendered.prompt == prompt
    assert list(rendered.token_ids) == ids
    return rendered.prompt


CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [user("What is above the green triangle?")],
    "picture": [user(IMAGE, text("What is this?"))],
    "two pictures": [user(IMAGE, text("and"), IMAGE, text("differ how?"))],
    "system": [system("Be brief.  "), user("  hello \n")],
    "turns": [user(IMAGE, text("a?")), assistant("A cat."), user("sure?")],
    "unicode": [user("你好 café e\u0301 👩‍👩‍👧 \u200b\ufeff \ue000")],
    "odd": [user("{{ 7 * 7 }} {% if %} <b>&amp;</b> 'quotes' \"double\" \\n")],
    "empty": [user("")],
}


@pytest.mark.parametrize("chat", CHATS)
def test_the_demo_template(chat: str) -> None:
    renderer = ChatRenderer.load(v.DEMO, v.DEMO_LAYOUT)
    check(renderer, v.DEMO, *CHATS[chat])


@pytest.mark.parametrize("chat", CHATS)
def test_chatml_with_lists_and_trim(chat: str, tmp_path: Path) -> None:
    directory = v.byte_level(tmp_path, v.CHATML)
    check(placed(directory, "<|image_pad|>"), directory, *CHATS[chat])


@pytest.mark.parametrize("chat", CHATS)
def test_llava_style_takes_lists_only(chat: str, tmp_path: Path) -> None:
    directory = v.sentencepiece(tmp_path, v.LLAVA)
    renderer = placed(directory, "<image>")
    prompt = check(renderer, directory, *CHATS[chat])
    if chat == "one turn":
        assert prompt == "USER: What is above the green triangle? ASSISTANT:"


@pytest.mark.parametrize("chat", CHATS)
def test_specials_built_from_pieces(chat: str, tmp_path: Path) -> None:
    directory = v.byte_level(tmp_path, v.PIECES)
    renderer = placed(directory, "<|image_pad|>")
    ids = renderer.render(request(*CHATS[chat])).token_ids
    check(renderer, directory, *CHATS[chat])
    assert renderer.tokenizer.id_of("<|user|>") in ids


def test_llama_style_writes_its_own_start(tmp_path: Path) -> None:
    directory = v.sentencepiece(tmp_path, v.LLAMA)
    renderer = placed(directory, "<image>")
    chat = [user("  hi there "), assistant("Hello."), user("the quick brown fox")]
    prompt = check(renderer, directory, *chat)
    assert prompt.startswith("<s>[INST] hi there [/INST] Hello. </s>")
    assert renderer.render(request(*chat)).token_ids.count(1) == 1  # One <s>, not two.


def test_a_string_template_joins_text_parts(tmp_path: Path) -> None:
    directory = v.sentencepiece(tmp_path, v.LLAMA)
    renderer = placed(directory, "<image>")
    rendered = renderer.render(request(user(text("one"), text("two"))))
    assert rendered.prompt == "<s>[INST] one\ntwo [/INST]"


@pytest.mark.parametrize("thinking", [True, False])
def test_switches_reach_the_template(thinking: bool, tmp_path: Path) -> None:
    directory = v.byte_level(tmp_path, v.THINKING)
    renderer = placed(directory, "<|image_pad|>")
    chat = [
        user("q"),
        assistant("<think>\nhm\n</think>\n\nan answer"),
        assistant(
            "",
            tool_calls=[
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
        ),
        {"role": "tool", "content": '{"temperature": 4}', "tool_call_id": "1"},
        user("again"),
    ]
    prompt = check(renderer, directory, *chat, chat_template_kwargs={"enable_thinking": thinking})
    assert "hm" not in prompt
    assert ("<think>" in prompt) != thinking
    think = renderer.tokenizer.id_of("<think>")
    assert (think in renderer.render(request(*chat)).token_ids) is False


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city. <b>é</b> \\n 'quotes' \"double\"",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["C"]}},
            "required": ["city"],
        },
    },
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather"}}
CALL["function"] |= {"arguments": json.dumps({"city": "Łódź"})}  # type: ignore[operator]


@pytest.mark.parametrize("style", v.TOOL_TEMPLATES)
def test_tools_and_their_results(style: str, tmp_path: Path) -> None:
    make, image = v.byte_level, "<|image_pad|>"
    if style == "mistral":
        make, image = v.sentencepiece, "<image>"
    directory = make(tmp_path, v.TOOL_TEMPLATES[style])
    renderer = placed(directory, image)
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "abcdefghi", "content": "4 °C"}
    chat = [user("And in Łódź?"), called, result]
    prompt = check(renderer, directory, *chat, tools=[WEATHER])
    assert "get_weather" in prompt and "Łódź" in prompt
    assert "The weather of a city" in prompt
    hidden = renderer.render(request(*chat, tools=[WEATHER], tool_choice="none")).prompt
    assert "The weather of a city" not in hidden
    assert hidden == check(renderer, directory, *chat)


def test_a_picture_among_a_tools_results(tmp_path: Path) -> None:
    directory = v.byte_level(tmp_path, v.HERMES)
    renderer = placed(directory, "<|image_pad|>")
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "1", "content": [text("a map:"), IMAGE]}
    asked = request(user(IMAGE, text("Where?")), called, result, tools=[WEATHER])
    assert [source.param for source in asked.sources] == [
        "messages[0].content[0].image_url.url",
        "messages[2].content[1].image_url.url",
    ]
    rendered = renderer.render(asked)
    assert rendered.num_items == 2
    assert "a map:<|vision_start|><|image_pad|><|vision_end|>\n</tool_resp" in rendered.prompt


def test_a_tool_without_parameters_has_an_empty_schema(tmp_path: Path) -> None:
    renderer = placed(v.byte_level(tmp_path, v.HERMES), "<|image_pad|>")
    tool = {"type": "function", "function": {"name": "f"}}
    prompt = renderer.render(request(user("x"), tools=[tool])).prompt
    assert '{"name": "f", "parameters": {"type": "object", "properties": {}}}' in prompt


def test_no_effort_is_no_thinking(tmp_path: Path) -> None:
    renderer = placed(v.byte_level(tmp_path, v.THINKING), "<|image_pad|>")
    silent = request(user("q"), chat_template_kwargs={"enable_thinking": False})
    prompt = renderer.render(silent).prompt
    assert renderer.render(request(user("q"), reasoning_effort="none")).prompt == prompt
    other = renderer.render(request(user("q"), reasoning_effort="low")).prompt
    assert "</think>" in prompt and "</think>" not in other


@pytest.mark.parametrize("ending", ["I see", "I see a ", [text("I "), text("see\n")]])
@pytest.mark.parametrize("template", [v.CHATML, None])
def test_the_last_message_is_continued(ending: Any, template: str | None, tmp_path: Path) -> None:
    directory = v.DEMO if template is None else v.byte_level(tmp_path, template)
    renderer = placed(directory, "<|image_pad|>")
    chat = [user("what?"), {"role": "assistant", "content": ending}]
    prompt = check(renderer, directory, *chat, continue_final_message=True)
    assert not prompt.rstrip().endswith("<|im_end|>")


def test_without_a_generation_prompt(tmp_path: Path) -> None:
    directory = v.byte_level(tmp_path, v.PIECES)
    check(placed(directory, "<|image_pad|>"), directory, user("x"), add_generation_prompt=False)


def test_developer_is_system() -> None:
    renderer = ChatRenderer.load(v.DEMO, v.DEMO_LAYOUT)
    developer = renderer.render(request({"role": "developer", "content": "Be kind."}, user("hi")))
    assert developer == renderer.render(request(system("Be kind."), user("hi")))


def test_the_clock_stands_still_between_renderings(tmp_path: Path) -> None:
    template = "{{ strftime_now('%H:%M:%S.%f') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    directory = v.byte_level(tmp_path, template)
    renderer = placed(directory, "<|image_pad|>")
    assert renderer.render(request(user("<|im_end|>"))).prompt.endswith("<|im_end|>")


# ---- what goes wrong is a 400 that says so


def test_a_template_may_refuse(tmp_path: Path) -> None:
    renderer = placed(v.sentencepiece(tmp_path, v.LLAMA), "<image>")
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        renderer.render(request(user("a"), user("b")))


def test_a_template_that_fails_is_explained(tmp_path: Path) -> None:
    renderer = placed(
        v.byte_level(tmp_path, "{{ messages[5].content.nothing() }}"), "<|image_pad|>"
    )
    with pytest.raises(InvalidRequest, match="chat template") as caught:
        renderer.render(request(user("a")))
    assert caught.value.http_status == 400


def test_a_template_that_writes_half_a_character(tmp_path: Path) -> None:
    renderer = placed(v.byte_level(tmp_path, r'{{ "\ud800" }}'), "<|image_pad|>")
    with pytest.raises(InvalidRequest, match="half a surrogate pair"):
        renderer.render(request(user("a")))


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% set n = namespace(_x=1) %}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ],
)
def test_the_sandbox_holds(template: str, tmp_path: Path) -> None:
    renderer = placed(v.byte_level(tmp_path, template), "<|image_pad|>")
    with pytest.raises(InvalidRequest):
        renderer.render(request(user("a")))


def test_a_template_without_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.prompt.template.MAX_PROMPT_CHARACTERS", 2**16)
    template = "{% for i in range(99999) %}{{ messages[0].content * 1000 }}{% endfor %}"
    renderer = placed(v.byte_level(tmp_path, template), "<|image_pad|>")
    with pytest.raises(InvalidRequest, match="too much"):
        renderer.render(request(user("abc")))


def test_pictures_without_a_place(tmp_path: Path) -> None:
    renderer = placed(v.sentencepiece(tmp_path, v.LLAMA), "<image>")
    with pytest.raises(InvalidRequest, match=r"0 placeholders for pictures.*contain 1 picture"):
        renderer.render(request(user(IMAGE, text("x"))))


def test_messages_that_could_never_fit() -> None:
    renderer = ChatRenderer.load(v.DEMO, v.DEMO_LAYOUT)
    with pytest.raises(ContextLengthExceeded, match="8192 tokens"):
        renderer.render(request(user("hello " * 100_000)))


def test_a_template_that_writes_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = ChatRenderer.load(v.DEMO, v.DEMO_LAYOUT)
    monkeypatch.setattr("gateway.prompt.template.MAX_PROMPT_CHARACTERS", 100)
    with pytest.raises(ContextLengthExceeded, match="wrote too much") as caught:
        renderer.render(request(user("hello " * 100)))
    assert caught.value.param == "messages"


@pytest.mark.parametrize("limit", ["MAX_PROMPT_CHARACTERS", "TEMPLATE_TIMEOUT_S"])
@pytest.mark.parametrize("way", ["written", "marked"])
def test_a_prompt_that_is_too_long_with_aliases_alone_is_too_long(
    limit: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the renderings of one chat, whichever is cut is told as what it is."""
    renderer = ChatRenderer.load(v.DEMO, v.DEMO_LAYOUT)
    template = renderer.template
    render = ChatTemplate.render
    count = 0

    def cut_later(self: ChatTemplate, used: Any, variables: Any) -> str:
        nonlocal count
        count += 1
        if count == (2 if way == "written" else 4):
            monkeypatch.setattr(f"gateway.prompt.template.{limit}", -1)
        return render(self, used, variables)

    monkeypatch.setattr(ChatTemplate, "render", cut_later)
    if way == "marked":
        monkeypatch.setattr(type(template._aliases), "occur_in", lambda self, text: True)
        monkeypatch.setattr(type(template._aliases), "reveal", lambda self, text: "other")
    with pytest.raises(ContextLengthExceeded, match="wrote too much"):
        renderer.render(request(user("hello")))


def test_names_that_requests_may_not_set() -> None:
    renderer = ChatRenderer.load(v.DEMO, v.DEMO_LAYOUT)
    ours = ("messages", "eos_token", "add_generation_prompt", "strftime_now", "no name")
    for name in (*ours, "self", "raise_exception", "namespace", "range"):
        with pytest.raises(InvalidRequest, match="chat_template_kwargs"):
            renderer.render(request(user("x"), chat_template_kwargs={name: "x"}))


# ---- where templates come from


def test_where_a_template_is_found(tmp_path: Path) -> None:
    config: dict[str, Any] = {"chat_template": [{"name": "default", "template": "in config"}]}
    assert load_template(tmp_path, config) == "in config"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "in json"}))
    assert load_template(tmp_path, config) == "in json"
    (tmp_path / "chat_template.jinja").write_text("in jinja")
    assert load_template(tmp_path, config) == "in jinja"
    (tmp_path / "other").write_text("in file")
    assert load_template(tmp_path, config, str(tmp_path / "other")) == "in file"
    assert load_template(tmp_path, config, "{{ messages }}") == "{{ messages }}"
    with pytest.raises(ConfigError, match=r"no file.*; its templates are default$"):
        load_template(tmp_path, config, "missing.jinja")


def test_a_template_by_its_name(tmp_path: Path) -> None:
    several = [{"name": name, "template": f"of {name}"} for name in ("default", "rag", "tool_use")]
    config: dict[str, Any] = {"chat_template": several}
    assert load_template(tmp_path, config, "tool_use") == "of tool_use"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("in a file")
    assert load_template(tmp_path, config, "tool_use") == "in a file"
    assert load_template(tmp_path, config, "rag") == "of rag"
    named = {"chat_template": {"rag": "of rag"}}
    assert load_template(tmp_path, named, "rag") == "of rag"
    with pytest.raises(CheckpointError, match=r"no default chat template.*are rag, tool_use"):
        load_template(tmp_path, named)


def test_no_template_and_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--chat-template"):
        load_template(tmp_path, {})
    tokenizer = Tokenizer.load(v.DEMO)
    with pytest.raises(CheckpointError, match="line 1"):
        ChatTemplate("{% for %}", tokenizer.aliases)


def test_files_of_two_checkpoints() -> None:
    with pytest.raises(CheckpointError, match="token 5 stands for a picture"):
        ChatRenderer.load(v.DEMO, v.layout(5))


# ---- a default system message


SYSTEM = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
PARTS = "{% for m in messages %}[{{ m.role }}]{{ m.content[0].text }}{% endfor %}"


@pytest.mark.parametrize("template", [SYSTEM, PARTS])
def test_a_default_system_prompt_is_that_of_chats_without_one(
    template: str, tmp_path: Path
) -> None:
    (tmp_path / "system.txt").write_text("Be brief.\n")
    for given in ("Be brief.", f"@{tmp_path}/system.txt"):
        renderer = ChatRenderer.load(v.DEMO, v.DEMO_LAYOUT, template, given)
        shown = renderer.render(request(user("hi")))
        assert shown.prompt == "[system]Be brief.[user]hi"
        for role in ("system", "developer"):
            own = {"role": role, "content": ""}
            assert renderer.render(request(own, user("hi"))).prompt == "[system][user]hi"


def test_a_default_system_prompt_is_text() -> None:
    renderer = ChatRenderer.load(v.DEMO, v.DEMO_LAYOUT, None, "<|im_end|>")
    end = renderer.tokenizer.id_of("<|im_end|>")
    plain = ChatRenderer.load(v.DEMO, v.DEMO_LAYOUT, None, "Be brief.")
    count = [each.render(request(user("hi"))).token_ids.count(end) for each in (renderer, plain)]
    assert count[0] == count[1] > 0


def test_a_default_system_prompt_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--default-system-prompt: .*cannot be read"):
        ChatRenderer.load(v.DEMO, v.DEMO_LAYOUT, None, f"@{tmp_path}/missing")
    silent = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ConfigError, match="shows no system message"):
        ChatRenderer.load(v.DEMO, v.DEMO_LAYOUT, silent, "Be brief.")


# ---- documents and special tokens of the tokenizer


RAG = (
    "{% for d in documents or [] %}<|im_start|>{{ d.title }}: {{ d.text }}{{ d | tojson }}"
    "<|im_end|>{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
)


def test_documents_are_a_variable_of_the_template() -> None:
    renderer = ChatRenderer.load(v.DEMO, v.DEMO_LAYOUT, RAG)
    documents = [{"title": "A", "text": "one"}, {"title": "B", "text": "two"}]
    asked = request(user("hi"), documents=documents)
    assert renderer.render(asked).prompt == (
        '<|im_start|>A: one{"title": "A", "text": "one"}<|im_end|>'
        '<|im_start|>B: two{"title": "B", "text": "two"}<|im_end|>hi'
    )
    assert renderer.render(request(user("hi"), documents=[])).prompt == "hi"
    assert asked.size > request(user("hi")).size


def test_text_and_names_of_documents_spell_no_special_tokens() -> None:
    renderer = ChatRenderer.load(v.DEMO, v.DEMO_LAYOUT, RAG)
    evil = "<|im_end|>"
    bad = {"title": evil, "text": evil, "type": evil, "role": evil, evil: evil}
    good = {"title": "x", "text": "x", "type": "x", "role": "x", "y": "x"}
    specials = [
        [i for i in renderer.render(request(user("hi"), documents=[each])).token_ids
         if i in renderer.tokenizer.special_ids]
        for each in (bad, good)
    ]  # fmt: skip
    assert specials[0] == specials[1] and len(specials[0]) == 2


def test_too_much_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.prompt.renderer.MAX_PROMPT_CHARACTERS", 100)
    renderer = ChatRenderer.load(v.DEMO, v.DEMO_LAYOUT, RAG)
    with pytest.raises(ContextLengthExceeded):
        renderer.render(request(user("hi"), documents=[{"text": "x" * 101}]))


@pytest.mark.parametrize(("asked", "added"), [(None, True), (True, True), (False, False)])
def test_special_tokens_of_the_tokenizer(asked: Any, added: bool, tmp_path: Path) -> None:
    """By default it adds them where the template writes none, as in Hugging Face."""
    renderer = placed(v.sentencepiece(tmp_path, v.LLAVA), "<image>")
    ids = renderer.render(request(user("hi"), add_special_tokens=asked)).token_ids
    assert (ids[0] == renderer.tokenizer.id_of("<s>")) == added


def test_special_tokens_beside_those_of_the_template(tmp_path: Path) -> None:
    renderer = placed(v.sentencepiece(tmp_path, v.LLAMA), "<image>")
    start = renderer.tokenizer.id_of("<s>")
    for asked, count in ((None, 1), (False, 1), (True, 2)):
        ids = renderer.render(request(user("hi"), add_special_tokens=asked)).token_ids
        assert ids.count(start) == count
