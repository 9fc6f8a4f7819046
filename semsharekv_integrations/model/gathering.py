"""The cache that a selective pass runs on, the paper's (arXiv 2509.24832, section 3).

It holds KV of stored references in the prompt's order, keys turned to their place, and takes up new KV.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from semsharekv_integrations.kv import LayerKV, LayerRotation
from semsharekv_integrations.model.layers import fill_layer
from semsharekv_integrations.model.sources import Pieces, Sources
from semsharekv_integrations.reuse.plan import ReusePlan

_GROUP_BYTES = 1 << 28  # of stored KV that an accelerator puts together at a time: few launches, little memory beside
_STRETCH_BYTES = 1 << 17  # of a layer; if stretches are shorter on average, picking is faster than copying each


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
    """Return copies of the KV that ``plan`` borrows, in the prompt's order, keys turned if it says so; else zeros.

    Each layer's KV lies where what is stored of it does.
    """
    turning = rotations if plan.rotate_keys else [LayerRotation()] * len(rotations)
    sources = Sources(plan)
    layers: list[LayerKV] = []
    while (index := len(layers)) < len(turning):
        pieces = sources.read(index)
        on_cpu, num_bytes = pieces[0].keys.device.type == "cpu", _count_bytes(pieces)
        if on_cpu and num_bytes >= len(sources.stretches) * _STRETCH_BYTES:
            layers.append(sources.copy(pieces, turning[index]))
        else:
            most = 1 if on_cpu else _GROUP_BYTES // max(1, num_bytes)
            layers += sources.pick(_take_group(sources, pieces, turning[index:][:most], index), turning[index])
    return GatheredCache(layers)


def _take_group(sources: Sources, first: Pieces, turning: Sequence[LayerRotation], start: int) -> list[Pieces]:
    """Return the pieces of layer ``start``, ``first``, and of those of ``turning`` behind it that can go with it.

    They turn alike, and lie on one device in one shape.
    """
    group = [first]
    for index, rotation in enumerate(turning[1:], start + 1):
        if rotation != turning[0] or _describe(pieces := sources.read(index)) != _describe(first):
            break
        group.append(pieces)
    return group


def _count_bytes(pieces: Pieces) -> int:
    return sum(tensor.nbytes for layer in pieces for tensor in layer)


def _describe(pieces: Pieces) -> list[tuple[Any, ...]]:
    return [(tensor.device, tensor.dtype, tensor.shape) for layer in pieces for tensor in layer]
