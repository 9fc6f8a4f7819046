"""A forward pass over some rows of a prompt, and the cache that it runs on.

Hooks before the decoder layers replace hidden states, positions and mask by those of the rows that are still active.
They act only on passes with the pass's own cache, and are gone when it ends. That cache is the paper's (arXiv
2509.24832, section 3): KV of stored references in the prompt's order, keys turned to their place; it takes up new KV.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from semsharekv_integrations.kv import LayerKV, LayerRotation, Rotation, take_first_tokens
from semsharekv_integrations.model.attention import blocks_of, use_blocks
from semsharekv_integrations.model.layers import fill_layer
from semsharekv_integrations.model.views import MASK, LayerView, Window, find_unseen
from semsharekv_integrations.reuse.plan import PROJECTION_SHARE, Borrowing, ReusePlan

Measured = tuple["GatheredLayer", LayerKV]
Measure = Callable[[], Measured]
Choose = Callable[[int, Tensor, Measure], Tensor]


@dataclass(eq=False)
class RowPass:
    """One forward pass over some rows, run inside ``install``. ``first_mask`` is the mask for its first rows.

    Attributes:
        cache: KV of all tokens; what is computed replaces KV in it.
        rows: [N] positions of the tokens that go in, ascending; later those that are still active.
        choose: called once for each layer with its index, the active rows, and a function that computes fresh keys and
            values [B, H, N, D] for them, for layers that keep any; returns the rows that stay, a subset.
        hidden: [T] tokens that have no KV yet and must not be seen, or None.
        row_layers: how many rows were computed, summed over layers; measuring a row counts as a share of one.
    """

    view: LayerView
    cache: GatheredCache
    rows: Tensor
    choose: Choose
    dtype: torch.dtype
    hidden: Tensor | None = None
    row_layers: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._first = self.rows
        self._mask = self.first_mask = self._make_mask(self.rows, None)
        self._window: Window | None = None
        self._measuring = False

    @contextmanager
    def install(self) -> Iterator[None]:
        """Have the model's layers run this pass's rows inside; set the blocks of attention, which stay set after."""
        handles = [
            module.register_forward_pre_hook(partial(self._enter, index), with_kwargs=True)
            for index, module in enumerate(self.view.modules)
        ]
        use_blocks(blocks_of(self.rows))
        for layer in self.cache.layers:
            layer.rows = self.rows[:0]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def given_mask(self) -> Tensor:
        """The mask that the model is given: that of its first rows, or of all tokens [1, T] if it takes no other."""
        return (
            torch.ones_like(self.first_mask[0, 0, :1], dtype=torch.long) if self.view.takes_lengths else self.first_mask
        )

    def _enter(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Choose the rows of layer ``index``, note and count them, and return its arguments; None for other passes."""
        if self._measuring or all(value is not self.cache for value in (*args, *kwargs.values())):
            return None
        given = self.view.name_arguments(index, args, kwargs)
        states = given.pop(self.view.parameters[index][0])  # hidden states come first
        rows = self.choose(index, self.rows, partial(self._measure, index, module, states, given))
        current = self._narrow(index, states, given, rows)
        self.rows = rows
        for place in self.view.places[index]:
            self.cache.layers[place].rows = rows
        self.row_layers += len(rows)
        return current

    def _measure(self, index: int, module: nn.Module, states: Tensor, given: dict[str, Any]) -> Measured:
        """Run the layer up to its first cache update; return the layer of the cache, which stays, and fresh KV."""
        layer = self.cache.layers[self.view.places[index][0]]
        self.row_layers += PROJECTION_SHARE * len(self.rows)
        layer.measures = self._measuring = True
        try:
            narrowed, changed = self._narrow(index, states, given, self.rows)
            module(*narrowed, **changed)
        except _Measured as measured:
            return layer, LayerKV(*measured.args)
        finally:
            layer.measures = self._measuring = False
        raise AssertionError("the layer did not update its cache")

    def _narrow(
        self, index: int, states: Tensor, given: dict[str, Any], rows: Tensor
    ) -> tuple[tuple[Tensor], dict[str, Any]]:
        """Return the layer's arguments for ``rows``: hidden states [..., N, hidden], and what else goes by row."""
        kept = _Kept(torch.searchsorted(self._first, rows), len(self._first), None)
        if len(rows) < len(self.rows):
            places = torch.searchsorted(self.rows, rows)
            kept = kept._replace(now=(places, len(self.rows)))
            states = _pick(states, places, states.ndim - 2)
        changed = {name: kept.narrow(value) for name, value in given.items() if name != MASK}
        changed[MASK] = self._fit_mask(rows, index, given.get(MASK), states.device)
        return (states,), changed

    def _fit_mask(self, rows: Tensor, index: int, built: Tensor | None, device: torch.device) -> Tensor:
        """Return the mask for ``rows`` in layer ``index``, as it takes masks; ``built`` is what the model made."""
        mask = self._get_mask(rows, self.view.windows[index]).to(device)
        if self.view.hides:
            return mask < 0
        if self.view.takes_lengths and built is not None and built.ndim == 4 and built.shape[1] > 1:  # with biases
            return mask + _pick(built, torch.searchsorted(self._first, rows), 2)
        return mask

    def _get_mask(self, rows: Tensor, window: Window | None) -> Tensor:
        """Return the mask [1, 1, N, T]; make it and set the blocks anew only if window or number of rows changed."""
        if len(rows) != self._mask.shape[2] or window != self._window:
            self._mask, self._window = self._make_mask(rows, window), window
            use_blocks(blocks_of(rows))
        return self._mask

    def _make_mask(self, rows: Tensor, window: Window | None) -> Tensor:
        """Return an additive mask [1, 1, N, T]: a row sees itself and its window before, except ``hidden`` tokens."""
        unseen = find_unseen(rows, self.cache.layers[0].keys.shape[2], window)
        if self.hidden is not None:
            unseen |= self.hidden
        mask = torch.zeros(unseen.shape, dtype=self.dtype, device=rows.device)
        return mask.masked_fill_(unseen, torch.finfo(self.dtype).min)[None, None]


