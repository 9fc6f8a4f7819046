"""What a few short passes tell about a model: its layers, and how their keys move. Run once, before any reuse.

A probe's KV is made at two places. A model that is told positions computes it there; one that is not (ALiBi) computes
rows behind tokens that they do not see. Windows are narrowed meanwhile, since real ones are longer than any probe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from semsharekv_integrations.errors import UnsupportedModelError
from semsharekv_integrations.kv import LayerKV, LayerRotation, TokenIds
from semsharekv_integrations.model.adapter import ModelAdapter
from semsharekv_integrations.model.gathering import GatheredCache
from semsharekv_integrations.model.layers import shrink_windows
from semsharekv_integrations.model.rotations import PROBE_SHIFT, find_rotations
from semsharekv_integrations.model.rows import RowPass, keep_all
from semsharekv_integrations.model.views import LayerView, list_windows, view_layers, watch_layers

T = TypeVar("T")
_NARROW = 5  # tokens
# What a pass through a model raises that does not fit it
MISFITS = (TypeError, AttributeError, ValueError, RuntimeError, LookupError, AssertionError)


class Probe(NamedTuple):
    """What was found.

    Attributes:
        token_ids: [N] of the probe.
        moved: its KV at the other place: [B, H, PROBE_SHIFT + N, D], of which the first tokens are no part.
        rotations: of each layer of the cache.
    """

    view: LayerView
    token_ids: TokenIds
    moved: tuple[LayerKV, ...]
    rotations: tuple[LayerRotation, ...]


@contextmanager
def short_windows(adapter: ModelAdapter) -> Iterator[None]:
    """Have the model's windows be shorter than a probe inside, where nobody else runs the model meanwhile."""
    with adapter.lock(), shrink_windows(adapter.model, _NARROW):
        yield


def probe_model(adapter: ModelAdapter) -> Probe:
    """Find layers and rotations; call inside of ``short_windows``.

    Raises:
        UnsupportedModelError: if keys cannot be moved.
    """
    probe, name = adapter.probe_ids(), type(adapter.model).__name__
    with watch_layers(adapter.model) as calls:
        here = adapter.compute_kv(probe, 0)
    view = view_layers(calls, list_windows(adapter.config), name)
    if adapter.takes_positions:
        there = adapter.compute_kv(probe, PROBE_SHIFT)
        moved = tuple(LayerKV(*(_pad(tensor) for tensor in layer)) for layer in there)
    else:
        view, moved = _compute_rows(adapter, view, probe, here)
        there = tuple(LayerKV(*(tensor[:, :, PROBE_SHIFT:] for tensor in layer)) for layer in moved)
    try:
        rotations = find_rotations(adapter.model, adapter.config, here, there, PROBE_SHIFT)
    except UnsupportedModelError as error:
        untold = "" if adapter.takes_positions else " (its forward takes no position_ids)"
        raise UnsupportedModelError(f"{name}{untold}: {error}") from None
    return Probe(view, probe, moved, rotations)


def _pad(tensor: Tensor) -> Tensor:
    """Return ``tensor`` [B, H, N, D] behind ``PROBE_SHIFT`` tokens of zeros."""
    return torch.cat([tensor.new_zeros((*tensor.shape[:2], PROBE_SHIFT, tensor.shape[3])), tensor], dim=2)


def _compute_rows(
    adapter: ModelAdapter, view: LayerView, probe: TokenIds, here: Sequence[LayerKV]
) -> tuple[LayerView, tuple[LayerKV, ...]]:
    """Compute the probe as rows behind tokens that they do not see; return the view that suits, and all KV."""

    def compute(view: LayerView) -> tuple[LayerKV, ...]:
        cache = GatheredCache([LayerKV(*map(_pad, layer)) for layer in here])
        rows = np.arange(PROBE_SHIFT, PROBE_SHIFT + len(probe))
        hidden = np.arange(PROBE_SHIFT + len(probe)) < PROBE_SHIFT
        ahead = RowPass(view, cache, rows, keep_all, adapter.dtype, adapter.device, hidden)
        ids = torch.cat([torch.zeros(PROBE_SHIFT, dtype=torch.int64), torch.from_numpy(probe)]).numpy()
        with torch.inference_mode(), adapter.attention(), ahead.install():
            adapter.forward_rows(ids, ahead.first, cache, ahead.given_mask)
        return adapter.read_layers(cache)

    return try_views(view, compute, type(adapter.model).__name__)


def try_views(view: LayerView, run: Callable[[LayerView], T], name: str) -> tuple[LayerView, T]:
    """Run with the view as it is, then with masks of all rows, of tokens alone, and attention watched by operations.

    Returns:
        The first view that suits the model, and what came of it.

    Raises:
        UnsupportedModelError: if none does, naming the model by ``name``, and why the first one does not.
    """
    first: Exception | None = None
    choices = product((view.takes_lengths, True), (view.by_operations, True))
    plain = [
        replace(view, takes_lengths=takes_lengths, by_operations=by_operations, by_positions=False)
        for takes_lengths, by_operations in choices
    ]
    for tried in [view, *plain] if view.by_positions else plain:
        try:
            return tried, run(tried)
        except torch.OutOfMemoryError:
            raise
        except MISFITS as error:
            first = first or error
    raise UnsupportedModelError(f"{name} cannot compute some rows alone ({first}); use mode='exact'") from first
