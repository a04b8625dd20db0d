"""Questions about many pictures, as a file in OpenAI's batch format.

    python -m examples.batch DIRECTORY > in.jsonl
    opticnerve batch in.jsonl out.jsonl --url http://127.0.0.1:8000

The second command goes on where it was if it is stopped. Without `--url` it starts a server itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from examples.picture import PICTURES, data_url


def request(path: Path) -> dict:
    picture = {"type": "image_url", "image_url": {"url": data_url(path)}}
    question = {"type": "text", "text": "What do you see?"}
    message = {"role": "user", "content": [picture, question]}
    body = {"model": "model", "messages": [message], "temperature": 0, "max_tokens": 64}
    return {"custom_id": path.name, "method": "POST", "url": "/v1/chat/completions", "body": body}


if __name__ == "__main__":
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURES
    for path in sorted(directory.glob("*.png")) + sorted(directory.glob("*.jpg")):
        print(json.dumps(request(path)))
