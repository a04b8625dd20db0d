"""One real stack for the tests of a module: processes, ports, shared memory, the openai client."""

import base64
import io
from pathlib import Path

import pytest

import opticnerve
from examples.demo_training import scenes
from opticnerve.demo.chats import PICTURES


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """All tests of this folder need a stack, or start processes of their own."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.process)


@pytest.fixture(scope="session")
def stack():
    with opticnerve.serve(dtype="float32", log_format="json") as running:
        yield running


@pytest.fixture(scope="session")
def client(stack):
    return stack.openai


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def bundled(name):
    return data_url((PICTURES / name).read_bytes())


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def scene(seed, *items, size=scenes.PICTURE_SIZES[0], scale=4):
    """A picture of the given shapes, drawn with the jitter of ``seed``."""
    return scenes.draw_scene(list(items), scenes.Random(seed, size, scale))


def user(text, *urls):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
