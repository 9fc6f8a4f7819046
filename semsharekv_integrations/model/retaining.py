"""Retention carried out: after prefill, each layer of the cache keeps only what the end of the prompt attends to."""

from __future__ import annotations

import numpy as np

from semsharekv_integrations.core.plan import ReusePlan
from semsharekv_integrations.core.retention import retained_shares, retained_tokens
from semsharekv_integrations.errors import UnsupportedModelError
from semsharekv_integrations.kv import LayerKV
from semsharekv_integrations.model.adapter import ModelAdapter, Prefill
from semsharekv_integrations.model.gathered import GatheredCache
from semsharekv_integrations.model.selective import SelectivePrefill

LONGEST_TAIL_TOKENS = 128  # of the prompt, whose attention is looked at


class Retainer:
    """Shortens caches of one model.

    Args:
        adapter: the model.
        selective: sees what tokens attend to.
        ratio: share of the KV kept, averaged over layers.

    Raises:
        UnsupportedModelError: if layers with caches of different lengths cannot be decoded from.
    """

    def __init__(self, adapter: ModelAdapter, selective: SelectivePrefill, ratio: float) -> None:
        if any(window is not None for window in selective.windows) or adapter.config._attn_implementation != "sdpa":
            raise UnsupportedModelError(
                f"{type(adapter.model).__name__} has sliding windows or attn_implementation "
                f"{adapter.config._attn_implementation!r}; reuse.retention_ratio needs full attention and 'sdpa'"
            )
        self._adapter = adapter
        self._selective = selective
        self._shares = retained_shares(selective.num_layers, ratio)

    def shortened(self, plan: ReusePlan, prefill: Prefill) -> Prefill:
        """The prefill of a plan with what is kept of its cache; the question's attention decides. The cache stays."""
        cache, tail = prefill.cache, plan.question.copy()
        tail[:-LONGEST_TAIL_TOKENS] = False
        whole = GatheredCache([LayerKV(layer.keys, layer.values) for layer in cache.layers])
        for layer in whole.layers:
            layer.frozen = True
        attended = self._selective.attention_of(plan.token_ids, tail, whole, np.zeros_like(tail))
        layers = []
        for layer, scores, share in zip(cache.layers, attended, self._shares, strict=True):
            kept = retained_tokens(scores, share).to(layer.keys.device)
            layers.append(LayerKV(layer.keys[:, :, kept], layer.values[:, :, kept]))
        return Prefill(prefill.logits, GatheredCache(layers).finished())
