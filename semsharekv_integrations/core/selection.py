"""Which borrowed tokens are recomputed: those that deviate most and those that the question attends to most.

Each signal ranks the borrowed tokens and has a quota. A token's priority is its best rank as a share of that signal's
quota: below 1 it is selected, and keeping only what lies below a smaller share gives a smaller set inside the larger
one, as recomputing over depth needs (a token that was dropped has no hidden state to come back with).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Signal(NamedTuple):
    """Scores [T], higher is more urgent, and how many tokens this signal may select."""

    scores: torch.Tensor
    quota_tokens: int


def priorities(signals: Sequence[Signal], eligible: torch.Tensor) -> torch.Tensor:
    """[T] each token's best rank over the signals, as a share of their quotas; infinity if not ``eligible`` [T]."""
    best = torch.full(eligible.shape, float("inf"), device=eligible.device)
    places = eligible.nonzero()[:, 0]
    for scores, quota_tokens in signals:
        if quota_tokens > 0 and len(places):
            order = places[scores[places].argsort(descending=True, stable=True)]
            shares = torch.arange(len(order), device=best.device) / quota_tokens
            best[order] = torch.minimum(best[order], shares)
    return best


def selected(priority: torch.Tensor, share: float) -> torch.Tensor:
    """The tokens [T] that are kept when ``share`` of every quota is left."""
    return priority < share


def deviation(fresh: Sequence[torch.Tensor], borrowed: Sequence[torch.Tensor]) -> torch.Tensor:
    """How far each token's borrowed keys and values are from fresh ones, [N] in float32: 0 is equal.

    The L2 norms of both differences, each as a share of the mean norm of the fresh ones, summed (the paper adds the
    plain norms; keys are often much larger than values, which would then not count).

    Args:
        fresh: keys and values [B, H, N, D], computed for this prompt.
        borrowed: keys and values [B, H, N, D], taken from a reference.
    """
    total = torch.zeros(fresh[0].shape[2], device=fresh[0].device)
    for new, old in zip(fresh, borrowed, strict=True):
        norms = new.float().pow(2).sum(dim=(0, 1, 3)).sqrt()  # [N]
        differences = (new.float() - old.float()).pow(2).sum(dim=(0, 1, 3)).sqrt()  # [N]
        total += differences / norms.mean().clamp_min(1e-6)
    return total
