"""Bad input: a 4xx in OpenAI's shape that says what to do. No process dies, the next one works."""

import http.server
import io
import struct
import threading
import zlib

import openai
import pytest
from PIL import Image

from examples.demo_training.scenes import Item
from tests.e2e.conftest import bundled, data_url, png, scene, user

STAR = "A large red star in the center."
LEFT = [Item("star", "red", "large", (1, 0))]


@pytest.fixture(autouse=True)
def everything_lives(stack, client):
    def pids():
        return set(_children(stack.process.pid))

    before = pids()
    yield
    assert pids() == before
    answer = client.chat.completions.create(
        model="model", messages=[user("What do you see?", bundled("star.png"))], temperature=0
    )
    assert answer.choices[0].message.content == STAR


def _children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()


def refused(client, *messages, status=400, **parameters):
    parameters = {"model": "model", **parameters}
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(messages=list(messages), **parameters)
    error = caught.value
    assert error.status_code == status, error.response.text
    body = error.response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert len(body["message"]) > 10
    return body


def header_png(width, height):
    """A PNG whose header claims a size that its data do not have."""
    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + chunk(b"IEND", b"")
    )  # fmt: skip


def jpeg(image, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **kwargs)
    return buffer.getvalue()


def ask_about(data):
    return user("What do you see?", data_url(data))


def test_not_an_image(client):
    assert "png" in refused(client, ask_about(b"hello, I am text"))["message"].lower()


def test_truncated_jpeg(client):
    data = jpeg(scene(1, *LEFT))
    refused(client, ask_about(data[: len(data) // 2]))
    refused(client, ask_about(data[:40]))


def test_a_bomb_by_its_header(client):
    body = refused(client, ask_about(header_png(20_000, 20_000)))
    assert "pixels" in body["message"]


def test_a_header_that_lies_about_its_data(client):
    refused(client, ask_about(header_png(64, 64)))


def test_extreme_aspect(client):
    refused(client, ask_about(png(Image.new("RGB", (2000, 4)))))


def test_one_by_one_picture_is_answered(client):
    answer = client.chat.completions.create(
        model="model", messages=[ask_about(png(Image.new("RGB", (1, 1)))) ], max_tokens=4
    )  # fmt: skip
    assert answer.usage.completion_tokens > 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_pictures_are_seen_upright(client, orientation):
    """The stored pixels are turned so that EXIF turns them back."""
    upright = scene(5, *LEFT)
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright.transpose(undo) if undo is not None else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = "A large red star on the left."
    for data in (jpeg(stored, exif=exif, quality=95), exif_after_data(stored, exif)):
        answer = client.chat.completions.create(
            model="model", messages=[ask_about(data)], temperature=0
        )
        assert answer.choices[0].message.content == expected


def exif_after_data(image, exif):
    """A PNG whose eXIf chunk follows IDAT, as some cameras and editors write it."""
    plain = png(image)
    payload = exif.tobytes().removeprefix(b"Exif\x00\x00")
    chunk = struct.pack(">I", len(payload)) + b"eXIf" + payload
    chunk += struct.pack(">I", zlib.crc32(b"eXIf" + payload))
    return plain[:-12] + chunk + plain[-12:]


class Web(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        self.send_response(404)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def web():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("url", "code", "text"),
    [
        ("http://127.0.0.1:1/x.png", "media_address_not_allowed", "not public"),
        ("http://localhost/x.png", "media_address_not_allowed", "not public"),
        ("http://169.254.169.254/latest/meta-data", "media_address_not_allowed", "not public"),
        ("http://[::1]/x.png", "media_address_not_allowed", "not public"),
        ("http://2130706433/x.png", None, "dotted decimal"),
        ("http://0x7f.1/x.png", None, "dotted decimal"),
        ("ftp://example.com/x.png", None, "must begin with data:"),
        ("file:///etc/passwd", "file_media_off", "no file: URLs"),
        ("data:image/png;base64,@@@", "invalid_base64", "does not decode"),
        ("not a url", None, "must begin with data:"),
    ],
)
def test_addresses_that_are_not_fetched(client, url, code, text):
    body = refused(client, user("What do you see?", url))
    assert body["code"] == code and text in body["message"]
    assert body["param"] == "messages[0].content[0].image_url.url"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"])
def test_private_addresses_are_refused_before_they_are_asked(client, web, host):
    body = refused(client, user("What do you see?", f"http://{host}:{web.server_port}/x.png"))
    assert body["code"] == "media_address_not_allowed"
    assert web.asked == []


def test_the_eleventh_picture(client):
    body = refused(client, user("What do you see?", *[bundled("star.png")] * 11))
    assert "10" in body["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"stop": 7}, "stop"),
        ({"messages": "hello"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages[0].content[0].image_url"),
        ({"top_k_k": 3}, "top_k_k"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
    ],
)  # fmt: skip
def test_wrong_types_name_their_field(stack, change, param):
    body = {"model": "model", "messages": [user("Hello!")], **change}
    answer = stack._http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(param), answer.text


def test_prompt_too_long(client):
    assert refused(client, user("word " * 20_000))["code"] == "context_length_exceeded"


def test_unknown_model(client):
    body = refused(client, user("Hello!"), status=404, model="gpt-17")
    assert body["code"] == "model_not_found"


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b'"x"', b""])
def test_bodies_that_are_no_request(stack, content):
    answer = stack._http.post(
        "/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_unknown_routes_and_methods(stack):
    assert stack._http.get("/v1/nothing").json()["error"]["message"]
    assert stack._http.get("/v1/nothing").status_code == 404
    assert stack._http.get("/v1/chat/completions").status_code == 405
    assert stack._http.get("/v1/models/").status_code == 200
