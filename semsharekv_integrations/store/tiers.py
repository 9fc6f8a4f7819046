"""Where the KV of every node lies: on the model's device, in host memory or on disk; and what is evicted.

A node is in at most one memory tier and, where there is a directory, also on disk: memory may drop it then. KV that no
tier can keep is lost, with the entries that need it. Every bound holds after every step.

A node that was reused is proven, any other novel. A full tier evicts novel nodes first, least recently used first, down
to a share of its room, so a stream of prompts that never return evicts none that did. Proven nodes go by the compute
that a byte of them saves: every use adds what it saved, and unused nodes fall behind as others rise (greedy dual size
frequency, Cherkasova 1998). All nodes of a model take the same bytes per token; a token saves the more compute, the
more tokens it attends to.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import count
from typing import NamedTuple

import torch

from semsharekv_integrations.config import Eviction, StoreConfig
from semsharekv_integrations.errors import StoreFileError
from semsharekv_integrations.logs import log_trouble
from semsharekv_integrations.store.codec import OUT_OF_MEMORY, PackedKV, make_if_room
from semsharekv_integrations.store.disk import DISK, DiskTier
from semsharekv_integrations.store.files import UnavailableFileError
from semsharekv_integrations.store.radix import Node

NOVEL_SHARE = 0.25  # of a full tier is for nodes that were never reused
COSTLY_POSITION = 8192  # where attending to all before costs about as much as the rest of a layer
MOST_HITS = 4.0  # so that what was once popular is outlived soon
_CPU = torch.device("cpu")


class Unreadable(Exception):
    """The KV of ``node`` is damaged or lost; its entries must be dropped."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.node = node


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

    def shrink(self, node: Node, num_bytes: int) -> None:
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
        """Return the node to evict next, never a pinned or ``protected`` one, or None, before ``novel_bytes`` come."""
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


