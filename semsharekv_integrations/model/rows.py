"""A forward pass over some rows of a prompt, narrowing from layer to layer, under the model's own forward.

Hooks before the decoder layers replace hidden states, positions and mask by those of the rows that are still active.
They act only on passes that carry the pass's own cache, and are gone when it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from semsharekv_integrations.core.plan import PROJECTION_SHARE
from semsharekv_integrations.kv import LayerKV
from semsharekv_integrations.model.attention import blocks_of, use_blocks
from semsharekv_integrations.model.gathered import GatheredCache, Measured

Measure = Callable[[], LayerKV]
Choose = Callable[[int, torch.Tensor, Measure], torch.Tensor]


class LayerView(NamedTuple):
    """The decoder layers of a model, and how many positions back each one sees (None: all)."""

    modules: Sequence[nn.Module]
    windows: Sequence[int | None]


class RowPass:
    """One pass.

    Args:
        view: the decoder layers.
        cache: KV of all tokens, which takes up what is computed.
        rows: [N] positions of the tokens that go in, ascending.
        choose: from layer, active rows, and a way to have the layer's fresh keys and values for them, to the rows
            that stay, a subset. Asked once for each layer.
        hidden: [T] tokens that have no KV yet and must not be seen, or None.
        dtype: of the mask.
    """

    def __init__(
        self,
        view: LayerView,
        cache: GatheredCache,
        rows: torch.Tensor,
        choose: Choose,
        dtype: torch.dtype,
        hidden: torch.Tensor | None = None,
    ) -> None:
        self._view = view
        self._cache = cache
        self._first = self._rows = rows
        self._choose = choose
        self._dtype = dtype
        self._hidden = hidden
        self._mask = self.first_mask = self._mask_of(rows, None)
        self._window: int | None = None
        self.row_layers = 0.0

    @property
    def rows(self) -> torch.Tensor:
        """The rows that are active now."""
        return self._rows

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Hooks in place."""
        handles = [
            module.register_forward_pre_hook(partial(self._enter, index), with_kwargs=True)
            for index, module in enumerate(self._view.modules)
        ]
        use_blocks(blocks_of(self._rows))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self._cache.layers[index]
        if layer.measures or all(value is not self._cache for value in (*args, *kwargs.values())):
            return None
        rows = self._choose(index, self._rows, partial(self._measure, index, module, args, kwargs))
        current = self._inputs(index, args, kwargs, rows)
        self._rows = layer.rows = rows
        self.row_layers += len(rows)
        return current

    def _measure(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerKV:
        """The layer's fresh keys and values [B, H, N, D] of its rows, by its own code, stopped once they are there."""
        layer = self._cache.layers[index]
        self.row_layers += PROJECTION_SHARE * len(self._rows)
        layer.measures = True
        try:
            narrowed, changed = self._inputs(index, args, kwargs, self._rows)
            module(*narrowed, **changed)
        except Measured as measured:
            return measured.layer
        finally:
            layer.measures = False
        raise AssertionError("the layer did not update its cache")

    def _inputs(
        self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], rows: torch.Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The layer's arguments for ``rows`` alone; hidden states come for the rows before, the rest for the first."""
        states = args[0]
        if len(rows) < states.shape[1]:
            states = _picked(states, torch.searchsorted(self._rows, rows))
        changed = dict(kwargs, attention_mask=self._mask_for(rows, self._view.windows[index]).to(states.device))
        if len(rows) < len(self._first):
            kept = torch.searchsorted(self._first, rows)
            changed["position_ids"] = _picked(kwargs["position_ids"], kept)
            changed["position_embeddings"] = tuple(_picked(part, kept) for part in kwargs["position_embeddings"])
        return (states, *args[1:]), changed

    def _mask_for(self, rows: torch.Tensor, window: int | None) -> torch.Tensor:
        """The mask [1, 1, N, T], kept while rows and window stay."""
        if len(rows) != self._mask.shape[2] or window != self._window:
            self._mask, self._window = self._mask_of(rows, window), window
            use_blocks(blocks_of(rows))
        return self._mask

    def _mask_of(self, rows: torch.Tensor, window: int | None) -> torch.Tensor:
        keys = torch.arange(self._cache.layers[0].keys.shape[2], device=rows.device)
        unseen = keys > rows[:, None]  # [N, T]
        if window is not None:
            unseen |= keys <= rows[:, None] - window
        if self._hidden is not None:
            unseen |= self._hidden
        mask = torch.zeros(unseen.shape, dtype=self._dtype, device=rows.device)
        return mask.masked_fill_(unseen, torch.finfo(self._dtype).min)[None, None]


def _picked(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Entries ``indices`` [N] of ``tensor`` [B, T, ...], wherever both are."""
    return tensor[:, indices.to(tensor.device)]
