"""A forward pass over some rows of a prompt, narrowing from layer to layer, under the model's own forward.

Hooks before the decoder layers replace hidden states, positions and mask by those of the rows that are still active.
They act only on passes that carry the pass's own cache, and are gone when it ends.

A prompt's KV gathered from stored references into its own order, in a cache that takes up what is computed.

The paper's rearranged cache (arXiv 2509.24832, section 3), with keys turned to where they stand now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from semsharekv_integrations.kv import LayerKV, Reference, Rotation, take_first_tokens, turn
from semsharekv_integrations.model.attention import blocks_of, use_blocks
from semsharekv_integrations.reuse.plan import PROJECTION_SHARE, Borrowing, ReusePlan

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


class _Taken(NamedTuple):
    """What is taken from one reference: its tokens ``sources`` [N] become tokens ``targets`` [N] of the prompt."""

    reference: Reference
    sources: torch.Tensor
    targets: torch.Tensor


class _Gatherer:
    """Gathers layer after layer; the angles are the same for all layers of one rotation."""

    def __init__(self, plan: ReusePlan) -> None:
        self._plan = plan
        groups: dict[int, list[Borrowing]] = {}
        for borrowing in plan.borrowings:
            groups.setdefault(id(borrowing.reference), []).append(borrowing)
        self._taken = [_taken(group) for group in groups.values()]
        prefix = plan.prefix
        self._prefixes = take_first_tokens(prefix.reference.layers, prefix.num_tokens) if prefix else None
        self._angles: dict[tuple[int, int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def layer(self, index: int, rotation: Rotation | None) -> LayerKV:
        stored = [taken.reference.layers[index] for taken in self._taken]
        prefix = next(self._prefixes) if self._prefixes else LayerKV(*(tensor[:, :, :0] for tensor in stored[0]))
        keys = self._gathered([layer.keys for layer in stored], prefix.keys, rotation)
        return LayerKV(keys, self._gathered([layer.values for layer in stored], prefix.values, None))

    def _gathered(
        self, stored: Sequence[torch.Tensor], prefix: torch.Tensor, rotation: Rotation | None
    ) -> torch.Tensor:
        """Keys or values [B, H, T, D] of one layer from those of each reference [B, H, S, D]."""
        like = stored[0]
        whole = like.new_zeros((*like.shape[:2], len(self._plan.token_ids), like.shape[3]))
        whole[:, :, : prefix.shape[2]] = prefix
        for place, (_, sources, targets) in enumerate(self._taken):
            part = stored[place].index_select(2, sources.to(whole.device))
            if rotation is not None and self._plan.rotate_keys and not torch.equal(sources, targets):
                part = turn(part, *self._angles_of(place, rotation, whole.device), rotation.interleaved)
            whole.index_copy_(2, targets.to(whole.device), part)
        return whole

    def _angles_of(self, place: int, rotation: Rotation, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        known = (place, id(rotation), device)
        if known not in self._angles:
            taken = self._taken[place]
            self._angles[known] = rotation.angles((taken.targets - taken.sources).to(device))
        return self._angles[known]


def _taken(borrowings: Sequence[Borrowing]) -> _Taken:
    """All borrowings from one reference together."""
    sources, targets = (np.concatenate([getattr(b, name) for b in borrowings]) for name in ("sources", "targets"))
    return _Taken(borrowings[0].reference, torch.from_numpy(sources), torch.from_numpy(targets))
