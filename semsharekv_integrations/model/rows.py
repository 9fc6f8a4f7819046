"""A forward pass over some rows of a prompt.

Hooks before the decoder layers replace hidden states, positions and mask by those of the rows that are still active.
They act only on passes with the pass's own cache, and are gone when it ends. Positions of rows are known on the host,
so that it never waits for the device to learn them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from semsharekv_integrations.kv import LayerKV
from semsharekv_integrations.model.attention import use_sight, watch_by_sight
from semsharekv_integrations.model.gathering import GatheredCache, GatheredLayer, Measured
from semsharekv_integrations.model.sight import Rows, Sight
from semsharekv_integrations.model.transfers import send, send_together
from semsharekv_integrations.model.views import MASK, LayerView, Window
from semsharekv_integrations.reuse.plan import PROJECTION_SHARE

Positions = NDArray[np.int64]


class Fresh(NamedTuple):
    """Keys and values [B, H, N, D] that a layer computed for ``rows`` [N], and the ``gathered`` ones, in place yet."""

    kv: LayerKV
    rows: Tensor
    gathered: GatheredLayer


Measure = Callable[[], Fresh]
Choose = Callable[[int, Positions, Measure], Positions]


def keep_all(index: int, rows: Positions, measure: Measure) -> Positions:
    """Choose all rows for every layer."""
    return rows


@dataclass(eq=False)
class RowPass:
    """One forward pass over some rows, run inside ``install``.

    Attributes:
        cache: KV of all tokens; what is computed replaces KV in it.
        positions: [N] of the tokens that go in, ascending; later those that are still active.
        choose: called once for each layer with its index, the active rows, and a function that computes fresh keys and
            values for them, for layers that keep any; returns the rows that stay, a subset.
        dtype: of masks.
        device: of the model's input.
        hidden: [T] tokens that have no KV yet and must not be seen, or None.
        stop: how many first layers run; the pass ends with ``Stopped`` behind the last of them. None for all, and head.
        first: the rows that go in.
        row_layers: how many rows were computed, summed over layers; measuring a row counts as a share of one.
    """

    view: LayerView
    cache: GatheredCache
    positions: Positions
    choose: Choose
    dtype: torch.dtype
    device: torch.device
    hidden: NDArray[np.bool_] | None = None
    stop: int | None = None
    first: Rows = field(init=False)
    row_layers: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.first = Rows(self.positions, send(self.positions, self.device))
        self._hidden = None if self.hidden is None else send(self.hidden, self.device)
        self._active = _Active(self.first, None)
        self._placeholders: dict[torch.device, Tensor] = {}
        self._attending = 0  # layers that must have attended by positions
        self._sights: list[Sight] = []
        self._measuring = False

    @contextmanager
    def install(self) -> Iterator[None]:
        """Have the model's layers run this pass's rows inside.

        Raises:
            RuntimeError: if attention was to go by positions, and layers do not call this package's.
        """
        handles = [
            module.register_forward_pre_hook(partial(self._enter, index), with_kwargs=True)
            for index, module in enumerate(self.view.modules)
        ]
        if self.stop is not None:
            handles.append(self.view.modules[self.stop - 1].register_forward_hook(self._leave, with_kwargs=True))
        for layer in self.cache.layers:
            layer.rows = self.first.on_device[:0]
        try:
            with watch_by_sight():
                yield
        finally:
            for handle in handles:
                handle.remove()
        if sum(sight.uses for sight in self._sights) < self._attending:
            raise RuntimeError("layers compute attention by code of their own")

    @property
    def given_mask(self) -> Tensor:
        """The mask that the model is given: that of its first rows, or of all tokens [1, T] if it takes no other."""
        if self.view.takes_lengths:
            return torch.ones((1, self._num_tokens), dtype=torch.long, device=self.device)
        return self._show(self._find_sight(self._active, None), self.device)

    @property
    def _num_tokens(self) -> int:
        return self.cache.layers[0].keys.shape[2]

    def _enter(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Choose the rows of layer ``index``, note and count them, and return its arguments; None for other passes."""
        if self._measuring or all(value is not self.cache for value in (*args, *kwargs.values())):
            return None
        given = self.view.name_arguments(index, args, kwargs)
        states = given.pop(self.view.parameters[index][0])  # hidden states come first
        chosen = self.choose(index, self.positions, partial(self._measure, index, module, states, given))
        before, self._active = self._active, self._narrow_to(chosen)
        current = self._narrow(index, states, given, before)
        self.positions = self._active.rows.positions
        for place in self.view.places[index]:
            self.cache.layers[place].rows = self._active.rows.on_device
        self.row_layers += len(self.positions)
        self._attending += self.view.by_positions and bool(self.view.places[index])
        return current

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """End the pass behind its last layer; not other passes."""
        if any(value is self.cache for value in (*args, *kwargs.values())):
            raise Stopped

    def _narrow_to(self, chosen: Positions) -> _Active:
        """Return the rows at ``chosen`` [N], a subset of the active ones; what is new goes to the device at once."""
        if len(chosen) == len(self.positions):
            return self._active
        places = (np.searchsorted(known, chosen) for known in (self.first.positions, self.positions))
        on_device, first, now = send_together([chosen, *places], self.device)
        return _Active(Rows(chosen, on_device), first, now)

    def _measure(self, index: int, module: nn.Module, states: Tensor, given: dict[str, Any]) -> Fresh:
        """Run the layer up to its first cache update, and return what that would have written."""
        layer = self.cache.layers[self.view.places[index][0]]
        self.row_layers += PROJECTION_SHARE * len(self.positions)
        layer.measures = self._measuring = True
        try:
            narrowed, changed = self._narrow(index, states, given, self._active)
            module(*narrowed, **changed)
        except Measured as measured:
            return Fresh(LayerKV(*measured.args), self._active.rows.on_device, layer)
        finally:
            layer.measures = self._measuring = False
        raise AssertionError("the layer did not update its cache")

    def _narrow(
        self, index: int, states: Tensor, given: dict[str, Any], before: _Active
    ) -> tuple[tuple[Tensor], dict[str, Any]]:
        """Return the layer's arguments for the active rows: hidden states [..., N, hidden], and what else goes by row.

        ``before`` are the rows of the layer before.
        """
        active, num_first = self._active, len(self.first)
        num_now = len(before.rows) if active is not before else None
        if num_now is not None and active.now is not None:
            states = _pick(states, active.now, states.ndim - 2)
        changed = {name: active.narrow(value, num_first, num_now) for name, value in given.items() if name != MASK}
        changed[MASK] = self._fit_mask(index, given.get(MASK), states.device)
        return (states,), changed

    def _fit_mask(self, index: int, built: Tensor | None, device: torch.device) -> Tensor:
        """Return the mask for the active rows in layer ``index``, as it takes masks; ``built`` is the model's own."""
        sight = self._find_sight(self._active, self.view.windows[index])
        use_sight(sight, self.view.by_positions)
        mask = self._show(sight, device)
        if self.view.hides:
            return mask < 0
        if self.view.takes_lengths and built is not None and built.ndim == 4 and built.shape[1] > 1:  # with biases
            return mask + (built if self._active.first is None else _pick(built, self._active.first, 2))
        return mask

    def _find_sight(self, active: _Active, window: Window | None) -> Sight:
        """Return what the ``active`` rows see in layers with ``window``."""
        if window not in active.sights:
            active.sights[window] = Sight(active.rows, self._num_tokens, window, self._hidden)
            self._sights.append(active.sights[window])
        return active.sights[window]

    def _show(self, sight: Sight, device: torch.device) -> Tensor:
        """Return the mask of ``sight``, or where positions decide one of a single element, which hides nothing."""
        if not self.view.by_positions:
            return sight.get_whole_mask(self.dtype, device)
        if device not in self._placeholders:
            self._placeholders[device] = torch.zeros((1, 1, 1, 1), dtype=self.dtype, device=device)
        return self._placeholders[device]


