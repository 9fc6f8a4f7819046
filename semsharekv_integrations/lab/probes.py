"""What sweeps measure on documents alone, without generating: how alike two versions are, and what hashing misses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from semsharekv_integrations.config import EngineConfig
from semsharekv_integrations.core.lsh import lsh_recall, rotated_embeddings
from semsharekv_integrations.index import PooledEmbedder
from semsharekv_integrations.kv import TokenIds
from semsharekv_integrations.lab.quality import Outcome
from semsharekv_integrations.lab.workloads import Case
from semsharekv_integrations.matching import LONGEST_EXACT_TOKENS
from semsharekv_integrations.model.adapter import ModelAdapter
from semsharekv_integrations.model.selective import SelectivePrefill


class SimilarityProbe:
    """Adds to an outcome how alike the document asked about is to its stored version, as mode ``semantic`` sees it.

    The pooled embeddings are fitted to the stored documents of the case, as the index fits them to what is stored.

    Args:
        model: whose input embeddings are pooled.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._embedder = PooledEmbedder(model.get_input_embeddings().weight)
        self._last: tuple[Case | None, float | None] = None, None

    def __call__(self, case: Case, outcome: Outcome) -> Outcome:
        """``outcome`` with the similarity; as it is where the document is not stored in any version."""
        if case is not self._last[0]:
            self._last = case, self._similarity(case)
        return replace(outcome, similarity=self._last[1])

    def _similarity(self, case: Case) -> float | None:
        stored = {key: text for reference in case.references for key, text in reference.documents.items()}
        if case.asked not in stored:
            return None
        fitted = self._embedder.fitted([_ids(self._tokenizer, text) for text in stored.values()])
        texts = case.target.documents[case.asked], stored[case.asked]
        one, other = fitted.embed([_ids(self._tokenizer, text) for text in texts])
        return float(one @ other)


class RecallProbe:
    """Adds to an outcome the share of a document's tokens that hashing matches as well as comparing all of them.

    Args:
        model: whose input embeddings and RoPE are used.
        tokenizer: its tokenizer.
        configs: settings by policy, with the number of hash bits.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, configs: Mapping[str, EngineConfig]
    ) -> None:
        self._tokenizer = tokenizer
        self._adapter = ModelAdapter(model, "semantic")
        rotations = SelectivePrefill(self._adapter).rotations
        self._frequencies = next(r.inverse_frequencies for r in rotations if r is not None)
        self._bits = {name: config.reuse.rules.lsh_bits for name, config in configs.items() if config.reuse.rules.fuzzy}
        self._last: tuple[Case | None, dict[str, float]] = None, {}

    def __call__(self, case: Case, outcome: Outcome) -> Outcome:
        """``outcome`` with the recall of its policy; as it is where a policy, or a document so short, is not hashed."""
        if case is not self._last[0]:
            self._last = case, self._recalls(case)
        return replace(outcome, lsh_recall=self._last[1].get(outcome.policy))

    def _recalls(self, case: Case) -> dict[str, float]:
        (target,), (stored,) = case.target.documents.values(), case.references[0].documents.values()
        ids = [_ids(self._tokenizer, text) for text in (target, stored)]
        if max(map(len, ids)) <= LONGEST_EXACT_TOKENS:
            return {}
        pair = [self._rotated(version) for version in ids]
        return {name: lsh_recall(pair[0], pair[1], bits=bits) if bits else 1.0 for name, bits in self._bits.items()}

    def _rotated(self, ids: TokenIds) -> torch.Tensor:
        positions = torch.arange(len(ids), device=self._frequencies.device)
        return rotated_embeddings(self._adapter.embed(ids), positions, self._frequencies)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> TokenIds:
    return np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)
