"""Where the KV of every node lies: on the model's device, in host memory, on disk, and how it moves between them.

A node is in one memory tier at most, and on disk as well where there is a directory: what memory gives up is still
there. What no tier can keep is lost, and with it the entries that need it. Every bound holds after every step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

import torch

from semsharekv_integrations.config import StoreConfig
from semsharekv_integrations.errors import StoreFileError
from semsharekv_integrations.logs import log_trouble
from semsharekv_integrations.store.codec import OUT_OF_MEMORY, PackedKV
from semsharekv_integrations.store.disk import DiskTier
from semsharekv_integrations.store.eviction import Tier
from semsharekv_integrations.store.files import UnavailableFileError
from semsharekv_integrations.store.radix import Node

DEVICE, HOST = "device", "host"
_CPU = torch.device("cpu")


class Unreadable(Exception):
    """The KV of a node cannot be had; the node has to go."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.node = node


class Tiers:
    """Keeps the KV of nodes. Not safe to use from several threads by itself.

    Args:
        config: bounds.
        lose: drops all entries that end with a node, whose KV no tier keeps any more; the node has no children.
    """

    def __init__(self, config: StoreConfig, lose: Callable[[Node], None]) -> None:
        self._lose = lose
        self._rounds = config.kv_bits is not None
        self.counts: Counter[str] = Counter()
        self.device = Tier(DEVICE, config.max_bytes, config.eviction)
        self.host = Tier(HOST, config.host_max_bytes, config.eviction)
        self.disk = DiskTier(config, self.counts, self._give_up)

    def place(self, node: Node, packed: PackedKV, namespace: str | None) -> bool:
        """Keep the KV of a new node, in memory and, for a ``namespace``, on disk; whether there was room for it.

        What must go for it is moved down or lost; nothing is, if there is no room. Counts as a use of what is before.
        """
        path = node.path()
        tier = next((tier for tier in (self.device, self.host) if self._make_room(tier, packed.num_bytes, path)), None)
        if tier is not None and (held := packed if tier is self.device else _moved(packed, _CPU)) is not None:
            node.held = held
            self._into(tier, node)
        saved = namespace is not None and self.disk.save(node, packed, namespace)
        self.touch(path)
        return node.held is not None or saved

    def load(self, path: Sequence[Node], protected: Collection[Node]) -> list[PackedKV]:
        """The KV of nodes, ready for the model; what lay lower moves up if there is room. Counts as a use.

        Nothing that is ``protected``, which includes ``path``, is lost for it.

        Raises:
            UnavailableFileError: if a file cannot be read now; nothing has to go.
            Unreadable: naming the first node that is damaged, vanished, rounded though this store keeps KV as it is, or
                has no room after it could not be moved up.
        """
        pieces = [self._raised(node, protected) for node in path]
        for node in path:
            node.hits += 1
        self.touch(path)
        return pieces

    def touch(self, path: Sequence[Node]) -> None:
        """The nodes are the most recent ones; of them the one that fewest others need is the least recent."""
        for node in reversed(path):
            for tier in (self.device, self.host, self.disk.tier):
                if node in tier:
                    tier.use(node)

    def drop(self, nodes: Sequence[Node], keys: Sequence[str]) -> None:
        """Forget the KV of nodes that are no longer in their tree, and what is written of the entries ``keys``."""
        for node in nodes:
            self._out_of_memory(node)
        self.disk.drop(nodes, keys)

    def split(self, upper: Node, lower: Node, namespace: str) -> None:
        """``upper`` has become the first tokens of what ``lower`` was: divide the KV."""
        if lower.held is not None:
            tier, whole, num_tokens = self._tier_of(lower), lower.held, len(upper.token_ids)
            upper.held = _part(whole, 0, num_tokens)
            lower.held = _part(whole, num_tokens, whole.num_tokens)
            tier.shrink(lower, lower.held.num_bytes)
            self._into(tier, upper)
        self.disk.split(upper, lower, namespace)

    def could_hold(self, num_bytes: int) -> bool:
        """Whether a memory tier has so much room beside what is pinned."""
        return any(tier.can_hold(num_bytes, ()) for tier in (self.device, self.host))

    def check(self, nodes: Collection[Node], written: set[str]) -> None:
        """The law: tiers hold exactly what ``nodes``, which are all there are, say of themselves.

        The entries ``written`` are those in the catalog.
        """
        for tier in (self.device, self.host):
            held = {node: node.held.num_bytes for node in nodes if node.held is not None and node.tier == tier.name}
            assert dict(tier.sizes()) == held, f"tier {tier.name} differs from its nodes"
            tier.check()
        for node in nodes:
            assert node.held is not None or node.on_disk is not None, "a node without KV"
            assert node.held is None or node.held.num_tokens == len(node.token_ids)
            assert (node.held is None) == (node.tier is None)
        self.disk.check(nodes, written)

    def _make_room(self, tier: Tier, num_bytes: int, protected: Collection[Node], *, novel: bool = True) -> bool:
        """Whether so much fits into ``tier``, after what must go for it has gone."""
        if not tier.can_hold(num_bytes, protected):
            return False
        while tier.num_bytes + num_bytes > tier.max_bytes:
            victim = tier.victim(protected, num_bytes if novel else 0)
            assert victim is not None, "what is neither pinned nor protected can go"
            self._step_down(tier, victim, protected)
        return True

    def _step_down(self, tier: Tier, node: Node, protected: Collection[Node]) -> None:
        """Take ``node`` out of ``tier``: to host memory or to the disk alone, else it is lost, its last child first."""
        assert node.held is not None
        packed, novel = node.held, node.hits == 0
        if tier is self.device and self._make_room(self.host, packed.num_bytes, protected, novel=novel):
            if node.held is None:  # went with what had to go from there
                return
            if (moved := _moved(packed, _CPU)) is not None:
                self._out_of_memory(node)
                node.held = moved
                self._into(self.host, node)
                self.counts["demoted"] += 1
                return
        if node.on_disk is not None:
            self._out_of_memory(node)
            self.counts["demoted"] += 1
        else:
            self._give_up(node)

    def _give_up(self, node: Node) -> None:
        """Lose a node, or rather one that nothing follows."""
        while node.children:
            node = next(iter(node.children.values()))
        self.counts["evicted"] += len(node.entries)
        self._lose(node)

    def _raised(self, node: Node, protected: Collection[Node]) -> PackedKV:
        """Its KV, in the highest tier that has room."""
        packed = node.held or self._read(node)
        if packed.is_rounded and not self._rounds:  # another store wrote it, which takes it for good enough
            raise Unreadable(node)
        for tier in (self.device, self.host):
            if node.tier == tier.name:
                return packed
            if tier.can_hold(packed.num_bytes, protected):
                return self._moved_up(node, packed, tier, protected)
        return packed

    def _moved_up(self, node: Node, packed: PackedKV, tier: Tier, protected: Collection[Node]) -> PackedKV:
        was_held = node.held is not None
        self._out_of_memory(node)  # first, so that what must go from the device finds room on the host
        self._make_room(tier, packed.num_bytes, protected, novel=False)
        target = packed.device if tier is self.device else _CPU
        raised = _moved(packed, target, copied=not was_held)
        if raised is None:
            self.counts["promotion_failed"] += 1
            return self._left_below(node, packed, protected, was_held=was_held)
        node.held = raised
        self._into(tier, node)
        self.counts["promoted"] += 1
        return raised

    def _left_below(self, node: Node, packed: PackedKV, protected: Collection[Node], *, was_held: bool) -> PackedKV:
        """The KV of a node for which a tier had room and the machine no memory: it is served from where it was."""
        if was_held and self._make_room(self.host, packed.num_bytes, protected, novel=False):
            node.held = packed
            self._into(self.host, node)
        elif node.on_disk is None:
            raise Unreadable(node)
        return packed

    def _read(self, node: Node) -> PackedKV:
        try:
            return self.disk.read(node)
        except UnavailableFileError:
            log_trouble("unavailable_file")
            raise
        except StoreFileError:
            log_trouble("unreadable_file")
            raise Unreadable(node) from None

    def _into(self, tier: Tier, node: Node) -> None:
        assert node.held is not None
        node.tier = tier.name
        tier.add(node, node.held.num_bytes)

    def _out_of_memory(self, node: Node) -> None:
        if node.tier is not None:
            self._tier_of(node).remove(node)
        node.held = node.tier = None

    def _tier_of(self, node: Node) -> Tier:
        return {DEVICE: self.device, HOST: self.host}[str(node.tier)]


def _moved(packed: PackedKV, device: torch.device, *, copied: bool = False) -> PackedKV | None:
    """``packed`` on ``device``, or None if there is no memory for it."""
    try:
        return packed.copied(device) if copied else packed.moved(device)
    except OUT_OF_MEMORY:
        log_trouble("out_of_memory")
        return None


def _part(whole: PackedKV, start: int, stop: int) -> PackedKV:
    """Some tokens of ``whole``, copied if there is memory for it."""
    try:
        return whole.part(start, stop)
    except OUT_OF_MEMORY:
        return whole.view(start, stop)
