"""Which tokens matter: those that the question is about or attends to, and those whose borrowed KV deviates.

Selective prefill ranks borrowed tokens by attention and by deviation; each signal has a quota. A token's priority is
its best rank as a share of that signal's quota: below 1 it is selected. A smaller share selects a subset of what a
larger one selects. Deeper layers need that: a dropped token has no hidden state to come back with.

Documents are scored by Okapi BM25 over token ids alone, which is not part of SemShareKV (arXiv 2509.24832). A document
that the answer hangs on is computed as a whole: some of its tokens alone would still take their context from borrowed
ones. The question's attention does not always find it, since a model may look only when it writes the answer.

Retention keeps a share of the prompt's KV for decoding; kept tokens keep their positions. SemShareKV (section 3) keeps
a fraction that decays exponentially over the layers. How fast, and how many first and last tokens stay, is not
confirmed against the paper. The reference model answers better from the same share in every layer, and much better if
the documents that share rare words with the question stay whole.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from math import log
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import max_pool1d

from semsharekv_integrations.kv import Mask, TokenIds

MOST_OF_ONE = 0.5  # share of the tokens that may be chosen as relevant, for a single document
LEAST_OF_BEST = 0.5  # score of a document that counts, as a share of the best one's: less is words that many share
_SATURATION, _LENGTH_SHARE = 2.0, 0.75  # BM25's k1 and b, at usual values
SINK_TOKENS = 4  # first tokens, which much attention rests on whatever they say, and so retention keeps
RECENT_TOKENS = 16  # last tokens, likewise
RELEVANT_SHARE = 0.12  # of the tokens that retention keeps first, as their documents share rare words with the question
NEIGHBOURHOOD_TOKENS = 7  # that stay or go together, as in SnapKV (arXiv 2404.14469): words are several tokens
_HALVINGS = 40


def spread_shares(num_layers: int, first: float, last: float) -> tuple[float, ...]:
    """Return one share for each layer, from ``first`` to ``last``, by the same factor from layer to layer.

    That neither is negative is not checked. If either is 0, every layer after the first gets 0.
    """
    if num_layers == 1 or first == 0 or last == 0:
        return (first, *[0.0] * (num_layers - 1))
    factor = (last / first) ** (1 / (num_layers - 1))
    return tuple(first * factor**layer for layer in range(num_layers))


class Signal(NamedTuple):
    """Scores [T], higher is more urgent, and how many tokens this signal may select."""

    scores: torch.Tensor
    quota_tokens: int


def rank_tokens(signals: Sequence[Signal], eligible: torch.Tensor) -> torch.Tensor:
    """Return each token's best rank over the signals [T], as a share of their quotas; infinity if not ``eligible`` [T].

    Tokens ranked below ``share`` are selected where ``share`` of every quota is left.
    """
    best = torch.full(eligible.shape, float("inf"), device=eligible.device)
    places = eligible.nonzero()[:, 0]
    for scores, quota_tokens in signals:
        if quota_tokens > 0 and len(places):
            order = places[scores[places].argsort(descending=True, stable=True)]
            shares = torch.arange(len(order), device=best.device) / quota_tokens
            best[order] = torch.minimum(best[order], shares)
    return best


def measure_reading(attention: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return how much each token adds to what is read: attention times the norm of its value, mean over heads [T].

    Attention alone counts tokens that are looked at for want of others, whose values are small (arXiv 2004.10102).

    Args:
        attention: [heads, T].
        values: [B, H, T, D], of which each of the ``H`` serves ``heads / H`` heads in a row.
    """
    norms = torch.linalg.vector_norm(values[0], dim=-1, dtype=torch.float32)  # [H, T]
    return (attention.unflatten(0, (len(norms), -1)) * norms[:, None]).mean((0, 1))


