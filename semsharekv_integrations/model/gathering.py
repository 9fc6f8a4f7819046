"""The cache that a selective pass runs on, the paper's (arXiv 2509.24832, section 3).

It holds KV of stored references in the prompt's order, keys turned to their place, and takes up new KV.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from semsharekv_integrations.kv import LayerKV, LayerRotation, Rotation, take_first_tokens
from semsharekv_integrations.model.layers import fill_layer
from semsharekv_integrations.reuse.plan import Borrowing, ReusePlan


class Measured(Exception):
    """Stops a layer; its arguments are the layer's fresh keys and values [B, H, N, D]."""


class GatheredLayer(DynamicLayer):
    """Keys and values of all prompt tokens [B, H, T, D]; an update replaces those of ``rows``.

    Attributes:
        rows: [N] positions of the tokens that the layer computes next.
        measures: if True, an update changes nothing and raises ``Measured``.
        frozen: if True, an update changes nothing, because the KV is already in place.
    """

    def __init__(self, layer: LayerKV) -> None:
        super().__init__()
        fill_layer(self, layer)
        self.rows = torch.arange(0)
        self.measures = self.frozen = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> LayerKV:
        """Write the keys and values [B, H, N, D] to ``rows``, unless ``frozen``; return those of all tokens."""
        if self.measures:
            raise Measured(key_states, value_states)
        if not self.frozen:
            self.put(self.rows, LayerKV(key_states, value_states))
        return LayerKV(self.keys, self.values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many tokens there are, those of the rows among them, and where they begin."""
        return self.keys.shape[2], 0

    def put(self, rows: Tensor, fresh: LayerKV) -> None:
        """Overwrite the keys and values of ``rows`` [N] in place."""
        rows = rows.to(self.keys.device)
        self.keys.index_copy_(2, rows, fresh.keys)
        self.values.index_copy_(2, rows, fresh.values)

    def take(self, rows: Tensor) -> LayerKV:
        """Return copies of the keys and values of ``rows`` [N]."""
        rows = rows.to(self.keys.device)
        return LayerKV(self.keys[:, :, rows], self.values[:, :, rows])


class GatheredCache(DynamicCache):
    """A cache of ``GatheredLayer`` s for the length of one prefill."""

    layers: list[GatheredLayer]

    def __init__(self, layers: Sequence[LayerKV]) -> None:
        super().__init__()
        self.layers = [GatheredLayer(layer) for layer in layers]

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        """Return how many tokens there are; to a layer that runs, what takes it from 0, 1, ... to its rows [N]."""
        rows = self.layers[layer_idx or 0].rows
        if layer_idx is None or not len(rows):
            return self.layers[0].keys.shape[2]
        return rows - torch.arange(len(rows), device=rows.device)


def gather(plan: ReusePlan, rotations: Sequence[LayerRotation]) -> GatheredCache:
    """Return copies of the KV that ``plan`` borrows, in the prompt's order, keys turned if it says so; else zeros."""
    groups: dict[int, list[Borrowing]] = {}
    for borrowing in plan.borrowings:
        groups.setdefault(id(borrowing.reference), []).append(borrowing)
    sources = [_Source(group) for group in groups.values()]
    prefixes = take_first_tokens(plan.prefix.reference.layers, plan.prefix.num_tokens) if plan.prefix else None
    layers = []
    for index, rotation in enumerate(rotations):
        prefix = next(prefixes) if prefixes else (None, None)
        stored = zip(*(source.reference.layers[index] for source in sources), strict=True)  # keys, then values
        turning = rotation if plan.rotate_keys else LayerRotation()
        pieces = zip(stored, prefix, turning, strict=True)
        layers.append(LayerKV(*(_gather(len(plan.token_ids), sources, *piece) for piece in pieces)))
    return GatheredCache(layers)


def _gather(
    length: int, sources: Sequence[_Source], stored: Sequence[Tensor], prefix: Tensor | None, turning: Rotation | None
) -> Tensor:
    """Return new keys or values [B, H, T, D] of one layer, copied from each reference [B, H, S, D] and the prefix."""
    like = stored[0]
    whole = like.new_zeros((*like.shape[:2], length, like.shape[3]))
    if prefix is not None:
        whole[:, :, : prefix.shape[2]] = prefix
    for source, tensor in zip(sources, stored, strict=True):
        source.put(whole, tensor, turning)
    return whole


class _Source:
    """A reference, whose tokens ``sources`` [N] become tokens ``targets`` [N] of the prompt."""

    def __init__(self, borrowings: Sequence[Borrowing]) -> None:
        self.reference = borrowings[0].reference
        self._sources, self._targets = (
            torch.from_numpy(np.concatenate([getattr(b, name) for b in borrowings])) for name in ("sources", "targets")
        )
        self._moves = not torch.equal(self._sources, self._targets)
        self._angles: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}  # of each rotation

    def put(self, whole: Tensor, stored: Tensor, rotation: Rotation | None) -> None:
        """Write this source's tokens of ``stored`` [B, H, S, D] into ``whole`` [B, H, T, D], turned by ``rotation``."""
        device = whole.device
        part = stored.index_select(2, self._sources.to(device))
        if rotation is not None and self._moves:
            known = id(rotation), device
            if known not in self._angles:
                self._angles[known] = rotation.angles((self._targets - self._sources).to(device))
            part = rotation.turn(part, *self._angles[known])
        whole.index_copy_(2, self._targets.to(device), part)
