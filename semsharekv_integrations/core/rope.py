"""Rotary position embeddings: keys that were computed at one position, turned to stand at another.

RoPE (arXiv 2104.09864) turns every pair of key dimensions by position times inverse frequency, so a key moves by
``shift`` positions when its pairs are turned by ``shift`` times that frequency. Models that scale cosine and sine
(YaRN) have done so already: only the pure angle is applied here. Knows nothing about models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Rotation:
    """How one layer turns its keys.

    Attributes:
        inverse_frequencies: [R] radians for each position, one for each pair; the other D - 2R dimensions stay.
        interleaved: whether neighbours (0, 1), (2, 3), ... are pairs, instead of the two halves (0, R), (1, R + 1), ...
    """

    inverse_frequencies: torch.Tensor
    interleaved: bool = False

    def angles(self, shifts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, both [N, R] in float32, for ``shifts`` [N] in positions, which may be negative."""
        frequencies = self.inverse_frequencies.to(shifts.device, torch.float32)
        turned = shifts[:, None].to(torch.float32) * frequencies  # [N, R]
        return turned.cos(), turned.sin()


def rotate(keys: torch.Tensor, shifts: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Keys [B, H, N, D] moved by ``shifts`` [N] positions each; computed in float32, returned in their own dtype."""
    return turn(keys, *rotation.angles(shifts), rotation.interleaved)


def turn(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """As ``rotate``, with angles that were computed before: one pair serves all layers of a frequency."""
    turned = keys.to(torch.float32, copy=True)
    rotary = turned[..., : 2 * cos.shape[-1]]  # [B, H, N, 2R]
    first, second = (rotary[..., 0::2], rotary[..., 1::2]) if interleaved else rotary.chunk(2, dim=-1)
    before = first.clone()
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(before, sin)
    return turned.to(keys.dtype)
