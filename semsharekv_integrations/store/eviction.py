"""What a tier holds, in bytes, and which node goes first when it is full.

What was reused before is proven, anything else novel. A full tier gives up the novel nodes first, least recently used
first, down to a share of its room, so a stream of prompts that never come back flushes none that did. Proven nodes go
by the compute that a byte of them saves: every use adds what it saved, and what is not used falls behind as others rise
(greedy dual size frequency, Cherkasova 1998). All nodes of a model take the same bytes for a token, and a token saves
the more, the more tokens it would attend to.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Collection, Iterator
from itertools import count
from typing import NamedTuple

from semsharekv_integrations.config import Eviction
from semsharekv_integrations.store.radix import Node

NOVEL_SHARE = 0.25  # of a full tier is for nodes that were never reused
COSTLY_POSITION = 8192  # where attending to all before costs about as much as the rest of a layer
MOST_HITS = 4.0  # so that what was once popular is outlived soon


class _Rank(NamedTuple):
    """Where a proven node stands: the lowest goes first, of equals the one that fewest others need."""

    priority: float
    before_start: int
    order: int


class Tier:
    """A bounded number of bytes in nodes; which nodes these are is told by its caller.

    Args:
        name: of the tier.
        max_bytes: bound.
        eviction: ``value`` as above, or ``lru``: least recently used first, whatever it was.
    """

    def __init__(self, name: str, max_bytes: int, eviction: Eviction = "value") -> None:
        self.name = name
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._eviction = eviction
        self._sizes: dict[Node, int] = {}
        self._novel: OrderedDict[Node, None] = OrderedDict()  # least recently used first
        self._novel_bytes = 0
        self._ranks: dict[Node, _Rank] = {}  # of the proven ones
        self._by_order: dict[int, Node] = {}
        self._proven: list[_Rank] = []  # a heap; ranks that no node has are stale, and keep none in memory
        self._order = count()
        self._clock = 0.0

    def __contains__(self, node: Node) -> bool:
        return node in self._sizes

    def add(self, node: Node, num_bytes: int) -> None:
        """Count ``node``, which is not here yet."""
        assert node not in self._sizes
        self._sizes[node] = num_bytes
        self.num_bytes += num_bytes
        self._rank(node)

    def remove(self, node: Node) -> None:
        """Count ``node`` no longer."""
        num_bytes = self._sizes.pop(node)
        self.num_bytes -= num_bytes
        self._unrank(node, num_bytes)

    def shrink(self, node: Node, num_bytes: int) -> None:
        """``node`` has only ``num_bytes`` left; it was not used."""
        freed = self._sizes[node] - num_bytes
        self._sizes[node] = num_bytes
        self.num_bytes -= freed
        if node in self._novel:
            self._novel_bytes -= freed

    def use(self, node: Node) -> None:
        """``node``, which is here, was used once more; its hits are counted already."""
        self._unrank(node, self._sizes[node])
        self._rank(node)

    def can_hold(self, num_bytes: int, protected: Collection[Node]) -> bool:
        """Whether so much fits beside what is pinned or ``protected``."""
        missing = self.num_bytes + num_bytes - self.max_bytes
        for node, size in self._sizes.items():
            if missing <= 0:
                return True
            if not node.pins and node not in protected:
                missing -= size
        return missing <= 0

    def victim(self, protected: Collection[Node], novel_bytes: int) -> Node | None:
        """What goes next, or None: never pinned, never ``protected``; ``novel_bytes`` are about to come."""
        novel = next((node for node in self._novel if not node.pins and node not in protected), None)
        crowded = self._novel_bytes + novel_bytes > NOVEL_SHARE * self.max_bytes
        if novel is not None and (crowded or self._eviction == "lru"):
            return novel
        proven = self._least_proven(protected)
        if proven is not None:
            self._clock = max(self._clock, self._ranks[proven].priority)
        return proven or novel

    def _rank(self, node: Node) -> None:
        if node.hits == 0 or self._eviction == "lru":
            self._novel[node] = None
            self._novel_bytes += self._sizes[node]
            return
        worth = 1 + (node.start + node.stop) / 2 / COSTLY_POSITION
        rank = _Rank(self._clock + min(node.hits, MOST_HITS) * worth, -node.start, next(self._order))
        self._ranks[node], self._by_order[rank.order] = rank, node
        heapq.heappush(self._proven, rank)
        if len(self._proven) > 64 + 2 * len(self._sizes):
            self._proven = list(self._ranks.values())
            heapq.heapify(self._proven)

    def _unrank(self, node: Node, num_bytes: int) -> None:
        if node in self._novel:
            del self._novel[node]
            self._novel_bytes -= num_bytes
        rank = self._ranks.pop(node, None)
        if rank is not None:
            del self._by_order[rank.order]

    def _least_proven(self, protected: Collection[Node]) -> Node | None:
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

    def size_of(self, node: Node) -> int:
        """Bytes that ``node``, which is here, counts for."""
        return self._sizes[node]

    def sizes(self) -> Iterator[tuple[Node, int]]:
        """Every node that is counted, and its bytes."""
        return iter(self._sizes.items())

    def check(self) -> None:
        """The law: bytes are exact and bounded, and every node is ranked once."""
        assert self.num_bytes == sum(self._sizes.values()) <= self.max_bytes, f"bytes of tier {self.name}"
        assert self._novel_bytes == sum(self._sizes[node] for node in self._novel)
        ranked = {self._by_order[rank.order] for rank in self._proven if rank.order in self._by_order}
        assert {self._by_order[rank.order]: rank for rank in self._ranks.values()} == self._ranks, "orders of nodes"
        assert ranked == set(self._ranks) and set(self._sizes) == ranked | set(self._novel), "unranked nodes"