def measure_deviation(fresh: Sequence[torch.Tensor], borrowed: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return how far each token's borrowed keys and values are from fresh ones, [N] in float32: 0 is equal.

    It is the sum of the L2 norms of both differences, each as a share of the mean norm of the fresh ones. (The paper
    adds the plain norms; keys are often much larger than values, which would then not count.) Both are keys and values
    [B, H, N, D], the fresh ones computed for this prompt, the borrowed ones taken from a reference.
    """
    of_keys, of_values = map(_measure_differences, fresh, borrowed)
    return of_keys + of_values


def _measure_differences(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Return [N] the L2 norm of each token's difference, as a share of the mean norm of ``new`` [B, H, N, D]."""
    norms, differences = (
        torch.linalg.vector_norm(each, dim=(0, 1, 3), dtype=torch.float32) for each in (new, new.float() - old.float())
    )
    return differences / norms.mean().clamp_min(1e-6)


def score_documents(token_ids: TokenIds, segments: Sequence[tuple[int, int]], question: Mask) -> NDArray[np.float32]:
    """Return each token's [T] segment's BM25 score to the question; 0 outside, or if they share only what all have.

    Args:
        segments: documents or passages, as (start, stop).
        question: [T] marks the question, which is no part of the segments that it stands in.
    """
    scores = np.zeros(len(token_ids), dtype=np.float32)
    texts = [Counter(token_ids[start:stop][~question[start:stop]].tolist()) for start, stop in segments]
    found = {token_id: sum(token_id in text for text in texts) for token_id in set(token_ids[question].tolist())}
    rarities = {token_id: log(len(texts) / count) for token_id, count in found.items() if 0 < count < len(texts)}
    mean_length = sum(text.total() for text in texts) / max(1, len(texts))
    for (start, stop), text in zip(segments, texts, strict=True):
        length = 1 - _LENGTH_SHARE + _LENGTH_SHARE * text.total() / max(1.0, mean_length)
        terms = ((rarity, text[token_id]) for token_id, rarity in rarities.items())
        scores[start:stop] = sum(r * n * (_SATURATION + 1) / (n + _SATURATION * length) for r, n in terms if n)
    return scores


def choose_relevant_tokens(
    scores: NDArray[np.float32],
    segments: Sequence[tuple[int, int]],
    eligible: Mask,
    ratio: float,
    most: int = sys.maxsize,
) -> Mask:
    """Return a mask [T] of the ``eligible`` tokens of the segments with the highest ``scores`` [T].

    It takes whole segments, down to ``LEAST_OF_BEST`` of the best score, up to the first that would take more than
    ``ratio`` (0 to 1) of the eligible tokens, or more than ``most`` of them. Where ``ratio`` is above 0, the first may
    take up to ``MOST_OF_ONE``: what is alone with its question cannot be told from the rest.
    """
    chosen = np.zeros_like(eligible)
    share = max(ratio, MOST_OF_ONE) if ratio > 0 else 0.0
    least = max(LEAST_OF_BEST * float(scores.max(initial=0.0)), np.finfo(np.float32).tiny)
    for start, stop in sorted((s for s in segments if scores[s[0]] >= least), key=lambda s: -scores[s[0]]):
        larger = chosen.copy()
        larger[start:stop] |= eligible[start:stop]
        if larger.sum() > min(share * eligible.sum(), most):
            break
        if larger.any():
            chosen, share = larger, ratio
    return chosen


def compute_retained_shares(num_layers: int, ratio: float, final_share: float) -> tuple[float, ...]:
    """Return the share of the tokens that each layer keeps, ``ratio`` on average.

    Args:
        ratio: above 0, up to 1.
        final_share: what the last layer keeps as a multiple of what the first one keeps, where none keeps more than
            all: 1 is the same everywhere, less decays exponentially with depth, more grows.
    """
    shape = spread_shares(num_layers, 1.0, final_share)
    low, high = 0.0, 1 / min(shape)
    for _ in range(_HALVINGS):  # the average grows with the scale
        scale = (low + high) / 2
        if sum(min(1.0, scale * share) for share in shape) < ratio * num_layers:
            low = scale
        else:
            high = scale
    return tuple(min(1.0, high * share) for share in shape)


def choose_retained_tokens(attended: torch.Tensor, share: float, relevant: torch.Tensor | None = None) -> torch.Tensor:
    """Return the positions [N] of the tokens to keep, ascending.

    Args:
        attended: [heads, T] how much attention each token gets; a token counts by the head that looks at it most, and
            by the most looked at of its neighbours.
        share: of the tokens to keep, 0 to 1; sinks and recent tokens count, and stay even if there is no room.
        relevant: [T] tokens that come before all others, or None.
    """
    num_tokens = attended.shape[1]
    scores = max_pool1d(attended.amax(0)[None], NEIGHBOURHOOD_TOKENS, stride=1, padding=NEIGHBOURHOOD_TOKENS // 2)[0]
    if relevant is not None:
        scores = scores + relevant * (scores.max() + 1)
    scores[:SINK_TOKENS] = scores[-RECENT_TOKENS:] = float("inf")
    least = min(num_tokens, SINK_TOKENS + RECENT_TOKENS)
    kept = max(least, round(share * num_tokens))
    return scores.topk(kept).indices.sort().values
