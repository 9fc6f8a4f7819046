"""Token embeddings made fit for averaging: whitened over the vocabulary.

Trained token embeddings share a few strong directions, so that means of them are all alike. Whitening (as in
BERT-whitening, arXiv 2103.15316, there of sentence vectors) takes that away. Knows nothing about models or segments.
"""

from __future__ import annotations

import torch

MOST_WIDTH = 256
_SAMPLED_TOKENS = 16_384
_FLOOR = 0.01  # share of the mean variance that is added to every direction's


def whitening(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [hidden] of token embeddings [V, hidden], and the map [hidden, W] behind which all directions vary alike.

    Wide embeddings are first projected at random, and large vocabularies sampled evenly, to keep it cheap.
    """
    sample = matrix[:: max(1, len(matrix) // _SAMPLED_TOKENS)].float()
    centre, hidden = sample.mean(dim=0), matrix.shape[1]
    projection = torch.eye(hidden)
    if hidden > MOST_WIDTH:
        generator = torch.Generator().manual_seed(0)
        projection = torch.randn(hidden, MOST_WIDTH, generator=generator) / hidden**0.5
    projection = projection.to(sample.device)
    projected = (sample - centre) @ projection  # [sample, W]
    variance, directions = torch.linalg.eigh(projected.T @ projected / len(projected))
    floor = _FLOOR * variance.mean() + torch.finfo(torch.float32).tiny
    scale = (variance.clamp_min(0) + floor).rsqrt()  # [W]
    return centre, projection @ (directions * scale) @ directions.T
