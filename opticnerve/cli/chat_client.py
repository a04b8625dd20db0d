"""Chat completions of a gateway, for scripts, ``opticnerve ask`` and ``opticnerve demo``."""

from __future__ import annotations

import base64
import json
import os
import ssl
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import httpx2

from opticnerve.certificates import PemFiles
from opticnerve.config.options import build
from opticnerve.config.shared import CallsConfig, CertificateConfig, client_tls_options
from opticnerve.errors import ConfigError, OpticNerveError, Unavailable, from_openai
from opticnerve.media.load import Picture, is_url, read_picture

NO_GATEWAY = "what answers at this URL is no gateway; check --url"
TIMEOUT_S = 600.0


def user_message(text: str, pictures: Iterable[Picture]) -> dict[str, Any]:
    """A user's message in OpenAI's form, pictures first. Raises InvalidRequest for a file that
    cannot be read."""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": picture_url(picture)}} for picture in pictures
    ]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def picture_url(picture: Picture) -> str:
    """A URL unchanged; a path, bytes or a Pillow image as a data: URL. Raises InvalidRequest for a
    file that cannot be read."""
    if is_url(picture):
        return str(picture)
    data = base64.b64encode(read_picture(picture)).decode()
    return f"data:application/octet-stream;base64,{data}"


def trust_for(url: str, given: Mapping[str, Any] | None = None) -> ssl.SSLContext | None:
    """The context that verifies the certificate of the server at ``url`` and presents our own; None
    for plain HTTP. ``given``: the values of ``client_tls_options``; without them, the system's
    authorities are trusted, or those of SSL_CERT_FILE. Raises ConfigError."""
    if not url.startswith("https:"):
        refuse_tls(given or {}, "a URL of https://")
        return None
    if given is None:
        return ssl.create_default_context()
    calls, own = build(CallsConfig, given), build(CertificateConfig, given)
    files = PemFiles(own.tls_certificate, own.tls_key, calls.tls_ca)
    return files.client_context()


def refuse_tls(given: Mapping[str, Any], needed: str) -> None:
    """Raises ConfigError if one of ``client_tls_options`` is given, which only ``needed`` uses."""
    for item in client_tls_options():
        if given.get(item.name) is not None:
            raise ConfigError(f"{item.flag} is for {needed}", param=item.name)


def stream_chat(
    url: str, body: dict[str, Any], trust: ssl.SSLContext | None = None
) -> Iterator[dict[str, Any]]:
    """The chunks of one streamed chat completion. ``trust`` verifies the gateway's certificate.
    Raises the gateway's error as its class, Unavailable if nothing answers, and OpticNerveError if
    the answer is not a gateway's."""
    key = os.environ.get("OPENAI_API_KEY", "none")
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    headers = {"Authorization": f"Bearer {key}"}
    try:
        with (
            httpx2.Client(verify=trust or True, timeout=TIMEOUT_S, trust_env=False) as client,
            client.stream(
                "POST", f"{url}/v1/chat/completions", json=body, headers=headers
            ) as answer,
        ):
            if answer.status_code != 200:
                answer.read()
                raise error_of(answer)
            if not answer.headers.get("content-type", "").startswith("text/event-stream"):
                raise OpticNerveError(NO_GATEWAY)
            yield from read_events(answer.iter_lines())
    except httpx2.ConnectError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise Unavailable(
                f"the certificate of {url} is not trusted ({error}); --tls-ca or SSL_CERT_FILE "
                "names a file with the authorities to trust"
            ) from error
        raise Unavailable(
            f"nothing answers at {url} ({error}); check --url, or start a gateway: opticnerve up"
        ) from error
    except httpx2.HTTPError as error:
        why = str(error) or type(error).__name__
        raise OpticNerveError(f"no answer from {url}: {why}") from error


def read_events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The chunks in the lines of a stream of server-sent events. Raises like ``stream_chat``."""
    for line in lines:
        if not line.startswith("data: "):
            continue
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError as error:
            raise OpticNerveError(NO_GATEWAY) from error
        if isinstance(event, dict) and "error" in event:
            raise from_openai(event)
        if not isinstance(event, dict) or not isinstance(event.get("choices"), list):
            raise OpticNerveError(NO_GATEWAY)
        yield event
    raise OpticNerveError("the answer ended early, without [DONE]")


def print_answer(
    url: str, body: dict[str, Any], trust: ssl.SSLContext | None = None
) -> tuple[str, dict[str, Any]]:
    """Prints an answer as it is streamed; returns its text and its timings in milliseconds."""
    text = ""
    timings: dict[str, Any] = {}
    for chunk in stream_chat(url, {**body, "timings": True}, trust):
        timings = chunk.get("timings") or timings
        for choice in chunk["choices"]:
            piece = choice["delta"].get("content") or ""
            text += piece
            print(piece, end="", flush=True)
    print()
    return text, timings


def error_of(answer: httpx2.Response) -> OpticNerveError:
    """The typed error of a gateway's complete error response."""
    try:
        body = answer.json()
    except ValueError:  # A proxy's answer, say.
        body = None
    after = answer.headers.get("retry-after", "")
    return from_openai(body, answer.status_code, float(after) if after.isdecimal() else None)
