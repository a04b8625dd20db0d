"""The contents of one request, which replace its prompt's placeholders, and their spans.

A prompt's token ids hold runs of a placeholder id. ``MultiMediaInfo`` gives the contents for each
such id, in order: pictures, references to embeddings, or embeddings as tensors. Knows no transport.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from opticnerve.embeddings.ref import EmbeddingRef, Location, tensors_key
from opticnerve.errors import InvalidRequest
from opticnerve.extras import require_extra
from opticnerve.generation.values import check_integer, check_number, read_token_ids
from opticnerve.media.load import Picture, is_picture
from opticnerve.media.plan import Grid, Modality, Plan, Span, SpanAttention


@dataclass(frozen=True, slots=True)
class EncodedPicture(EmbeddingRef):
    """An encoder's reference, and the picture's plan, from which positions are computed."""

    plan: Plan | None = None
    hit: bool = False  # Whether the embedding was in the store already.


@dataclass(frozen=True)
class Tensors:
    """The caller's own embeddings, as tensors that support DLPack (torch, numpy, CuPy, JAX).

    ``rows`` is [num_rows, hidden_size]; ``deepstack`` has a tensor of that shape for each DeepStack
    level of the model. ``grid`` counts patches before merging; models with 3D positions require it,
    others take the rows' positions like text's. ``attention`` is BIDIRECTIONAL for models whose own
    pictures attend so, such as Gemma 3.
    """

    rows: Any
    grid: Grid | None = None
    deepstack: Sequence[Any] = ()
    modality: Modality = Modality.IMAGE
    attention: SpanAttention = SpanAttention.CAUSAL
    seconds_per_grid: float = 0.0

    def named(self) -> dict[str, Any]:
        """The tensors by their names in an embedding."""
        levels = {f"deepstack.{index}": level for index, level in enumerate(self.deepstack)}
        return {"rows": self.rows, **levels}


Content: TypeAlias = EmbeddingRef | Tensors | Picture | Any
"""Any: a tensor [num_rows, hidden_size], which is read as ``Tensors(rows=...)``."""


class MultiMediaInfo:
    """Contents by placeholder id: ``MultiMediaInfo({151655: [picture, tensor]})``.

    The contents of an id take its placeholders in order, each as many as it has rows. A single
    content needs no list: ``{151655: picture}``. Raises InvalidRequest, which shows the form, for
    anything else.
    """

    def __init__(self, contents: Mapping[int, Iterable[Content] | Content] | None = None) -> None:
        self._contents: dict[int, list[Content]] = {}
        if contents is not None and not isinstance(contents, Mapping):
            raise InvalidRequest(
                "contents are given by placeholder id, {id: [content, ...]}, not as "
                f"{type(contents).__name__}",
                param="contents",
            )
        for token_id, items in (contents or {}).items():
            for item in items if _is_several(items) else [items]:
                self.add(token_id, item)

    def add(self, token_id: int, content: Content) -> None:
        """Adds a content for the placeholder id ``token_id``. Raises InvalidRequest for another
        type."""
        if not is_picture(content) and not isinstance(content, (EmbeddingRef, Tensors)):
            content = Tensors(_as_tensor(content))
        read_token_ids("contents", [token_id])
        self._contents.setdefault(int(token_id), []).append(content)

    def __iter__(self) -> Iterator[tuple[int, Content]]:
        """(placeholder id, content), in order of ids and then of contents."""
        for token_id, items in self._contents.items():
            for item in items:
                yield token_id, item

    def __len__(self) -> int:
        return sum(map(len, self._contents.values()))


def _as_tensor(content: object) -> Any:
    """Raises InvalidRequest for an object without DLPack, StartupError without torch."""
    require_extra("worker", "a content that is a tensor")
    from opticnerve.embeddings import codec

    return codec.as_tensor(content)


def _is_several(contents: object) -> bool:
    """Whether these are several contents. A path or a tensor is one, though it can be iterated."""
    if is_picture(contents) or isinstance(contents, Mapping) or hasattr(contents, "__dlpack__"):
        return False
    return isinstance(contents, Iterable)


@dataclass(frozen=True)
class Placed:
    """One content, ready to send. ``span``: of all its rows, with offset 0; ``lay_out`` places
    it."""

    token_id: int
    ref: EmbeddingRef
    span: Span
    picture: Picture | None = field(default=None, repr=False)  # Encoded again if its rows are lost.


def place_tensors(token_id: int, content: Tensors) -> Placed:
    """The caller's tensors as inline bytes, with their hash as key.

    Raises InvalidRequest, and StartupError without torch.
    """
    require_extra("worker", "a content that is a tensor")
    from opticnerve.embeddings import codec

    named = content.named()
    specs = codec.specs_of(named)
    for spec in specs:
        if len(spec.shape) != 2 or spec.shape != specs[0].shape or 0 in spec.shape:
            raise InvalidRequest(
                f"embeddings are [rows, hidden_size], the same for every level; {spec.name} is "
                f"{list(spec.shape)}"
            )
    if not codec.is_finite(named):
        raise InvalidRequest("embeddings have finite values, no NaN and no infinity")
    data = codec.to_bytes(named, {})
    rows = specs[0].shape[0]
    grid = content.grid or Grid(1, 1, rows)
    for extent in (grid.t, grid.h, grid.w):
        check_integer("grid", extent)
    check_number("seconds_per_grid", content.seconds_per_grid)
    ref = EmbeddingRef(tensors_key(data), "", specs, rows, Location(inline=data))
    span = Span(0, rows, 0, 0, content.modality, grid, content.seconds_per_grid, content.attention)
    return Placed(token_id, ref, span)


def place_ref(token_id: int, ref: EmbeddingRef, picture: Picture | None = None) -> Placed:
    """A reference from an encoder; ``picture``: see ``Placed``."""
    plan = ref.plan if isinstance(ref, EncodedPicture) else None
    if plan is None:
        span = Span(0, ref.num_rows, 0, 0, Modality.IMAGE, Grid(1, 1, ref.num_rows))
    else:
        placed = (plan.modality, plan.grid, plan.seconds_per_grid, plan.attention)
        span = Span(0, ref.num_rows, 0, 0, *placed)
    return Placed(token_id, ref, span, picture)


def lay_out(
    token_ids: Sequence[int], contents: Sequence[Placed]
) -> tuple[list[EmbeddingRef], list[Span]]:
    """(distinct references, spans in order of the prompt) of a request.

    Raises InvalidRequest unless each id has as many placeholders as its contents have rows.
    """
    places = {placed.token_id: [] for placed in contents}  # type: dict[int, list[int]]
    for position, token_id in enumerate(token_ids):
        if token_id in places:
            places[token_id].append(position)
    refs: dict[str, EmbeddingRef] = {}
    spans: list[Span] = []
    taken = dict.fromkeys(places, 0)
    for placed in contents:
        start = taken[placed.token_id]
        taken[placed.token_id] = end = start + placed.ref.num_rows
        refs.setdefault(placed.ref.key, placed.ref)
        item = list(refs).index(placed.ref.key)
        spans.extend(_spans(placed, item, places[placed.token_id][start:end]))
    for token_id, rows in taken.items():
        if rows != len(places[token_id]):
            raise InvalidRequest(
                f"the prompt has {len(places[token_id])} placeholders of id {token_id}, but its "
                f"contents have {rows} rows"
            )
    return list(refs.values()), sorted(spans, key=lambda span: span.token_offset)


def _spans(placed: Placed, item: int, positions: Sequence[int]) -> Iterator[Span]:
    """One span for each run of consecutive positions."""
    start = 0
    for index in range(1, len(positions) + 1):
        if index < len(positions) and positions[index] == positions[index - 1] + 1:
            continue
        yield replace(
            placed.span,
            token_offset=positions[start],
            num_tokens=index - start,
            item=item,
            row_start=start,
        )
        start = index
