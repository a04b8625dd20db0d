"""What /v1/completions tells of its prompts: several at once, echo, log-probabilities, pictures."""

import base64

import pytest

from opticnerve.errors import InvalidRequest
from tests.fakes import until
from tests.gateways import END, data_url, events, ids, stack, tokenizer, user
from tests.integration.test_gateway_completions import complete, texts

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop")]

NO_PICTURE = base64.b64encode(b"no picture at all").decode()
CROSSED = {"min_pixels": 9, "max_pixels": 4}
PIXELS = "<|vision_start|><IMAGE_TOKEN><|vision_end|>"


def joined(answer, stream):
    """(text, log-probabilities) of each choice, in order."""
    bodies = events(answer.text)[:-1] if stream else [answer.json()]
    found = {}
    for choice in (choice for told in bodies for choice in told["choices"]):
        text, columns = found.setdefault(choice["index"], ([], {}))
        text.append(choice["text"])
        for name, column in (choice["logprobs"] or {}).items():
            columns.setdefault(name, []).extend(column)
    return [("".join(text), columns) for _, (text, columns) in sorted(found.items())]


@pytest.mark.parametrize("stream", [True, False])
async def test_several_prompts_have_one_answer(stream):
    async with stack() as s:
        for prompts in (["Once", "Twice, thrice", "x"], [ids("Once"), ids("Twice, thrice"), [5]]):
            s.llm.starts.clear()
            options = {"stream_options": {"include_usage": True}} if stream else {}
            answer = await complete(s, prompts, n=2, echo=True, stream=stream, **options)
            told = texts(answer, stream, "text")
            begun = [tokenizer().decode(p) if isinstance(p, list) else p for p in prompts]
            assert told == [f"{text}Hello there." for text in begun for _ in range(2)]
            usage = (events(answer.text)[-2] if stream else answer.json())["usage"]
            tokens = sum(len(start.token_ids) for start in s.llm.starts)
            assert usage["prompt_tokens"] == tokens
            assert usage["completion_tokens"] == 6 * len(s.llm.tokens)
            assert sorted(tuple(start.token_ids) for start in s.llm.starts) == sorted(
                tuple(p) if isinstance(p, list) else tuple(ids(p)) for p in prompts
            )
        await until(s.idle)


async def test_a_list_of_prompts_takes_the_places_that_are_free():
    async with stack(max_concurrent_requests=3) as s:
        most = 0

        async def step(llm, index):
            nonlocal most
            most = max(most, llm.running, s.gateway.admission.requests.held)

        s.llm.step = step
        answer = await complete(s, ["Once"] * 9)
        assert [choice["index"] for choice in answer.json()["choices"]] == list(range(9))
        assert most <= 3
        await until(s.idle)


async def test_running_usage_counts_all_prompts():
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with stack() as s:
        answer = await complete(s, ["Once", "x"], stream=True, stream_options=options)
        told = [chunk["usage"]["completion_tokens"] for chunk in events(answer.text)[:-1]]
        assert told[-1] == 2 * len(s.llm.tokens) and max(told) == told[-1]


async def test_an_error_of_one_prompt_is_told_with_its_index_and_ends_the_others():
    async with stack(max_concurrent_requests=1) as s:

        async def step(llm, index):
            if list(llm.starts[-1].token_ids) == [6]:
                raise InvalidRequest("no", param="max_tokens")

        s.llm.step = step
        answer = await complete(s, [[5], [6], [7]])
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["message"].startswith("prompt[1]: ")
        await until(s.idle)
        answer = await complete(s, [[5], [10**6]])
        assert answer.json()["error"]["param"] == "prompt[1]"
        await until(s.idle)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("as_ids", [True, False])
async def test_echo_with_logprobs(stream, as_ids):
    text = "Once <|im_start|>upon é a time"
    hidden = tokenizer().aliases.hide(text)
    expected = tokenizer().encode(hidden)
    async with stack() as s:
        prompt = expected if as_ids else text
        answer = await complete(s, prompt, echo=True, logprobs=2, n=2, stream=stream)
        start = s.llm.starts[0]
        assert (start.sampling.logprobs, start.sampling.prompt_logprobs) == (2, 2)
        for told, columns in joined(answer, stream):
            assert told == text + "Hello there."
            count = len(expected) + len(s.llm.tokens)
            assert [len(column) for column in columns.values()] == [count] * 4
            assert columns["token_logprobs"] == [None] + [-0.5] * (count - 1)
            assert columns["top_logprobs"][0] is None
            assert all(max(top.values()) == -0.5 for top in columns["top_logprobs"][1:])
            assert columns["tokens"][-1] == "<|im_end|>"
            begins = columns["text_offset"]
            assert begins == sorted(begins) and begins[-1] == len(told)
            for token, begin in zip(columns["tokens"][:-1], begins, strict=False):
                assert token.startswith("bytes:") or told.startswith(token, begin)


async def test_a_token_that_is_no_whole_character_is_spelled_in_bytes():
    token = next(i for i in range(256) if not tokenizer().decode([i]).isprintable())
    async with stack(tokens=[token, END]) as s:
        told = (await complete(s, logprobs=0)).json()["choices"][0]["logprobs"]
        assert told["tokens"][0].startswith("bytes:\\x") or len(told["tokens"][0]) == 1
        assert [len(top) for top in told["top_logprobs"]] == [1, 1]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_prompt_is_scored_without_an_answer(stream):
    async with stack() as s:
        answer = await complete(
            s, ["Once", "Once upon"], echo=True, logprobs=1, max_tokens=0, stream=stream
        )
        assert {start.sampling.max_tokens for start in s.llm.starts} == {1}
        (first, scores), (second, _) = joined(answer, stream)
        assert (first, second) == ("Once", "Once upon")
        assert scores["token_logprobs"] == [None] + [-0.5] * (len(ids("Once")) - 1)
        if not stream:
            assert answer.json()["usage"]["completion_tokens"] == 0
            reasons = [choice["finish_reason"] for choice in answer.json()["choices"]]
            assert reasons == ["length"] * 2
        await until(s.idle)


