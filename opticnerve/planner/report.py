"""The output of ``opticnerve plan``: text, JSON and plots."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from opticnerve import __version__
from opticnerve.benchmark.figures import Slo
from opticnerve.benchmark.plot import new_figure
from opticnerve.benchmark.tables import table
from opticnerve.planner.rates import Rates
from opticnerve.planner.search import Proposal
from opticnerve.planner.simulation import Forecast
from opticnerve.planner.traffic import Traffic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOT_MODELLED = (
    "one device is one encoder, LLM worker or whole copy, all alike and of equal cost; none slows "
    "another, as processes do that share cores",
    "the gateway, the store and the network take time and never get busy: see their own metrics",
    "an LLM worker takes a request when its pictures are encoded, reserves its whole length, and "
    "never preempts; attention to a longer context costs no more than to a short one",
    "cached pictures and prompts are hits on every worker; no request fails or is cancelled",
)
HEADER = (
    "pools", "devices", "requests/s", "within SLO", "TTFT p50, ms", "TTFT p99", "TPOT p50, ms",
    "TPOT p99", "encoders busy", "LLM busy", "sequences",
)  # fmt: skip


def row(forecast: Forecast) -> list[str]:
    def ms(name: str, rank: float) -> str:
        value = forecast.quantile(name, rank)
        return "-" if value is None else f"{value * 1000:,.1f}"

    return [
        str(forecast.pools),
        str(forecast.pools.devices),
        f"{forecast.requests_per_s:,.2f}",
        f"{forecast.attained:.1%}",
        ms("ttft", 50), ms("ttft", 99), ms("tpot", 50), ms("tpot", 99),
        f"{forecast.encoder_use:.0%}" if forecast.pools.encoders else "-",
        f"{forecast.llm_use:.0%}",
        f"{forecast.llm_sequences:.1f}",
    ]  # fmt: skip


def forecast_table(forecasts: Sequence[Forecast]) -> str:
    return table(HEADER, [row(forecast) for forecast in forecasts])


def text(proposal: Proposal) -> str:
    told = [verdict(proposal), forecast_table(proposal.forecasts), notes(proposal.slices)]
    return "\n\n".join(told)


def verdict(proposal: Proposal) -> str:
    split, whole = proposal.split.pools, proposal.whole.pools
    need = f"{split}: {_devices(split.devices)}. {whole} would do as well"
    if split.devices < whole.devices:
        saved = whole.devices - split.devices
        return f"{need}, on {_devices(whole.devices)}: splitting saves {saved}."
    if split.devices > whole.devices:
        return f"{need}, on {_devices(whole.devices)}: splitting does not pay here."
    return f"{need}: splitting saves no device."


def _devices(number: int) -> str:
    return "1 device" if number == 1 else f"{number} devices"


def notes(slices: int) -> str:
    lines = ["Not modelled:", *(f"- {line};" for line in NOT_MODELLED)]
    lines[-1] = lines[-1][:-1] + "."
    if slices > 1:
        lines.append(
            f"One of {slices} equal parts of traffic and pools was simulated; the real pools share "
            "more, and need slightly less."
        )
    return "\n".join(lines)


def document(
    argv: Sequence[str],
    rates: Rates,
    traffic: Traffic,
    slo: Slo | None,
    forecasts: Sequence[Forecast],
) -> dict[str, Any]:
    """The answer as JSON."""
    return {
        "command": shlex.join(["opticnerve", "plan", *argv]),
        "version": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rates": rates.document(),
        "traffic": asdict(traffic),
        "slo_s": slo.limits if slo else {},
        "forecasts": [forecast.document() for forecast in forecasts],
        "not_modelled": NOT_MODELLED,
    }


def plan_plot(forecasts: Sequence[Forecast]) -> Figure:
    """Distributions of TTFT and TPOT, and how busy the pools are."""
    figure, (ttft, tpot, busy) = new_figure(1, 3)
    for forecast in forecasts:
        for axes, values in ((ttft, forecast.ttft_s), (tpot, forecast.tpot_s)):
            if values:
                axes.ecdf([value * 1000 for value in values], label=str(forecast.pools))
    for axes, name in ((ttft, "TTFT"), (tpot, "time per output token")):
        axes.set(title=name, xlabel="ms", ylabel="share of requests", ylim=(0, 1))
    names = [str(forecast.pools).replace(" and ", "\n") for forecast in forecasts]
    places = range(len(forecasts))
    left, right = [place - 0.2 for place in places], [place + 0.2 for place in places]
    busy.bar(left, [each.encoder_use for each in forecasts], 0.4, label="encoders")
    busy.bar(right, [each.llm_use for each in forecasts], 0.4, label="LLM workers")
    busy.set(title="share of time at work", ylim=(0, 1.05), xticks=list(places), xticklabels=names)
    ttft.legend()
    busy.legend()
    return figure
