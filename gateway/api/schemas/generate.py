"""The fields of every request that generates, besides its prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from gateway.api.schemas.base import INTEGRAL, Strict, fault
from gateway.api.schemas.sampling import SamplingFields
from gateway.edge.limits import MAX_SALT_CHARACTERS
from gateway.job import UNLIMITED, GenerationOptions, Truncation


def _some(length: int) -> int:
    if length < 1 and length != UNLIMITED:
        raise PydanticCustomError(
            "length", "should be greater than or equal to 1, or -1 for no limit"
        )
    return length


Priority = Annotated[int, Field(ge=-(2**31), le=2**31 - 1), INTEGRAL]
NumLogprobs = Annotated[int, Field(ge=0, le=2**31 - 1), INTEGRAL]
CacheSalt = Annotated[str, Field(max_length=MAX_SALT_CHARACTERS)]
OutputLength = Annotated[
    int,
    Field(le=2**31 - 1, json_schema_extra={"anyOf": [{"minimum": 1}, {"const": UNLIMITED}]}),
    AfterValidator(_some),
    INTEGRAL,
]


class StreamOptions(Strict):
    """Ignored unless ``stream`` is true."""

    include_usage: bool = False
    continuous_usage_stats: bool = Field(
        False,
        description="With include_usage: every chunk has the usage so far, for all choices "
        "together.",
    )
    include_obfuscation: bool = Field(
        False, description="Padding against traffic analysis; none is added."
    )


class GenerateFields(SamplingFields):
    model: str = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Priority | None = Field(
        None,
        description="Lower runs first. The minimum is 0, or the API key's own; the default is 0, "
        "or that minimum if it is higher.",
    )
    cache_salt: CacheSalt | None = Field(
        None,
        description="Only requests with the same salt share cached prefixes and pictures and, "
        "unless the server shares its caches, only those of the same tenant.",
    )
    timings: bool = Field(
        False, description="Adds timings by stage to the answer; an extension of this server."
    )
    truncate_prompt_tokens: OutputLength | None = Field(
        None,
        description="Number of the prompt's tokens to keep; -1: as many as fit. Every picture must "
        "be among them.",
    )
    truncation_side: Literal["left", "right"] = Field(
        "left", description="Where tokens are left out: left keeps the last ones."
    )
    user: str | None = None
    session_id: str | None = Field(None, description="Has no effect: every prefix is cached.")
    spaces_between_special_tokens: bool = Field(
        True, description="Has no effect: texts have no spaces but those of the tokens."
    )
    return_tokens_as_token_ids: bool = Field(
        False, description="Log-probabilities show tokens as `token_id:ID`."
    )

    @property
    def without_effect(self) -> Iterator[str]:
        options = self.stream_options
        if self.stream and options and options.continuous_usage_stats and not self.stream_usage:
            yield "stream_options.continuous_usage_stats"
        yield from super().without_effect

    @property
    def stream_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        options = self.stream_options
        return bool(self.stream) and options is not None and options.include_usage

    @property
    def running_usage(self) -> bool:
        """Whether every chunk of a stream has the usage so far."""
        options = self.stream_options
        return self.stream_usage and options is not None and options.continuous_usage_stats

    @property
    def truncation(self) -> Truncation | None:
        most = self.truncate_prompt_tokens
        return None if most is None else Truncation(most, first=self.truncation_side == "right")

    def generation_options(
        self, max_tokens: int | None, max_tokens_field: str, top_logprobs: int | None
    ) -> GenerationOptions:
        """How to continue the prompt. The sampling fields are copied, so that they do not keep the
        prompt in memory."""
        fields = {name: getattr(self, name) for name in SamplingFields.model_fields}
        return GenerationOptions(
            sampling=SamplingFields.model_construct(**fields),
            max_tokens=max_tokens,
            max_tokens_field=max_tokens_field,
            top_logprobs=top_logprobs,
            priority=self.priority,
            cache_salt=self.cache_salt or "",
            running_usage=self.running_usage,
            truncation=self.truncation,
            tokens_as_ids=self.return_tokens_as_token_ids,
        )


class TokenFields(GenerateFields):
    """What an answer shows of tokens, its own and the prompt's."""

    prompt_logprobs: NumLogprobs | None = Field(
        None,
        description="Reports the log-probability of each token of the prompt, and of this number "
        "of most likely tokens at its place. Not in a stream. Such a prompt reads no cached "
        "prefix.",
    )
    return_token_ids: bool = Field(
        False,
        description="Each choice has `token_ids`, also of tokens whose text is not shown; the "
        "prompt's are `prompt_token_ids`.",
    )

    @model_validator(mode="after")
    def _whole_prompt(self) -> TokenFields:
        if self.stream and self.prompt_logprobs is not None:
            raise fault("prompt_logprobs", "is not in a stream; leave stream out")
        return self

    def generation_options(
        self, max_tokens: int | None, max_tokens_field: str, top_logprobs: int | None
    ) -> GenerationOptions:
        options = super().generation_options(max_tokens, max_tokens_field, top_logprobs)
        return replace(
            options, prompt_logprobs=self.prompt_logprobs, token_ids=self.return_token_ids
        )
