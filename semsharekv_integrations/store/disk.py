"""The lowest shelf: KV in the files of a directory, bounded, and a catalog that says what prompts need it.

What the catalog could not be told, because the disk is full, it is told with the next change, or when it is closed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch

from semsharekv_integrations.config import StoreConfig
from semsharekv_integrations.errors import StoreFileError, StoreWriteError
from semsharekv_integrations.logs import log_trouble
from semsharekv_integrations.store.codec import OUT_OF_MEMORY, PackedKV, memory_errors
from semsharekv_integrations.store.directory import EntryRecord, KVDirectory, NodeRecord
from semsharekv_integrations.store.eviction import Tier
from semsharekv_integrations.store.files import TOKEN_DIM
from semsharekv_integrations.store.radix import FileRange, Node

DISK = "disk"
_HEADER_BYTES = 512  # of a file, at most, and of each tensor in it


class DiskTier:
    """KV of nodes in files; without a directory it keeps nothing. Not safe to use from several threads by itself.

    Args:
        config: bounds.
        counts: of troubles.
        give_up: loses the KV of a node, or of one behind it, that is in no other tier.
    """

    def __init__(self, config: StoreConfig, counts: Counter[str], give_up: Callable[[Node], None]) -> None:
        self.tier = Tier(DISK, config.disk_max_bytes, config.eviction)
        self._directory: KVDirectory | None = None
        self._counts = counts
        self._give_up = give_up
        self._home = (torch.float32, torch.device("cpu"))
        self._is_gathering = False
        self._nodes: dict[str, NodeRecord] = {}  # these four: what the catalog is still to be told
        self._entries: dict[str, EntryRecord] = {}
        self._gone_nodes: set[str] = set()
        self._gone_entries: set[str] = set()

    def attach(self, directory: KVDirectory, dtype: torch.dtype, device: torch.device) -> None:
        """Keep KV in ``directory`` from now on; what is read from it goes to ``device`` as ``dtype``."""
        self._directory = directory
        self._home = dtype, device

    def read(self, node: Node) -> PackedKV:
        """The KV of ``node`` in the file that it lies in, mapped into memory.

        Raises:
            UnavailableFileError: if the system cannot read the file now.
            StoreFileError: if the file is damaged, or gone.
        """
        assert self._directory is not None and node.on_disk is not None
        file, first = node.on_disk
        whole = PackedKV(self._directory.read(file), *self._home)
        stop = first + len(node.token_ids)
        if whole.num_tokens < stop:
            raise StoreFileError(f"{file} has {whole.num_tokens} tokens, not {stop}")
        return whole.view(first, stop)

    def save(self, node: Node, packed: PackedKV, namespace: str) -> bool:
        """Write a node, if there is a directory, room, and all that comes before it."""
        before = node.path()[:-1]
        if self._directory is None or any(earlier.on_disk is None for earlier in before):
            return False
        if not self._make_room(packed.num_bytes + _HEADER_BYTES * (1 + len(packed.tensors)), before):
            self._counts["disk_refused"] += 1
            return False
        try:
            with memory_errors():
                on_host = {name: tensor.contiguous().cpu() for name, tensor in packed.tensors.items()}
            file = self._directory.write(on_host, packed.num_tokens)
        except (StoreWriteError, *OUT_OF_MEMORY):
            self._write_failed()
            return False
        node.on_disk = FileRange(file, 0)
        if not self.record(nodes=[(node, namespace)]):
            del self._nodes[node.id]
            node.on_disk = None
            self._directory.discard(file)
            return False
        self.tier.add(node, self._directory.file_bytes(file))
        return True

    def drop(self, nodes: Sequence[Node], keys: Sequence[str]) -> None:
        """Nodes, and entries, are no longer here."""
        gone = [node for node in nodes if node.on_disk is not None]
        if gone or keys:
            self.record(gone_nodes=[node.id for node in gone], gone_entries=keys)
        for node in gone:
            self.tier.remove(node)
            node.on_disk = None

    def split(self, upper: Node, lower: Node, namespace: str) -> None:
        """``upper`` has become the first tokens of what ``lower`` was; both lie in its file from now on."""
        if lower.on_disk is None:
            return
        file, first = lower.on_disk
        upper.on_disk, lower.on_disk = lower.on_disk, FileRange(file, first + len(upper.token_ids))
        size = self.tier.size_of(lower)
        share = size * len(upper.token_ids) // (len(upper.token_ids) + len(lower.token_ids))
        self.tier.shrink(lower, size - share)
        self.tier.add(upper, share)
        self.record(nodes=[(upper, namespace), (lower, namespace)])

    def adopt(self, node: Node, place: FileRange, file_tokens: int) -> None:
        """``node`` was found in a file, in which nodes with so many tokens in all were found."""
        assert self._directory is not None
        node.on_disk = place
        self.tier.add(node, self._directory.file_bytes(place.file) * len(node.token_ids) // file_tokens)

    def record(
        self,
        *,
        nodes: Iterable[tuple[Node, str]] = (),
        entries: Iterable[EntryRecord] = (),
        gone_nodes: Iterable[str] = (),
        gone_entries: Iterable[str] = (),
    ) -> bool:
        """Tell the catalog, if there is one; whether that went well. Nodes come with their namespace."""
        if self._directory is None:
            return False
        for known, gone, ids in (
            (self._nodes, self._gone_nodes, list(gone_nodes)),
            (self._entries, self._gone_entries, list(gone_entries)),
        ):
            gone.update(ids)
            for id in ids:
                known.pop(id, None)
        self._nodes |= {node.id: _record(node, namespace) for node, namespace in nodes}
        self._entries |= {entry.id: entry for entry in entries}
        if self._is_gathering:
            return True
        try:
            self._directory.record(
                nodes=self._nodes.values(),
                entries=self._entries.values(),
                gone_nodes=self._gone_nodes,
                gone_entries=self._gone_entries,
            )
        except StoreWriteError:
            self._write_failed()
            return False
        for told in (self._nodes, self._entries, self._gone_nodes, self._gone_entries):
            told.clear()
        return True

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Tell the catalog at the end, in one change, of all that goes meanwhile; nothing may be written meanwhile."""
        self._is_gathering = True
        try:
            yield
        finally:
            self._is_gathering = False
            if self._owes:
                self.record()

    def compact(self, nodes: Iterable[Node], namespace: str) -> bool:
        """Write files anew of which ``nodes``, all of a namespace, need only a part: what is forgotten goes with it.

        Whether that went well.
        """
        if self._directory is None:
            return True
        by_file: defaultdict[str, list[Node]] = defaultdict(list)
        for node in nodes:
            if node.on_disk is not None:
                by_file[node.on_disk.file].append(node)
        partly = [needed for file, needed in by_file.items() if _num_tokens(needed) < self._directory.file_tokens(file)]
        written = [self._write_anew(needed, namespace) for needed in partly]
        return all(written)

    def sweep(self) -> None:
        """Delete some of the files that nothing needs any more."""
        if self._directory is not None:
            self._directory.sweep()

    def scrub(self, *, whole: bool) -> bool:
        """Delete what still names forgotten tokens and documents: see ``KVDirectory.scrub``. Whether nothing does."""
        try:
            if self._directory is not None:
                self._directory.scrub(whole=whole)
        except StoreWriteError:
            self._write_failed()
            return False
        return not self._owes

    def fit(self) -> None:
        """Bring what was found within the bound; pinned nodes go last, but they go."""
        self._make_room(0, ())
        while self.num_bytes > self.tier.max_bytes:
            least = min((node for node, _ in self.tier.sizes()), key=lambda node: node.pins > 0, default=None)
            if least is None:
                return
            self._give_up(least)

    def close(self, entries: Sequence[EntryRecord]) -> None:
        """Write ``entries`` down once more, and let go of the directory; nothing is here afterwards."""
        if self._directory is None:
            return
        self.record(entries=entries)
        self._directory.close()
        self.abandon()

    def abandon(self) -> None:
        """Let go of the directory as it is; nothing is here afterwards."""
        for node in [node for node, _ in self.tier.sizes()]:
            self.tier.remove(node)
            node.on_disk = None
        for untold in (self._nodes, self._entries, self._gone_nodes, self._gone_entries):
            untold.clear()
        self._directory = None

    @property
    def num_bytes(self) -> int:
        """Of all KV files."""
        return self._directory.num_bytes if self._directory is not None else 0

    def counts(self) -> dict[str, int]:
        """What was found wrong: see ``KVDirectory.counts``."""
        found = self._directory.counts() if self._directory is not None else {}
        return {f"{DISK}_{name}": count for name, count in found.items()}

    def check(self, nodes: Collection[Node], keys: set[str]) -> None:
        """The law: of ``nodes`` and entries ``keys`` it has those that say so, and the catalog has no others."""
        here = {node for node, _ in self.tier.sizes()}
        assert here == {node for node in nodes if node.on_disk is not None}, "nodes on disk"
        for node in here:
            parent = node.parent
            assert parent is None or parent.parent is None or parent in here, "on disk without what comes before it"
        self.tier.check()
        if self._directory is None or self._owes:
            return
        assert self.num_bytes <= self.tier.max_bytes, "the bound of the disk tier"
        written = {node.id: tuple(node.on_disk) for node in here if node.on_disk is not None}
        assert {node.id: (node.file, node.first) for node in self._directory.nodes()} == written, "nodes written"
        assert {entry.id for entry in self._directory.entries()} == keys, "entries written"

    @property
    def _owes(self) -> bool:
        return bool(self._nodes or self._entries or self._gone_nodes or self._gone_entries)

    def _make_room(self, num_bytes: int, protected: Collection[Node]) -> bool:
        """Whether so much fits, after what must go for it has gone; nothing goes if it does not fit in the end."""
        assert self._directory is not None
        if self.num_bytes + num_bytes <= self.tier.max_bytes:
            return True
        staying = {node.on_disk for node, _ in self.tier.sizes() if node.pins or node in protected}
        files = {place.file for place in staying if place is not None}
        if sum(map(self._directory.file_bytes, files)) + num_bytes > self.tier.max_bytes:
            return False
        while self.num_bytes + num_bytes > self.tier.max_bytes:
            if self._owes and not self.record():
                return False  # what goes would not make room
            victim = self.tier.victim(protected, num_bytes)
            if victim is None:
                return False
            while (below := next((c for c in victim.children.values() if c.on_disk is not None), None)) is not None:
                victim = below
            if victim.held is None:
                self._give_up(victim)
            else:
                self.drop([victim], sorted(victim.entries))
        return True

    def _write_anew(self, nodes: Sequence[Node], namespace: str) -> bool:
        """Move nodes to one new file; whether that went well, else they stay in the old one."""
        assert self._directory is not None
        num_tokens = [len(node.token_ids) for node in nodes]
        try:
            with memory_errors():
                parts = [self.read(node).tensors for node in nodes]
                whole = {name: torch.cat([part[name] for part in parts], dim=TOKEN_DIM) for name in parts[0]}
            file = self._directory.write(whole, sum(num_tokens))
        except (StoreFileError, StoreWriteError, *OUT_OF_MEMORY):
            self._write_failed()
            return False
        former = [node.on_disk for node in nodes]
        for node, stop in zip(nodes, accumulate(num_tokens), strict=True):
            node.on_disk = FileRange(file, stop - len(node.token_ids))
        if not self.record(nodes=[(node, namespace) for node in nodes]):
            for node, place in zip(nodes, former, strict=True):
                node.on_disk = place
            self._nodes |= {node.id: _record(node, namespace) for node in nodes}
            self._directory.discard(file)
            return False
        num_bytes = self._directory.file_bytes(file)
        for node, own_tokens in zip(nodes, num_tokens, strict=True):
            self.tier.shrink(node, num_bytes * own_tokens // sum(num_tokens))
        return True

    def _write_failed(self) -> None:
        self._counts["write_failed"] += 1
        log_trouble("write_failed")


def _num_tokens(nodes: Iterable[Node]) -> int:
    return sum(len(node.token_ids) for node in nodes)


def _record(node: Node, namespace: str) -> NodeRecord:
    assert node.on_disk is not None
    parent = node.parent.id if node.parent is not None and len(node.parent.token_ids) else None
    return NodeRecord(node.id, parent, namespace, node.token_ids, node.on_disk.file, node.on_disk.first)
