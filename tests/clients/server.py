"""The server that client programs are tried against, and what they ask of it."""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from opticnerve.demo.chats import PICTURES

KEY = "sk-clients"
MODEL = "model"
PLACES = 8  # Requests that the gateway takes at a time.
WAIT_S = 60.0

# The demo checkpoint's answers at temperature 0.
SPELL, SPELT = "Spell OCEAN.", "O C E A N"
SEE, SEEN = "What do you see?", "A large red star in the center."
STAR = base64.b64encode((PICTURES / "star.png").read_bytes()).decode()
STAR_URL = f"data:image/png;base64,{STAR}"
STAR_CHAT: list[dict[str, Any]] = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": SEE},
            {"type": "image_url", "image_url": {"url": STAR_URL}},
        ],
    }
]

# The demo checkpoint knows no tools and may never end a free string: what it must write is one of
# a few words.
COLORS = ["red", "green", "blue"]
PAINTED: dict[str, Any] = {
    "type": "object",
    "properties": {"color": {"type": "string", "enum": COLORS}},
    "required": ["color"],
    "additionalProperties": False,
}
PAINT = {
    "type": "function",
    "function": {"name": "paint", "description": "Paints a wall.", "parameters": PAINTED},
}


def chat(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@dataclass(frozen=True)
class Server:
    """A running stack. ``url``: its address, without a path."""

    url: str

    @property
    def v1(self) -> str:
        """The base URL of clients of OpenAI's API."""
        return f"{self.url}/v1"

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        asked = urllib.request.Request(self.url + path, headers={"authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(asked, timeout=WAIT_S) as answer:
            return json.load(answer)

    def wait_idle(self) -> None:
        """Returns once no request has a place, as clients that have gone away still may."""
        end = time.monotonic() + WAIT_S
        while self.get("/health")["gateway"]["requests_in_flight"]:
            assert time.monotonic() < end, "requests whose clients have left are still running"
            time.sleep(0.05)
