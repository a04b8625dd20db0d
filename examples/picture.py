"""What the examples share: where the server is, and a picture as a data URL."""

from __future__ import annotations

import base64
import mimetypes
import os
from pathlib import Path

from opticnerve.demo.chats import PICTURES

URL = os.environ.get("SERVER_URL", "http://127.0.0.1:8000")  # Of `make serve`, say.
KEY = os.environ.get("API_KEY", "none")
STAR, PAIR, WORD = PICTURES / "star.png", PICTURES / "pair.png", PICTURES / "word.png"


def data_url(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
