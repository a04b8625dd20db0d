"""What every request that generates may say, whatever its prompt is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from gateway.api.schemas.base import INTEGRAL, Strict
from gateway.api.schemas.sampling import SamplingFields
from gateway.edge.limits import MAX_SALT_CHARACTERS
from gateway.job import UNLIMITED, GenerationOptions


def _some(length: int) -> int:
    if length < 1 and length != UNLIMITED:
        raise PydanticCustomError(
            "length", "should be greater than or equal to 1, or -1 for no limit"
        )
    return length


Priority = Annotated[int, Field(ge=-(2**31), le=2**31 - 1), INTEGRAL]
CacheSalt = Annotated[str, Field(max_length=MAX_SALT_CHARACTERS)]
OutputLength = Annotated[
    int,
    Field(le=2**31 - 1, json_schema_extra={"anyOf": [{"minimum": 1}, {"const": UNLIMITED}]}),
    AfterValidator(_some),
    INTEGRAL,
]


class StreamOptions(Strict):
    """Read where ``stream`` is true, and nowhere else."""

    include_usage: bool = False
    continuous_usage_stats: bool = Field(
        False,
        description="With include_usage: every chunk has the usage so far, of all choices "
        "together, as the last chunk does.",
    )
    include_obfuscation: bool = Field(
        False, description="Padding against traffic analysis; none is added."
    )


class GenerateFields(SamplingFields):
    model: str = Field(min_length=1)
    max_tokens: OutputLength | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Priority | None = Field(
        None,
        description="Lower runs first. From 0 on, or from where the caller's key allows it; a "
        "request that says nothing has 0, or the lowest that its key allows where that is higher.",
    )
    cache_salt: CacheSalt | None = Field(
        None,
        description="Requests share cached prefixes and pictures only with those of the same salt "
        "and, unless the server shares its caches, of the same tenant.",
    )
    timings: bool = Field(
        False, description="Adds to the answer where its time went; a field of this server."
    )
    user: str | None = None

    @property
    def without_effect(self) -> Iterator[str]:
        options = self.stream_options
        if self.stream and options and options.continuous_usage_stats and not self.stream_usage:
            yield "stream_options.continuous_usage_stats"
        yield from super().without_effect

    @property
    def stream_usage(self) -> bool:
        """Whether a stream has its usage at its end."""
        options = self.stream_options
        return bool(self.stream) and options is not None and options.include_usage

    @property
    def running_usage(self) -> bool:
        """Whether every chunk of a stream has the usage so far."""
        options = self.stream_options
        return self.stream_usage and options is not None and options.continuous_usage_stats

    def generation_options(
        self, max_tokens: int | None, max_tokens_field: str, top_logprobs: int | None
    ) -> GenerationOptions:
        """How the prompt is gone on with. The sampling fields are copied, so that nothing of a
        prompt stays with them."""
        fields = {name: getattr(self, name) for name in SamplingFields.model_fields}
        return GenerationOptions(
            sampling=SamplingFields.model_construct(**fields),
            max_tokens=max_tokens,
            max_tokens_field=max_tokens_field,
            top_logprobs=top_logprobs,
            priority=self.priority,
            cache_salt=self.cache_salt or "",
            running_usage=self.running_usage,
        )
