"""The disk tier: KV in the files of a directory, bounded, and a catalog that says which prompts need it.

Whatever one call of the store changes is one transaction of the catalog, at its end. Only a KV file that is written, or
deleted to make room, has a transaction of its own before that. A change that the catalog refuses (disk full) is owed:
the next transaction includes it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress

import torch

from semsharekv_integrations.errors import StoreFileError, StoreWriteError
from semsharekv_integrations.logs import log_trouble
from semsharekv_integrations.store.codec import OUT_OF_MEMORY, PackedKV, raise_memory_errors
from semsharekv_integrations.store.directory import MOST_REMOVED, KVDirectory
from semsharekv_integrations.store.eviction import Tier
from semsharekv_integrations.store.homes import HOST, Homes
from semsharekv_integrations.store.placed import PlacedKV
from semsharekv_integrations.store.radix import FileRange, Node
from semsharekv_integrations.store.records import EntryRecord, FileRecord, NodeRecord

DISK = "disk"
_HEADER_BYTES = 512  # of a file, at most, and of each tensor in it


class Writing:
    """A file that is being written for ``node``. ``run`` needs no lock; ``record`` is None until it has worked."""

    def __init__(self, node: Node, packed: PackedKV, directory: KVDirectory) -> None:
        self.node = node
        self.directory = directory
        self.record: FileRecord | None = None
        self.num_tokens = packed.num_tokens
        self._packed = packed

    def run(self) -> None:
        """Write the file. Raises nothing that ``DiskTier`` counts as a failed write."""
        with suppress(StoreWriteError, *OUT_OF_MEMORY), raise_memory_errors():
            self.record = self.directory.files.write_apart(self._packed.tensors, self._packed.num_tokens)


class DiskTier:
    """Keeps the KV of nodes in files; without a directory, nothing. Not thread-safe: the store's lock guards it.

    ``tier`` counts the bytes of each node, and chooses what goes first. ``give_up`` drops a node that no
    other tier holds or, if nodes stand behind it, one of these. Increments ``counts`` for every trouble.
    """

    def __init__(self, tier: Tier, counts: Counter[str], give_up: Callable[[Node], None]) -> None:
        self.tier = tier
        self._directory: KVDirectory | None = None
        self._counts = counts
        self._give_up = give_up
        self._home = (torch.float32, HOST)
        self._nodes: dict[str, NodeRecord | None] = {}  # what the next transaction writes, by id; None: deletes
        self._entries: dict[str, EntryRecord | None] = {}
        self._has_news = False  # whether any of this came after the last transaction, be it refused or not

    def attach(self, directory: KVDirectory, dtype: torch.dtype, homes: Homes) -> None:
        """Use ``directory`` from now on; KV read from it is for a model that takes ``dtype`` at ``homes``."""
        self._directory = directory
        self._home = dtype, homes

    def locate(self, node: Node) -> PlacedKV:
        """Return where the KV of ``node``, which must be on disk, lies."""
        assert self._directory is not None and node.on_disk is not None
        return PlacedKV(self._directory.files, node.on_disk, len(node.token_ids), *self._home)

    def save(self, node: Node, packed: PackedKV, namespace: str) -> bool:
        """Write ``node`` and commit. False if there is no directory, no room, an ancestor off disk, or it fails."""
        if not self.takes(node, packed.num_bytes + _HEADER_BYTES * (1 + len(packed.tensors))):
            return False
        if (num_bytes := self._write([node], lambda: packed.tensors, namespace)) is None:
            return False
        self.tier.add(node, num_bytes)
        return True

    def takes(self, node: Node, num_bytes: int) -> bool:
        """Return whether a file of so many bytes for ``node`` may come; makes room for it.

        Not without a directory, if an ancestor is off disk, or if there is no room, which is counted.
        """
        before = node.path()[:-1]
        if self._directory is None or any(earlier.on_disk is None for earlier in before):
            return False
        if not self._make_room(num_bytes, before):
            self._counts["disk_refused"] += 1
            return False
        return True

    def begin(self, node: Node, packed: PackedKV) -> Writing | None:
        """Return what writes ``node``, whose KV is ``packed``, without the store's lock; None as ``takes`` says."""
        if not self.takes(node, packed.num_bytes + _HEADER_BYTES * (1 + len(packed.tensors))):
            return None
        assert self._directory is not None
        return Writing(node, packed, self._directory)

    def end(self, writing: Writing, namespace: str) -> bool:
        """Note and commit what was written meanwhile; return whether it is on disk now.

        If it failed, or the node is gone or was divided, the file is deleted.
        """
        node, record = writing.node, writing.record
        if record is None:
            self._note_failure()
            return False
        files = writing.directory.files
        there = node.parent is not None and node.parent.children.get(int(node.token_ids[0])) is node
        whole = there and node.on_disk is None and len(node.token_ids) == record.num_tokens
        if not (writing.directory is self._directory and whole and self.takes(node, record.num_bytes)):
            files.remove(record.id)
            return False
        files.records[record.id] = record
        if (num_bytes := self._enter([node], record.id, namespace)) is None:
            return False
        self.tier.add(node, num_bytes)
        return True

    def drop(self, nodes: Sequence[Node], keys: Iterable[str]) -> None:
        """Take ``nodes`` out of the tier; the next commit deletes their records and those of the entries ``keys``."""
        gone = [node for node in nodes if node.on_disk is not None]
        self.change(dict.fromkeys(node.id for node in gone), dict.fromkeys(keys))
        for node in gone:
            self.tier.remove(node)
            node.on_disk = None

    def split(self, upper: Node, lower: Node, namespace: str) -> None:
        """Divide bytes and file range of ``lower``, if on disk; ``upper`` has its first tokens. Does not commit."""
        if lower.on_disk is None:
            return
        file, first = lower.on_disk
        upper.on_disk, lower.on_disk = lower.on_disk, FileRange(file, first + len(upper.token_ids))
        size = self.tier.sizes[lower]
        share = size * len(upper.token_ids) // (len(upper.token_ids) + len(lower.token_ids))
        self.tier.resize(lower, size - share)
        self.tier.add(upper, share)
        self._put([upper, lower], namespace)

    def adopt(self, node: Node, place: FileRange, file_tokens: int) -> None:
        """Note that ``node`` lies at ``place``; count its share of a file whose nodes have ``file_tokens`` in all."""
        assert self._directory is not None
        node.on_disk = place
        self.tier.add(node, self._directory.files.records[place.file].num_bytes * len(node.token_ids) // file_tokens)

    def change(self, nodes: Mapping[str, NodeRecord | None], entries: Mapping[str, EntryRecord | None]) -> None:
        """Note records, by id, for the next commit: None deletes, others are put. Does nothing without a directory."""
        if self._directory is not None:
            self._nodes |= nodes
            self._entries |= entries
            self._has_news = True

    def commit(self, *, retry: bool = True) -> bool:
        """Write all noted changes to the catalog in one transaction; return whether none is owed now.

        A refusal is counted and logged. Without ``retry``, refused changes wait until something else changes.
        """
        if self._directory is None or not self._owes or not (retry or self._has_news):
            return not self._owes
        self._has_news = False
        try:
            self._directory.record(
                nodes=[node for node in self._nodes.values() if node is not None],
                entries=[entry for entry in self._entries.values() if entry is not None],
                gone_nodes=[id for id, node in self._nodes.items() if node is None],
                gone_entries=[id for id, entry in self._entries.items() if entry is None],
            )
        except StoreWriteError:
            self._note_failure()
            return False
        self._nodes.clear()
        self._entries.clear()
        return True

    def purge(self, nodes: Iterable[Node], namespace: str) -> bool:
        """Rewrite files that ``nodes``, all of a namespace, need only in part, so that forgotten tokens leave the disk.

        Returns False if some file could not be rewritten, which is counted and logged.
        """
        if self._directory is None:
            return True
        by_file: defaultdict[str, list[Node]] = defaultdict(list)
        for node in nodes:
            if node.on_disk is not None:
                by_file[node.on_disk.file].append(node)
        files = self._directory.files.records
        is_gone = True
        for file, needed in by_file.items():
            if sum(len(node.token_ids) for node in needed) < files[file].num_tokens:
                is_gone &= self._rewrite(needed, namespace)
        return is_gone

    def sweep(self) -> None:
        """Delete up to ``MOST_REMOVED`` of the files that no node needs any more."""
        if self._directory is not None:
            self._directory.files.remove(most=MOST_REMOVED)

    def scrub(self, *, whole: bool) -> bool:
        """Run ``KVDirectory.scrub(whole)``. Return False if it fails (counted and logged) or changes are still owed."""
        try:
            if self._directory is not None:
                self._directory.scrub(whole=whole)
        except StoreWriteError:
            self._note_failure()
            return False
        return not self._owes

    def fit(self) -> None:
        """Evict nodes until the bound holds; pinned nodes go last, but they go."""
        self._make_room(0, ())
        while self.num_bytes > self.tier.max_bytes:
            least = min(self.tier.sizes, key=lambda node: node.pins > 0, default=None)
            if least is None:
                return
            self._give_up(least)
            self.commit()

    def close(self, entries: Iterable[EntryRecord]) -> None:
        """Write ``entries`` and all that is owed, if possible; close the directory. The tier is empty afterwards."""
        if self._directory is None:
            return
        self.change({}, {entry.id: entry for entry in entries})
        self.commit()
        self._directory.close()
        self.abandon()

    def abandon(self) -> None:
        """Empty the tier and forget what is owed; leave the directory as it is, without closing it."""
        for node in list(self.tier.sizes):
            self.tier.remove(node)
            node.on_disk = None
        self._nodes.clear()
        self._entries.clear()
        self._directory = None

    @property
    def num_bytes(self) -> int:
        """Size of all KV files in use; 0 without a directory."""
        return self._directory.num_bytes if self._directory is not None else 0

    def counts(self) -> dict[str, int]:
        """Return ``KVDirectory.counts``, with ``disk_`` before each name; empty without a directory."""
        found = self._directory.counts() if self._directory is not None else {}
        return {f"{DISK}_{name}": count for name, count in found.items()}

    def check(self, nodes: Collection[Node], keys: set[str]) -> None:
        """Assert that tier and, if nothing is owed, catalog have just what of ``nodes`` is on disk, and ``keys``."""
        here = set(self.tier.sizes)
        assert here == {node for node in nodes if node.on_disk is not None}, "nodes on disk"
        for node in here:
            parent = node.parent
            assert parent is None or parent.parent is None or parent in here, "on disk without what comes before it"
        self.tier.check()
        if self._directory is None or self._owes:
            return
        assert self.num_bytes <= self.tier.max_bytes, "the bound of the disk tier"
        self._directory.check()
        found = self._directory.contents()
        wanted = sorted(_make_plain(_record(node, "")) for node in here)
        assert sorted(map(_make_plain, found.nodes)) == wanted, "nodes written"
        assert {entry.id for entry in found.entries} == keys, "entries written"

    @property
    def _owes(self) -> bool:
        return bool(self._nodes or self._entries)

    def _make_room(self, num_bytes: int, protected: Collection[Node]) -> bool:
        """Evict until ``num_bytes`` more fit; return whether they do. Evicts nothing if they could not fit anyway."""
        assert self._directory is not None
        if self.num_bytes + num_bytes <= self.tier.max_bytes:
            return True
        staying = {node.on_disk for node in self.tier.sizes if node.pins or node in protected}
        files = {place.file for place in staying if place is not None}
        if sum(self._directory.files.records[file].num_bytes for file in files) + num_bytes > self.tier.max_bytes:
            return False
        while self.commit():  # else what goes would not make room
            if self.num_bytes + num_bytes <= self.tier.max_bytes:
                return True
            victim = self.tier.choose_victim(protected, num_bytes)
            if victim is None:
                break
            while (below := next((c for c in victim.children.values() if c.on_disk is not None), None)) is not None:
                victim = below
            if victim.held is None:
                self._give_up(victim)
            else:
                self.drop([victim], sorted(victim.entries))
        return False

    def _rewrite(self, nodes: Sequence[Node], namespace: str) -> bool:
        """Copy ``nodes`` to one new file. Return whether that worked; if not, they stay where they are."""

        def join() -> Mapping[str, torch.Tensor]:
            return PackedKV.join([self.locate(node).read() for node in nodes]).tensors

        if (num_bytes := self._write(nodes, join, namespace)) is None:
            return False
        num_tokens = sum(len(node.token_ids) for node in nodes)
        for node in nodes:
            self.tier.resize(node, num_bytes * len(node.token_ids) // num_tokens)
        return True

    def _write(
        self, nodes: Sequence[Node], join: Callable[[], Mapping[str, torch.Tensor]], namespace: str
    ) -> int | None:
        """Write the KV of ``nodes``, as ``join`` returns it, to one new file and commit; return the file's bytes.

        Returns None if either fails; this is counted and logged, and the nodes stay where they were.
        """
        assert self._directory is not None
        files, num_tokens = self._directory.files, sum(len(node.token_ids) for node in nodes)
        try:
            with raise_memory_errors():
                file = files.write(join(), num_tokens)
        except (StoreFileError, StoreWriteError, *OUT_OF_MEMORY):
            self._note_failure()
            return None
        return self._enter(nodes, file, namespace)

    def _enter(self, nodes: Sequence[Node], file: str, namespace: str) -> int | None:
        """Note that ``nodes`` lie in ``file``, one behind the other, and commit; return the file's bytes.

        Returns None if that fails; the file is deleted then, and the nodes stay where they were.
        """
        assert self._directory is not None
        files = self._directory.files
        former = [(node.on_disk, self._nodes.get(node.id)) for node in nodes]
        first = 0
        for node in nodes:
            node.on_disk = FileRange(file, first)
            first += len(node.token_ids)
        self._put(nodes, namespace)
        if self.commit():
            return files.records[file].num_bytes
        for node, (place, owed) in zip(nodes, former, strict=True):
            node.on_disk = place
            del self._nodes[node.id]
            if owed is not None:
                self._nodes[node.id] = owed
        self._directory.discard(file)
        return None

    def _put(self, nodes: Iterable[Node], namespace: str) -> None:
        self.change({node.id: _record(node, namespace) for node in nodes}, {})

    def _note_failure(self) -> None:
        self._counts["write_failed"] += 1
        log_trouble("write_failed")


def _record(node: Node, namespace: str) -> NodeRecord:
    assert node.on_disk is not None
    parent = node.parent.id if node.parent is not None and len(node.parent.token_ids) else None
    return NodeRecord(node.id, parent, namespace, node.token_ids, node.on_disk.file, node.on_disk.first)


def _make_plain(record: NodeRecord) -> tuple[str, ...]:
    """Return a record's fields but the namespace as strings, so that records can be compared."""
    return record.id, str(record.parent), record.token_ids.tobytes().hex(), record.file, str(record.first)