class Tiers:
    """Keeps the KV of nodes. Not thread-safe. ``lose`` drops the entries that end with a leaf without KV."""

    def __init__(self, config: StoreConfig, lose: Callable[[Node], None]) -> None:
        """Make empty tiers; the disk tier keeps nothing until a directory is attached."""
        self._lose = lose
        self._rounds = config.kv_bits is not None
        self.counts: Counter[str] = Counter()
        self.device = Tier("device", config.max_bytes, config.eviction)
        self.memory = (self.device, Tier("host", config.host_max_bytes, config.eviction))  # fastest first
        self.disk = DiskTier(Tier(DISK, config.disk_max_bytes, config.eviction), self.counts, self._give_up)

    def place(self, node: Node, packed: PackedKV, namespace: str | None) -> bool:
        """Keep the KV of a new node in memory and, with a ``namespace``, on disk; return whether any tier took it.

        Demotes or evicts others for it, unless there can be no room. Counts as a use of the nodes before it.
        """
        path = node.path()
        tier = next((tier for tier in self.memory if self._make_room(tier, packed.num_bytes, path)), None)
        if tier is not None and (held := packed if tier is self.device else _move(packed, _CPU)) is not None:
            self._put_into(tier, node, held)
        saved = namespace is not None and self.disk.save(node, packed, namespace)
        self.touch(path)
        return node.held is not None or saved

    def load(self, path: Sequence[Node], protected: Collection[Node]) -> list[PackedKV]:
        """Return the KV of the nodes of ``path``, promoted where there is room. Counts as a use of them.

        Never evicts ``protected`` nodes; ``path`` must be among them.

        Raises:
            UnavailableFileError: if a file cannot be read now; nothing is lost.
            Unreadable: at the first node that is damaged, vanished, rounded though this store keeps KV as it is, or
                has no room after it could not be promoted.
        """
        pieces = [self._raise(node, protected) for node in path]
        for node in path:
            node.hits += 1
        self.touch(path)
        return pieces

    def touch(self, path: Sequence[Node]) -> None:
        """Make the nodes the most recent ones; of them, the last of ``path`` is the least recent. Adds no hit."""
        for node in reversed(path):
            if node.tier is not None:
                node.tier.use(node)
            if node.on_disk is not None:
                self.disk.tier.use(node)

    def drop(self, nodes: Sequence[Node], keys: Iterable[str]) -> None:
        """Drop the KV of nodes that left their tree; the next commit deletes them and the entries ``keys`` on disk."""
        for node in nodes:
            self._take_out(node)
        self.disk.drop(nodes, keys)

    def split(self, upper: Node, lower: Node, namespace: str) -> None:
        """Divide the KV of ``lower``, in memory and on disk; ``upper`` has taken over its first tokens."""
        if lower.held is not None and lower.tier is not None:
            whole, num_tokens = lower.held, len(upper.token_ids)
            lower.held = _take_part(whole, num_tokens, whole.num_tokens)
            lower.tier.shrink(lower, lower.held.num_bytes)
            self._put_into(lower.tier, upper, _take_part(whole, 0, num_tokens))
        self.disk.split(upper, lower, namespace)

    def check(self, nodes: Collection[Node], written: set[str]) -> None:
        """Assert that tiers hold exactly what ``nodes``, which are all, say; and the catalog the keys ``written``."""
        for tier in self.memory:
            held = {node: node.held.num_bytes for node in nodes if node.held is not None and node.tier is tier}
            assert tier.sizes == held, f"tier {tier.name} differs from its nodes"
            tier.check()
        for node in nodes:
            assert node.held is not None or node.on_disk is not None, "a node without KV"
            assert node.held is None or node.held.num_tokens == len(node.token_ids)
            assert (node.held is None) == (node.tier is None)
        self.disk.check(nodes, written)

    def _make_room(self, tier: Tier, num_bytes: int, protected: Collection[Node], *, novel: bool = True) -> bool:
        """Demote nodes of ``tier`` until ``num_bytes`` fit. Return False, and demote none, if they cannot fit."""
        if not tier.can_hold(num_bytes, protected):
            return False
        while tier.num_bytes + num_bytes > tier.max_bytes:
            victim = tier.choose_victim(protected, num_bytes if novel else 0)
            assert victim is not None, "what is neither pinned nor protected can go"
            self._demote(tier, victim, protected)
        return True

    def _demote(self, tier: Tier, node: Node, protected: Collection[Node]) -> None:
        """Move ``node`` to a lower memory tier, or leave it to the disk; else lose it, its last child first."""
        assert node.held is not None
        packed, novel = node.held, node.hits == 0
        for lower in self.memory[self.memory.index(tier) + 1 :]:
            if not self._make_room(lower, packed.num_bytes, protected, novel=novel):
                continue
            if node.held is None:  # went with what had to go from there
                return
            if (moved := _move(packed, _CPU)) is not None:
                self._take_out(node)
                self._put_into(lower, node, moved)
                self.counts["demoted"] += 1
                return
        if node.on_disk is not None:
            self._take_out(node)
            self.counts["demoted"] += 1
        else:
            self._give_up(node)

    def _give_up(self, node: Node) -> None:
        """Lose ``node`` or, if it has children, one node without any behind it; count its entries as evicted."""
        while node.children:
            node = next(iter(node.children.values()))
        self.counts["evicted"] += len(node.entries)
        self._lose(node)

    def _raise(self, node: Node, protected: Collection[Node]) -> PackedKV:
        """Return the KV of ``node``, promoted to the highest tier with room. Raises as ``load``; logs bad files."""
        try:
            packed = node.held or self.disk.read(node)
        except UnavailableFileError:
            log_trouble("unavailable_file")
            raise
        except StoreFileError:
            log_trouble("unreadable_file")
            raise Unreadable(node) from None
        if packed.is_rounded and not self._rounds:  # another store wrote it, which takes it for good enough
            raise Unreadable(node)
        for tier in self.memory:
            if node.tier is tier:
                return packed
            if tier.can_hold(packed.num_bytes, protected):
                return self._promote(node, packed, tier, protected)
        return packed

    def _promote(self, node: Node, packed: PackedKV, tier: Tier, protected: Collection[Node]) -> PackedKV:
        """Move ``node`` to ``tier``; return its KV. If memory runs out, return it unmoved or raise ``Unreadable``."""
        former = node.tier
        self._take_out(node)  # first, so that what must go from the device finds room on the host
        self._make_room(tier, packed.num_bytes, protected, novel=False)
        raised = _move(packed, packed.device if tier is self.device else _CPU, copied=former is None)
        if raised is not None:
            self._put_into(tier, node, raised)
            self.counts["promoted"] += 1
            return raised
        # There was room in the tier, and none in the machine: it is served from where it was.
        self.counts["promotion_failed"] += 1
        if former is not None and self._make_room(former, packed.num_bytes, protected, novel=False):
            self._put_into(former, node, packed)
        elif node.on_disk is None:
            raise Unreadable(node)
        return packed

    def _put_into(self, tier: Tier, node: Node, packed: PackedKV) -> None:
        node.held, node.tier = packed, tier
        tier.add(node, packed.num_bytes)

    def _take_out(self, node: Node) -> None:
        """Drop ``node`` from memory, if it is there."""
        if node.tier is not None:
            node.tier.remove(node)
        node.held = node.tier = None


def _move(packed: PackedKV, device: torch.device, *, copied: bool = False) -> PackedKV | None:
    """Return ``packed`` on ``device``, always as a copy if ``copied``; None (logged) if there is no memory for it."""
    return make_if_room(lambda: packed.copy_to(device) if copied else packed.move_to(device))


def _take_part(whole: PackedKV, start: int, stop: int) -> PackedKV:
    """Return the tokens of ``whole`` from ``start`` to ``stop``: a copy or, if there is no memory for it, a view."""
    try:
        return whole.copy_part(start, stop)
    except OUT_OF_MEMORY:
        return whole.view_part(start, stop)
