"""Fuzzy matches: tokens of a prompt that may take the KV of alike tokens of a stored text.

In mode ``semantic`` each document or passage of the prompt has its own reference, the stored passage nearest in
meaning, or none. In mode ``paper`` the whole prompt has one, as in SemShareKV (arXiv 2509.24832, section 3). Tokens
are then matched by their RoPE'd embeddings. Knows the tokenizer only as a function from ids to pieces of text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np
import torch

from semsharekv_integrations.core.facts import guarded_tokens, unlike_facts
from semsharekv_integrations.core.lsh import mean_hamming_distance, nearest_tokens, paper_similarity, rotated_embeddings
from semsharekv_integrations.core.plan import Borrowing
from semsharekv_integrations.index import SegmentIndex, SegmentMatch
from semsharekv_integrations.kv import Mask, Reference, Rendered, Segment, TokenIds
from semsharekv_integrations.modes import ReuseRules
from semsharekv_integrations.store import KVStore

MOST_COVERED = 0.5  # share of a segment in identical runs above which it needs no fuzzy match
LONGEST_EXACT_TOKENS = 1024  # up to which comparing all tokens is exact and faster than hashing them
MOST_CANDIDATES = 8  # latest stored prompts that mode ``paper`` compares a prompt with
_EMBEDDING_ROPE_BASE, _EMBEDDING_HEAD = 10_000.0, 64  # for models that turn no keys


class FuzzyMatcher:
    """Finds fuzzy matches for one model.

    Args:
        store: where references are.
        index: finds stored passages by similarity.
        embed: from token ids [N] to their input embeddings [N, hidden], the E-cache.
        pieces: from token ids [N] to each token's text.
        inverse_frequencies: [R] of the model's own rope, or None for the usual ones.
        rules: bounds.
    """

    def __init__(
        self,
        store: KVStore,
        index: SegmentIndex,
        embed: Callable[[TokenIds], torch.Tensor],
        pieces: Callable[[TokenIds], Sequence[str]],
        inverse_frequencies: torch.Tensor | None,
        rules: ReuseRules,
    ) -> None:
        self._store = store
        self._index = index
        self._embed = embed
        self._pieces = pieces
        self._frequencies = _usual_frequencies() if inverse_frequencies is None else inverse_frequencies
        self._rules = rules

    def segment_matches(self, rendered: Rendered, open_tokens: Mask, namespace: str) -> list[Borrowing]:
        """Matches of each segment that is mostly uncovered with the stored one nearest to it, if that is near enough.

        Args:
            rendered: the prompt.
            open_tokens: [T] without a source so far; nothing else is matched.
            namespace: the only one looked at.
        """
        wanted = [s for s in segments_of(rendered) if open_tokens[s.start : s.stop].mean() > 1 - MOST_COVERED]
        if not wanted:
            return []
        texts = [rendered.token_ids[s.start : s.stop] for s in wanted]
        found = [self._nearest(texts, name) for name in self._store.readable(namespace)]
        least = self._rules.min_similarity
        threshold = self._index.embedder.threshold if least is None else least
        fetched: dict[str, Reference | None] = {}
        borrowings, still_open = [], open_tokens.copy()
        for segment, matches in zip(wanted, zip(*found, strict=True), strict=True):
            best = max(chain(*matches), key=lambda match: match.similarity, default=None)
            if best is None or best.similarity < threshold:
                continue
            key = best.reference.id
            reference = fetched[key] = fetched[key] if key in fetched else self._store.fetch(key, namespace)
            if reference is None:
                continue
            for borrowing in self._tokens(rendered, segment, reference, best.segment, still_open):
                still_open[borrowing.targets] = False  # a caller's documents may stand inside of each other
                borrowings.append(borrowing)
        return borrowings

    def _nearest(self, texts: Sequence[TokenIds], namespace: str) -> list[list[SegmentMatch]]:
        """For each text the stored passage of one namespace that is most like it, or none."""
        self._index.sync(self._store.references(namespace), namespace)
        return self._index.nearest(texts, namespace)

    def prompt_matches(self, rendered: Rendered, open_tokens: Mask, namespace: str) -> list[Borrowing]:
        """Matches of the whole prompt with the stored one most alike by LSH distance, if it is alike enough."""
        whole = Segment("", 0, len(rendered.token_ids))
        target = self._embed(rendered.token_ids)
        candidates = [
            (paper_similarity(mean_hamming_distance(target, self._embed(reference.token_ids))), reference)
            for name in self._store.readable(namespace)
            for reference in self._store.references(name)[-MOST_CANDIDATES:]
        ]
        similarity, found = max(candidates, key=lambda pair: pair[0], default=(0.0, None))
        if found is None or similarity < (self._rules.min_similarity or 0.0):
            return []
        best = self._store.fetch(found.id, namespace)
        if best is None:
            return []
        stored = Segment("", 0, len(best.token_ids))
        return list(self._tokens(rendered, whole, best, stored, open_tokens))

    def _tokens(
        self, rendered: Rendered, segment: Segment, reference: Reference, stored: Segment, open_tokens: Mask
    ) -> Iterator[Borrowing]:
        """The tokens of one segment that find an alike one in ``stored``, guarded facts left out."""
        ids, known = rendered.token_ids[segment.start : segment.stop], reference.token_ids[stored.start : stored.stop]
        bits = self._rules.lsh_bits if max(len(ids), len(known)) > LONGEST_EXACT_TOKENS else 0
        matches = nearest_tokens(self._rotated(ids), self._rotated(known), bits=bits or None)
        refused = ~open_tokens[segment.start : segment.stop] | (matches.cosine < self._rules.min_token_similarity)
        if self._rules.guard_facts:
            facts, stored_facts = (guarded_tokens(self._pieces(text)) for text in (ids, known))
            refused |= unlike_facts(ids, facts, known, stored_facts, matches.positions)
        targets = np.flatnonzero(~refused)
        if len(targets):
            sources = stored.start + matches.positions[targets]
            yield Borrowing(reference, segment.start + targets, sources, np.ones(len(targets), dtype=bool))

    def _rotated(self, token_ids: TokenIds) -> torch.Tensor:
        positions = torch.arange(len(token_ids), device=self._frequencies.device)
        return rotated_embeddings(self._embed(token_ids), positions, self._frequencies)


def segments_of(rendered: Rendered) -> list[Segment]:
    """The documents of a prompt, and its passages that overlap none of them."""
    free = [p for p in rendered.passages if not any(p.start < d.stop and d.start < p.stop for d in rendered.segments)]
    return sorted([*rendered.segments, *free], key=lambda segment: segment.start)


def _usual_frequencies() -> torch.Tensor:
    steps = torch.arange(0, _EMBEDDING_HEAD, 2) / _EMBEDDING_HEAD
    return _EMBEDDING_ROPE_BASE**-steps
