"""How a model goes on behind stored tokens: what a few short passes tell, before anything is reused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from semsharekv_integrations.errors import UnsupportedModelError
from semsharekv_integrations.kv import PrefixMatch, Reference, TokenIds
from semsharekv_integrations.model.layers import CHOSEN, shrink_windows

if TYPE_CHECKING:
    from semsharekv_integrations.model.adapter import ModelAdapter

_PROBE_WINDOW = 5  # windows that are as short as this hide nothing from the probe
_CHOSEN_PROBES, _LONG_PROBE = 4, 48


class Continuation(NamedTuple):
    """How a model goes on behind stored tokens.

    Attributes:
        keeps_states: whether its layers keep more than KV per token, so that it goes on from checkpoints alone.
        in_blocks: whether attention may be computed in blocks.
        one_by_one: whether a pass behind others takes one token alone.
    """

    keeps_states: bool = False
    in_blocks: bool = True
    one_by_one: bool = False


_CONTINUATIONS = (  # the first that gives a full prefill's logits is the model's
    Continuation(),
    Continuation(in_blocks=False),
    Continuation(keeps_states=True),
    Continuation(keeps_states=True, in_blocks=False),
    Continuation(keeps_states=True, in_blocks=False, one_by_one=True),
)


def find_continuation(adapter: ModelAdapter, off_alone: str | None) -> Continuation:
    """Return how a model goes on from a stored prefix, and set the adapter's ``way`` to it.

    Raises:
        UnsupportedModelError: if it cannot; ``off_alone`` says why, where that is known before.
    """
    name, why = type(adapter.model).__name__, off_alone
    if not adapter.model._supports_default_dynamic_cache():
        why = "keeps a cache of a class of its own"
    if why is not None:
        raise UnsupportedModelError(f"{name} {why}; use mode='off'")
    reason, failed = "gives other logits behind a reused prefix than in a full prefill", list[Exception]()
    with adapter.lock(), shrink_windows(adapter.model, _PROBE_WINDOW):
        for adapter.way in _CONTINUATIONS:
            try:
                if all(_continues(adapter, ids) for ids in _list_probes(adapter)):
                    return adapter.way
            except torch.OutOfMemoryError:
                raise
            except (TypeError, AttributeError, ValueError, RuntimeError, LookupError) as error:
                failed.append(error)  # the model does not take such a cache
    if len(failed) == len(_CONTINUATIONS):
        reason = f"fails with a cache ({failed[-1]})"
    raise UnsupportedModelError(f"{name} {reason}; use mode='off'")


def _list_probes(adapter: ModelAdapter) -> list[TokenIds]:
    """Return token ids [N] to try; several more where an indexer chooses tokens, as ties are broken by chance."""
    random = np.random.default_rng(0)
    more = _CHOSEN_PROBES if hasattr(adapter.config, CHOSEN) else 0
    return [adapter.probe_ids(), *(random.integers(adapter.config.vocab_size, size=_LONG_PROBE) for _ in range(more))]


def _continues(adapter: ModelAdapter, ids: TokenIds) -> bool:
    """Return True if ``ids`` [N] in two pieces give the logits of one piece, with another text computed between.

    So must one token by itself in the cache that transformers would use: else no prefill is like decoding.
    """
    logits = adapter.prefill(ids).logits
    for cut in (len(ids) // 2, len(ids) - 1):
        cache = adapter.prefill(ids[:cut]).cache
        if not cache.layers or not (adapter.way.keeps_states or has_kv_alone(cache)):
            return False
        states = adapter.read_states(cache) or {}
        stored = Reference("probe", "probe", ids[:cut], adapter.read_layers(cache), checkpoints=states)
        if cut < len(ids) - 1:
            adapter.prefill(ids[::-1].copy())
        if not adapter.is_close(adapter.prefill(ids, PrefixMatch(stored, cut)).logits, logits):
            return False
    usual = DynamicCache(config=adapter.model.config)
    return has_kv_alone(usual) or adapter.is_close(_probe_step(adapter, ids, usual), logits)


def _probe_step(adapter: ModelAdapter, ids: TokenIds, cache: DynamicCache) -> Tensor:
    """Return logits [B, V] of the last of ``ids`` [N], computed by itself behind the others, in an empty cache."""
    adapter.forward(ids[:-1], cache, 0)
    return adapter.decode_step(torch.from_numpy(ids)[None], cache)


def has_kv_alone(cache: DynamicCache) -> bool:
    """Return whether each layer of ``cache`` keeps the KV of every token, and nothing else."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def cut_back(cache: DynamicCache, lengths: int | Sequence[int]) -> None:
    """Drop what ``cache``, which has KV alone, holds behind so many tokens, in all layers or in each its own.

    It goes from memory at the next pass.
    """
    each = [lengths] * len(cache.layers) if isinstance(lengths, int) else lengths
    for layer, length in zip(cache.layers, each, strict=True):
        if layer.keys.shape[2] > length:
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
