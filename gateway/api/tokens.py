"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``: the model's tokenizer, for clients that
count or cut prompts. The paths, also below ``/v1``, and the fields are those of vLLM's server."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, model_validator
from starlette.responses import Response
from typing_extensions import TypedDict

from gateway.api.routing import Call, make_router
from gateway.api.schemas.base import Body, BoundedList, fault
from gateway.api.schemas.messages import Message
from gateway.api.schemas.sampling import TokenId
from gateway.api.schemas.template_fields import TemplateFields
from gateway.api.sse import dumps
from gateway.edge.limits import MAX_TOKENIZE_CHARACTERS
from gateway.edge.threads import off_loop_above
from gateway.job import TextPrompt
from gateway.prompt.completion_prompt import encode_text
from gateway.prompt.renderer import ChatRenderer
from gateway.prompt.tokenizer import Tokenizer
from opticnerve.checkpoints.tokenizer_files import NAMED
from opticnerve.errors import InvalidRequest

OFF_LOOP_CHARACTERS = 8_000  # Longer texts are tokenized in a thread.
OFF_LOOP_IDS = 2_000  # Likewise, longer lists of tokens.

router = make_router("tokens")


class TokenizeRequest(TemplateFields):
    """A text; or a chat, whose tokens are those of its rendered prompt, pictures included."""

    model: str | None = None
    prompt: Annotated[str, Field(max_length=MAX_TOKENIZE_CHARACTERS)] | None = Field(
        None,
        description="It may be longer than the model's context. The tokenizer adds its own special "
        "tokens to it unless add_special_tokens is false.",
    )
    messages: BoundedList[Message] = Field(default=[], description="Instead of prompt.")
    return_token_strs: bool = Field(
        False, description="Whether the answer has the tokens as the vocabulary spells them."
    )

    @model_validator(mode="after")
    def _one_source(self) -> TokenizeRequest:
        if (self.prompt is None) == (not self.messages):
            raise fault("prompt", "should be given, or else messages; one of them")
        return self


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class Tokens(TypedDict):
    count: int
    max_model_len: Annotated[int, Field(description="Tokens of a prompt and its answer together.")]
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(TypedDict):
    prompt: Annotated[str, Field(description="The tokens' text, special tokens included.")]


class AddedToken(TypedDict):
    content: str
    special: bool
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool


class TokenizerInfo(TypedDict):
    tokenizer_class: str
    chat_template: str
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    sep_token: str | None
    pad_token: str | None
    cls_token: str | None
    mask_token: str | None
    added_tokens_decoder: Annotated[dict[str, AddedToken], Field(description="By token id.")]


@router.post("/v1/tokenize", name="tokenize_v1", summary="As /tokenize", response_model=Tokens)
@router.post("/tokenize", summary="The tokens of a text or a chat", response_model=Tokens)
async def tokenize(call: Call, body: TokenizeRequest) -> Response:
    renderer, most = call.gateway.pipeline.renderer, call.gateway.names.max_model_len
    spell = renderer.tokenizer if body.return_token_strs else None
    if body.prompt is None:
        ids: Sequence[int] = (await call.render(body.chat)).token_ids
    else:
        text = TextPrompt(body.prompt, body.add_special_tokens is not False)
        given = text, renderer.tokenizer, renderer.layout
        ids = await off_loop_above(OFF_LOOP_CHARACTERS, text.size, encode_text, *given)
    told = await off_loop_above(OFF_LOOP_IDS, len(ids), _told, ids, most, spell)
    return _answer(call, told)


def _told(ids: Sequence[int], max_model_len: int, spell: Tokenizer | None) -> bytes:
    """A Tokens as JSON. ``spell``: the tokenizer, if the tokens are to be spelled."""
    told: Tokens = {
        "count": len(ids),
        "max_model_len": max_model_len,
        "tokens": list(ids),
        "token_strs": [spell.token_of(token) or "" for token in ids] if spell else None,
    }
    return dumps(told)


@router.post(
    "/v1/detokenize", name="detokenize_v1", summary="As /detokenize", response_model=Detokenized
)
@router.post("/detokenize", summary="The text of tokens", response_model=Detokenized)
async def detokenize(call: Call, body: DetokenizeRequest) -> Response:
    tokenizer, ids = call.gateway.pipeline.renderer.tokenizer, body.tokens
    told = await off_loop_above(OFF_LOOP_IDS, len(ids), _text, ids, tokenizer)
    return _answer(call, told)


def _text(ids: Sequence[int], tokenizer: Tokenizer) -> bytes:
    """A Detokenized as JSON. Raises InvalidRequest for an id without a token."""
    unknown = next((i for i, token in enumerate(ids) if tokenizer.token_of(token) is None), None)
    if unknown is not None:
        param = f"tokens[{unknown}]"
        raise InvalidRequest(f"{param}: {ids[unknown]} is no token of this model", param=param)
    told: Detokenized = {"prompt": tokenizer.decode(ids)}
    return dumps(told)


@router.get(
    "/v1/tokenizer_info",
    name="get_tokenizer_info_v1",
    summary="As /tokenizer_info",
    response_model=TokenizerInfo,
)
@router.get("/tokenizer_info", summary="The tokenizer's settings", response_model=TokenizerInfo)
async def get_tokenizer_info(call: Call) -> Response:
    return _answer(call, await asyncio.to_thread(_info, call.gateway.pipeline.renderer))


@functools.lru_cache(1)
def _info(renderer: ChatRenderer) -> bytes:
    """A TokenizerInfo as JSON."""
    tokenizer = renderer.tokenizer
    named = {name: tokenizer.named.get(name) for name in NAMED}
    added = ((tokenizer.id_of(token.content), token) for token in tokenizer.added)
    kind = tokenizer.config.get("tokenizer_class")
    return dumps(
        {
            "tokenizer_class": kind if isinstance(kind, str) else "PreTrainedTokenizerFast",
            "chat_template": renderer.template.source,
            "model_max_length": renderer.layout.max_positions,
            **named,
            "added_tokens_decoder": {
                str(token_id): {
                    "content": token.content,
                    "special": token.special,
                    "single_word": token.single_word,
                    "lstrip": token.lstrip,
                    "rstrip": token.rstrip,
                    "normalized": token.normalized,
                }
                for token_id, token in added
                if token_id is not None
            },
        }
    )


def _answer(call: Call, body: bytes) -> Response:
    return Response(body, headers=call.warnings(), media_type="application/json")
