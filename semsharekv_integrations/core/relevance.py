"""Which documents of a prompt share words with its question, from token ids alone.

A document that the answer hangs on is computed as a whole: some of its tokens alone would still take their context from
borrowed ones. The question's attention does not always find it, since a model may look only when it writes the answer;
rare words in common do. Not part of SemShareKV (arXiv 2509.24832).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import log

import numpy as np
from numpy.typing import NDArray

from semsharekv_integrations.kv import TokenIds


def relevance(
    token_ids: TokenIds, segments: Sequence[tuple[int, int]], question: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """[T] for each token the inverse document frequencies of what its segment has in common with the question, summed.

    0 outside of segments, and where nothing is shared but words that every segment has.

    Args:
        token_ids: [T].
        segments: documents and passages, as (start, stop).
        question: [T] marks the question, which no segment's words are taken from.
    """
    scores = np.zeros(len(token_ids), dtype=np.float32)
    words = [set(token_ids[start:stop][~question[start:stop]].tolist()) for start, stop in segments]
    asked = set(token_ids[question].tolist())
    frequency = Counter(token_id for found in words for token_id in found & asked)
    for (start, stop), found in zip(segments, words, strict=True):
        scores[start:stop] = sum(log(len(words) / frequency[token_id]) for token_id in found & asked)
    return scores
