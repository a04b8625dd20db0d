"""The sampling fields of every request that generates."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gateway.api.schemas.base import INTEGRAL, Body, at_most
from gateway.edge.limits import (
    MAX_ALLOWED_TOKENS,
    MAX_BAD_WORDS,
    MAX_BIASES,
    MAX_STOP_TOKENS,
    MAX_STOPS,
    MAX_WORD_CHARACTERS,
)
from opticnerve.generation.values import MAX_CHOICES

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1), INTEGRAL]
Word = Annotated[str, Field(max_length=MAX_WORD_CHARACTERS)]  # An empty one has no effect.
AllowedTokens = Annotated[
    list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED_TOKENS, fail_fast=True)
]


class SamplerFields(Body):
    """How likely each token is. A field that is None has the model's default, or the neutral value
    if there is none."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="0: the most likely token, as with temperature 0."
    )
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), INTEGRAL] | None = Field(
        None, description="-1 and 0: off."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-3, le=10)] | None = None


class DefaultSampling(SamplerFields):
    """``--default-sampling``."""

    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1), INTEGRAL] | None = None


class SamplingFields(SamplerFields):
    """All that decides the tokens of an answer."""

    seed: Annotated[int, Field(ge=-(2**63), lt=2**64), INTEGRAL] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), INTEGRAL] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1), INTEGRAL] | None = None
    stop: Word | Annotated[list[Word], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], at_most(MAX_BIASES)] | None
    ) = None
    bad_words: Annotated[list[Word], Field(max_length=MAX_BAD_WORDS)] | None = None
    allowed_token_ids: AllowedTokens | None = None
    skip_special_tokens: bool = True

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        return tuple(stop for stop in stops if stop)

    @property
    def sampling_size(self) -> int:
        """The work of resolving the fields: characters of words plus entries of lists."""
        lists = (self.stop_token_ids, self.allowed_token_ids, self.logit_bias)
        return sum(map(len, self.bad_words or ())) + sum(len(each or ()) for each in lists)
