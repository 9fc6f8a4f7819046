"""How a loaded model's layers turn their keys by position: found among its buffers, and proven on a real forward pass.

A probe is run at two places; each layer's rotation is the candidate that carries the keys of the one over to the
other. A model for which none does (learned positions, rotation of a part that is not the first, frequencies that
change) cannot have keys moved, and is refused for the modes that move them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from semsharekv_integrations.core.rope import Rotation, rotate
from semsharekv_integrations.errors import UnsupportedModelError
from semsharekv_integrations.kv import LayerKV

PROBE_SHIFT = 23  # positions
HALF_TOLERANCE, FLOAT_TOLERANCE = 0.1, 1e-3  # mean error as a share of the keys' mean magnitude


def find_rotations(
    model: nn.Module, here: Sequence[LayerKV], there: Sequence[LayerKV], shift: int
) -> tuple[Rotation | None, ...]:
    """The rotation of each layer; None for a layer that does not turn its keys.

    Args:
        model: whose buffers hold the inverse frequencies.
        here: KV of a probe, one pair for each layer.
        there: KV of the same probe ``shift`` positions later.
        shift: in positions.

    Raises:
        UnsupportedModelError: if values change with position, or keys in another way than by a rotation.
    """
    width = min(layer.keys.shape[3] for layer in here)
    candidates = [None, *(c for c in _candidates(model) if 2 * len(c.inverse_frequencies) <= width)]
    return tuple(
        _rotation_of(index, candidates, first, second, shift)
        for index, (first, second) in enumerate(zip(here, there, strict=True))
    )


def _rotation_of(
    index: int, candidates: Sequence[Rotation | None], here: LayerKV, there: LayerKV, shift: int
) -> Rotation | None:
    shifts = torch.full((here.keys.shape[2],), shift, device=here.keys.device)
    moved = [here.keys if rotation is None else rotate(here.keys, shifts, rotation) for rotation in candidates]
    errors = [_error(keys, there.keys) for keys in moved]
    best = min(range(len(errors)), key=errors.__getitem__)
    tolerance = FLOAT_TOLERANCE if here.keys.dtype == torch.float32 else HALF_TOLERANCE
    if errors[best] > tolerance or _error(here.values, there.values) > tolerance:
        raise UnsupportedModelError(
            f"layer {index}: keys at another position are not the rotated ones (error {errors[best]:.3f} of their "
            f"magnitude), as with learned positions, ALiBi, MLA or partial rotation; use mode='exact'"
        )
    return candidates[best]


def _error(moved: torch.Tensor, real: torch.Tensor) -> float:
    return float((moved.float() - real.float()).abs().mean() / real.float().abs().mean().clamp_min(1e-6))


def _candidates(model: nn.Module) -> Iterator[Rotation]:
    """Every set of inverse frequencies that the model holds (its original one where it changes), in both pairings."""
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        for name, frequencies in buffers.items():
            if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
                original = buffers.get(f"{name.removesuffix('inv_freq')}original_inv_freq")
                chosen = frequencies if original is None else original
                yield from (Rotation(chosen.float(), interleaved) for interleaved in (False, True))
