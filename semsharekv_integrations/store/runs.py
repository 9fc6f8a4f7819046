"""Runs of identical tokens: stretches of a prompt that also stand somewhere in earlier sequences, at any offset.

Windows of a fixed number of tokens are found by a polynomial rolling hash, so nothing depends on a grid; every hit is
then verified by comparing ids, and extended for as long as they agree. SemShareKV (arXiv 2509.24832) matches tokens by
similarity only; here identical ones come first. Knows nothing about KV, nor about where sequences are kept.

The index is a log-structured merge of sorted arrays: a sequence adds a small block, and a block is merged into the one
before it unless that is twice as long, so there are no more blocks than the logarithm of what is stored. What is
removed is skipped at once and purged in merges. Takes 16 bytes for each stored token, at most twice that until purged,
and about half a second of one core for each million of them when a large store is indexed at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from semsharekv_integrations.kv import TokenIds, count_common_tokens

BASE = 0x9E3779B97F4A7C15  # odd, hence invertible modulo 2**64
FIRST_STEP_TOKENS = 64  # first stretch that is compared; each further one is twice as long
MAX_CANDIDATES = 8  # latest occurrences of a window that are compared
SCANNED_AT_ONCE = 1024
POSITION_BITS = 32
_POSITION_MASK = (1 << POSITION_BITS) - 1
BYTES_PER_WINDOW = 16  # a hash and a place

Hashes = NDArray[np.uint64]
Positions = NDArray[np.int64]
Places = NDArray[np.int64]  # number of a source, shifted, plus a position in it: newer sources have higher places
Live = NDArray[np.bool_]  # whether there is a source with each number


class IndexedRun(NamedTuple):
    """Tokens from ``start`` on equal those of the sequence added as ``key`` from ``source_start`` on."""

    start: int
    key: str
    source_start: int
    num_tokens: int


class _Match(NamedTuple):
    """Tokens from ``start`` on of a prompt equal those that stand at ``place``."""

    start: int
    place: int
    num_tokens: int


class _Source(NamedTuple):
    key: str
    token_ids: TokenIds  # [S], not copied
    num_windows: int  # those that are indexed


class _Block(NamedTuple):
    """Hashes [N] and places [N] of windows, ordered by hash, then place."""

    hashes: Hashes
    places: Places

    def find(self, window_hash: np.uint64) -> Places:
        start, stop = (int(self.hashes.searchsorted(window_hash, side)) for side in ("left", "right"))
        return self.places[start:stop]

    def keep_live(self, live: Live) -> _Block:
        keep = live[self.places >> POSITION_BITS]
        return self if keep.all() else _Block(self.hashes[keep], self.places[keep])


_NOTHING = _Block(np.empty(0, np.uint64), np.empty(0, np.int64))


class RunIndex:
    """Sequences by key, found by any ``min_run_tokens`` tokens (a window) or more in a row. Not thread-safe."""

    def __init__(self, min_run_tokens: int) -> None:
        self.min_run_tokens = min_run_tokens
        self._sources: dict[int, _Source] = {}  # number -> source; later ones have higher numbers
        self._numbers: dict[str, int] = {}  # key -> number
        self._next_number = 0
        self._live: Live = np.zeros(64, dtype=bool)  # with room for more
        self._num_live_windows = 0
        self._blocks: list[_Block] = []  # older ones first

    def add(self, key: str, token_ids: TokenIds) -> None:
        """Index a sequence [S], which must not change from now on. Asserts that ``key`` is not there."""
        self.add_all([(key, token_ids)])

    def add_all(self, sequences: Iterable[tuple[str, TokenIds]]) -> None:
        """Index all ``sequences`` as ``add`` does, but sort them once."""
        new = [block for block in (self._number(*sequence) for sequence in sequences) if len(block.hashes)]
        if new:
            self._blocks.append(new[0] if len(new) == 1 else _sort(new))
        while len(self._blocks) > 1 and len(self._blocks[-2].hashes) < 2 * len(self._blocks[-1].hashes):
            self._blocks[-2:] = [self._merge(*self._blocks[-2:])]

    def remove(self, key: str) -> None:
        """Forget a sequence: it is not found from now on, but its windows may stay in memory until a purge."""
        number = self._numbers.pop(key)
        self._num_live_windows -= self._sources.pop(number).num_windows
        self._live[number] = False
        if self.num_windows > 2 * self._num_live_windows or self._next_number > 64 + 2 * len(self._sources):
            self.purge()

    def purge(self) -> None:
        """Keep nothing of what was removed. What is left has the lowest numbers from now on, in the same order."""
        if self._next_number == len(self._sources):
            return
        hashes, places = reduce(self._merge, self._blocks, _NOTHING)
        numbers = np.cumsum(self._live) - 1
        moved = numbers[places >> POSITION_BITS] << POSITION_BITS | places & _POSITION_MASK
        self._blocks = [_Block(hashes, moved)] if len(hashes) else []
        self._sources = {int(numbers[number]): source for number, source in sorted(self._sources.items())}
        self._numbers = {source.key: number for number, source in self._sources.items()}
        self._next_number = len(self._sources)
        self._live = np.arange(64 + 2 * len(self._sources)) < len(self._sources)

    def find(self, token_ids: TokenIds) -> list[IndexedRun]:
        """Return runs of a prompt [T], verified, in order, without overlap, each at least ``min_run_tokens`` long.

        A run goes on for as long as its source agrees. Every window of the prompt that occurs in a sequence starts
        inside a run. It looks at the latest few occurrences, and at those where the run before would continue, and
        takes the longest.
        """
        hashes = window_hashes(token_ids, self.min_run_tokens)
        distinct, which = np.unique(hashes, return_inverse=True)  # ordered: searching is several times as fast
        held = np.zeros(len(distinct), dtype=bool)
        for block in self._blocks:
            held |= _find_live(block, distinct, self._live)
        hits = np.flatnonzero(held[which])
        found: list[_Match] = []
        position = 0
        while (nth := int(hits.searchsorted(position))) < len(hits):  # takes a step for each run and each false hit
            position = int(hits[nth])
            expected = found[-1].place + position - found[-1].start if found else None
            match = self._match(token_ids, position, hashes[position], expected)
            if match is None:
                position += 1
            else:
                found.append(match)
                position += match.num_tokens
        return [
            IndexedRun(m.start, self._sources[m.place >> POSITION_BITS].key, m.place & _POSITION_MASK, m.num_tokens)
            for m in found
        ]

    @property
    def keys(self) -> set[str]:
        """Keys of all sequences that can be found."""
        return set(self._numbers)

    @property
    def num_windows(self) -> int:
        """Windows in memory, those of removed sequences that are not yet purged included."""
        return sum(len(block.hashes) for block in self._blocks)

    def check(self) -> None:
        """Assert that blocks are ordered and few, just the windows of live sequences are found, all is bounded."""
        assert {source.key: number for number, source in self._sources.items()} == self._numbers
        assert set(np.flatnonzero(self._live).tolist()) == set(self._sources), "what is live"
        assert self._num_live_windows == sum(source.num_windows for source in self._sources.values())
        assert self.num_windows <= 2 * self._num_live_windows, "removed windows are not purged"
        assert self._next_number <= 64 + 2 * len(self._sources), "removed numbers are not purged"
        for block in self._blocks:
            assert (np.lexsort((block.places, block.hashes)) == np.arange(len(block.hashes))).all(), "out of order"
        for older, newer in pairwise(self._blocks):
            assert len(older.hashes) >= 2 * len(newer.hashes), "too many blocks"
        found = [place for block in self._blocks for place in block.keep_live(self._live).places.tolist()]
        for number, source in self._sources.items():
            hashes = window_hashes(source.token_ids, self.min_run_tokens)
            positions = order_windows(hashes, self.min_run_tokens)
            assert {number << POSITION_BITS | int(at) for at in positions} <= set(found), "a window is not indexed"
        assert len(found) == self._num_live_windows, "a window is indexed twice"

    def _match(self, token_ids: TokenIds, start: int, window_hash: np.uint64, expected: int | None) -> _Match | None:
        """Return the longest run from ``start`` on; of equals, the nearest to ``expected``, then the newest.

        None if all that the hash found is another window.
        """

        def rank(match: _Match) -> tuple[float, ...]:
            """Return a sort key: length, then nearness to ``expected`` (only in its source), then place."""
            nearness = float("-inf")
            if expected is not None and match.place >> POSITION_BITS == expected >> POSITION_BITS:
                nearness = -abs(match.place - expected)
            return match.num_tokens, nearness, match.place

        matches = []
        for place in self._find_candidates(window_hash, expected):
            source = self._sources[place >> POSITION_BITS].token_ids[place & _POSITION_MASK :]
            matches.append(_Match(start, place, common_extension_tokens(token_ids[start:], source)))
        best = max(matches, key=rank, default=None)
        return best if best is not None and best.num_tokens >= self.min_run_tokens else None

    def _find_candidates(self, window_hash: np.uint64, expected: int | None) -> set[int]:
        """Return the latest live places of a hash, and the expected one with those just before and behind it."""
        places: list[int] = []
        beside: list[int] = [] if expected is None else [expected]
        for block in reversed(self._blocks):
            here = block.find(window_hash)
            if not len(here):
                continue
            places += _take_latest(here, self._live, MAX_CANDIDATES - len(places)).tolist()
            if expected is not None:
                at = int(here.searchsorted(expected))
                near = here[max(at - 1, 0) : at + 1]
                beside += near[self._live[near >> POSITION_BITS]].tolist()
        return {*places, *beside}

    def _merge(self, older: _Block, newer: _Block) -> _Block:
        """Return one block for two, the older before the newer among equal hashes, without what was removed."""
        older, newer = older.keep_live(self._live), newer.keep_live(self._live)
        inserted = older.hashes.searchsorted(newer.hashes, side="right") + np.arange(len(newer.hashes))
        is_older = np.ones(len(older.hashes) + len(newer.hashes), dtype=bool)
        is_older[inserted] = False
        merged = _Block(np.empty(len(is_older), np.uint64), np.empty(len(is_older), np.int64))
        for array, first, second in zip(merged, older, newer, strict=True):
            array[is_older], array[inserted] = first, second
        return merged

    def _number(self, key: str, token_ids: TokenIds) -> _Block:
        """Register a source under the next number, and return a block of its windows. Asserts that ``key`` is new."""
        assert key not in self._numbers
        hashes = window_hashes(token_ids, self.min_run_tokens)
        positions = order_windows(hashes, self.min_run_tokens)
        number = self._numbers[key] = self._next_number
        self._next_number += 1
        self._sources[number] = _Source(key, token_ids, len(positions))
        self._num_live_windows += len(positions)
        if number == len(self._live):
            self._live = np.concatenate([self._live, np.zeros_like(self._live)])
        self._live[number] = True
        return _Block(hashes[positions], positions | number << POSITION_BITS)


def window_hashes(token_ids: TokenIds, num_tokens: int) -> Hashes:
    """Return the hash of each window of ``num_tokens`` tokens, [T - num_tokens + 1] or [0], in time linear in T."""
    num_windows = max(len(token_ids) - num_tokens + 1, 0)
    powers = np.full(len(token_ids), BASE, dtype=np.uint64).cumprod()  # [T]
    sums = np.concatenate([np.zeros(1, np.uint64), (token_ids.astype(np.uint64) * powers).cumsum()])  # [T + 1]
    inverses = np.full(num_windows, pow(BASE, -1, 2**64), dtype=np.uint64).cumprod()
    return (sums[num_tokens:] - sums[:num_windows]) * inverses


def order_windows(hashes: Hashes, num_tokens: int) -> Positions:
    """Return positions of windows by hash, then position, without those that overlap an equal one before.

    So the first window stands for all of a stretch that repeats itself (a ruled line, blanks), which would else crowd
    out every other occurrence; it is also the one that agrees with a prompt for longest.
    """
    order = hashes.argsort(kind="stable")
    overlaps = (np.diff(order) < num_tokens) & (hashes[order[1:]] == hashes[order[:-1]])
    return order[np.concatenate([np.ones(min(len(order), 1), bool), ~overlaps])]


def common_extension_tokens(first: TokenIds, second: TokenIds) -> int:
    """As ``count_common_tokens``, in time linear in the answer instead of the lengths."""
    shared, step = 0, FIRST_STEP_TOKENS
    while True:
        equal = count_common_tokens(first[shared : shared + step], second[shared : shared + step])
        shared += equal
        if equal < step:
            return shared
        step *= 2


def _sort(blocks: list[_Block]) -> _Block:
    """Return one block for several, the older ones first among equal hashes."""
    hashes, places = (np.concatenate(arrays) for arrays in zip(*blocks, strict=True))
    order = hashes.argsort(kind="stable")
    return _Block(hashes[order], places[order])


def _take_latest(places: Places, live: Live, count: int) -> Places:
    """Return the last ``count`` live ones of ``places``, in their order; fewer if there are no more."""
    found, stop = places[:0], len(places)
    while stop > 0 and len(found) < count:
        part = places[max(stop - SCANNED_AT_ONCE, 0) : stop]
        found = np.concatenate([part[live[part >> POSITION_BITS]], found])[-count:]
        stop -= len(part)
    return found


def _find_live(block: _Block, hashes: Hashes, live: Live) -> NDArray[np.bool_]:
    """Return for each hash [T] whether ``block`` has a live window of it: looks at the latest ones first."""
    hits = np.zeros(len(hashes), dtype=bool)
    at = block.hashes.searchsorted(hashes, side="right") - 1
    pending = np.arange(len(hashes))
    while pending.size:
        pending = pending[(at[pending] >= 0) & (block.hashes[at[pending]] == hashes[pending])]
        is_live = live[block.places[at[pending]] >> POSITION_BITS]
        hits[pending[is_live]] = True
        pending = pending[~is_live]
        at[pending] -= 1
    return hits