async def test_prompt_logprobs_by_token_id():
    async with stack() as s:
        prompt = ids("Once upon a time")
        answer = (await complete(s, prompt, prompt_logprobs=1, n=2)).json()
        chat = (await s.chat(user("Hi"), prompt_logprobs=0)).json()
        for told, given, top in (
            *((choice["prompt_logprobs"], prompt, 1) for choice in answer["choices"]),
            (chat["prompt_logprobs"], list(s.llm.starts[-1].token_ids), 0),
        ):
            assert told[0] is None and len(told) == len(given)
            for token, entry in zip(given[1:], told[1:], strict=True):
                assert list(entry) == [str(token)]
                own = {"logprob": -0.5, "rank": 1, "decoded_token": tokenizer().decode([token])}
                assert entry[str(token)] == own
            assert s.llm.starts[-1 if top == 0 else 0].sampling.prompt_logprobs == top
        assert "prompt_logprobs" not in (await s.chat(user("Hi"))).json()


async def test_each_prompt_token_is_scored_once_after_a_failover():
    async with stack(llms=2) as s:
        died = []

        async def step(llm, index):
            if not died:
                died.append(llm)
                await llm.die()

        for llm in s.llms:
            llm.step = step
        prompt = ids("Once upon a time there was")
        answer = (await complete(s, prompt, echo=True, logprobs=1, prompt_logprobs=1)).json()
        (choice,) = answer["choices"]
        count = len(prompt) + len(s.llm.tokens)
        assert len(choice["logprobs"]["tokens"]) == count and died
        assert len(choice["prompt_logprobs"]) == len(prompt)


@pytest.mark.parametrize("stream", [True, False])
async def test_pictures_stand_where_the_text_has_markers(stream):
    chat = {"messages": [user("What?", data_url(), data_url("blue"))]}
    async with stack() as s:
        rendered = (await s.client.post("/v1/apply_template", json=chat)).json()
        text = rendered["prompt"].replace("<|image_pad|>", "<IMAGE_TOKEN>")
        for images, marker, marked in (
            ([data_url(), {"url": data_url("blue"), "detail": "auto"}], None, text),
            ([data_url(), data_url("blue")], "<|image_pad|>", rendered["prompt"]),
            (
                [data_url().partition(",")[2], data_url("blue")],
                "[P]",
                text.replace("<IMAGE_TOKEN>", "[P]"),
            ),
        ):
            s.llm.starts.clear()
            more = {"echo": True, "logprobs": 1, "stream": stream}
            if marker:
                more["image_marker"] = marker
            answer = await complete(s, marked, images=images, **more)
            (start,) = s.llm.starts
            assert list(start.token_ids) == rendered["token_ids"] and len(start.items) == 2
            assert [span.token_offset for span in start.spans] == [
                span["token_offset"] for span in rendered["spans"]
            ]
            ((told, columns),) = joined(answer, stream)
            assert told == marked + "Hello there."
            place = start.spans[0].token_offset
            assert columns["token_logprobs"][place] is None
            assert told.startswith(marker or "<IMAGE_TOKEN>", columns["text_offset"][place])
            assert told.startswith(
                "<|vision_end|>", columns["text_offset"][place + start.spans[0].num_tokens]
            )
        await until(s.idle)


async def test_pictures_of_several_prompts():
    async with stack() as s:
        prompts = [f"{PIXELS}a", "none", f"{PIXELS}{PIXELS}b"]
        colors = ("red", "blue", "green")
        answer = await complete(s, prompts, images=[data_url(color) for color in colors])
        assert len(answer.json()["choices"]) == 3
        assert sorted(len(start.items) for start in s.llm.starts) == [0, 1, 2]
        assert answer.json()["usage"]["prompt_tokens_details"]["image_tokens"] == 3 * 9


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"images": [data_url()]}, "images"),
        ({"prompt": f"{PIXELS}{PIXELS}", "images": [data_url()]}, "images"),
        ({"prompt": PIXELS, "image_marker": "<IMAGE_TOKEN>"}, "images"),
        ({"prompt": [5], "images": [data_url()]}, "images"),
        ({"prompt": PIXELS, "images": ["nothing"]}, "images[0]"),
        ({"prompt": PIXELS, "images": [5]}, "images[0]"),
        ({"prompt": PIXELS, "images": [NO_PICTURE]}, "images[0]"),
        ({"prompt": PIXELS, "images": [{"url": data_url(), **CROSSED}]}, "images[0]"),
        ({"prompt": PIXELS, "images": [data_url()], "image_marker": "x" * 65}, "image_marker"),
        ({"prompt": PIXELS * 80, "images": [data_url()] * 80}, "images"),
    ],
)  # fmt: skip
async def test_pictures_that_are_refused(fields, param):
    async with stack() as s:
        answer = await complete(s, **fields)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param), error
        assert s.idle()


async def test_a_marker_without_pictures_is_text():
    async with stack() as s:
        await complete(s, "<IMAGE_TOKEN>", echo=True)
        assert list(s.llm.starts[0].token_ids) == ids("<IMAGE_TOKEN>")
