"""The entries of a store: in their namespace, in the tiers, with a deadline. An entry is in all of these or in none."""

from __future__ import annotations

import heapq
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count

import torch

from semsharekv_integrations.concurrency.threads import free_in_children, hold_at_forks
from semsharekv_integrations.config import StoreConfig
from semsharekv_integrations.kv import PiecedLayers, Reference, SpaceName, make_space_name, select_within
from semsharekv_integrations.store.directory import KVDirectory
from semsharekv_integrations.store.disk import Writing
from semsharekv_integrations.store.files import KVFiles
from semsharekv_integrations.store.homes import Homes
from semsharekv_integrations.store.namespace import Entry, Namespace, join_labels, shorten
from semsharekv_integrations.store.radix import Node
from semsharekv_integrations.store.records import EntryRecord, pack_labels
from semsharekv_integrations.store.reopening import attach_nodes, reopen_entries
from semsharekv_integrations.store.tiers import Tiers, Unreadable

_COUNTED = ("hits", "misses", "expired", "refused", "unreadable")
_MOVED = ("evicted", "promoted", "demoted", "promotion_failed", "disk_refused", "write_failed")


class Deadlines:
    """At most one deadline for each key. Keeps nothing of a key that was dropped."""

    def __init__(self) -> None:
        self._times: dict[str, tuple[float, int]] = {}  # with the number of the time
        self._keys: dict[int, str] = {}  # by number
        self._heap: list[tuple[float, int]] = []  # those that no key has are stale
        self._numbers = count()

    def set(self, key: str, time_s: float) -> None:
        """Make ``key`` due at ``time_s``; do nothing if it is due earlier already."""
        before_s, former = self._times.get(key, (float("inf"), -1))
        if time_s < before_s:
            self._keys.pop(former, None)
            number = next(self._numbers)
            self._times[key], self._keys[number] = (time_s, number), key
            heapq.heappush(self._heap, (time_s, number))

    def drop(self, key: str) -> None:
        """Forget the deadline of ``key``, if it has one."""
        _, number = self._times.pop(key, (0.0, -1))
        self._keys.pop(number, None)
        if len(self._heap) > 64 + 2 * len(self._times):
            self._heap = list(self._times.values())
            heapq.heapify(self._heap)

    def take_due(self, now_s: float) -> list[str]:
        """Remove and return the keys whose deadline is at or before ``now_s``, the earliest first."""
        found = []
        while self._heap and self._heap[0][0] <= now_s:
            _, number = heapq.heappop(self._heap)
            key = self._keys.pop(number, None)
            if key is not None:
                del self._times[key]
                found.append(key)
        return found


