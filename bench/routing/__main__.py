"""How conversations that send their pictures again are routed, and how much of their prompts is
cached.

    python -m bench.routing [--conversations N] [--real]

Each conversation shows three pictures in its first turn and has up to three more turns; every turn
sends all before it again, after a system prompt that all conversations share. Conversations begin
as a Poisson process, with time to think between an answer and the next turn.

Decisions are the product's own: those of the gateway's ``Dispatcher`` and ``Affinity``, and in each
worker of the engine with its scheduler and block manager. Time is simulated: a step takes a fixed
time, and more for each sequence that decodes and for each token of prefill. Policies:

* affine: the gateway's own policy;
* affine, 2 gateways: turns arrive at a random one of them; each knows only what it sent itself, and
  learns once a second how many sequences a worker has;
* least loaded: the worker with the fewest sequences; among equals, the longest idle one;
* round robin;
* one big worker: one with all workers' KV blocks and speed together, the upper bound.

``cached`` is the part of all prompt tokens that came from a prefix cache; ``of the bound`` divides
it by the big worker's; ``load`` is the most loaded worker's requests, and its computed prompt
tokens, over the mean. ``--real`` plays the same conversations, shorter, with the demo checkpoint's
LLM workers as processes, over HTTP.

A decision is timed with a prompt of 32,768 tokens and 64 workers, each of which has had many other
prompts: the prompt's summary, and the choice with its bookkeeping. CPU time is measured, which
other work on the machine still lengthens; ``least`` is the least affected.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from bench import report
from bench.routing.policies import DECISION_TOKENS, DECISION_WORKERS, decide, simulate

WORKERS = (2, 4)
CONVERSATIONS_PER_S = 0.6  # For each worker, on average.
LEAST_OF_BOUND, MOST_LOAD, MOST_DECISION_MS = 0.9, 1.3, 1.0


def rows(found: dict[str, Any]) -> Iterator[list[str]]:
    for name, each in found.items():
        yield [
            name,
            f"{100 * each['cached']:.1f}",
            f"{100 * each['of_bound']:.1f}",
            f"{each['requests_max_over_mean']:.2f}",
            f"{each['computed_max_over_mean']:.2f}",
            f"{1e3 * each['ttft_mean_s']:.0f}",
            f"{1e3 * each['ttft_p50_s']:.0f}",
            f"{1e3 * each['ttft_p95_s']:.0f}",
        ]


HEADER = (
    "policy",
    "cached %",
    "of the bound %",
    "load, requests",
    "load, computed",
    "TTFT mean ms",
    "p50",
    "p95",
)


def misses(simulated: dict[str, Any], decision: dict[str, float]) -> list[str]:
    """The requirements that the figures miss."""
    found = []
    for workers, policies in simulated.items():
        affine = policies["affine"]
        if affine["of_bound"] < LEAST_OF_BOUND:
            found.append(f"{workers}: {affine['of_bound']:.2f} of the bound's cached tokens")
        load = max(affine["requests_max_over_mean"], affine["computed_max_over_mean"])
        if load > MOST_LOAD:
            found.append(f"{workers}: a worker has {load:.2f} times the mean load")
    if decision["whole_least_ms"] > MOST_DECISION_MS:
        found.append(f"a decision takes {decision['whole_least_ms']:.2f} ms")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=160, help="for each two workers")
    parser.add_argument("--rounds", type=int, default=300, help="decisions that are timed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--real", action="store_true", help="also real workers, over HTTP")
    args = parser.parse_args()
    decision = decide(args.rounds)
    print(f"A decision for {DECISION_TOKENS:,} tokens and {DECISION_WORKERS} workers, CPU ms:")
    rows_of = [[name, f"{ms:.3f}"] for name, ms in decision.items()]
    print(report.table(("", "ms"), rows_of), flush=True)
    simulated = {}
    for workers in WORKERS:
        conversations = args.conversations * workers // 2
        found = simulate(workers, conversations, args.seed, CONVERSATIONS_PER_S)
        simulated[f"{workers} workers"] = found
        print(f"\n{workers} workers, {conversations} conversations, scripted service times:")
        print(report.table(HEADER, list(rows(found))), flush=True)
    results: dict[str, Any] = {"decision": decision, "simulated": simulated}
    if args.real:
        from bench.routing.real import HEADER as REAL_HEADER
        from bench.routing.real import play

        results["real"] = play(args.seed)
        print("\nTwo LLM workers with the demo checkpoint, over HTTP:")
        print(report.table(REAL_HEADER, [[k, *v.values()] for k, v in results["real"].items()]))
    results["misses"] = misses(simulated, decision)
    print(report.save("routing", results))
    if results["misses"]:
        raise SystemExit("; ".join(results["misses"]))


if __name__ == "__main__":
    main()
