"""The runs of ``opticnerve bench serve``: prepares them, sends the load, prints and saves
results."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import resource
import ssl
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from tqdm import tqdm

from opticnerve.benchmark import plot, report
from opticnerve.benchmark.arrivals import arrivals, until
from opticnerve.benchmark.connection import LoadTarget
from opticnerve.benchmark.figures import Slo, load_figures, percentile
from opticnerve.benchmark.load import LoadRun, Pace, Record
from opticnerve.benchmark.pictures import Album, Size
from opticnerve.benchmark.report import LoadResult
from opticnerve.benchmark.workload import (
    ANSWER_FIELDS,
    Dialogue,
    Shape,
    body_fields,
    dialogues,
    read_prompts,
)
from opticnerve.cli.chat_client import error_of, trust_for
from opticnerve.errors import OpticNerveError, StartupError

GREET_S = 30.0
MAX_REQUESTS = 10_000_000
RECENT = 1000  # Number of requests whose median the progress bar shows.
LONG_PREPARATION = 64  # With more requests, a progress bar is shown.
Fields = dict[str, Any]


@dataclass(frozen=True)
class LoadSettings:
    """The command's arguments; None: the workload's default."""

    url: str
    model: str | None = None
    api_key: str = ""
    headers: dict[str, str] | None = None
    timeout_s: float = 600.0
    concurrency: tuple[int, ...] | None = None
    rate: tuple[float, ...] | None = None
    burstiness: float = 1.0
    requests: int | None = None
    duration_s: float | None = None
    ramp_s: float = 0.0
    warm_up: int = 2
    workload: str = "chat"
    prompts: Path | None = None
    output_tokens: int | None = None
    fields: Fields | None = None
    turns: tuple[int, ...] | None = None
    pictures: int | None = None
    picture_sizes: tuple[Size, ...] = ((448, 448),)
    picture_format: str = "jpeg"
    repeat: float = 0.0
    words: int = 32
    seed: int | None = None
    slo: Slo | None = None
    json: Path | None = None
    plot: Path | None = None
    tls: Mapping[str, Any] | None = None  # See ``trust_for``.

    @property
    def trust(self) -> ssl.SSLContext | None:
        return trust_for(self.url, self.tls)

    @property
    def converses(self) -> bool:
        return self.workload == "conversation"

    @property
    def default_fields(self) -> Fields:
        tokens = self.output_tokens or (120 if self.converses else 64)
        return {"max_tokens": tokens, **ANSWER_FIELDS}

    @property
    def request_headers(self) -> dict[str, str]:
        key = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {**key, **(self.headers or {})}


@dataclass(frozen=True)
class RunSettings:
    """What differs between runs."""

    concurrency: int | None
    rate: float | None
    turns: int  # Number of earlier turns.

    @property
    def label(self) -> str:
        pace = f"{self.rate:g} requests/s" if self.rate else f"{self.concurrency} at once"
        return pace + (f", {self.turns} earlier turns" if self.turns else "")


def run_settings(settings: LoadSettings) -> list[RunSettings]:
    """The runs, in order. Raises StartupError for flags that do not go together."""
    if settings.prompts and (settings.converses or settings.turns or settings.pictures):
        raise StartupError("--prompts replaces --workload conversation, --turns and --pictures")
    if settings.turns and not settings.converses:
        raise StartupError("--turns is of --workload conversation")
    rates, most = settings.rate, settings.concurrency
    if rates and most and len(most) > 1:
        raise StartupError("with --rate, --concurrency is one number: requests at once at most")
    if (
        settings.ramp_s
        and settings.duration_s is not None
        and settings.ramp_s >= settings.duration_s
    ):
        raise StartupError("--ramp is shorter than --duration, or nothing is measured")
    turns = settings.turns or ((0, 2) if settings.converses else (0,))
    if rates:
        bound = most[0] if most else None
        return [RunSettings(bound, rate, each) for each, rate in itertools.product(turns, rates)]
    closed = most or ((1, 32) if settings.converses else (8,))
    return [RunSettings(count, None, each) for each, count in itertools.product(turns, closed)]


def measure(settings: LoadSettings, argv: Sequence[str]) -> int:
    """Runs the load, prints its figures, and saves what was asked for. Returns the exit status.
    Raises StartupError if it cannot begin."""
    runs = run_settings(settings)
    model = greet(settings)
    seed = random.SystemRandom().randrange(2**32) if settings.seed is None else settings.seed
    print(f"{settings.url}, model {model}, seed {seed}", file=sys.stderr)
    results: list[LoadResult] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        for result in _results(settings, runs, model, seed):
            results.append(result)
            print(f"\n{report.text(result, settings.slo)}", flush=True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if results:
            _keep(settings, argv, results, {"url": settings.url, "model": model, "seed": seed})
    if not results[-1].complete:
        return 130
    found = [result.figures for result in results]
    return 0 if all(each.outcomes["answered"] == each.requests > 0 for each in found) else 1


def _keep(
    settings: LoadSettings, argv: Sequence[str], results: Sequence[LoadResult], common: Fields
) -> None:
    """Prints the summary of several runs, and writes the files."""
    if len(results) > 1:
        print(f"\n{report.summary(results)}", flush=True)
    if settings.json:
        kept = report.document("bench serve", _public(argv), results, common)
        try:
            settings.json.write_text(json.dumps(kept) + "\n")
        except OSError as error:
            raise StartupError(f"--json: cannot write {settings.json}: {error}") from error
    if settings.plot:
        told = "\n\n".join(report.text(result, settings.slo) for result in results)
        title = f"opticnerve bench serve {settings.url}, {common['model']}"
        plot.save(plot.load_plot(results), settings.plot, title, told)


def _public(argv: Sequence[str]) -> list[str]:
    """The arguments without the values of keys and headers."""
    shown, secret = [], False
    for word in argv:
        flag, equals, _ = word.partition("=")
        hidden = flag in ("--api-key", "--header")
        shown.append("***" if secret else f"{flag}=***" if hidden and equals else word)
        secret = hidden and not equals
    return shown


def greet(settings: LoadSettings) -> str:
    """The model to ask for. Raises StartupError if no server answers, or it refuses the key."""
    url = f"{settings.url}/v1/models"
    try:
        with httpx2.Client(
            verify=settings.trust or True,
            timeout=GREET_S,
            trust_env=False,
            headers=settings.request_headers,
        ) as http:
            answer = http.get(url)
        if answer.status_code != 200:
            raise error_of(answer)
        listed = [str(model["id"]) for model in answer.json()["data"]]
    except httpx2.HTTPError as error:
        why = str(error) or type(error).__name__
        raise StartupError(f"nothing answers at {settings.url} ({why})") from error
    except OpticNerveError as error:
        raise StartupError(f"{url}: {error.message}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StartupError(f"{url} lists no models: is {settings.url} the server?") from error
    if not listed and not settings.model:
        raise StartupError(f"{url} lists no models: name one with --model")
    return settings.model or listed[0]


# ---- one run


def _results(
    settings: LoadSettings, runs: Sequence[RunSettings], model: str, seed: int
) -> Iterator[LoadResult]:
    """The result of each run; the last may be incomplete."""
    for index, one in enumerate(runs):
        work = prepare(settings, one, model, f"{seed} {index}")
        before = [] if index or settings.prompts else warm_up(settings, one, model, seed)
        pace = Pace(one.concurrency, work.times, settings.duration_s, settings.ramp_s)
        run, complete = asyncio.run(_drive(settings, work.dialogues, pace, before, one.label))
        found = load_figures(run.records, settings.slo)
        yield LoadResult(one.label, vars(one), run, found, complete)
        if not complete:
            return


async def _drive(
    settings: LoadSettings,
    asked: Sequence[Dialogue],
    pace: Pace,
    warm_up: Sequence[Dialogue],
    label: str,
) -> tuple[LoadRun, bool]:
    """The run, and whether it is complete. Ctrl-C ends it early, and is not an error here."""
    async with LoadTarget(
        settings.url, settings.request_headers, settings.timeout_s, settings.trust
    ) as target:
        with tqdm(
            total=sum(len(each.askings) for each in asked), desc=label, unit="request", disable=None
        ) as bar:
            run = LoadRun(target, asked, pace, progress(bar))
            try:
                for dialogue in warm_up:
                    await target.ask(dialogue.body([]))
                await run.run()
            except asyncio.CancelledError:
                return run, False
    return run, True


def progress(bar: Any) -> Callable[[Record], None]:
    """Makes a function that advances the bar, and shows the median of recent TTFTs and the number
    of failures."""
    ttfts: deque[float] = deque(maxlen=RECENT)
    failed = 0

    def show(record: Record) -> None:
        nonlocal failed
        answer = record.answer
        failed += answer.outcome != "answered"
        if answer.ttft is not None:
            ttfts.append(answer.ttft)
        if bar.update(1):
            median = f"{percentile(list(ttfts), 50) * 1000:.0f} ms" if ttfts else "-"
            bar.set_postfix_str(f"TTFT p50 {median}, failed {failed}", refresh=False)

    return show


@dataclass(frozen=True)
class LoadWork:
    """The requests of a run. ``times``: see ``Pace``."""

    dialogues: list[Dialogue]
    times: list[float] | None = None


def prepare(settings: LoadSettings, run: RunSettings, model: str, seed: str) -> LoadWork:
    """The dialogues of a run, and when they are due."""
    source = random.Random(seed)
    read = []
    if settings.prompts:
        given, default = settings.fields or {}, settings.default_fields
        read = read_prompts(settings.prompts, model, given, default)
    count = _count(settings, run, len(read))
    times = None
    if run.rate is not None:
        due = arrivals(run.rate, source, burstiness=settings.burstiness, ramp_s=settings.ramp_s)
        due = due if settings.duration_s is None else until(due, settings.duration_s)
        times = list(itertools.islice(due, count))
        count = len(times)
    made = itertools.cycle(read) if read else synthetic(settings, run, model, source)
    shown = tqdm(
        itertools.islice(made, count), desc="preparing", total=count, leave=False,
        disable=None if count > LONG_PREPARATION else True,
    )  # fmt: skip
    return LoadWork(list(shown), times)


def synthetic(
    settings: LoadSettings, run: RunSettings, model: str, source: random.Random
) -> Iterator[Dialogue]:
    pictures = settings.pictures
    pictures = (3 if settings.converses else 1) if pictures is None else pictures
    shape = Shape(run.turns + 1, pictures, settings.words)
    album = Album(source, settings.picture_sizes, settings.picture_format.upper(), settings.repeat)
    fields = body_fields(model, {**settings.default_fields, **(settings.fields or {})})
    return dialogues(shape, album, source, fields)


def warm_up(settings: LoadSettings, run: RunSettings, model: str, seed: int) -> list[Dialogue]:
    """Dialogues that are part of no run; only their first turn is asked."""
    source = random.Random(f"{seed} warm-up")
    return list(itertools.islice(synthetic(settings, run, model, source), settings.warm_up))


def _count(settings: LoadSettings, run: RunSettings, lines: int) -> int:
    """The number of dialogues. In an open loop with a duration, arrival times decide, unless a
    number is given."""
    if settings.requests is not None:
        return -(-settings.requests // (run.turns + 1))
    if settings.duration_s is not None:
        return MAX_REQUESTS if run.rate else 1000
    return lines or max(32, 4 * (run.concurrency or 8)) // (run.turns + 1)
