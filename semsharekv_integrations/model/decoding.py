"""Decoding behind a prefill, token by token, and the cache that retention leaves to it.

Logits processors and stopping criteria are transformers' own: ``generate`` only prepares them and hands them back. So
sampling options mean exactly what they mean in transformers, while the prefill and the loop are ours.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from semsharekv_integrations.config import ReuseConfig, SamplingConfig
from semsharekv_integrations.errors import UnsupportedModelError
from semsharekv_integrations.kv import LayerKV, Mask, TokenIds
from semsharekv_integrations.model.adapter import ModelAdapter, Prefill
from semsharekv_integrations.model.batching import SharedDecoding
from semsharekv_integrations.model.gathering import GatheredCache
from semsharekv_integrations.model.layers import make_cache
from semsharekv_integrations.model.selective import SelectivePrefill
from semsharekv_integrations.model.views import list_windows
from semsharekv_integrations.reuse.selection import choose_retained_tokens, compute_retained_shares
from semsharekv_integrations.text.grammar import Constraint, ConstraintCriterion, ConstraintProcessor


class Decoder:
    """Chooses the tokens of one answer, one after another.

    ``decode`` sets ``cache``, the cache it works on. Once it has ended, that holds KV of all tokens but the last.

    Args:
        prompt_ids: [T]; penalties on repetition look at them.
        sampling: how tokens are chosen, ``max_new_tokens`` already within the context window.
        together: the decode steps of the engine's other calls.
    """

    cache: DynamicCache

    def __init__(
        self,
        adapter: ModelAdapter,
        prompt_ids: TokenIds,
        sampling: SamplingConfig,
        together: SharedDecoding,
        constraint: Constraint | None = None,
    ) -> None:
        self._adapter = adapter
        self._together = together
        self._constraint = constraint
        self._ids = torch.from_numpy(prompt_ids)[None].to(adapter.device)  # [B, T]
        self._greedy = sampling.temperature == 0
        self._process, self._criteria = self._prepare(sampling)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed  # torch's own needs a file handle
        self._random = torch.Generator(device=adapter.device).manual_seed(seed)

    def decode(
        self, prefill: Prefill, see: Callable[[Tensor], None] | None = None
    ) -> Generator[tuple[int, bool], None, None]:
        """Yield each new token and whether it is the last one. Closing the generator, or an error, ends the call.

        ``see`` gets the model's logits [B, V] before each token is chosen. After the first, ``cache`` may be replaced.
        """
        self.cache, logits = prefill.cache, prefill.logits
        row = self._together.join()
        try:
            while True:
                if see is not None:
                    see(logits)
                token_id, scores = self._choose(logits)
                self._ids = torch.cat([self._ids, torch.tensor([[token_id]], device=self._ids.device)], dim=1)
                last = bool(self._criteria(self._ids, scores).all())
                yield token_id, last
                if last:
                    return
                logits = self._together.step(row, self._ids, self.cache)
        finally:
            self._together.leave(row)

    def is_whole(self, last_id: int) -> bool:
        """Return True if ``last_id`` is an end-of-sequence token, or if the constraint is complete by now."""
        return last_id in self._adapter.end_ids or (self._constraint is not None and self._constraint.is_complete)

    def _choose(self, logits: Tensor) -> tuple[int, Tensor]:
        """Return the next token (the best one at temperature 0, else drawn) and the processed scores [B, V]."""
        with torch.inference_mode():
            scores = self._process(self._ids, logits.float().to(self._ids.device))  # [B, V]
            if self._greedy:
                return int(scores.argmax(-1)), scores
            chosen = torch.multinomial(scores.softmax(-1), 1, generator=self._random)
            return int(chosen), scores

    def _prepare(self, sampling: SamplingConfig) -> tuple[LogitsProcessorList, StoppingCriteriaList]:
        """Return what ``generate`` prepares to process and stop by, the constraint's included; generates nothing."""

        def hand_back(*_: Any, logits_processor: Any, stopping_criteria: Any, **__: Any) -> tuple[Any, Any]:
            return logits_processor, stopping_criteria

        return self._adapter.model.generate(
            self._ids,
            attention_mask=torch.ones_like(self._ids),
            custom_generate=hand_back,
            logits_processor=LogitsProcessorList([ConstraintProcessor(self._constraint)] if self._constraint else []),
            stopping_criteria=StoppingCriteriaList([ConstraintCriterion(self._constraint)] if self._constraint else []),
            generation_config=self._configure(sampling),
        )

    def _configure(self, sampling: SamplingConfig) -> GenerationConfig:
        """Return a copy of the model's settings with the caller's put in; top_k or penalty of None changes nothing."""
        config = copy.deepcopy(self._adapter.model.generation_config)
        config.update(max_new_tokens=sampling.max_new_tokens, max_length=None, stop_strings=None)
        config.update(num_beams=1, num_return_sequences=1, do_sample=not self._greedy)
        config.update(cache_implementation=None, use_cache=False)  # generate would make one, which nobody needs
        if self._greedy:
            config.update(temperature=None, top_p=None, top_k=None, min_p=None, typical_p=None)
        else:
            config.update(temperature=sampling.temperature, top_p=sampling.top_p)
            if sampling.top_k is not None:
                config.update(top_k=sampling.top_k)
        if sampling.repetition_penalty is not None:
            config.update(repetition_penalty=sampling.repetition_penalty)
        return config


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
        if not adapter.takes_positions or selective.counts_tokens:
            raise UnsupportedModelError(
                f"{name} counts tokens in its cache to tell how far apart they are; reuse.retention_ratio drops some"
            )
        self._adapter = adapter
        self._selective = selective
        rules = rules.resolve()
        self._shares = compute_retained_shares(
            len(selective.rotations), rules.retention_ratio or 1.0, rules.retention_final_share
        )

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
