"""Log-probabilities: the fp32 log-softmax of raw logits, before anything that sampling does."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opticnerve.generation.values import Logprob, PositionLogprobs


def position_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, counts: Sequence[int]
) -> list[PositionLogprobs]:
    """``logits`` fp32 [rows, vocab], ``token_ids`` int64 [rows]: the tokens that stand there.

    ``counts``: for each row how many of the best to name. Equal logits share a rank.
    """
    best = min(max(counts, default=0), logits.shape[-1])
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    chosen = logits.gather(1, token_ids.unsqueeze(1))
    ranks = (logits > chosen).sum(dim=-1).tolist()
    values = (chosen - normaliser).squeeze(1).tolist()
    ids = token_ids.tolist()
    top_values: list[list[float]] = []
    top_ids: list[list[int]] = []
    if best:
        found = logits.topk(best, dim=-1)
        top_values = (found.values - normaliser).tolist()
        top_ids = found.indices.tolist()
    described = []
    for row, count in enumerate(counts):
        top: tuple[Logprob, ...] = ()
        if count:
            pairs = zip(top_ids[row][:count], top_values[row], strict=False)
            top = tuple(Logprob(token, value, rank) for rank, (token, value) in enumerate(pairs, 1))
        sampled = Logprob(ids[row], values[row], ranks[row] + 1)
        described.append(PositionLogprobs(sampled, top))
    return described