class Stopped(Exception):
    """Ends a pass behind the last layer that is to run."""


class _Active:
    """Rows that layers run, and what came for other rows and was narrowed to them.

    Attributes:
        first: [N] their places among the first rows; None if they are those.
        now: [N] their places among the rows active before.
        sights: what they see, by window.
    """

    def __init__(self, rows: Rows, first: Tensor | None, now: Tensor | None = None) -> None:
        self.rows, self.first, self.now = rows, first, now
        self.sights: dict[Window | None, Sight] = {}
        self._known: dict[int, tuple[Tensor, Tensor]] = {}  # by id, with the tensor whose it is

    def narrow(self, value: Any, num_first: int, num_now: int | None) -> Any:
        """Return ``value`` for these rows: a tensor that goes by row in ``_find_row_dim``, or a tuple of such.

        It came for ``num_first`` rows, or for ``num_now``, those before, if these are fewer.
        """
        if isinstance(value, tuple | list):
            return type(value)(self.narrow(part, num_first, num_now) for part in value)
        dim = _find_row_dim(value) if isinstance(value, Tensor) else None
        if dim is None:
            return value
        if value.shape[dim] == num_first:
            return value if self.first is None else self._pick_first(value, dim)
        if value.shape[dim] == num_now and self.now is not None:
            return _pick(value, self.now, dim)
        return value

    def _pick_first(self, value: Tensor, dim: int) -> Tensor:
        """Return the entries of ``value``, which layers may share, for these rows."""
        assert self.first is not None, "they are not the first rows"
        known = self._known.get(id(value))
        if known is None:
            known = self._known[id(value)] = value, _pick(value, self.first, dim)
        return known[1]


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
