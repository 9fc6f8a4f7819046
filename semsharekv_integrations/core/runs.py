"""Runs of identical tokens: stretches of a prompt that also stand somewhere in earlier sequences, at any offset.

Windows of a fixed number of tokens are found by a polynomial rolling hash, so nothing depends on a grid; every hit is
then verified by comparing ids, and extended for as long as they agree. SemShareKV (arXiv 2509.24832) matches tokens by
similarity only; here identical ones come first. Knows nothing about KV, nor about where sequences are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from semsharekv_integrations.core.prefix import common_prefix_tokens
from semsharekv_integrations.kv import TokenIds

Hashes = NDArray[np.uint64]
Positions = NDArray[np.int64]

BASE = 0x9E3779B97F4A7C15  # odd, hence invertible modulo 2**64
FIRST_STEP_TOKENS = 64  # first stretch that is compared; each further one is twice as long


class Occurrence(NamedTuple):
    """Position ``start`` of the sequence with number ``source``; newer sequences have higher numbers."""

    source: int
    start: int


class Match(NamedTuple):
    """Tokens from ``start`` on of a prompt equal those of sequence ``source`` from ``source_start`` on."""

    start: int
    source: int
    source_start: int
    num_tokens: int

    def continued_at(self, position: int) -> Occurrence:
        """What stands at ``position`` if the prompt goes on as the source does, with no token more or less."""
        return Occurrence(self.source, self.source_start + position - self.start)


def window_hashes(token_ids: TokenIds, num_tokens: int) -> Hashes:
    """Hash of each window of ``num_tokens`` tokens, [T - num_tokens + 1], in time linear in T."""
    num_windows = max(len(token_ids) - num_tokens + 1, 0)
    powers = np.full(len(token_ids), BASE, dtype=np.uint64).cumprod()  # [T]
    sums = np.concatenate([np.zeros(1, np.uint64), (token_ids.astype(np.uint64) * powers).cumsum()])  # [T + 1]
    inverses = np.full(num_windows, pow(BASE, -1, 2**64), dtype=np.uint64).cumprod()
    return (sums[num_tokens:] - sums[:num_windows]) * inverses


def windows_by_hash(hashes: Hashes, num_tokens: int) -> Positions:
    """Positions of windows, ordered by hash, then position, leaving out those that overlap an equal one before.

    So the first window stands for all of a stretch that repeats itself (a ruled line, blanks), which would else crowd
    out every other occurrence; it is also the one that agrees with a prompt for longest.
    """
    order = hashes.argsort(kind="stable")
    overlaps = (np.diff(order) < num_tokens) & (hashes[order[1:]] == hashes[order[:-1]])
    return order[np.concatenate([np.ones(min(len(order), 1), bool), ~overlaps])]


def common_extension_tokens(first: TokenIds, second: TokenIds) -> int:
    """As ``common_prefix_tokens``, in time linear in the answer instead of the lengths."""
    shared, step = 0, FIRST_STEP_TOKENS
    while True:
        equal = common_prefix_tokens(first[shared : shared + step], second[shared : shared + step])
        shared += equal
        if equal < step:
            return shared
        step *= 2


def greedy_cover(
    token_ids: TokenIds,
    hits: Positions,
    occurrences_at: Callable[[int, Occurrence | None], Iterable[Occurrence]],
    sequence_of: Callable[[int], TokenIds],
    min_tokens: int,
) -> list[Match]:
    """Matches of at least ``min_tokens`` that do not overlap, from left to right; each the longest at its start.

    Where every hit has a true occurrence, every hit is inside a match. Takes a step for each match and each false hit.

    Args:
        token_ids: the prompt [T].
        hits: positions in it, ascending, whose window may occur in a sequence.
        occurrences_at: candidates for a hit, given where the match before would continue; they may be wrong.
        sequence_of: the token ids [S] of a source.
        min_tokens: least length of a match.
    """
    matches: list[Match] = []
    position = 0
    while (nth := int(hits.searchsorted(position))) < len(hits):
        position = int(hits[nth])
        last = matches[-1] if matches else None
        expected = last.continued_at(position) if last else None
        candidates = {*occurrences_at(position, expected), *([expected] if expected else [])}
        found = [_verified(token_ids, position, candidate, sequence_of) for candidate in candidates]
        best = max(found, key=lambda match: _preference(match, expected), default=None)
        if best is None or best.num_tokens < min_tokens:
            position += 1
        else:
            matches.append(best)
            position += best.num_tokens
    return matches


def _verified(
    token_ids: TokenIds, position: int, candidate: Occurrence, sequence_of: Callable[[int], TokenIds]
) -> Match:
    """The candidate with the number of tokens for which it truly agrees, perhaps none."""
    agreeing = common_extension_tokens(token_ids[position:], sequence_of(candidate.source)[candidate.start :])
    return Match(position, candidate.source, candidate.start, agreeing)


def _preference(match: Match, expected: Occurrence | None) -> tuple[float, ...]:
    """Longer, then nearer to where the match before would continue in its source, then newer."""
    nearness = float("-inf")
    if expected is not None and match.source == expected.source:
        nearness = -abs(match.source_start - expected.start)
    return match.num_tokens, nearness, match.source, match.source_start
