"""``/v1/models``: the names by which requests may ask for the model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from fastapi import Path
from starlette.responses import Response
from typing_extensions import TypedDict

from gateway.api.http import JSONResponse
from gateway.api.routing import Call, make_router
from gateway.edge.auth import Caller
from opticnerve.errors import ModelNotFound

ANY = "*"

router = make_router("models")


class ModelCard(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]


@dataclass(frozen=True)
class ServedNames:
    """The names of the one model. ``any``: whether every other name is accepted as well."""

    names: tuple[str, ...]
    any: bool
    max_model_len: int
    root: str  # The model's own name.
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, served: Sequence[str], model: str, max_model_len: int) -> ServedNames:
        """``served``: --served-model-name; without it the model's own name and ``model``."""
        names = [name for name in served if name != ANY]
        if not names:
            names = [model, "model"]
        return cls(tuple(dict.fromkeys(names)), ANY in served, max_model_len, names[0])

    def permitted(self, caller: Caller) -> ServedNames:
        """The names that ``caller`` may use; to it, others seem not to be served."""
        if not caller.models:
            return self
        names = [name for name in caller.models if self.any or name in self.names]
        return replace(self, names=tuple(names), any=False)

    def check(self, name: str | None, param: str | None = "model") -> None:
        """Raises ModelNotFound for a name that is not served. None: the model's own name."""
        name = self.root if name is None else name
        if self.any or name in self.names:
            return
        served = ", ".join(self.names) or "none that this key may use"
        raise ModelNotFound(
            f"there is no model {name[:100]!r} here; this server has {served}", param=param
        )

    def card(self, name: str) -> ModelCard:
        """Raises ModelNotFound."""
        self.check(name, param=None)
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "opticnerve",
            "root": self.root,
            "parent": None,
            "max_model_len": self.max_model_len,
        }

    def cards(self) -> ModelList:
        return {"object": "list", "data": [self.card(name) for name in self.names]}


@router.get("/v1/models", summary="The names that requests may ask for", response_model=ModelList)
async def list_models(call: Call) -> Response:
    return JSONResponse(call.names.cards())


@router.get("/v1/models/{name:path}", summary="One name", response_model=ModelCard)
async def get_model(
    call: Call, name: Annotated[str, Path(description="May contain slashes.")]
) -> Response:
    return JSONResponse(call.names.card(name))
