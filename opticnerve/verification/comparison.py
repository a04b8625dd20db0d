"""Compares the split model with the whole one, and says what counts as equal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from opticnerve.tensors.distance import LIMITS, Tolerance, compare
from opticnerve.verification.split import Asked, Rows
from opticnerve.verification.whole import Prefill, WholeModel

MAX_DRIFTS = {"float32": 1e-3, "float16": 0.125, "bfloat16": 1.0}


@dataclass(frozen=True, slots=True)
class Rule:
    """What counts as equal. ``max_gap``: a token that is not the unsplit model's best is allowed if
    its logit in that model is less than this below the best one's. ``max_drift``: the largest
    difference of a log-probability. ``rows``: the tolerance between pictures' rows and what the
    unsplit model reads in their places."""

    max_gap: float
    max_drift: float
    rows: Tolerance

    @classmethod
    def of(cls, dtype: torch.dtype) -> Rule:
        """In float32 the two differ only by rounding. In 16 bits, a logit of 20 has steps of an
        eighth (bfloat16) or a 64th (float16), and sums in another order differ by several steps;
        log-probabilities may differ by eight."""
        name = str(dtype).removeprefix("torch.")
        return cls(1e-3 if name == "float32" else 0.5, MAX_DRIFTS[name], LIMITS[name])


@dataclass
class Tally:
    """What was found in the cases of one kind."""

    cases: int = 0
    prompts_differ: int = 0
    tokens: int = 0
    close_calls: int = 0  # Tokens that differ as the rule allows.
    wrong_tokens: int = 0
    largest_gap: float = 0.0
    wrong_logprobs: int = 0  # Tokens with a log-probability beyond the rule.
    largest_drift: float = 0.0  # Of the finite log-probabilities.
    pictures: int = 0  # Pictures whose rows were compared.
    wrong_pictures: int = 0
    least_cosine: float = 1.0
    largest_difference: float = 0.0  # Of the finite elements of rows.
    faults: list[str] = field(default_factory=list)  # The first few, in words.

    @property
    def equal(self) -> bool:
        wrong = self.wrong_tokens or self.wrong_logprobs or self.wrong_pictures
        return not (self.prompts_differ or wrong)


MAX_FAULTS = 5


class Comparison:
    """Compares answers, case by case; ``tallies`` by kind."""

    def __init__(self, whole: WholeModel, rule: Rule) -> None:
        self.whole = whole
        self.rule = rule
        self.tallies: dict[str, Tally] = {}

    def add(self, asked: Asked) -> None:
        tally = self.tallies.setdefault(asked.case.kind, Tally())
        tally.cases += 1
        inputs = self.whole.inputs(asked.case)
        if inputs["input_ids"][0].tolist() != asked.prompt_ids:
            tally.prompts_differ += 1
            self._fault(tally, _first_difference(inputs["input_ids"][0].tolist(), asked.prompt_ids))
            return  # Answers to different prompts cannot be compared.
        prefill = None
        for answer, ways in _distinct(asked.answers).items():
            prefill = self.whole.prefill(inputs, list(answer))
            self._add_tokens(tally, prefill.logits, answer, ways)
            for way in ways:
                self._add_logprobs(tally, prefill.logits, answer, asked, way)
        if prefill is not None and asked.rows:
            self._add_rows(tally, prefill, asked, asked.rows)

    def _add_tokens(
        self, tally: Tally, logits: torch.Tensor, answer: Sequence[int], ways: Sequence[str]
    ) -> None:
        tally.tokens += len(answer) * len(ways)
        gaps = logits.max(dim=-1).values - logits[range(len(answer)), list(answer)]
        for index, gap in enumerate(gaps.tolist()):
            if gap <= 0:
                continue
            tally.largest_gap = max(tally.largest_gap, gap)
            if gap < self.rule.max_gap:
                tally.close_calls += len(ways)
                continue
            tally.wrong_tokens += len(ways)
            best = int(logits[index].argmax())
            self._fault(
                tally,
                f"asked {', '.join(ways)}: token {index} of the answer is {answer[index]}, the "
                f"unsplit model's is {best}, whose logit leads by {gap:.3g}",
            )
            return  # Later tokens follow another beginning than the unsplit model's.

    def _add_logprobs(
        self, tally: Tally, logits: torch.Tensor, answer: Sequence[int], asked: Asked, way: str
    ) -> None:
        """Compares the log-probabilities of the answer's tokens, and those of the most likely ones
        by rank: the stack does not give their ids, which may also change places at near ties."""
        said, first = asked.logprobs[way], None
        if len(said) != len(answer):
            tally.wrong_logprobs += len(answer)
            self._fault(tally, f"asked {way}: {len(answer)} tokens, {len(said)} log-probabilities")
            return
        wanted = logits.double().log_softmax(dim=-1)
        for index, (token, mine) in enumerate(zip(answer, said, strict=True)):
            best = wanted[index].topk(len(mine) - 1).values
            want = torch.cat([wanted[index, token, None], best])
            drift = float((torch.tensor(mine, dtype=torch.float64) - want).abs().max())
            if math.isfinite(drift):
                tally.largest_drift = max(tally.largest_drift, drift)
            if not drift <= self.rule.max_drift:
                tally.wrong_logprobs += 1
                first = first or f"token {index} of the answer has one that is off by {drift:.3g}"
        if first:
            self._fault(tally, f"asked {way}: of the log-probabilities, {first}")

    def _add_rows(self, tally: Tally, prefill: Prefill, asked: Asked, rows: Sequence[Rows]) -> None:
        wanted = _rows_of_pictures(prefill, asked.spans, len(rows))
        for index, (got, want) in enumerate(zip(rows, wanted, strict=True)):
            tally.pictures += 1
            if got.keys() != want.keys() or any(got[n].shape != want[n].shape for n in want):
                tally.wrong_pictures += 1
                self._fault(tally, f"picture {index} has tensors of other shapes")
                continue
            if fault := self._row_fault(tally, got, want):
                tally.wrong_pictures += 1
                self._fault(tally, f"picture {index} has wrong {fault}")

    def _row_fault(self, tally: Tally, got: Rows, want: Rows) -> str | None:
        """Says which tensor is too far off, and how far. Each is measured by its own largest
        number, since a DeepStack level may have much larger ones than the rows."""
        fault = None
        for name in want:
            distance = compare([(got[name].float(), want[name].float())])
            tally.least_cosine = min(tally.least_cosine, distance.cosine)
            if math.isfinite(distance.difference):
                tally.largest_difference = max(tally.largest_difference, distance.difference)
            if fault is None and not distance.within(self.rule.rows):
                fault = f"{name}: {distance.describe(self.rule.rows)}"
        return fault

    def _fault(self, tally: Tally, text: str) -> None:
        if len(tally.faults) < MAX_FAULTS:
            tally.faults.append(text)


def _distinct(answers: Mapping[str, list[int]]) -> dict[tuple[int, ...], list[str]]:
    """Answer -> the ways of asking that got it."""
    found: dict[tuple[int, ...], list[str]] = {}
    for way, answer in answers.items():
        found.setdefault(tuple(answer), []).append(way)
    return found


def _rows_of_pictures(
    prefill: Prefill, spans: Sequence[Mapping[str, Any]], pictures: int
) -> list[dict[str, torch.Tensor]]:
    """What the unsplit model reads in the places of each picture, in the order of its rows."""
    by_picture: list[list[Mapping[str, Any]]] = [[] for _ in range(pictures)]
    starts, seen = {}, 0  # Each span's first index among all placeholders.
    for span in sorted(spans, key=lambda each: each["token_offset"]):
        by_picture[span["item"]].append(span)
        starts[span["token_offset"]] = seen
        seen += span["num_tokens"]

    def pieces(source: torch.Tensor, of: list[Mapping[str, Any]], compact: bool) -> torch.Tensor:
        parts = []
        for span in sorted(of, key=lambda each: each["row_start"]):
            offset = span["token_offset"]
            start = starts[offset] if compact else offset
            parts.append(source[start : start + span["num_tokens"]])
        return torch.cat(parts)

    return [
        {"rows": pieces(prefill.embeddings, of, compact=False)}
        | {
            f"deepstack.{level}": pieces(tensor, of, compact=True)
            for level, tensor in enumerate(prefill.deepstack)
        }
        for of in by_picture
    ]


def _first_difference(want: Sequence[int], got: Sequence[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), None)
    if at is None:
        return f"the prompt has {len(got)} tokens, transformers' {len(want)}"
    return f"token {at} of the prompt is {got[at]}, transformers' is {want[at]}"
