"""Pictures, contents and spans of the Python client, without a service."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from opticnerve.client.contents import (
    EncodedPicture,
    MultiMediaInfo,
    Placed,
    Tensors,
    lay_out,
    place_ref,
    place_tensors,
)
from opticnerve.client.encoder import plan_picture
from opticnerve.embeddings import codec
from opticnerve.embeddings.ref import EmbeddingRef, Location, TensorSpec
from opticnerve.errors import InvalidMedia, InvalidRequest
from opticnerve.media.decode import decode
from opticnerve.media.load import read_picture
from opticnerve.media.plan import Grid, Span
from tests.encoders import demo_layout, picture

PAD, OTHER = 632, 633


def placed(key: str, rows: int, token_id: int = PAD) -> Placed:
    ref = EmbeddingRef(key, "f", (TensorSpec("rows", "F32", (rows, 8)),), rows)
    return place_ref(token_id, ref)


def offsets(spans: list[Span]) -> list[tuple[int, int, int, int]]:
    return [(span.token_offset, span.num_tokens, span.item, span.row_start) for span in spans]


def test_runs_of_placeholders_become_spans() -> None:
    ids = [1, PAD, PAD, PAD, 2, PAD, PAD, 3]
    refs, spans = lay_out(ids, [placed("a", 3), placed("b", 2)])
    assert [ref.key for ref in refs] == ["a", "b"]
    assert offsets(spans) == [(1, 3, 0, 0), (5, 2, 1, 0)]


def test_neighbouring_contents_split_one_run() -> None:
    _, spans = lay_out([PAD] * 5, [placed("a", 3), placed("b", 2)])
    assert offsets(spans) == [(0, 3, 0, 0), (3, 2, 1, 0)]


def test_one_content_over_several_runs_goes_on_in_its_rows() -> None:
    _, spans = lay_out([PAD, PAD, 7, PAD, PAD, 7], [placed("a", 4)])
    assert offsets(spans) == [(0, 2, 0, 0), (3, 2, 0, 2)]


def test_the_same_content_twice_is_one_item() -> None:
    refs, spans = lay_out([PAD, PAD, 7, PAD, PAD], [placed("a", 2), placed("a", 2)])
    assert len(refs) == 1
    assert offsets(spans) == [(0, 2, 0, 0), (3, 2, 0, 0)]


def test_two_placeholder_ids_are_counted_apart_and_spans_are_in_order() -> None:
    ids = [OTHER, PAD, OTHER]
    _, spans = lay_out(ids, [placed("a", 1), placed("b", 2, OTHER)])
    assert offsets(spans) == [(0, 1, 1, 0), (1, 1, 0, 0), (2, 1, 1, 1)]


@pytest.mark.parametrize("count", [0, 2, 4])
def test_counts_that_do_not_fit_are_refused_with_both_numbers(count: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"{count} placeholders .* 3 rows"):
        lay_out([PAD] * count, [placed("a", 3)])


def test_placeholders_without_contents_are_plain_tokens() -> None:
    assert lay_out([PAD, PAD], []) == ([], [])


def test_own_tensors_are_inline_and_keyed_by_their_values() -> None:
    rows = torch.randn(4, 8, dtype=torch.bfloat16)
    one = place_tensors(PAD, Tensors(rows, grid=Grid(1, 4, 4)))
    tensors, _ = codec.from_bytes(one.ref.location.inline)
    assert torch.equal(tensors["rows"], rows) and one.ref.tensors[0].dtype == "BF16"
    assert one.span.grid_thw == Grid(1, 4, 4) and one.ref.num_rows == 4
    assert place_tensors(PAD, Tensors(rows.clone())).ref.key == one.ref.key
    assert place_tensors(PAD, Tensors(rows + 1)).ref.key != one.ref.key
    assert place_tensors(PAD, Tensors(rows, deepstack=[rows])).ref.key != one.ref.key


def test_anything_that_speaks_dlpack_is_a_content() -> None:
    info = MultiMediaInfo({PAD: [np.ones((2, 8), np.float32)]})
    info.add(PAD, torch.ones(3, 8))
    info.add(OTHER, picture())
    assert len(info) == 3
    kinds = [(token_id, type(content)) for token_id, content in info]
    assert kinds == [(PAD, Tensors), (PAD, Tensors), (OTHER, bytes)]
    with pytest.raises(InvalidRequest, match="__dlpack__"):
        MultiMediaInfo({PAD: [object()]})


def test_a_content_that_stands_alone_is_one(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    ref = EmbeddingRef("a", "f", (TensorSpec("rows", "F32", (2, 8)),), 2)
    rows = torch.ones(2, 8)
    for alone in ("photo.png", Path("photo.png"), picture(), image, ref, Tensors(rows)):
        assert list(MultiMediaInfo({PAD: alone})) == [(PAD, alone)]
    for tensor in (rows, np.ones((2, 8), np.float32)):
        ((_, content),) = MultiMediaInfo({PAD: tensor})
        assert content.rows.shape == (2, 8)
    for several in ([ref, "photo.png"], (ref, "photo.png"), iter([ref, "photo.png"])):
        assert list(MultiMediaInfo({PAD: several})) == [(PAD, ref), (PAD, "photo.png")]
    assert list(MultiMediaInfo({PAD: []})) == []


@pytest.mark.parametrize(
    "contents", ["photo.png", [PAD], [(PAD, "photo.png")], 5, torch.ones(2, 8)]
)
def test_contents_that_are_not_by_placeholder_show_the_form(contents: object) -> None:
    with pytest.raises(InvalidRequest, match=r"\{id: \[content, \.\.\.\]\}"):
        MultiMediaInfo(contents)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [None, 5, {"image": "photo.png"}, [["photo.png"]]])
def test_what_is_no_content_is_told(content: object) -> None:
    with pytest.raises(InvalidRequest, match="embeddings are tensors"):
        MultiMediaInfo({PAD: content})


@pytest.mark.parametrize(
    "rows", [torch.ones(8), torch.ones(0, 8), torch.ones(2, 2, 2), torch.ones(2, 8).int()]
)
def test_tensors_of_another_shape_or_type_are_refused(rows: torch.Tensor) -> None:
    with pytest.raises(InvalidRequest):
        place_tensors(PAD, Tensors(rows))
    with pytest.raises(InvalidRequest):
        place_tensors(PAD, Tensors(torch.ones(2, 8), deepstack=[rows]))


def test_tensors_that_are_not_finite_are_refused() -> None:
    rows, bad = torch.ones(2, 8), torch.ones(2, 8)
    bad[1, 3] = float("nan")
    for content in (Tensors(bad), Tensors(rows, deepstack=[bad])):
        with pytest.raises(InvalidRequest, match="finite"):
            place_tensors(PAD, content)


def test_pictures_are_bytes_paths_and_pillow_images(tmp_path: Path) -> None:
    data = picture(1)
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    assert read_picture(data) == read_picture(path) == read_picture(str(path)) == data
    assert read_picture(memoryview(data)) == data
    image = Image.open(io.BytesIO(data))
    again = Image.open(io.BytesIO(read_picture(image)))
    assert np.array_equal(np.asarray(again), np.asarray(image.convert("RGB")))
    with pytest.raises(InvalidRequest, match="cannot read"):
        read_picture(tmp_path / "none.png")
    for wrong in (5, None, [data], {"url": "x"}, np.zeros((8, 8, 3), np.uint8)):
        with pytest.raises(InvalidRequest, match=f"not {type(wrong).__name__}"):
            read_picture(wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="Is a directory"):
        read_picture(tmp_path)
    with pytest.raises(InvalidRequest, match="cannot read the picture ~nobody-here/x"):
        read_picture(Path("~nobody-here/x"))
    with pytest.raises(InvalidRequest, match="cannot read"):
        read_picture("a\0b")
    for url in ("https://example.com/cat.png", "data:image/png;base64,AAAA"):
        with pytest.raises(InvalidRequest, match="only a gateway reads URLs"):
            read_picture(url)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "La", "RGBa", "P", "L", "RGB"])
def test_pillow_images_keep_what_is_transparent(mode: str) -> None:
    """For the encoder to lay on a background. The colours under it are black."""
    image = Image.new("RGBA", (84, 84), (0, 0, 0, 0))
    image.paste((10, 10, 10, 255), (0, 0, 84, 42))
    if mode in ("P", "L", "RGB"):
        opaque = image.convert("RGB")
        image = opaque.quantize(4) if mode == "P" else opaque.convert(mode)
        image.info["transparency"] = (0, 0, 0) if mode == "RGB" else image.getpixel((0, 83))
    else:
        image = image.convert("LA").convert(mode) if mode == "La" else image.convert(mode)
    data = read_picture(image)
    planned = plan_picture(data, demo_layout(), "f")
    seen = np.asarray(decode(data, planned.plan, background=planned.overrides.background))
    assert (seen[:42] == 10).all() and (seen[42:] == 255).all()


@pytest.mark.parametrize(
    ("value", "grey"), [(0, 0), (200, 200), (255, 255), (0x1234, 0x12), (70_000, 255), (-5, 0)]
)
def test_integers_of_32_bits_are_greys_of_8_or_of_16(value: int, grey: int) -> None:
    """Pillow has them of int32 arrays, which mostly hold 0 to 255."""
    image = Image.fromarray(np.full((84, 84), value, dtype=np.int32))
    again = Image.open(io.BytesIO(read_picture(image)))
    assert again.getpixel((0, 0)) == (grey, grey, grey)


def test_of_a_pillow_image_of_16_bit_grey_the_upper_8_bits_count() -> None:
    image = Image.fromarray(np.full((84, 84), 0x1234, dtype=np.uint16))
    data = read_picture(image)
    seen = np.asarray(decode(data, plan_picture(data, demo_layout(), "f").plan))
    assert (seen == 0x12).all()


def test_an_images_own_orientation_is_not_applied_twice() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (84, 112)).save(buffer, "PNG", exif=exif)
    turned = Image.open(buffer)
    planned = plan_picture(read_picture(turned), demo_layout(), "f")
    assert (planned.plan.orientation, planned.plan.width) == (1, 84)


def test_a_planned_picture_has_key_and_plan() -> None:
    planned = plan_picture(picture(1), demo_layout(), "f")
    assert len(planned.key) == 64 and planned.plan.num_tokens == 9
    assert plan_picture(picture(1), demo_layout(), "g").key != planned.key
    with pytest.raises(InvalidMedia):
        plan_picture(b"no picture", demo_layout(), "f")


def test_an_encoded_picture_is_a_reference_that_keeps_its_plan() -> None:
    plan = plan_picture(picture(1), demo_layout(), "f").plan
    ref = EncodedPicture("a" * 64, "f", (), 9, plan=plan)
    moved = ref.at(Location(redis=True))
    assert isinstance(moved, EmbeddingRef) and moved.plan == plan  # type: ignore[attr-defined]
    assert place_ref(PAD, ref).span.grid_thw == plan.grid


@given(
    rows=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    gaps=st.data(),
)
def test_spans_cover_every_placeholder_once_with_its_row(
    rows: list[int], gaps: st.DataObject
) -> None:
    ids: list[int] = []
    expected: dict[int, tuple[int, int]] = {}
    for item, count in enumerate(rows):
        for row in range(count):
            ids += [1] * gaps.draw(st.integers(0, 2))
            expected[len(ids)] = (item, row)
            ids.append(PAD)
    _, spans = lay_out(ids, [placed(f"{item}", count) for item, count in enumerate(rows)])
    covered = {
        span.token_offset + index: (span.item, span.row_start + index)
        for span in spans
        for index in range(span.num_tokens)
    }
    assert covered == expected and sum(span.num_tokens for span in spans) == len(expected)
