"""What schemathesis sends, made likelier to be answered, and how it reads streams."""

from __future__ import annotations

import json
from typing import Any

import schemathesis
from schemathesis import Case, DeserializationContext, HookContext, Response

from tests.clients.server import MODEL

LIMITS = {  # By route: the field that bounds an answer's tokens.
    "/v1/chat/completions": "max_tokens",
    "/v1/completions": "max_tokens",
    "/v1/messages": "max_tokens",
    "/v1/responses": "max_output_tokens",
}
MOST = 8
LARGEST = 2**31 - 1  # What a limit may be.


@schemathesis.hook
def before_call(context: HookContext[Case], case: Case, kwargs: dict[str, Any]) -> None:
    """Makes a request likelier to be answered, and soon: its model is served, no user's message is
    empty, and its answer is short."""
    body = case.body
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str) and body["model"]:
        body["model"] = MODEL
    limit = LIMITS.get(case.path)
    given = body.get(limit, 1) if limit else None
    if limit and (given is None or (type(given) is int and 0 < given <= LARGEST)):
        body[limit] = MOST
        body.pop("max_completion_tokens", None)
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict) and message.get("content") is None and "role" in message:
            message["content"] = "Hello"


@schemathesis.deserializer("text/event-stream")
def read_events(context: DeserializationContext, response: Response) -> list[Any]:
    """The JSON of every event: a stream's schema is that of its data, as OpenAI describes it."""
    lines = response.content.decode().splitlines()
    told = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(data) for data in told if data != "[DONE]"]
