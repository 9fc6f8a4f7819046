"""Which of a prompt's KV decoding keeps, over layers and over tokens. Kept tokens keep their positions.

SemShareKV (arXiv 2509.24832, section 3) keeps a fraction that decays exponentially over the layers. How fast, and how
many first and last tokens stay, is not confirmed against the paper. The reference model answers better from the same
share in every layer, and much better if the documents that share rare words with the question stay whole.
"""

from __future__ import annotations

import torch
from torch.nn.functional import max_pool1d

from semsharekv_integrations.core.schedule import geometric_shares

SINK_TOKENS = 4  # first tokens, which much attention rests on whatever they say
RECENT_TOKENS = 16  # last tokens
NEIGHBOURHOOD_TOKENS = 7  # that stay or go together, as in SnapKV (arXiv 2404.14469): words are several tokens
_HALVINGS = 40


def retained_shares(num_layers: int, ratio: float, final_share: float) -> tuple[float, ...]:
    """The share of the tokens that each layer keeps, ``ratio`` on average.

    Args:
        num_layers: of the model.
        ratio: above 0, up to 1.
        final_share: what the last layer keeps as a multiple of what the first one keeps, where none keeps more than
            all: 1 is the same everywhere, less decays exponentially with depth, more grows.
    """
    shape = geometric_shares(num_layers, 1.0, final_share)
    low, high = 0.0, 1 / min(shape)
    for _ in range(_HALVINGS):  # the average grows with the scale
        scale = (low + high) / 2
        if sum(min(1.0, scale * share) for share in shape) < ratio * num_layers:
            low = scale
        else:
            high = scale
    return tuple(min(1.0, high * share) for share in shape)


def retained_tokens(attended: torch.Tensor, share: float, relevant: torch.Tensor | None = None) -> torch.Tensor:
    """Positions [N], ascending, of the tokens to keep.

    Args:
        attended: [heads, T] how much attention each token gets; a token counts by the head that looks at it most, and
            by the most looked at of its neighbours.
        share: of the tokens to keep, 0 to 1; sinks and recent tokens count, and stay even if there is no room.
        relevant: [T] tokens that come before all others, or None.
    """
    num_tokens = attended.shape[1]
    scores = max_pool1d(attended.amax(0)[None], NEIGHBOURHOOD_TOKENS, stride=1, padding=NEIGHBOURHOOD_TOKENS // 2)[0]
    if relevant is not None:
        scores = scores + relevant * (scores.max() + 1)
    scores[:SINK_TOKENS] = scores[-RECENT_TOKENS:] = float("inf")
    least = min(num_tokens, SINK_TOKENS + RECENT_TOKENS)
    kept = max(least, round(share * num_tokens))
    return scores.topk(kept).indices.sort().values
