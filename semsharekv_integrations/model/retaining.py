"""Retention carried out: after prefill, each layer of the cache keeps only what the question hangs on."""

from __future__ import annotations

import numpy as np
import torch
from transformers import DynamicCache

from semsharekv_integrations.core.retention import retained_shares, retained_tokens
from semsharekv_integrations.errors import UnsupportedModelError
from semsharekv_integrations.kv import LayerKV, Mask, TokenIds
from semsharekv_integrations.model.adapter import ModelAdapter
from semsharekv_integrations.model.gathered import GatheredCache
from semsharekv_integrations.model.selective import SelectivePrefill
from semsharekv_integrations.modes import ReuseRules


class Retainer:
    """Shortens caches of one model.

    Args:
        adapter: the model.
        selective: sees what tokens attend to.
        rules: with a ``retention_ratio``.

    Raises:
        UnsupportedModelError: if layers with caches of different lengths cannot be decoded from.
    """

    def __init__(self, adapter: ModelAdapter, selective: SelectivePrefill, rules: ReuseRules) -> None:
        if any(window is not None for window in selective.windows) or adapter.config._attn_implementation != "sdpa":
            raise UnsupportedModelError(
                f"{type(adapter.model).__name__} has sliding windows or attn_implementation "
                f"{adapter.config._attn_implementation!r}; reuse.retention_ratio needs full attention and 'sdpa'"
            )
        self._adapter = adapter
        self._selective = selective
        self._shares = retained_shares(selective.num_layers, rules.retention_ratio or 1.0, rules.retention_final_share)

    def shortened(self, token_ids: TokenIds, question: Mask, relevant: Mask, cache: DynamicCache) -> DynamicCache:
        """What is kept of ``cache``, which itself stays as it is.

        Args:
            token_ids: [T] of the prompt.
            question: [T] whose attention decides.
            relevant: [T] what is kept before anything else.
            cache: of that prompt.
        """
        whole = GatheredCache([LayerKV(layer.keys, layer.values) for layer in cache.layers])
        for layer in whole.layers:
            layer.frozen = True
        attended = self._selective.attention_of(token_ids, question, whole, np.zeros_like(question))
        layers = []
        for layer, weights, share in zip(cache.layers, attended, self._shares, strict=True):
            first = torch.from_numpy(relevant).to(weights.device)
            kept = retained_tokens(weights, share, first).to(layer.keys.device)
            layers.append(LayerKV(layer.keys[:, :, kept], layer.values[:, :, kept]))
        return GatheredCache(layers).finished()
