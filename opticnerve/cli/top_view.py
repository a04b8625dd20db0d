"""What ``opticnerve top`` draws, with rich."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from opticnerve.cli.snapshot import Change

STAGE = "opticnerve_stage_seconds"
LATENCIES = {
    "first token": "opticnerve_time_to_first_token_seconds",
    "between tokens": "opticnerve_inter_token_seconds",
}
LOOKUPS = "opticnerve_embedding_lookups_total"
REQUESTS = "opticnerve_requests_total"
WATCHING = frozenset({"/health", "/live", "/metrics", "/ready"})  # Routes that are not shown.
STAGES = (
    "fetch",
    "encoder_queue",
    "preprocess",
    "encode",
    "put",
    "queue",
    "get",
    "prefill",
    "decode",
)
SHARES = (0.5, 0.9, 0.99)
COLORS = {
    "ok": "green",
    "serving": "green",
    "degraded": "yellow",
    "draining": "yellow",
    "starting": "yellow",
}


def screen(url: str, change: Change) -> RenderableType:
    """The whole screen, from the newest snapshot and the change since the earlier one."""
    health = change.now.health
    parts: list[RenderableType] = [_head(url, change)]
    if "encoders" in health:
        parts.append(_pools(health))
    else:
        parts.append(Text("the pools are shown to holders of a key: OPENAI_API_KEY", "yellow"))
    if change.now.samples:
        parts += [_traffic(change), _latencies(change)]
    parts += [told(f"no metrics from {place}: {why}", "yellow") for place, why in _silent(change)]
    return Group(*(line for part in parts for line in (part, Text(""))))


def told(value: object, style: str = "") -> Text:
    """Text from a server, shown literally: brackets are not markup, and control characters are
    replaced."""
    shown = "".join(char if char.isprintable() else "\ufffd" for char in str(value))
    return Text(shown, style)


def lost(url: str, since: float, why: str) -> RenderableType:
    """The screen while the gateway does not answer."""
    clock = time.strftime("%H:%M:%S", time.localtime(since))
    return Group(Text(f"{url} unreachable since {clock}", "bold red"), told(why, "dim"))


def _silent(change: Change) -> Iterable[tuple[str, str]]:
    return change.now.silent.items()


def _head(url: str, change: Change) -> Text:
    health = change.now.health
    status = str(health["status"])
    span = f"the last {change.seconds:.0f} s" if change.before.health else "since the start"
    if change.now.samples and change.seconds <= 0:  # Several processes export no start time.
        span += ", whose time is not known: counts, not rates"
    line = Text.assemble(
        (url, "bold"),
        "  ",
        told(status, COLORS.get(status, "bold red")),
        (f"  {span}", "dim"),
    )
    if health.get("missing"):
        line.append("\n").append(told(f"missing: {'; '.join(map(str, health['missing']))}", "red"))
    return line


def _table(*columns: str, figures: bool = False) -> Table:
    """``figures``: whether all columns but the first are aligned to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold cyan")
    for place, column in enumerate(columns):
        justify: JustifyMethod = "right" if figures and place else "left"
        table.add_column(column, justify=justify, no_wrap=True)
    return table


# ---- pools


def _pools(health: Mapping[str, Any]) -> Table:
    table = _table("pool", "waiting", "worker", "state", "load")
    for name, pool in (("encoders", health["encoders"]), ("llms", health["llms"])):
        first = [name, str(pool.get("waiting", 0))]  # Shown once per pool.
        for worker in pool["workers"] or [{"address": "-", "state": "none"}]:
            state = str(worker["state"])
            shown = told(state, COLORS.get(state, "red"))
            table.add_row(*first, told(worker["address"]), shown, told(_load(worker)))
            first = ["", ""]
            if worker.get("fault"):
                table.add_row("", "", told(worker["fault"], "red"))
    return table


def _load(worker: Mapping[str, Any]) -> str:
    """A worker's load, in words."""
    load, limits = worker.get("load") or {}, worker.get("limits") or {}
    if "running" in load:
        blocks = limits.get("num_kv_blocks") or 0
        used = f", KV {1 - load['free_kv_blocks'] / blocks:.0%}" if blocks else ""
        return f"{load['running']} running, {load['waiting']} waiting{used}"
    if "queued_patches" in load:
        return f"{load['queued_items']} pictures, {load['queued_patches']} patches"
    return "-"


# ---- traffic


def _traffic(change: Change) -> Table:
    now = change.now
    table = _table("traffic", *[""] * 5)
    statuses = change.by(REQUESTS, "status", without=("route", WATCHING))
    asked = [
        told(f"{status}: {_per_s(count, change)}") for status, count in statuses.items() if count
    ]
    in_flight = now.total("opticnerve_requests_in_flight")
    table.add_row("requests", f"in flight: {in_flight:.0f}", *asked[:4])
    kinds = ("prompt", "cached", "image", "completion")
    tokens = {kind: change.growth("opticnerve_tokens_total", kind=kind) for kind in kinds}
    table.add_row("tokens", *(f"{kind}: {_per_s(n, change, 1)}" for kind, n in tokens.items()))
    rates = [told(_hit_rate(change, tier)) for tier in change.by(LOOKUPS, "tier")]
    if rates:
        table.add_row("cache hits", *rates[:5])
    patches = now.total("opticnerve_patches_waiting")
    table.add_row("queue", f"patches: {patches:.0f}")
    return table


def _hit_rate(change: Change, tier: str) -> str:
    hits = change.growth(LOOKUPS, tier=tier, result="hit")
    looked = change.growth(LOOKUPS, tier=tier)
    return f"{tier}: {hits / looked:.0%}" if looked else f"{tier}: -"


def _per_s(count: float, change: Change, digits: int = 2) -> str:
    """A count per second, or the count itself if the time is not known."""
    return f"{count / change.seconds:.{digits}f}/s" if change.seconds > 0 else f"{count:.0f}"


# ---- latencies


def _latencies(change: Change) -> Table:
    timed = "per s" if change.seconds > 0 else "count"
    columns = ["milliseconds", timed, "mean", *(f"p{share * 100:.0f}" for share in SHARES)]
    table = _table(*columns, figures=True)
    for title, name in LATENCIES.items():
        _add_latency(table, title, change, name)
    stages = change.by(f"{STAGE}_count", "stage")
    ordered = [*(stage for stage in STAGES if stage in stages), *sorted(stages.keys() - {*STAGES})]
    for stage in ordered:
        _add_latency(table, stage, change, STAGE, stage=stage)
    return table


def _add_latency(table: Table, title: str, change: Change, name: str, **labels: str) -> None:
    figures = [change.mean(name, **labels)]
    figures += [change.quantile(name, share, **labels) for share in SHARES]
    often = _per_s(change.growth(f"{name}_count", **labels), change).removesuffix("/s")
    table.add_row(told(title), often, *("-" if s is None else f"{s * 1e3:.1f}" for s in figures))
