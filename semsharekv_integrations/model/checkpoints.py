"""The caches of models that keep more than KV per token: recurrent states, windows of KV, the keys of an indexer.

Such a state sums up all tokens before it, so nothing can be cut off it again. A ``StateCache`` copies the states at
checkpoints while it grows, and a prompt that begins alike goes on from one of these. Layers with KV per token keep it
as others do. Knows nothing about particular models: a state is whatever a layer of transformers' cache has in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from semsharekv_integrations.kv import LayerKV, State
from semsharekv_integrations.store.homes import Homes

_KV = ("keys", "values")


class StateCache(DynamicCache):
    """The cache that transformers makes for a model, with the states it had on the way.

    Attributes:
        num_tokens: how many tokens it has seen; whoever runs the model counts them.
        checkpoints: copies of the states, by the number of tokens before them.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.num_tokens = 0
        self.checkpoints: dict[int, State] = {}

    def keep_state(self) -> None:
        """Make a checkpoint here. Costs a copy of the states, not of the KV per token."""
        self.checkpoints[self.num_tokens] = _copy_state(self.layers)

    def read_kv(self) -> tuple[LayerKV, ...]:
        """Return each layer's KV per token, not copied: [B, 0, S, 0] of a layer without."""
        return tuple(self._read_layer(layer) for layer in self.layers)

    def _read_layer(self, layer: Any) -> LayerKV:
        if _grows(layer) and layer.is_initialized:
            return LayerKV(layer.keys, layer.values)
        return LayerKV(*(torch.empty(1, 0, self.num_tokens, 0) for _ in _KV))

    @classmethod
    def restore(
        cls, config: PreTrainedConfig, layers: Sequence[LayerKV], state: State, homes: Homes | torch.device
    ) -> StateCache:
        """Return a new cache of the tokens [S] of ``layers``, as it was behind the last one.

        ``state`` is copied to ``homes``, wherever the store kept it.
        """
        cache, homes = cls(config), Homes.of(homes)
        for layer, kv in zip(cache.layers, layers, strict=True):
            if kv.keys.shape[1]:
                DynamicLayer.lazy_initialization(layer, *kv)
                layer.keys, layer.values = kv
            cache.num_tokens = kv.keys.shape[2]
        for name, tensor in state.items():
            index, attribute, *key = name.split("/")
            moved = tensor.to(homes.get(name), copy=True) if tensor.ndim else tensor
            _set(cache.layers[int(index)], attribute, key, moved)
        return cache


class OwnCache(DynamicCache):
    """Holds, in mode ``off``, the cache of a class of its own that a model makes in its first pass."""

    own: Any = None


def list_tensors(layer: object) -> Iterator[tuple[str, Tensor]]:
    """Yield what a layer of a cache keeps, by name: KV, states, and plain numbers as tensors without dimensions."""
    for name, value in vars(layer).items():
        parts = value if isinstance(value, dict) else {None: value}
        for key, part in parts.items() if not name.startswith("_") else ():
            if isinstance(part, (Tensor, int)):
                tensor = part if isinstance(part, Tensor) else torch.tensor(part)
                yield name if key is None else f"{name}/{key}", tensor


def _grows(layer: object) -> bool:
    """Return whether a layer of a cache keeps keys and values of every token."""
    return isinstance(layer, DynamicLayer) and not layer.is_sliding


def _copy_state(layers: Sequence[object]) -> State:
    """Return copies of all that ``layers`` keep, but for KV per token."""
    return {
        f"{index}/{name}": tensor.clone()
        for index, layer in enumerate(layers)
        for name, tensor in list_tensors(layer)
        if not (_grows(layer) and name in _KV)
    }


def _set(layer: Any, name: str, key: Sequence[str], tensor: Tensor) -> None:
    """Set what ``list_tensors`` named so to ``tensor``; one without dimensions is a plain number again."""
    found = vars(layer)[name]
    place = next((each for each in found if [str(each)] == key), None) if key else None
    before = found[place] if key else found
    value: Any = tensor
    if not tensor.ndim:
        value = bool(tensor) if isinstance(before, bool) else int(tensor)
    elif getattr(layer, "device", None) is None:
        layer.dtype, layer.device = tensor.dtype, tensor.device
    if key:
        found[place] = value
    else:
        setattr(layer, name, value)
