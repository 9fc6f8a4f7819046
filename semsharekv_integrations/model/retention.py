"""Retention: decoding goes on with a share of the prompt's KV, what the question attends to, more or less by depth."""

from __future__ import annotations

import numpy as np
import torch
from transformers import DynamicCache

from semsharekv_integrations.config import ReuseConfig
from semsharekv_integrations.errors import UnsupportedModelError
from semsharekv_integrations.kv import LayerKV, Mask, Rendered, TokenIds
from semsharekv_integrations.model.adapter import ModelAdapter
from semsharekv_integrations.model.gathering import GatheredCache
from semsharekv_integrations.model.layers import make_cache
from semsharekv_integrations.model.selective import SelectivePrefill
from semsharekv_integrations.model.views import list_windows
from semsharekv_integrations.reuse.planner import list_texts, mark_question
from semsharekv_integrations.reuse.selection import (
    RELEVANT_SHARE,
    choose_relevant_tokens,
    choose_retained_tokens,
    compute_retained_shares,
    score_documents,
)


class Retainer:
    """Shortens the caches of one model: each layer keeps a share of the tokens, those the question attends to most.

    Raises ``UnsupportedModelError`` if the model has sliding windows, or attention other than ``sdpa``.
    """

    def __init__(self, adapter: ModelAdapter, selective: SelectivePrefill, rules: ReuseConfig) -> None:
        attention, name = adapter.config._attn_implementation, type(adapter.model).__name__
        if any(window is not None for window in list_windows(adapter.config)) or attention != "sdpa":
            raise UnsupportedModelError(
                f"{name} has sliding windows or attn_implementation {attention!r}; "
                f"reuse.retention_ratio needs full attention and 'sdpa'"
            )
        if not adapter.takes_positions or selective.counts_tokens or adapter.counts_slots:
            raise UnsupportedModelError(
                f"{name} counts tokens in its cache to tell where they are; reuse.retention_ratio drops some"
            )
        self._adapter = adapter
        self._selective = selective
        self._rules = rules = rules.resolve()
        self._shares = compute_retained_shares(
            len(selective.rotations), rules.retention_ratio or 1.0, rules.retention_final_share
        )

    def shorten_for(self, rendered: Rendered, cache: DynamicCache) -> DynamicCache:
        """Return what ``shorten`` does of a prompt's cache: what its question is about is kept first."""
        texts = list_texts(rendered)
        question = mark_question(rendered, self._rules.tail_tokens)
        scores = score_documents(rendered.token_ids, texts, question)
        relevant = choose_relevant_tokens(scores, texts, np.ones_like(question), RELEVANT_SHARE)
        return self.shorten(rendered.token_ids, question, relevant, cache)

    def shorten(self, token_ids: TokenIds, question: Mask, relevant: Mask, cache: DynamicCache) -> DynamicCache:
        """Return a new, shorter cache; ``cache``, that of the whole prompt ``token_ids`` [T], stays as it is.

        Runs the ``question`` [T] tokens again to see what they attend to; ``relevant`` [T] tokens are kept first.
        """
        whole = GatheredCache(self._adapter.read_layers(cache))
        for layer in whole.layers:
            layer.frozen = True
        attended = self._selective.watch_attention(token_ids, question, whole, np.zeros_like(question))
        layers = []
        for layer, weights, share in zip(cache.layers, attended, self._shares, strict=True):
            first = torch.from_numpy(relevant).to(weights.device)
            kept = choose_retained_tokens(weights, share, first).to(layer.keys.device)
            layers.append(LayerKV(layer.keys[:, :, kept], layer.values[:, :, kept]))
        return make_cache(layers)
