"""Which documents of a prompt its question is about, by Okapi BM25 over token ids alone.

A document that the answer hangs on is computed as a whole: some of its tokens alone would still take their context from
borrowed ones. The question's attention does not always find it, since a model may look only when it writes the answer;
rare words in common do, and cost little. Not part of SemShareKV (arXiv 2509.24832).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import log

import numpy as np
from numpy.typing import NDArray

from semsharekv_integrations.kv import Mask, TokenIds

MOST_OF_ONE = 0.5  # share of the tokens that may be chosen, for a single document
LEAST_OF_BEST = 0.5  # score of a document that counts, as a share of the best one's: less is words that many share
_SATURATION, _LENGTH_SHARE = 2.0, 0.75  # BM25's k1 and b, at usual values


def relevance(token_ids: TokenIds, segments: Sequence[tuple[int, int]], question: Mask) -> NDArray[np.float32]:
    """[T] for each token its segment's BM25 score to the question; 0 where they share nothing that others have not.

    Args:
        token_ids: [T].
        segments: documents or passages, as (start, stop).
        question: [T] marks the question, which is no part of the segments that it stands in.
    """
    scores = np.zeros(len(token_ids), dtype=np.float32)
    texts = [Counter(token_ids[start:stop][~question[start:stop]].tolist()) for start, stop in segments]
    rarities = _inverse_frequencies(set(token_ids[question].tolist()), texts)
    mean_length = sum(text.total() for text in texts) / max(1, len(texts))
    for (start, stop), text in zip(segments, texts, strict=True):
        length = 1 - _LENGTH_SHARE + _LENGTH_SHARE * text.total() / max(1.0, mean_length)
        terms = ((rarity, text[token_id]) for token_id, rarity in rarities.items())
        scores[start:stop] = sum(r * n * (_SATURATION + 1) / (n + _SATURATION * length) for r, n in terms if n)
    return scores


def _inverse_frequencies(asked: set[int], texts: Sequence[Counter[int]]) -> dict[int, float]:
    """By token asked for, the logarithm of how few of the texts have it; nothing for those that none or all have."""
    found = {token_id: sum(token_id in text for text in texts) for token_id in asked}
    return {token_id: log(len(texts) / count) for token_id, count in found.items() if 0 < count < len(texts)}


def relevant_tokens(
    scores: NDArray[np.float32], segments: Sequence[tuple[int, int]], eligible: Mask, ratio: float
) -> Mask:
    """[T] the ``eligible`` tokens of the segments with the highest scores.

    Whole segments, down to ``LEAST_OF_BEST`` of the best score, up to the first that would take more than ``ratio`` of
    the eligible tokens. Where ``ratio`` is above 0, the first of them may take up to ``MOST_OF_ONE``: what is alone
    with its question cannot be told from the rest.

    Args:
        scores: [T] as ``relevance`` gives them.
        segments: that they are of.
        eligible: [T] tokens that count and that may be chosen.
        ratio: 0 to 1.
    """
    chosen = np.zeros_like(eligible)
    share = max(ratio, MOST_OF_ONE) if ratio > 0 else 0.0
    least = max(LEAST_OF_BEST * float(scores.max(initial=0.0)), np.finfo(np.float32).tiny)
    for start, stop in sorted((s for s in segments if scores[s[0]] >= least), key=lambda s: -scores[s[0]]):
        larger = chosen.copy()
        larger[start:stop] |= eligible[start:stop]
        if larger.sum() > share * eligible.sum():
            break
        if larger.any():
            chosen, share = larger, ratio
    return chosen
