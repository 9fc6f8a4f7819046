"""A prompt's KV gathered from stored references into its own order, in a cache that takes up what is computed.

The paper's rearranged cache (arXiv 2509.24832, section 3), with keys turned to where they stand now.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from semsharekv_integrations.core.plan import Borrowing, ReusePlan
from semsharekv_integrations.core.rope import Rotation, turn
from semsharekv_integrations.kv import LayerKV


class Measured(Exception):
    """Fresh keys and values [B, H, N, D] of a layer whose rest is not wanted."""

    def __init__(self, layer: LayerKV) -> None:
        super().__init__()
        self.layer = layer


class GatheredLayer(DynamicLayer):
    """Keys and values of all prompt tokens [B, H, T, D]; an update replaces those of ``rows``.

    Attributes:
        rows: [N] positions of the tokens that the layer computes next.
        measures: whether an update raises ``Measured`` instead.
        frozen: whether updates change nothing, since what they bring is there.
    """

    def __init__(self, layer: LayerKV) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer
        self.rows = torch.arange(0)
        self.measures = self.frozen = False

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> LayerKV:
        """Put the fresh keys and values [B, H, N, D] of ``rows`` in place; all of them [B, H, T, D]."""
        if self.measures:
            raise Measured(LayerKV(key_states, value_states))
        if not self.frozen:
            self.put(self.rows, LayerKV(key_states, value_states))
        return LayerKV(self.keys, self.values)

    def put(self, rows: torch.Tensor, fresh: LayerKV) -> None:
        """Replace the keys and values of ``rows`` [N]."""
        rows = rows.to(self.keys.device)
        self.keys.index_copy_(2, rows, fresh.keys)
        self.values.index_copy_(2, rows, fresh.values)

    def take(self, rows: torch.Tensor) -> LayerKV:
        """The keys and values of ``rows`` [N], copied."""
        rows = rows.to(self.keys.device)
        return LayerKV(self.keys[:, :, rows], self.values[:, :, rows])


class GatheredCache(DynamicCache):
    """A cache of ``GatheredLayer`` s for the length of one prefill."""

    layers: list[GatheredLayer]

    def __init__(self, layers: Sequence[LayerKV]) -> None:
        super().__init__()
        self.layers = [GatheredLayer(layer) for layer in layers]

    def finished(self) -> DynamicCache:
        """The same tensors in a plain cache, which decoding lets grow."""
        cache = DynamicCache()
        for gathered in self.layers:
            layer = DynamicLayer()
            layer.lazy_initialization(gathered.keys, gathered.values)
            layer.keys, layer.values = gathered.keys, gathered.values
            cache.layers.append(layer)
        return cache


def gather(plan: ReusePlan, rotations: Sequence[Rotation | None]) -> GatheredCache:
    """The KV that ``plan`` borrows, at its places, keys re-rotated if it says so; zeros where nothing is borrowed.

    Args:
        plan: it borrows something.
        rotations: of each layer, or None where keys do not turn.
    """
    gatherer = _Gatherer(plan)
    return GatheredCache([gatherer.layer(index, rotation) for index, rotation in enumerate(rotations)])


class _Angles(NamedTuple):
    cos: torch.Tensor
    sin: torch.Tensor


class _Gatherer:
    """Gathers layer after layer; the angles are the same for all layers of one rotation."""

    def __init__(self, plan: ReusePlan) -> None:
        self._plan = plan
        taken: dict[int, list[Borrowing]] = {}
        for borrowing in plan.borrowings:
            taken.setdefault(id(borrowing.reference), []).append(borrowing)
        groups = list(taken.values())
        self._references = [group[0].reference for group in groups]
        self._sources = [np.concatenate([b.sources for b in group]) for group in groups]
        targets = np.concatenate([b.targets for group in groups for b in group])
        self._targets = torch.from_numpy(targets)  # [N]
        self._shifts = torch.from_numpy(targets - np.concatenate(self._sources))  # [N]
        self._moves = plan.rotate_keys and bool((self._shifts != 0).any())
        self._angles: dict[tuple[int, torch.device], _Angles] = {}

    def layer(self, index: int, rotation: Rotation | None) -> LayerKV:
        borrowed = LayerKV(*(self._borrowed(index, kind) for kind in range(2)))
        if rotation is not None and self._moves:
            borrowed = borrowed._replace(keys=self._turned(borrowed.keys, rotation))
        return LayerKV(*(self._placed(index, kind, borrowed[kind]) for kind in range(2)))

    def _borrowed(self, index: int, kind: int) -> torch.Tensor:
        stored = zip(self._references, self._sources, strict=True)
        return torch.cat([_taken(reference.layers[index][kind], sources) for reference, sources in stored], dim=2)

    def _turned(self, keys: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        known = (id(rotation), keys.device)
        if known not in self._angles:
            self._angles[known] = _Angles(*rotation.angles(self._shifts.to(keys.device)))
        return turn(keys, *self._angles[known], rotation.interleaved)

    def _placed(self, index: int, kind: int, borrowed: torch.Tensor) -> torch.Tensor:
        batch, heads, _, width = borrowed.shape
        whole = borrowed.new_zeros((batch, heads, len(self._plan.token_ids), width))  # [B, H, T, D]
        if self._plan.prefix:
            start = self._plan.prefix.num_tokens
            whole[:, :, :start] = self._plan.prefix.reference.layers[index][kind][:, :, :start]
        return whole.index_copy_(2, self._targets.to(whole.device), borrowed)


def _taken(tensor: torch.Tensor, sources: NDArray[np.int64]) -> torch.Tensor:
    """Tokens ``sources`` [N] of ``tensor`` [B, H, S, D]; a view where they stand in a row."""
    if len(sources) == sources[-1] - sources[0] + 1 and bool((np.diff(sources) == 1).all()):
        return tensor[:, :, int(sources[0]) : int(sources[-1]) + 1]
    return tensor[:, :, torch.from_numpy(sources).to(tensor.device)]
