"""Token by token behind a prefill, with transformers' own logits processors and stopping criteria.

``generate`` is called once, with a callable that only hands back what it prepared: sampling options keep exactly
the meaning they have in transformers, while the prefill and the loop are ours.

Retention carried out: after prefill, each layer of the cache keeps only what the question hangs on.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from semsharekv_integrations.config import ReuseConfig, SamplingConfig
from semsharekv_integrations.errors import UnsupportedModelError
from semsharekv_integrations.kv import LayerKV, Mask, TokenIds
from semsharekv_integrations.model.adapter import ModelAdapter, Prefill
from semsharekv_integrations.model.batching import SharedDecoding
from semsharekv_integrations.model.rows import GatheredCache
from semsharekv_integrations.model.selective import SelectivePrefill
from semsharekv_integrations.reuse.selection import choose_retained_tokens, compute_retained_shares
from semsharekv_integrations.text.grammar import Constraint, ConstraintCriterion, ConstraintProcessor


class _Prepared(NamedTuple):
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList


class Decoder:
    """Chooses tokens for one call.

    Args:
        adapter: the model.
        prompt_ids: [T]; penalties on repetition look at them.
        sampling: how tokens are chosen, ``max_new_tokens`` already within the context window.
        constraint: what the answer must look like, or None.
        together: with which other calls decode.

    Attributes:
        cache: what decoding goes on with; it holds KV of all tokens but the last when ``tokens`` has ended.
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
        self._prepared = self._prepare(sampling)
        self._greedy = sampling.temperature == 0
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed  # torch's own needs a file handle
        self._random = torch.Generator(device=adapter.device).manual_seed(seed)

    def decode(
        self, prefill: Prefill, see: Callable[[torch.Tensor], None] | None = None
    ) -> Generator[tuple[int, bool], None, None]:
        """Each new token, and whether it is the last. Closing it ends the call.

        ``see`` is shown the model's logits [B, V] for each. ``cache`` may be replaced behind the first token.
        """
        self.cache, logits = prefill.cache, prefill.logits
        row = self._together.join()
        try:
            while True:
                if see is not None:
                    see(logits)
                token_id, scores = self._choose(logits)
                self._ids = torch.cat([self._ids, torch.tensor([[token_id]], device=self._ids.device)], dim=1)
                last = bool(self._prepared.stopping_criteria(self._ids, scores).all())
                yield token_id, last
                if last:
                    return
                logits = row.step(self._ids, self.cache)
        finally:
            row.leave()

    def is_end(self, token_id: int) -> bool:
        """Whether ``token_id`` is one of the model's end-of-sequence tokens."""
        return token_id in self._adapter.end_ids

    @property
    def is_complete(self) -> bool:
        """Whether the answer is all that its constraint allows."""
        return self._constraint is not None and self._constraint.is_complete

    def _choose(self, logits: torch.Tensor) -> tuple[int, torch.Tensor]:
        with torch.inference_mode():
            scores = self._prepared.logits_processor(self._ids, logits.float().to(self._ids.device))  # [B, V]
            if self._greedy:
                return int(scores.argmax(-1)), scores
            chosen = torch.multinomial(scores.softmax(-1), 1, generator=self._random)
            return int(chosen), scores

    def _prepare(self, sampling: SamplingConfig) -> _Prepared:
        def hand_back(
            model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **_: Any
        ) -> _Prepared:
            return _Prepared(logits_processor, stopping_criteria)

        return self._adapter.model.generate(
            self._ids,
            attention_mask=torch.ones_like(self._ids),
            custom_generate=hand_back,
            logits_processor=LogitsProcessorList([ConstraintProcessor(self._constraint)] if self._constraint else []),
            stopping_criteria=StoppingCriteriaList([ConstraintCriterion(self._constraint)] if self._constraint else []),
            generation_config=self._generation_config(sampling),
        )

    def _generation_config(self, sampling: SamplingConfig) -> GenerationConfig:
        """The model's own settings, overruled by what the caller set."""
        config = copy.deepcopy(self._adapter.model.generation_config)
        greedy = sampling.temperature == 0
        config.update(
            max_new_tokens=sampling.max_new_tokens,
            max_length=None,
            do_sample=not greedy,
            num_beams=1,
            num_return_sequences=1,
            cache_implementation=None,
            use_cache=False,  # generate would make one, which nobody needs
            stop_strings=None,
            temperature=None if greedy else sampling.temperature,
            top_p=None if greedy else sampling.top_p,
        )
        if greedy:
            config.update(top_k=None, min_p=None, typical_p=None)
        elif sampling.top_k is not None:
            config.update(top_k=sampling.top_k)
        if sampling.repetition_penalty is not None:
            config.update(repetition_penalty=sampling.repetition_penalty)
        return config


class Retainer:
    """Shortens caches of one model.

    Args:
        adapter: the model.
        selective: sees what tokens attend to.
        rules: with a ``retention_ratio``.

    Raises:
        UnsupportedModelError: if layers with caches of different lengths cannot be decoded from.
    """

    def __init__(self, adapter: ModelAdapter, selective: SelectivePrefill, rules: ReuseConfig) -> None:
        if any(window is not None for window in selective.windows) or adapter.config._attn_implementation != "sdpa":
            raise UnsupportedModelError(
                f"{type(adapter.model).__name__} has sliding windows or attn_implementation "
                f"{adapter.config._attn_implementation!r}; reuse.retention_ratio needs full attention and 'sdpa'"
            )
        self._adapter = adapter
        self._selective = selective
        rules = rules.resolve()
        self._shares = compute_retained_shares(
            selective.num_layers, rules.retention_ratio or 1.0, rules.retention_final_share
        )

    def shorten(self, token_ids: TokenIds, question: Mask, relevant: Mask, cache: DynamicCache) -> DynamicCache:
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
            kept = choose_retained_tokens(weights, share, first).to(layer.keys.device)
            layers.append(LayerKV(layer.keys[:, :, kept], layer.values[:, :, kept]))
        return GatheredCache(layers).finished()
