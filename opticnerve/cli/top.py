"""``opticnerve top``: a gateway and its pools as they are now, in the terminal."""

from __future__ import annotations

import argparse
import os
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import httpx2

from opticnerve.addresses import gateway_url
from opticnerve.cli.chat_client import trust_for
from opticnerve.cli.snapshot import Change, Snapshot, is_health, read_samples
from opticnerve.config.command_line import Parser, argument_type, number_type
from opticnerve.errors import OpticNerveError, Unavailable
from opticnerve.extras import require_extra
from opticnerve.telemetry import logs

DESCRIPTION = (
    "Shows a gateway's pools, queues, hit rates, tokens, latencies and stages, again and again."
)
EPILOG = "Example: opticnerve top http://127.0.0.1:8000 --metrics http://127.0.0.1:9001/metrics"
URL = "http://127.0.0.1:8000"
WINDOW_S = 30.0  # Rates and latencies cover the last so many seconds.
TIMEOUT_S = 5.0


def parser() -> Parser:
    made = Parser("top", DESCRIPTION, "[URL] [flags]", EPILOG)
    group = made.add_argument_group("What to show")
    group.add_argument(
        "url",
        nargs="?",
        default=URL,
        metavar="URL",
        type=argument_type(gateway_url),
        help=f"the gateway (default: {URL}); OPENAI_API_KEY is its key",
    )
    group.add_argument(
        "--metrics",
        action="append",
        default=[],
        metavar="URL",
        help="a further /metrics to read, such as a worker's, which tells of its tiers and stages, "
        "or the gateway's own where it has a port of its own; may be given several times",
    )
    group.add_argument(
        "--interval",
        type=number_type(float, minimum=1),
        default=2.0,
        metavar="SECONDS",
        help="time between two looks (default: 2)",
    )
    group.add_argument(
        "--once",
        action="store_true",
        help="print what was counted since the gateway's start, and exit; for pipes",
    )
    return made


def main(argv: Sequence[str]) -> int:
    args: argparse.Namespace = parser().parse_args(argv)
    require_extra("top", "opticnerve top")
    with Source(args.url, args.metrics) as source:
        return print_once(source) if args.once else watch(source, args.interval)


class Source:
    """The gateway at a URL, and further sources of metrics; closed on exit."""

    def __init__(self, url: str, metrics: Sequence[str]) -> None:
        self.url = url
        self._metrics = [f"{url}/metrics", *metrics]
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._gateway = httpx2.Client(
            verify=trust_for(url) or True, timeout=TIMEOUT_S, trust_env=False, headers=headers
        )
        self._others = httpx2.Client(timeout=TIMEOUT_S, trust_env=False)  # They get no key.

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._gateway.close()
        self._others.close()

    def look(self) -> Snapshot:
        """A snapshot of all of them now. Raises Unavailable if the gateway does not answer, and
        OpticNerveError if something else does."""
        try:
            health = self._gateway.get(f"{self.url}/health").json()
        except httpx2.HTTPError as error:
            raise Unavailable(f"nothing answers at {self.url}: {error}") from error
        except ValueError as error:
            raise OpticNerveError(f"what answers at {self.url} is no gateway") from error
        if not is_health(health):
            raise OpticNerveError(f"what answers at {self.url} is no gateway")
        samples: dict[Any, float] = {}
        silent: dict[str, str] = {}
        for place in self._metrics:
            try:
                samples |= read_samples(place, self._text(place))
            except (httpx2.HTTPError, ValueError) as error:
                silent[place] = str(error) or type(error).__name__
        return Snapshot(health, samples, silent)

    def _text(self, place: str) -> str:
        """The text at a URL. Raises httpx2.HTTPError, and ValueError for an error's answer."""
        is_own = place == self._metrics[0]
        answer = (self._gateway if is_own else self._others).get(place)
        if answer.status_code in (401, 403):
            raise ValueError("it needs a key: OPENAI_API_KEY")
        if answer.status_code == 404 and is_own:
            raise ValueError("it has a port of its own: --metrics URL")
        if answer.status_code != 200:
            raise ValueError(f"it answers with status {answer.status_code}")
        return answer.text


def print_once(source: Source) -> int:
    """Prints what was counted since the start. Returns the exit status, 1 if there is no answer."""
    from rich.console import Console

    from opticnerve.cli import top_view

    try:
        now = source.look()
    except OpticNerveError as error:
        logs.say(f"opticnerve: {error.message}")
        return 1
    Console().print(top_view.screen(source.url, Change(now.start(), now)))
    return 0


def watch(source: Source, interval_s: float) -> int:
    """Shows the gateway until Ctrl-C. Keeps asking while it does not answer."""
    from rich.live import Live

    from opticnerve.cli import top_view

    kept: deque[Snapshot] = deque(maxlen=max(2, round(WINDOW_S / interval_s) + 1))
    lost_at: float | None = None
    with Live(auto_refresh=False, screen=True) as live:
        while True:
            try:
                kept.append(source.look())
                lost_at = None
            except OpticNerveError as error:
                lost_at = lost_at or time.time()
                live.update(top_view.lost(source.url, lost_at, error.message), refresh=True)
            else:
                first = kept[0] if len(kept) > 1 else kept[0].start()
                change = Change(first, kept[-1])
                live.update(top_view.screen(source.url, change), refresh=True)
            time.sleep(interval_s)
