"""The split model's side: a running stack is asked over HTTP, its encoder over gRPC."""

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

AT_ONCE = 8  # Requests together.
BEST = 5  # Most likely tokens at each place, whose log-probabilities are asked for.
MAX_ROW_BYTES = 2**30  # Rows that are kept for comparison; those of later cases are not fetched.
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
    """A case and what the stack said of it. ``answers``: output ids by the way of asking;
    ``logprobs``: for each of them its own log-probability, and then those of the most likely tokens
    in its place, best first."""

    case: Case
    prompt_ids: list[int] = field(default_factory=list)
    spans: list[Mapping[str, Any]] = field(default_factory=list)
    answers: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[list[float]]] = field(default_factory=dict)
    rows: list[Rows] | None = None  # Of each picture; None: not fetched.


class SplitModel:
    """A stack behind the gateway at ``url``; OPENAI_API_KEY is its key. ``encoder`` is one of its
    encoders, where rows are to be compared. ``trust``: what its certificate is checked by, by
    default the system's authorities."""

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
        """Asks every case: a half one by one, a half together, and then all of them again, when
        prompts and pictures are cached. ``step`` is called after each answer. Raises the stack's
        errors, and Unavailable."""
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
        """Of the stack's encoders, where it tells them."""
        workers = self._http.get("/health").json().get("encoders", {}).get("workers", [])
        return [worker["address"] for worker in workers]


def _number(told: float | None) -> float:
    """JSON has null for what is not a number."""
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
