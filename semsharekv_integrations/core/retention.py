"""Which of a prompt's KV decoding keeps: less with depth, chosen by attention, with first and last tokens always in.

SemShareKV (arXiv 2509.24832, section 3) keeps a fraction that decays exponentially over the layers. How fast, and how
many first and last tokens stay, is not confirmed against the paper. Kept tokens keep their positions.
"""

from __future__ import annotations

import torch

from semsharekv_integrations.core.schedule import decaying_shares

SINK_TOKENS = 4  # first tokens, which much attention rests on whatever they say
RECENT_TOKENS = 16  # last tokens
STEEPEST = 3.0  # most that the first layer may keep, as a multiple of the average; less in models of few layers
_HALVINGS = 40


def retained_shares(num_layers: int, ratio: float) -> tuple[float, ...]:
    """The share of the tokens that each layer keeps, exponentially decaying, ``ratio`` on average."""
    first = min(1.0, min(STEEPEST, (num_layers + 1) / 2) * ratio)
    low, high = 0.0, first
    for _ in range(_HALVINGS):  # the average grows with the last layer's share
        last = (low + high) / 2
        if sum(decaying_shares(num_layers, first, last)) < ratio * num_layers:
            low = last
        else:
            high = last
    return decaying_shares(num_layers, first, high)


def retained_tokens(attended: torch.Tensor, share: float) -> torch.Tensor:
    """Positions [N], ascending, of the tokens to keep.

    Args:
        attended: [T] how much attention each token gets.
        share: of the tokens to keep, 0 to 1; sinks and recent tokens count, and stay even if there is no room.
    """
    num_tokens = len(attended)
    scores = attended.clone()
    scores[:SINK_TOKENS] = scores[-RECENT_TOKENS:] = float("inf")
    least = min(num_tokens, SINK_TOKENS + RECENT_TOKENS)
    kept = max(least, round(share * num_tokens))
    return scores.topk(kept).indices.sort().values
