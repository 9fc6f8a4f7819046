"""Where the KV of every node lies: on the model's device, in host memory or on disk.

A node is in at most one memory tier and, where there is a directory, also on disk, or in a library: memory may drop it
then. KV that no tier can keep is lost, with the entries that need it. Every bound holds after every step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial

from semsharekv_integrations.config import StoreConfig
from semsharekv_integrations.errors import StoreFileError
from semsharekv_integrations.kv import State
from semsharekv_integrations.logs import log_trouble
from semsharekv_integrations.store.codec import OUT_OF_MEMORY, PackedKV, make_if_room
from semsharekv_integrations.store.disk import DISK, DiskTier
from semsharekv_integrations.store.eviction import Tier
from semsharekv_integrations.store.files import UnavailableFileError
from semsharekv_integrations.store.homes import HOST, Homes
from semsharekv_integrations.store.radix import Node


class Unreadable(Exception):
    """The KV of ``node`` is damaged or lost; its entries must be dropped."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.node = node


class Tiers:
    """Keeps the KV of nodes. Not thread-safe.

    ``lose`` is called with a leaf that no tier can keep, and drops the entries that end with it.
    """

    def __init__(self, config: StoreConfig, lose: Callable[[Node], None]) -> None:
        """Make empty tiers; the disk tier keeps nothing until a directory is attached."""
        self._lose = lose
        self._rounds = config.kv_bits is not None
        self.counts: Counter[str] = Counter()
        self.device = Tier("device", config.max_bytes, config.eviction)
        self.memory = (self.device, Tier("host", config.host_max_bytes, config.eviction))  # fastest first
        self.disk = DiskTier(Tier(DISK, config.disk_max_bytes, config.eviction), self.counts, self._give_up)

    def place(self, node: Node, packed: PackedKV, namespace: str | None) -> bool:
        """Keep the KV of a new node in memory, else, with a ``namespace``, on disk; return whether any tier took it.

        Demotes or evicts others for it, unless there can be no room. Counts as a use of the nodes before it.
        """
        path = node.path()
        tier = next((tier for tier in self.memory if self._make_room(tier, packed.num_bytes, path)), None)
        if tier is not None and (held := packed if tier is self.device else _move(packed, HOST)) is not None:
            self._put_into(tier, node, held)
        elif namespace is not None:
            self.save([*path[:-1]], namespace)
            self.disk.save(node, packed, namespace)
        self.touch(path)
        return node.held is not None or node.on_disk is not None

    def save(self, path: Iterable[Node], namespace: str) -> None:
        """Write the nodes of ``path`` that are in memory alone to the disk, as far as it takes them."""
        for node in path:
            if node.on_disk is None and (node.held is None or not self.disk.save(node, node.held, namespace)):
                return

    def load(self, path: Sequence[Node], protected: Collection[Node]) -> list[PackedKV]:
        """Return the KV of the nodes of ``path``, promoted where there is room. Counts as a use of them.

        Never evicts ``protected`` nodes; ``path`` must be among them.

        Raises:
            UnavailableFileError: if a file cannot be read now; nothing is lost.
            Unreadable: at the first node that is damaged or vanished; or rounded, though this store keeps KV as it
                is; or that could not be promoted and then had no room any more where it was.
        """
        pieces = [self._raise(node, protected) for node in path]
        for node in path:
            node.hits += 1
        self.touch(path)
        return pieces

    def touch(self, path: Sequence[Node]) -> None:
        """Make the nodes the most recent ones; of them, the last of ``path`` is the least recent. Adds no hit."""
        for node in reversed(path):
            for tier in (*self.memory, self.disk.tier):
                if node in tier.sizes:
                    tier.use(node)

    def drop(self, nodes: Sequence[Node], keys: Iterable[str]) -> None:
        """Drop the KV of nodes that left their tree; the next commit deletes them and the entries ``keys`` on disk."""
        for node in nodes:
            self._take_out(node)
        self.disk.drop(nodes, keys)

    def split(self, upper: Node, lower: Node, namespace: str) -> None:
        """Divide the KV of ``lower`` in its tiers: ``upper`` has taken over its first tokens. Loses and writes none."""
        tier = self.find_tier(lower)
        if lower.held is not None and tier is not None:
            whole, num_tokens = lower.held, len(upper.token_ids)
            lower.held = _take_part(whole, num_tokens, whole.num_tokens)
            tier.resize(lower, lower.held.num_bytes)
            self._put_into(tier, upper, _take_part(whole, 0, num_tokens))
        self.disk.split(upper, lower, namespace)

    def add_checkpoints(self, path: Sequence[Node], checkpoints: Mapping[int, State]) -> None:
        """Give nodes of ``path`` in memory the states, by position, that they lack, as far as there is room."""
        for node in path:
            tier, held = self.find_tier(node), node.held
            if tier is None or held is None:
                continue
            places = {at - node.start: state for at, state in checkpoints.items() if node.start < at <= node.stop}
            missing = {at: state for at, state in places.items() if at not in held.checkpoints}
            fuller = make_if_room(partial(held.add_checkpoints, missing)) if missing else None
            if fuller is not None and self._make_room(tier, fuller.num_bytes - held.num_bytes, path):
                node.held = fuller
                tier.resize(node, fuller.num_bytes)

    def make(self, make: Callable[[], PackedKV], protected: Collection[Node] | None) -> PackedKV | None:
        """Return what ``make`` returns; None (logged) if memory runs out.

        Unless ``protected`` is None, then first empty the device, but for these nodes, and try once more.
        """
        made = make_if_room(make)
        if made is not None or protected is None:
            return made
        self.empty_device(protected)
        return make_if_room(make)

    def empty_device(self, protected: Collection[Node] = ()) -> tuple[int, int]:
        """Take all but pinned and ``protected`` nodes out of the device tier; return bytes gone, and bytes left.

        They go to a lower tier, else they are lost. Where the device is the host itself, host memory is no lower tier.
        """
        before = self.device.num_bytes
        while (victim := self.device.choose_victim(protected, 0)) is not None:
            assert victim.held is not None
            if victim.held.homes != HOST:
                self._demote(self.device, victim, protected)
            elif victim.outlasts_memory:
                self._take_out(victim)
                self.counts["demoted"] += 1
            else:
                self._give_up(victim)
        return before - self.device.num_bytes, self.device.num_bytes

    def find_tier(self, node: Node) -> Tier | None:
        """Return the memory tier that holds ``node``, or None."""
        return next((tier for tier in self.memory if node in tier.sizes), None)

    def check(self, nodes: Collection[Node], written: set[str]) -> None:
        """Assert that tiers hold exactly what ``nodes``, which are all, say; and the catalog the keys ``written``."""
        for tier in self.memory:
            held = {node: node.held.num_bytes for node in nodes if node.held is not None and node in tier.sizes}
            assert tier.sizes == held, f"tier {tier.name} differs from its nodes"
            tier.check()
        for node in nodes:
            assert node.held is not None or node.outlasts_memory, "a node without KV"
            assert node.on_disk is None or node.shelved is None, "a node of a library in the directory"
            assert node.held is None or node.held.num_tokens == len(node.token_ids)
            assert sum(node in tier.sizes for tier in self.memory) == (node.held is not None), "tiers of a node"
        self.disk.check(nodes, written)

    def _make_room(self, tier: Tier, num_bytes: int, protected: Collection[Node], *, novel: bool = True) -> bool:
        """Demote nodes of ``tier`` until ``num_bytes`` fit. Return False, and demote none, if they cannot fit.

        ``novel`` tells that the bytes are of a node that was never reused, which displaces others like it first.
        """
        if not tier.can_hold(num_bytes, protected):
            return False
        while tier.num_bytes + num_bytes > tier.max_bytes:
            victim = tier.choose_victim(protected, num_bytes if novel else 0)
            assert victim is not None, "what is neither pinned nor protected can go"
            self._demote(tier, victim, protected)
        return True

    def _demote(self, tier: Tier, node: Node, protected: Collection[Node]) -> None:
        """Move ``node`` to a lower memory tier, or leave it to the disk. If neither works, call ``_give_up``."""
        assert node.held is not None
        packed, novel = node.held, node.hits == 0
        for lower in self.memory[self.memory.index(tier) + 1 :]:
            if not self._make_room(lower, packed.num_bytes, protected, novel=novel):
                continue
            if node.held is None:  # went with what had to go from there
                return
            if (moved := _move(packed, HOST)) is not None:
                self._take_out(node)
                self._put_into(lower, node, moved)
                self.counts["demoted"] += 1
                return
        if node.outlasts_memory:
            self._take_out(node)
            self.counts["demoted"] += 1
        else:
            self._give_up(node)

    def _give_up(self, node: Node) -> None:
        """Lose ``node`` or, if nodes stand behind it, one leaf of these; count the entries lost as evicted."""
        while node.children:
            node = next(iter(node.children.values()))
        self.counts["evicted"] += len(node.entries)
        self._lose(node)

    def _raise(self, node: Node, protected: Collection[Node]) -> PackedKV:
        """Return the KV of ``node``, promoted to the highest tier with room. Raises as ``load``; logs bad files."""
        if node.held is not None:
            return self._raise_held(node, node.held, protected)
        try:
            return self._raise_stored(node, protected)
        except UnavailableFileError:
            log_trouble("unavailable_file")
            raise
        except StoreFileError:
            log_trouble("unreadable_file")
            raise Unreadable(node) from None

    def _raise_stored(self, node: Node, protected: Collection[Node]) -> PackedKV:
        """As ``_raise``, for a node that is not in memory. Raises ``StoreFileError`` for a bad file."""
        stored = node.shelved or self.disk.locate(node)
        if node.shelved is not None and stored.homes == HOST:
            mapped = stored.read()
            self._require_kind(node, mapped)
            return mapped
        form = stored.describe()
        self._require_kind(node, form)
        tier = next((tier for tier in self.memory if tier.can_hold(form.num_bytes, protected)), None)
        if tier is None:
            return stored.read()
        self._make_room(tier, form.num_bytes, protected, novel=False)
        homes = form.homes if tier is self.device else HOST
        raised = make_if_room(lambda: stored.load(homes))
        self.counts["promotion_failed" if raised is None else "promoted"] += 1
        if raised is None:  # there was room in the tier, and none in the machine
            return stored.read()
        self._put_into(tier, node, raised)
        return raised

    def _raise_held(self, node: Node, packed: PackedKV, protected: Collection[Node]) -> PackedKV:
        """As ``_raise``, for a node in a memory tier."""
        self._require_kind(node, packed)
        for tier in self.memory:
            if node in tier.sizes:
                break
            if tier.can_hold(packed.num_bytes, protected):
                return self._promote(node, packed, tier, protected)
        return packed

    def _require_kind(self, node: Node, packed: PackedKV) -> None:
        """Raise ``Unreadable`` for KV that another store has rounded, which takes it for good enough."""
        if packed.is_rounded and not self._rounds:
            raise Unreadable(node)

    def _promote(self, node: Node, packed: PackedKV, tier: Tier, protected: Collection[Node]) -> PackedKV:
        """Move ``node`` from a lower tier to ``tier``; return its KV.

        If memory runs out, return it unmoved or raise ``Unreadable``.
        """
        former = self.find_tier(node)
        assert former is not None
        self._take_out(node)  # first, so that what must go from the device finds room on the host
        self._make_room(tier, packed.num_bytes, protected, novel=False)
        raised = _move(packed, packed.homes if tier is self.device else HOST)
        if raised is not None:
            self._put_into(tier, node, raised)
            self.counts["promoted"] += 1
            return raised
        # There was room in the tier, and none in the machine: it is served from where it was.
        self.counts["promotion_failed"] += 1
        if self._make_room(former, packed.num_bytes, protected, novel=False):
            self._put_into(former, node, packed)
        elif not node.outlasts_memory:
            raise Unreadable(node)
        return packed

    def _put_into(self, tier: Tier, node: Node, packed: PackedKV) -> None:
        node.held = packed
        tier.add(node, packed.num_bytes)

    def _take_out(self, node: Node) -> None:
        """Drop ``node`` from memory, if it is there."""
        tier = self.find_tier(node)
        if tier is not None:
            tier.remove(node)
        node.held = None


def _move(packed: PackedKV, homes: Homes) -> PackedKV | None:
    """Return ``packed`` at ``homes``; None (logged) if there is no memory for it."""
    return make_if_room(lambda: packed.move_to(homes))


def _take_part(whole: PackedKV, start: int, stop: int) -> PackedKV:
    """Return the tokens of ``whole`` from ``start`` to ``stop``: a copy or, if there is no memory for it, a view."""
    try:
        return whole.copy_part(start, stop)
    except OUT_OF_MEMORY:
        return whole.view_part(start, stop)
