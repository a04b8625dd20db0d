"""Paths that are not served: a 404 that says what this server serves, and what to use instead.

The answer comes from the path alone, for every method; no body is read.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.routing import BaseRoute

from gateway.api.anthropic.errors import is_anthropic
from opticnerve.errors import NotFound
from opticnerve.telemetry.logs import printable

MAX_SHOWN_PATH = 100  # Characters of a path that an error message repeats.

EMBEDDINGS = "it generates text, and makes no embeddings or scores; run a server of such a model"
SPEECH = "it neither hears nor speaks; send a transcript as text"
PICTURES = "it reads pictures, in the messages of a chat, and makes none"
BATCHES = "it keeps no files; run a file of requests with `opticnerve batch IN OUT`"
STATE = "it keeps nothing between requests; send the whole conversation with each"
OTHERS = "send OpenAI's requests instead, to /v1/chat/completions"

UNSERVED: dict[str, str] = {
    "/v1/embeddings": EMBEDDINGS,
    "/v1/rerank": EMBEDDINGS,
    "/v1/score": EMBEDDINGS,
    "/v1/pooling": EMBEDDINGS,
    "/v1/classify": EMBEDDINGS,
    "/v1/audio": SPEECH,
    "/v1/realtime": "open /v1/realtime itself as a WebSocket, with an API key",
    "/v1/images": PICTURES,
    "/v1/videos": PICTURES,
    "/v1/moderations": "it judges no text; ask a model about it in a chat",
    "/v1/files": BATCHES,
    "/v1/uploads": BATCHES,
    "/v1/batches": BATCHES,
    "/v1/messages/batches": BATCHES,
    "/v1/fine_tuning": "it trains nothing; start it with a checkpoint that is trained",
    "/v1/assistants": STATE,
    "/v1/threads": STATE,
    "/v1/vector_stores": STATE,
    "/v1/conversations": STATE,
    "/v1/containers": STATE,
    "/v1/evals": STATE,
    "/v1/chat/completions": STATE,  # Paths below it are those of stored answers.
    "/v1/responses": STATE,
    "/v1/organization": "it has no accounts; --api-key-file names its keys",
    "/v1/edits": "ask for the change in a chat",
    "/v1/engines": "it is /v1/models that lists what is served",
    "/v1/complete": "use /v1/messages or /v1/completions",
    "/generate": OTHERS,
    "/generate_stream": OTHERS,
    "/invocations": OTHERS,
    "/inference/v1/generate": OTHERS,
    "/api": OTHERS,
}
"""Advice for paths of other servers, and for every path below them, unless a route exists."""


def not_found(path: str, routes: Sequence[BaseRoute]) -> NotFound:
    """The error for a request to ``path``, which has no route, or none for WebSockets. ``routes``:
    the existing ones."""
    served = [str(getattr(route, "path", "")) for route in routes]
    shown = printable(path, MAX_SHOWN_PATH)
    if path in served:
        return NotFound(f"{shown} is no WebSocket; /v1/realtime is one", code="not_served")
    near = _with_one_v1(path)
    if near in served:
        advice = "a client's base URL ends in /v1, once"
        if path.startswith("/v1/v1/") and is_anthropic(near):
            advice = "Anthropic's clients take the base URL without /v1"
        return NotFound(f"there is no {shown} here, but {near}: {advice}", code="not_served")
    apis = sorted({path for path in served if path.startswith("/v1/") and "{" not in path})
    parents = [path[:at] for at, char in enumerate(f"{path}/") if char == "/"]
    instead = next((UNSERVED[each] for each in reversed(parents) if each in UNSERVED), None)
    if instead is None:
        return NotFound(
            f"there is no {shown} here; this server serves {', '.join(apis)}; /docs describes them",
            code="not_served",
        )
    return NotFound(
        f"{shown} is not served: {instead}; this server serves {', '.join(apis)}",
        code="not_served",
    )


def _with_one_v1(path: str) -> str:
    """``path`` as a client meant it whose base URL lacks ``/v1``, or has it twice."""
    return "/v1/" + path.lstrip("/").removeprefix("v1/").removeprefix("v1/")
