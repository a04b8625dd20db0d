"""The fields that ask for an answer of a given form: OpenAI's ``response_format``, vLLM's
``structured_outputs`` and its older ``guided_*``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError, from_json

from gateway.api.schemas.base import Strict, Unused, fault
from gateway.api.schemas.generate import TokenFields
from gateway.job import FormatKind, GenerationOptions, OutputFormat
from opticnerve.errors import UnsupportedFeature


def _read_schema(schema: Any) -> Any:
    """The schema that a text spells, since clients send both. Raises PydanticCustomError."""
    if isinstance(schema, str):
        try:
            schema = from_json(schema, allow_inf_nan=False)
        except ValueError as error:
            raise PydanticCustomError("schema", "should be a JSON schema") from error
    if not isinstance(schema, dict | bool):
        raise PydanticCustomError("schema", "should be a JSON schema: an object, or its text")
    return schema


Schema = Annotated[
    dict[str, Any] | bool | str,
    Field(description="A JSON schema, or its text."),
    AfterValidator(_read_schema),
]
Pattern = Annotated[str, Field(min_length=1)]
ChoiceTexts = Annotated[list[str], Field(min_length=1)]


class NamedSchema(Strict):
    aliases: ClassVar[frozenset[str]] = frozenset({"schema"})

    name: str | None = None
    description: str | None = None
    json_schema: Schema | None = Field(
        None, alias="schema", description="A JSON schema, or its text. Default: any object."
    )
    strict: bool | None = Field(
        None,
        description="Whether a schema that cannot be enforced as a whole is refused. Otherwise a "
        "warning's header names what is not enforced.",
    )


class ResponseFormat(Strict):
    aliases: ClassVar[frozenset[str]] = frozenset({"schema"})

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    plain_schema: Schema | None = Field(
        None, alias="schema", description="A schema of json_object, as some servers take it."
    )

    @model_validator(mode="after")
    def _agrees(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None and self.plain_schema is None:
            raise fault("json_schema", "required with the type json_schema")
        return self

    @property
    def output_format(self) -> OutputFormat | None:
        named = self.json_schema
        if self.type == "json_schema" and named is not None and named.json_schema is not None:
            param = "response_format.json_schema.schema"
            strict = bool(named.strict)
            return OutputFormat(FormatKind.JSON_SCHEMA, named.json_schema, param, strict)
        if self.type != "text" and self.plain_schema is not None:
            param = "response_format.schema"
            return OutputFormat(FormatKind.JSON_SCHEMA, self.plain_schema, param, strict=False)
        return None if self.type == "text" else OutputFormat(FormatKind.JSON_OBJECT, None)


class StructuredOutputs(Strict):
    aliases: ClassVar[frozenset[str]] = frozenset({"json"})

    json_schema: Schema | None = Field(None, alias="json")
    regex: Pattern | None = None
    choice: ChoiceTexts | None = None
    grammar: Pattern | None = Field(None, description="In Lark (llguidance's dialect) or GBNF.")
    json_object: bool | None = None
    whitespace_pattern: str | None = Field(
        None, description="A regular expression for the white space between the parts of JSON."
    )
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    structural_tag: Any = None
    disable_fallback: Unused = None

    @model_validator(mode="after")
    def _is_served(self) -> StructuredOutputs:
        for name, instead in (
            ("structural_tag", "send tools, or a grammar"),
            ("disable_additional_properties", 'put "additionalProperties": false into the schema'),
        ):
            if getattr(self, name):
                path = f"structured_outputs.{name}"
                message = f"{path}: not supported by this server; {instead}"
                raise UnsupportedFeature(message, param=path)
        return self


NOTHING = StructuredOutputs.model_validate({})


class StructuredFields(TokenFields):
    """At most one of them asks for a form."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = Field(None, description="As structured_outputs.json.")
    guided_regex: Pattern | None = Field(None, description="As structured_outputs.regex.")
    guided_choice: ChoiceTexts | None = Field(None, description="As structured_outputs.choice.")
    guided_grammar: Pattern | None = Field(None, description="As structured_outputs.grammar.")
    guided_whitespace_pattern: str | None = Field(
        None, description="As structured_outputs.whitespace_pattern."
    )
    guided_decoding_backend: str | None = Field(None, description="Has no effect.")

    @model_validator(mode="after")
    def _one_form(self) -> StructuredFields:
        asked = [each.param for each in self._formats()]
        if len(asked) > 1:
            field = asked[1].partition(".")[0]
            raise fault(field, f"asks for a form of the answer besides {asked[0]}; give one")
        return self

    @property
    def without_effect(self) -> Iterator[str]:
        if self.guided_decoding_backend:
            yield "guided_decoding_backend"
        yield from super().without_effect

    def _formats(self) -> Iterator[OutputFormat]:
        named = self.response_format and self.response_format.output_format
        if named:
            yield named
        asked = self.structured_outputs or NOTHING
        for prefix, schema, regex, choice, grammar in (
            (
                "structured_outputs.",
                asked.json_schema,
                asked.regex,
                asked.choice,
                asked.grammar,
            ),
            (
                "guided_",
                self.guided_json,
                self.guided_regex,
                self.guided_choice,
                self.guided_grammar,
            ),
        ):
            if schema is not None:
                yield OutputFormat(FormatKind.JSON_SCHEMA, schema, f"{prefix}json")
            if regex is not None:
                yield OutputFormat(FormatKind.REGEX, regex, f"{prefix}regex")
            if choice is not None:
                yield OutputFormat(FormatKind.CHOICE, tuple(choice), f"{prefix}choice")
            if grammar is not None:
                yield OutputFormat(FormatKind.GRAMMAR, grammar, f"{prefix}grammar")
        if asked.json_object:
            yield OutputFormat(FormatKind.JSON_OBJECT, None, "structured_outputs.json_object")

    @property
    def output_format(self) -> OutputFormat | None:
        found = next(self._formats(), None)
        return found and replace(found, whitespace=self._whitespace)

    @property
    def _whitespace(self) -> str | None:
        asked = self.structured_outputs or NOTHING
        if asked.disable_any_whitespace:
            return ""
        given = asked.whitespace_pattern
        return self.guided_whitespace_pattern if given is None else given

    def generation_options(
        self, max_tokens: int | None, max_tokens_field: str, top_logprobs: int | None
    ) -> GenerationOptions:
        options = super().generation_options(max_tokens, max_tokens_field, top_logprobs)
        return replace(options, format=self.output_format)
