"""The split model's side: asks a running stack over HTTP, and its encoder over gRPC."""

from __future__ import annotations

import base64
import math
import os
import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx2

from opticnerve.cli.chat_client import TIMEOUT_S, error_of, trust_for
from opticnerve.client import EncoderClient
from opticnerve.errors import Unavailable
from opticnerve.media.plan import Overrides, planned_as_several
from opticnerve.verification.cases import Case

if TYPE_CHECKING:
    import torch

AT_ONCE = 8  # Requests in flight when asking together.
BEST = 5  # The most likely tokens of a place, for log-probabilities.
MAX_ROW_BYTES = 2**30  # Of rows kept for comparison; no more are fetched.
NEUTRAL = {
    "temperature": 0,
    "top_p": 1,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "ignore_eos": True,
    "return_token_ids": True,
    "logprobs": True,
    "top_logprobs": BEST,
}

Rows = Mapping[str, "torch.Tensor"]
"""Named tensors of one picture, each [rows, hidden_size]: "rows", "deepstack.<i>"."""


@dataclass
class Asked:
    """A case and the stack's answers to it. ``answers``: output ids by the way of asking.
    ``logprobs``: for each output token its own log-probability, then those of the most likely
    tokens in its place, best first."""

    case: Case
    prompt_ids: list[int] = field(default_factory=list)
    spans: list[Mapping[str, Any]] = field(default_factory=list)
    answers: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[list[float]]] = field(default_factory=dict)
    rows: list[Rows] | None = None  # Of each picture; None: not fetched.


class SplitModel:
    """A stack behind the gateway at ``url``, which is called with the key in OPENAI_API_KEY.
    ``encoder``: one of its encoders, if rows are to be compared. ``trust``: verifies the gateway's
    certificate; by default the system's authorities do."""

    def __init__(
        self,
        url: str,
        max_tokens: int,
        encoder: EncoderClient | None = None,
        trust: ssl.SSLContext | None = None,
    ) -> None:
        self.encoder = encoder
        self.max_tokens = max_tokens
        key = os.environ.get("OPENAI_API_KEY", "none")
        self._http = httpx2.Client(
            base_url=url,
            verify=trust or trust_for(url) or True,
            timeout=TIMEOUT_S,
            trust_env=False,
            headers={"Authorization": f"Bearer {key}"},
        )
        self._row_bytes = 0

    def ask_all(self, cases: Sequence[Case], step: Callable[[], object]) -> list[Asked]:
        """Asks half of the cases one by one, the others together, and then all of them again, with
        prompts and pictures cached. Calls ``step`` after each answer. Raises the stack's errors,
        and Unavailable if it does not answer."""
        asked = [Asked(case) for case in cases]
        for each in asked:
            self._render(each)
        for each in asked[::2]:
            self._answer(each, "alone")
            step()
        for way, group in (("together", asked[1::2]), ("again", asked)):
            self._together(group, way, step)
        for each in asked:
            if self.encoder is not None and self._row_bytes < MAX_ROW_BYTES:
                each.rows = self._fetch(self.encoder, each.case.pictures)
        return asked

    def close(self) -> None:
        self._http.close()

    def _together(self, group: Iterable[Asked], way: str, step: Callable[[], object]) -> None:
        def answer(each: Asked) -> None:
            self._answer(each, way)
            step()

        with ThreadPoolExecutor(AT_ONCE) as pool:
            for _ in pool.map(answer, group):
                pass

    def _render(self, asked: Asked) -> None:
        told = self._post("/v1/apply_template", {"messages": _openai_messages(asked.case)})
        asked.prompt_ids, asked.spans = told["token_ids"], told["spans"]

    def _answer(self, asked: Asked, way: str) -> None:
        body = {"model": "model", "messages": _openai_messages(asked.case), **NEUTRAL}
        told = self._post("/v1/chat/completions", body | {"max_tokens": self.max_tokens})
        choice = told["choices"][0]
        asked.answers[way] = choice["token_ids"]
        asked.logprobs[way] = [
            [_number(each["logprob"]) for each in (at, *at["top_logprobs"])]
            for at in choice["logprobs"]["content"]
        ]

    def _fetch(self, encoder: EncoderClient, pictures: Sequence[bytes]) -> list[Rows]:
        several = planned_as_several(len(pictures), encoder.layout().settings())
        refs = [encoder.encode(png, Overrides(one_of_several=several)) for png in pictures]
        rows: list[Rows] = [encoder.fetch(ref) for ref in refs]
        self._row_bytes += sum(tensor.nbytes for item in rows for tensor in item.values())
        return rows

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        try:
            answer = self._http.post(path, json=body)
        except httpx2.HTTPError as error:
            raise Unavailable(f"no answer from {self._http.base_url}: {error!r}") from error
        if answer.status_code != 200:
            raise error_of(answer)
        return answer.json()

    def encoder_addresses(self) -> list[str]:
        """The addresses of the stack's encoders, if its /health reports them."""
        workers = self._http.get("/health").json().get("encoders", {}).get("workers", [])
        return [worker["address"] for worker in workers]


def _number(told: float | None) -> float:
    """NaN for JSON's null, which stands for it."""
    return math.nan if told is None else told


def _openai_messages(case: Case) -> list[dict[str, Any]]:
    pictures = iter(case.pictures)

    def part(given: Mapping[str, Any]) -> Mapping[str, Any]:
        if given["type"] != "image":
            return given
        data = base64.b64encode(next(pictures)).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}

    return [
        {"role": message["role"], "content": [part(each) for each in message["content"]]}
        for message in case.messages
    ]
