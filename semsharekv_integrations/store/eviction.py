"""One tier's bytes against their bound, and which node goes first when it is full.

A node that was reused is proven, any other novel. A full tier evicts novel nodes first, least recently used first, down
to a share of its room, so a stream of prompts that never return evicts none that did. Proven nodes go by the compute
that a byte of them saves: every use adds what it saved, and unused nodes fall behind as others rise (greedy dual size
frequency, Cherkasova 1998). All nodes of a model take the same bytes per token; a token saves the more compute, the
more tokens it attends to. Knows nothing about where KV lies.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Collection
from itertools import count
from typing import NamedTuple

from semsharekv_integrations.config import Eviction
from semsharekv_integrations.store.radix import Node

NOVEL_SHARE = 0.25  # of a full tier is for nodes that were never reused
COSTLY_POSITION = 8192  # where attending to all before costs about as much as the rest of a layer
MOST_HITS = 4.0  # so that what was once popular is outlived soon


class _Rank(NamedTuple):
    """The rank of a proven node: the lowest is evicted first; of equals, the node that fewest others need."""

    priority: float
    before_start: int
    order: int


class Tier:
    """Counts bytes of nodes against a bound, and ranks them: by ``value`` as above, or ``lru``. Moves no KV."""

    def __init__(self, name: str, max_bytes: int, eviction: Eviction = "value") -> None:
        self.name = name
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.sizes: dict[Node, int] = {}  # bytes of every node that is here
        self._eviction = eviction
        self._novel: OrderedDict[Node, None] = OrderedDict()  # least recently used first
        self._novel_bytes = 0
        self._ranks: dict[Node, _Rank] = {}  # of the proven ones
        self._by_order: dict[int, Node] = {}
        self._proven: list[_Rank] = []  # a heap; ranks that no node has are stale, and keep none in memory
        self._order = count()
        self._clock = 0.0

    def add(self, node: Node, num_bytes: int) -> None:
        """Count ``node``, which must not be here yet, and rank it. Checks no bound."""
        assert node not in self.sizes
        self.sizes[node] = num_bytes
        self.num_bytes += num_bytes
        self._rank(node)

    def remove(self, node: Node) -> None:
        """Count and rank ``node``, which must be here, no longer."""
        num_bytes = self.sizes.pop(node)
        self.num_bytes -= num_bytes
        self._drop_rank(node, num_bytes)

    def resize(self, node: Node, num_bytes: int) -> None:
        """Count ``num_bytes`` for ``node`` in place of what it had. No use: its rank stays."""
        freed = self.sizes[node] - num_bytes
        self.sizes[node] = num_bytes
        self.num_bytes -= freed
        if node in self._novel:
            self._novel_bytes -= freed

    def use(self, node: Node) -> None:
        """Rank ``node`` anew after a use, which its ``hits`` include already."""
        self._drop_rank(node, self.sizes[node])
        self._rank(node)

    def can_hold(self, num_bytes: int, protected: Collection[Node]) -> bool:
        """Return whether ``num_bytes`` would fit beside pinned and ``protected`` nodes. Evicts nothing."""
        missing = self.num_bytes + num_bytes - self.max_bytes
        for node, size in self.sizes.items():
            if missing <= 0:
                return True
            if not node.pins and node not in protected:
                missing -= size
        return missing <= 0

    def choose_victim(self, protected: Collection[Node], novel_bytes: int) -> Node | None:
        """Return the node to evict next, never a pinned or ``protected`` one; None if there is no other.

        ``novel_bytes`` are those of a node that was never reused and now wants in; 0 if a reused one does.
        """
        novel = next((node for node in self._novel if not node.pins and node not in protected), None)
        crowded = self._novel_bytes + novel_bytes > NOVEL_SHARE * self.max_bytes
        if novel is not None and (crowded or self._eviction == "lru"):
            return novel
        proven = self._find_least_proven(protected)
        if proven is not None:
            self._clock = max(self._clock, self._ranks[proven].priority)
        return proven or novel

    def check(self) -> None:
        """Assert that bytes are exact and bounded, and every node is ranked once."""
        assert self.num_bytes == sum(self.sizes.values()) <= self.max_bytes, f"bytes of tier {self.name}"
        assert self._novel_bytes == sum(self.sizes[node] for node in self._novel)
        ranked = {self._by_order[rank.order] for rank in self._proven if rank.order in self._by_order}
        assert {self._by_order[rank.order]: rank for rank in self._ranks.values()} == self._ranks, "orders of nodes"
        assert ranked == set(self._ranks) and set(self.sizes) == ranked | set(self._novel), "unranked nodes"

    def _rank(self, node: Node) -> None:
        """Put ``node`` last among the novel (``lru``: always) or, if reused, among the proven by what it saves."""
        if node.hits == 0 or self._eviction == "lru":
            self._novel[node] = None
            self._novel_bytes += self.sizes[node]
            return
        worth = 1 + (node.start + node.stop) / 2 / COSTLY_POSITION
        rank = _Rank(self._clock + min(node.hits, MOST_HITS) * worth, -node.start, next(self._order))
        self._ranks[node], self._by_order[rank.order] = rank, node
        heapq.heappush(self._proven, rank)
        if len(self._proven) > 64 + 2 * len(self.sizes):
            self._proven = list(self._ranks.values())
            heapq.heapify(self._proven)

    def _drop_rank(self, node: Node, num_bytes: int) -> None:
        """Take ``node``, which has ``num_bytes``, out of the novel and the proven."""
        if node in self._novel:
            del self._novel[node]
            self._novel_bytes -= num_bytes
        rank = self._ranks.pop(node, None)
        if rank is not None:
            del self._by_order[rank.order]

    def _find_least_proven(self, protected: Collection[Node]) -> Node | None:
        """Return the proven node of lowest rank that is not pinned or ``protected``, or None. Drops stale ranks."""
        kept = []
        found = None
        while self._proven and found is None:
            rank = heapq.heappop(self._proven)
            node = self._by_order.get(rank.order)
            if node is None:
                continue
            kept.append(rank)
            if not node.pins and node not in protected:
                found = node
        for rank in kept:
            heapq.heappush(self._proven, rank)
        return found