class Entries:
    """Entries by key, by namespace and by state of the model. Not thread-safe: callers hold ``lock``."""

    def __init__(
        self,
        config: StoreConfig,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        min_run_tokens: int | None,
    ) -> None:
        """Make a store without entries; only ``open`` uses a directory. For the clocks see ``KVStore``."""
        self.lock = hold_at_forks(threading.Lock())  # for those who call
        self.writing = free_in_children(threading.RLock())  # held while a file is written, and taken before ``lock``
        self.waiting: dict[str, None] = {}  # keys of the entries that are to be written, in order
        self.tiers = Tiers(config, self._lose)
        self.namespaces: dict[SpaceName, Namespace] = {}  # by ``Reference.space``; none is empty
        self._later: dict[str, dict[SpaceName, None]] = {}  # those of states other than the first, by namespace
        self.by_key: dict[str, Entry] = {}
        self.libraries: dict[str, KVFiles] = {}  # those that are mounted, by the namespace of their entries
        self.counts: Counter[str] = Counter()
        self.lost: set[str] = set()  # namespaces that lost entries since somebody looked
        self.leaves_on_disk = False  # whether what was removed last could not be removed from there
        self._ttl_s = config.ttl_s
        self._clock = clock
        self._wall_clock = wall_clock
        self._min_run_tokens = min_run_tokens
        self._deadlines = Deadlines()

    def open(self, directory: KVDirectory, dtype: torch.dtype, homes: Homes) -> int:
        """Load what lies in ``directory``, has not expired and fits the bound; return the number of all entries."""
        self.tiers.disk.attach(directory, dtype, homes)
        found = self._reopen(directory)
        for name, space in list(self.namespaces.items()):
            if not (space.tree.root.children or space.tainted):
                self._drop_namespace(name)
        began = self._wall_clock() - self._clock()
        for entry, used_s in found:
            entry.last_used_s = min(used_s - began, self._clock())  # a clock set back puts no use in the future
            self.add(entry)
        self.expire()
        self.tiers.disk.commit()
        self.tiers.disk.fit()
        return len(self._list_own())

    def close(self) -> None:
        """Write what is to be written and when entries were used last, and close the directory.

        Drop entries whose KV is not all in memory.
        """
        for entry in [self.by_key[key] for key in self.waiting if key in self.by_key]:
            self.tiers.save(entry.node.path(), entry.reference.namespace)
        self.waiting.clear()
        ordinary = [entry for entry in self.by_key.values() if not entry.reference.is_tainted]
        self.tiers.disk.close([self._make_record(entry) for entry in ordinary if entry.node.on_disk is not None])
        self._keep_to_memory()

    def abandon(self) -> None:
        """In a forked child: leave the directory to the parent, and drop entries whose KV is not all in memory."""
        self.waiting.clear()
        self.tiers.disk.abandon()
        self._keep_to_memory()

    def absorb(self, entry: Entry) -> None:
        """Give ``entry`` the labels of those that it begins with; remove these, but for what must stay on disk."""
        node, reference = entry.node, entry.reference
        absorbed = self.namespaces[reference.space].find_contained(entry)
        for other in absorbed:
            reference = join_labels(reference, other.reference)
            entry.hits = max(entry.hits, other.hits)
        self.relabel(entry, reference)
        for other in absorbed:
            other.stays = node.on_disk is None and other.node.on_disk is not None  # else the disk would have neither
            if not other.stays:
                self.remove(other)

    def begin_writing(self) -> tuple[Entry, Writing] | None:
        """Return the next node that is in memory alone and to be written, with an entry that needs it; None if none."""
        while self.waiting:
            key = next(iter(self.waiting))
            entry = self.by_key.get(key)
            path = entry.node.path() if entry is not None else []
            node = next((node for node in path if node.on_disk is None), None)
            writing = self.tiers.disk.begin(node, node.held) if node is not None and node.held is not None else None
            if entry is not None and writing is not None:
                return entry, writing
            del self.waiting[key]
        return None

    def select(self, namespace: str | None, state: str | None = None) -> list[Entry]:
        """Return the entries, tainted ones too, of one namespace or all (None), of one state or all (None).

        All are those of callers: libraries are left out.
        """
        if namespace is None:
            return [entry for entry in self._list_own() if state in (None, entry.reference.state)]
        names = (name for name in self.list_names(namespace, state) if name in self.namespaces)
        return [entry for name in names for entry in self.namespaces[name]]

    def list_names(self, namespace: str, state: str | None = None) -> list[SpaceName]:
        """Return the keys of ``namespaces`` that belong to ``namespace``, in one state of the model or all (None)."""
        return [namespace, *self._later.get(namespace, ())] if state is None else [make_space_name(namespace, state)]

    def find(self, reference_id: str, namespaces: Sequence[str], state: str | None) -> Entry | None:
        """Return the ordinary entry of this id in the first of ``namespaces`` that has it; None if none has."""
        names = (name for namespace in namespaces for name in self.list_names(namespace, state))
        spaces = (self.namespaces[name] for name in names if name in self.namespaces)
        return next((space.ordinary[reference_id] for space in spaces if reference_id in space.ordinary), None)

    def ensure_namespace(self, name: SpaceName) -> Namespace:
        """Return the namespace of this name; make an empty one if there is none."""
        if name not in self.namespaces:
            namespace = name if isinstance(name, str) else name[0]
            self.namespaces[name] = Namespace(self._min_run_tokens, partial(self.tiers.split, namespace=namespace))
            if name != namespace:
                self._later.setdefault(namespace, {})[name] = None
        return self.namespaces[name]

    def add(self, entry: Entry) -> None:
        """Add ``entry`` to its namespace, by its key, and with its deadline; the caller places its KV."""
        self.ensure_namespace(entry.reference.space).add(entry)
        self.by_key[entry.key] = entry
        self._set_deadline(entry)

    def relabel(self, entry: Entry, reference: Reference) -> None:
        """Give ``entry`` the labels, pin and lifetime of ``reference``; if on disk, the next commit writes them."""
        space = self.namespaces[reference.space]
        space.pin(entry, reference.pinned - entry.reference.pinned)
        entry.reference = reference
        space.label(entry)
        self._set_deadline(entry)
        self.note_written([entry.node])

    def note_written(self, nodes: Iterable[Node]) -> None:
        """Have the next commit write the entries that end with ``nodes``, where these are on disk."""
        for entry in [self.by_key[key] for node in nodes if node.on_disk is not None for key in node.entries]:
            self.tiers.disk.change({}, {entry.key: self._make_record(entry)})

    def remove(self, entry: Entry) -> None:
        """Remove ``entry``, KV that no other entry needs, and an empty namespace; the disk follows with the commit."""
        space = self.namespaces[entry.reference.space]
        written = [entry.key] if entry.node.on_disk is not None else []
        gone = space.remove(entry)
        del self.by_key[entry.key]
        self.lost.add(entry.reference.namespace)
        self._deadlines.drop(entry.key)
        self.tiers.drop(gone, written)
        if not (space.ordinary or space.tainted):
            self._drop_namespace(entry.reference.space)

    def expire(self) -> None:
        """Remove entries unused for their lifetime, and commit. Deletes some of their files; later calls the rest."""
        self.tiers.disk.sweep()
        now, expired = self._clock(), list[Entry]()
        for key in self._deadlines.take_due(now):
            entry = self.by_key[key]
            if now - entry.last_used_s < (self._get_lifetime(entry) or 0.0):
                self._set_deadline(entry)  # it was used since
            else:
                expired.append(entry)
        if expired:
            self.counts["expired"] += len(expired)
            self.remove_all(expired, at_once=False)

    def remove_all(self, entries: Sequence[Entry], purged: Iterable[SpaceName] = (), *, at_once: bool = True) -> int:
        """Remove ``entries`` in one transaction, so that nothing of them stays on disk; return their number.

        Sets ``leaves_on_disk``: whether the disk could not be cleared. Unless ``at_once``, later calls delete files
        that are left. In the namespaces ``purged``, this also clears away what earlier removals left.
        """
        for entry in entries:
            self.remove(entry)
        self.tiers.disk.commit()
        is_gone, purged = True, set(purged)
        for name in self.namespaces.keys() & purged:
            self.namespaces[name].purge()
        for name in self.namespaces.keys() & (purged | {entry.reference.space for entry in entries}):
            if isinstance(name, str):  # all others lie in memory alone
                is_gone &= self.tiers.disk.purge(self.namespaces[name].tree.nodes(), name)
        self.leaves_on_disk = not (self.tiers.disk.scrub(whole=at_once) and is_gone)
        return len(entries)

    def load(self, entry: Entry, path: list[Node]) -> Reference | None:
        """Return the beginning of ``entry`` along ``path``, with its KV. Counts as a use.

        Returns None if KV is damaged or gone: counts it as unreadable, and removes every entry that needs it.

        Raises:
            UnavailableFileError: if the system cannot read a file now; the entry stays.
        """
        try:
            pieces = self.tiers.load(path, entry.node.path())
        except Unreadable as trouble:
            self.counts["unreadable"] += 1
            for key in [key for node in trouble.node.below() for key in node.entries]:
                self.remove(self.by_key[key])
            return None
        entry.last_used_s = self._clock()
        entry.hits += 1
        spans = select_within(entry.reference.spans, path[-1].stop)
        if not entry.reference.is_tainted:
            spans |= self.namespaces[entry.reference.space].find_documents(path)
        return replace(
            entry.reference.labelled(spans),
            token_ids=entry.reference.token_ids[: path[-1].stop],
            layers=PiecedLayers(pieces, pieces[0].num_layers),
            checkpoints={
                node.start + at: state
                for node, piece in zip(path, pieces, strict=True)
                for at, state in piece.checkpoints.items()
            },
            rounded=any(piece.is_rounded for piece in pieces),
        )

    def stats(self) -> dict[str, int]:
        """Return all counts, bytes and bounds by name: see ``KVStore.stats``."""
        tiers, own = self.tiers, self._list_own()
        bounds: dict[str, int] = {}
        for tier in tiers.memory:
            prefix = "" if tier is tiers.device else f"{tier.name}_"
            bounds |= {f"{prefix}bytes": tier.num_bytes, f"{prefix}max_bytes": tier.max_bytes}
        return {
            "entries": len(own),
            "tainted_entries": sum(entry.reference.is_tainted for entry in own),
            "library_entries": len(self.by_key) - len(own),
            "library_unusable": self.counts["library_unusable"],
            **bounds,
            "disk_bytes": tiers.disk.num_bytes,
            "disk_max_bytes": tiers.disk.tier.max_bytes,
            "index_bytes": sum(space.index_bytes for space in self.namespaces.values()),
            **{name: self.counts[name] for name in _COUNTED},
            **{name: tiers.counts[name] for name in _MOVED},
            **tiers.disk.counts(),
        }

    def check(self) -> None:
        """Assert that each entry is in its namespace, and that tiers hold the KV of all of them and nothing else."""
        assert {entry.key for space in self.namespaces.values() for entry in space} == set(self.by_key)
        later = [name for names in self._later.values() for name in names]
        assert sorted(later) == sorted(name for name in self.namespaces if isinstance(name, tuple))
        nodes: list[Node] = []
        for name, space in self.namespaces.items():
            space.check(name)
            nodes += [*space.tree.nodes(), *(entry.node for entry in space.tainted.values())]
        ordinary = (entry for space in self.namespaces.values() for entry in space.ordinary.values())
        self.tiers.check(nodes, {entry.key for entry in ordinary if entry.node.on_disk is not None})

    def _reopen(self, directory: KVDirectory) -> list[tuple[Entry, float]]:
        """Return the entries on disk, least recently used first, each with the wall clock's time of its last use.

        Puts their nodes in trees and disk tier. The next commit deletes records that do not fit together. Reads no KV.
        """
        contents = directory.contents()
        nodes = attach_nodes(contents.nodes, lambda namespace: self.ensure_namespace(namespace).tree)
        found = reopen_entries(contents.entries, nodes)
        file_tokens: Counter[str] = Counter()
        for node, place in nodes.values():
            file_tokens[place.file] += len(node.token_ids)
        for _, _, path in found:  # after all hits are known, which rank the nodes
            for step in reversed(path):
                if step.on_disk is None:
                    place = nodes[step.id][1]
                    self.tiers.disk.adopt(step, place, file_tokens[place.file])
        for node, _ in nodes.values():
            if node.on_disk is None and node.parent is not None:
                del node.parent.children[int(node.token_ids[0])]
        gone = [part.id for part in contents.nodes if part.id not in nodes or nodes[part.id][0].on_disk is None]
        gone_entries = {record.id for record in contents.entries} - {record.id for record, _, _ in found}
        self.tiers.disk.change(dict.fromkeys(gone), dict.fromkeys(gone_entries))
        return [(Entry(ref, path[-1], 0.0, record.hits), record.used_s) for record, ref, path in found]

    def _list_own(self) -> list[Entry]:
        return [entry for entry in self.by_key.values() if entry.reference.namespace not in self.libraries]

    def _keep_to_memory(self) -> None:
        """Remove the entries whose KV is not all in memory, but for those of libraries, which need no directory."""
        for entry in self._list_own():
            if any(node.held is None for node in entry.node.path()):
                self.remove(entry)

    def _lose(self, node: Node) -> None:
        """Remove the entries that end with ``node``.

        If the node before was reused, and nothing else needs it, an entry that ends there takes their place.
        """
        before = node.parent
        for entry in [self.by_key[key] for key in node.entries]:
            if before is not None and before.hits and not before.entries and len(before.children) == 1:
                reference = shorten(entry.reference, before.stop)
                beginning = Entry(reference, before, entry.last_used_s, before.hits)
                self.add(beginning)
                self.relabel(beginning, reference)
                if entry.key in self.waiting:
                    self.waiting[beginning.key] = None
            self.remove(entry)

    def _drop_namespace(self, name: SpaceName) -> None:
        """Delete a namespace, and its name from those of later states."""
        del self.namespaces[name]
        if isinstance(name, tuple):
            del self._later[name[0]][name]
            if not self._later[name[0]]:
                del self._later[name[0]]

    def _get_lifetime(self, entry: Entry) -> float | None:
        """Return seconds after its last use at which an entry expires; None for never, as in a library."""
        if entry.reference.namespace in self.libraries:
            return None
        return entry.reference.expires_after_s or self._ttl_s

    def _set_deadline(self, entry: Entry) -> None:
        lifetime = self._get_lifetime(entry)
        if lifetime is not None:
            self._deadlines.set(entry.key, entry.last_used_s + lifetime)

    def _make_record(self, entry: Entry) -> EntryRecord:
        reference, age_s = entry.reference, max(0.0, self._clock() - entry.last_used_s)
        labels, used_s = pack_labels(reference), self._wall_clock() - age_s
        return EntryRecord(reference.id, reference.namespace, entry.node.id, labels, entry.hits, used_s)