class _Kept(NamedTuple):
    """The rows that stay: their places [N] among the ``num_first`` first ones, and among those of now if fewer."""

    first: Tensor
    num_first: int
    now: tuple[Tensor, int] | None

    def narrow(self, value: Any) -> Any:
        """Return ``value`` with the rows that stay: a tensor that has them in ``_find_row_dim``, or a tuple of such."""
        if isinstance(value, tuple | list):
            return type(value)(self.narrow(part) for part in value)
        dim = _find_row_dim(value) if isinstance(value, Tensor) else None
        if dim is not None:
            for places, num_rows in filter(None, ((self.first, self.num_first), self.now)):
                if value.shape[dim] == num_rows:
                    return value if len(places) == num_rows else _pick(value, places, dim)
        return value


def _find_row_dim(tensor: Tensor) -> int | None:
    """Return which dimension of what a layer is given may go by row: ids [..., N], others [B, N, ...] or [N, width].

    None for what has heads: keys and values go by token.
    """
    if tensor.ndim < 2 or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.ndim - 1 if tensor.ndim else None
    if tensor.ndim == 4:  # [B, 1, N, ...]
        return 2 if tensor.shape[1] == 1 else None
    return 0 if tensor.ndim == 2 and tensor.shape[0] > 1 else 1


def _pick(tensor: Tensor, indices: Tensor, dim: int) -> Tensor:
    """Return a copy of entries ``indices`` [N] of ``tensor`` in dimension ``dim``; they may be on different devices."""
    return tensor.index_select(dim, indices.to(tensor.device))


class _Measured(Exception):
    """Stops a layer; its arguments are the layer's fresh keys and values [B, H, N, D]."""


class GatheredLayer(DynamicLayer):
    """Keys and values of all prompt tokens [B, H, T, D]; an update replaces those of ``rows``.

    Attributes:
        rows: [N] positions of the tokens that the layer computes next.
        measures: if True, an update changes nothing and raises ``_Measured``.
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
            raise _Measured(key_states, value_states)
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
