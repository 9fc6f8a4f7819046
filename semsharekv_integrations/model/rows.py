"""A forward pass over some rows of a prompt, and the cache that it runs on.

Hooks before the decoder layers replace hidden states, positions and mask by those of the rows that are still active.
They act only on passes with the pass's own cache (``gathering``), and are gone when it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from semsharekv_integrations.kv import LayerKV
from semsharekv_integrations.model.attention import blocks_of, use_blocks
from semsharekv_integrations.model.gathering import GatheredCache, GatheredLayer, Measured
from semsharekv_integrations.model.views import MASK, LayerView, Window, find_unseen
from semsharekv_integrations.reuse.plan import PROJECTION_SHARE

Measure = Callable[[], tuple[GatheredLayer, LayerKV]]
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

    def _measure(
        self, index: int, module: nn.Module, states: Tensor, given: dict[str, Any]
    ) -> tuple[GatheredLayer, LayerKV]:
        """Run the layer up to its first cache update; return the layer of the cache, which stays, and fresh KV."""
        layer = self.cache.layers[self.view.places[index][0]]
        self.row_layers += PROJECTION_SHARE * len(self.rows)
        layer.measures = self._measuring = True
        try:
            narrowed, changed = self._narrow(index, states, given, self.rows)
            module(*narrowed, **changed)
        except Measured as measured:
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
