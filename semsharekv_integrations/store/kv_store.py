"""The store: prompts with their KV by namespace, found by their beginning and by runs anywhere in them.

A beginning that several prompts share is kept once (``store.radix``), in whatever tier has room (``store.tiers``).
Every hit is verified token by token. Tainted entries, whose KV is approximate, lie apart: the latest of each session,
in memory alone, found by that session alone. Knows nothing about models.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from semsharekv_integrations.concurrency.threads import do_when_free, hold_at_forks, tell_of_forks
from semsharekv_integrations.config import StoreConfig
from semsharekv_integrations.errors import StoreWriteError, make_plain
from semsharekv_integrations.kv import PrefixMatch, Reference, Run, TokenIds, count_common_tokens, make_space_name
from semsharekv_integrations.store.codec import PackedKV
from semsharekv_integrations.store.directory import KVDirectory
from semsharekv_integrations.store.entries import Entries
from semsharekv_integrations.store.files import UnavailableFileError
from semsharekv_integrations.store.forgetting import entries_with, forms_of
from semsharekv_integrations.store.homes import Homes
from semsharekv_integrations.store.library import KVFacts
from semsharekv_integrations.store.mounting import mount_libraries
from semsharekv_integrations.store.namespace import Entry, Match, Namespace, find_gaps, join_labels
from semsharekv_integrations.store.radix import Node
from semsharekv_integrations.store.records import reference_id, require_writable
from semsharekv_integrations.store.work import Work, paused_collector, write_waiting


class KVStore:
    """References by namespace. Thread-safe: every method holds one lock. A forked child has a copy, in memory alone.

    ``clock`` has seconds that only grow; ``wall_clock`` seconds since the epoch, for what outlives the process, which
    may jump. ``min_run_tokens``, at least 1, is the shortest run that ``find_runs`` finds. None, for
    a store where that is never called, saves about 20 bytes a token, which the byte bounds do not count.
    """

    def __init__(
        self,
        config: StoreConfig,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        *,
        min_run_tokens: int | None = None,
    ) -> None:
        """Make an empty store. It uses the configured directory only after ``open``."""
        self.config = config
        self.min_run_tokens = min_run_tokens
        self._state: str | None = None
        self._clock = clock
        self._entries = Entries(config, clock, wall_clock, min_run_tokens)
        tell_of_forks(self)

    def view_state(self, state: str) -> KVStore:
        """Return a view of this store for one state of the model. They share all; only state ``""`` goes to disk."""
        view = copy(self)
        view._state = state
        return view

    def open(self, fingerprint: str, dtype: torch.dtype, homes: Homes | torch.device) -> int:
        """Load the entries of the configured directory; return the store's number of entries. Reads no KV.

        ``fingerprint``, hexadecimal digits, identifies the model, which takes KV as ``dtype`` at ``homes``. KV of
        other models is left alone. Without a configured directory, this does nothing and returns 0.

        Raises:
            StoreLockedError: if another process uses the directory with this model.
            StoreFileError: if the directory cannot be used.
        """
        if self.config.directory is None:
            return 0
        with self._lock, paused_collector():
            return self._entries.open(KVDirectory(Path(self.config.directory), fingerprint), dtype, Homes.of(homes))

    def mount(self, facts: KVFacts, dtype: torch.dtype, homes: Homes | torch.device) -> None:
        """Mount the configured libraries for the model of these ``facts``; see ``mount_libraries``, and ``open``."""
        with self._lock, paused_collector():
            mount_libraries(self._entries, map(Path, self.config.libraries), facts, dtype, Homes.of(homes))

    def close(self) -> None:
        """Write when entries were used last, release the directory, and drop entries whose KV is not all in memory."""
        with self._entries.writing, self._lock:
            self._entries.close()

    def go_on_in_child(self) -> None:
        """In a forked child: make a new lock, leave the directory to the parent, and keep what is all in memory."""
        self._entries.lock = hold_at_forks(threading.Lock())
        self._entries.abandon()

    @property
    def _lock(self) -> threading.Lock:
        return self._entries.lock  # one for all states

    def abandon(self) -> None:
        """Close once no thread holds the lock. Never waits, so the garbage collector may call it anywhere."""
        do_when_free(self._lock, self._entries.close)

    def list_readable(self, namespace: str) -> list[str]:
        """Return the namespaces that requests of ``namespace`` may read: itself, a shared one, those of libraries."""
        shared = self.config.shared_namespace
        own = [namespace] if shared in (None, namespace) else [namespace, make_plain(shared)]
        return [*own, *self.list_libraries()]

    def list_libraries(self) -> list[str]:
        """Return the namespaces of mounted libraries, in which no caller's entries can lie."""
        return list(self._entries.libraries)

    def find_prefix(
        self,
        token_ids: TokenIds,
        namespace: str,
        *,
        max_tokens: int,
        session: str | None = None,
        at_checkpoint: bool = False,
        counts: bool = True,
    ) -> PrefixMatch | None:
        """Return the entry, with KV, that agrees longest with the start of ``token_ids``, and for how many tokens.

        Looks in ``namespace``, in the shared namespace, and at the tainted entry of ``session``, which must agree for
        longer than the others. Counts a hit and a use; or a miss, and returns None, if no readable entry agrees. Not
        ``counts``: no hit and no miss, as where one prompt is looked up again. ``at_checkpoint``: the match ends at the
        last checkpoint within what agrees; without one there is none.
        """
        with Work(self._entries):
            while True:
                found = [
                    match
                    for name in self.list_readable(namespace)
                    if (space := self._find_namespace(name)) is not None
                    and (match := space.find_prefix(token_ids, max_tokens, session if name == namespace else None))
                ]
                found.sort(key=lambda match: (-match.num_tokens, match.entry.reference.is_tainted))
                prefix = self._load_longest(found, at_checkpoint=at_checkpoint)
                if prefix is None and any(match.entry.key not in self._entries.by_key for match in found):
                    continue  # and look again among what is left
                self._entries.counts["misses" if prefix is None else "hits"] += counts
                return prefix

    def _load_longest(self, found: Sequence[Match], *, at_checkpoint: bool) -> PrefixMatch | None:
        """Return the longest of ``found``, which come so, with KV; None if one is damaged, or none can be used."""
        served: list[PrefixMatch] = []
        for match in found:
            if match.entry.key not in self._entries.by_key:  # what was loaded before it may have pushed it out
                continue
            try:
                reference = self._entries.load(match.entry, match.path)
            except UnavailableFileError:
                continue
            if reference is None:
                return None
            prefix = PrefixMatch(reference, match.num_tokens)
            if not at_checkpoint:
                return prefix
            served.append(prefix.cut_to_checkpoint())
        longest = max(served, key=lambda prefix: prefix.num_tokens, default=None)
        return longest if longest and longest.num_tokens else None

    def find_tainted(self, namespace: str, session: str) -> Reference | None:
        """Return what ``session`` has stored that is not exact, without KV; None if nothing. Counts no use."""
        with Work(self._entries):
            space = self._find_namespace(namespace)
            entry = space.tainted.get(session) if space is not None else None
            return None if entry is None else entry.reference

    def count_prefix_tokens(self, token_ids: TokenIds, namespace: str) -> int:
        """Return how many first tokens of ``token_ids`` ordinary readable entries have. Counts no use, hit or miss."""
        with self._lock:
            spaces = [space for name in self.list_readable(namespace) if (space := self._find_namespace(name))]
            found = [space.find_prefix(token_ids, len(token_ids), None) for space in spaces]
            return max((match.num_tokens for match in found if match is not None), default=0)

    def find_runs(self, token_ids: TokenIds, namespace: str, *, start: int, stop: int) -> list[Run]:
        """Return stretches of ``token_ids[start:stop]`` that stand anywhere in ordinary entries of ``namespace``.

        They come in order, without overlap. Each has at least ``min_run_tokens`` tokens, and goes on for as long as its
        entry agrees. Any ``min_run_tokens`` tokens in a row that a readable entry has too start inside a run. Looks in
        the shared namespace for what ``namespace`` lacks. Counts as a use of the entries. Asserts that the store was
        made with ``min_run_tokens``.
        """
        with Work(self._entries):
            runs: list[Run] = []
            for name in self.list_readable(namespace):
                for first, last in find_gaps(runs, start, stop):
                    runs += self._find_runs(token_ids, name, first, last)
                runs.sort(key=lambda run: run.start)
            return runs

    def put(self, reference: Reference, *, frees: bool = False, writes: bool = True) -> bool:
        """Store ``reference``; return whether it, or a longer entry that begins with it, is in the store afterwards.

        It replaces the entries that are a prefix of it, and takes over their labels; a prefix on disk stays if this
        entry could not be written there. An entry that has it already takes its labels. A tainted one replaces that of
        its session, and is never pinned. Returns False, and counts it as refused, if memory runs out, if there is no
        room beside pinned entries, if it is tainted without a session, or rounded and this store keeps KV as it is.
        With ``frees``, where memory runs out others are taken out of it, and it is tried once more. Not ``writes``:
        what is in memory now is not written yet, see ``write_waiting``.

        Raises:
            ValueError: if its labels cannot be written as JSON; nothing changes.
        """
        require_writable(reference)
        with Work(self._entries, commits=not writes):
            stored = self._put(reference, frees=frees)
        if writes:
            self.write_waiting()
        return stored

    def write_waiting(self) -> None:
        """Write to the directory what ``put`` left in memory alone. Other work on the store goes on meanwhile."""
        write_waiting(self._entries)

    def between_writes(self) -> AbstractContextManager[object]:
        """Inside, no file is being written. Taken before all other locks."""
        return self._entries.writing

    def _put(self, reference: Reference, *, frees: bool) -> bool:
        """Store ``reference`` in memory if that has room, else on disk. The caller holds the lock."""
        if self._state is not None and reference.state != self._state:
            own_id = reference_id(reference.namespace, reference.token_ids, self._state)
            reference = replace(reference, id=own_id, state=self._state)
        if reference.rounded and self.config.kv_bits is None:
            return self._refuse()
        if reference.is_tainted:
            return self._put_tainted(reference, frees=frees)
        space = self._entries.ensure_namespace(reference.space)
        container = space.ordinary.get(reference.id) or space.find_container(reference)
        if container is None:
            return self._put_new(space, reference, frees=frees)
        pinned = reference.pinned or container.reference.pinned
        container.last_used_s = self._clock()
        self._entries.tiers.touch(container.node.path())
        self._entries.tiers.add_checkpoints(container.node.path(), reference.checkpoints)
        self._entries.relabel(container, replace(join_labels(container.reference, reference), pinned=pinned))
        return True

    def fetch(self, reference_id: str, namespace: str) -> Reference | None:
        """Return an entry with its KV, by id; counts as a use. None if it is unknown, damaged or not readable now."""
        try:
            return self._fetch(reference_id, namespace)
        except UnavailableFileError:
            return None

    def references(self, namespace: str | None = None) -> list[Reference]:
        """Return the ordinary references of one namespace, or of all (None), without KV; oldest use first."""
        with Work(self._entries):
            entries = sorted(self._entries.select(namespace, self._state), key=lambda entry: entry.last_used_s)
            return [entry.reference for entry in entries if not entry.reference.is_tainted]

    def fetch_all(self, namespace: str | None = None) -> list[Reference]:
        """As ``references``, with KV, but for damaged ones. Raises ``StoreFileError`` if one is not readable now."""
        found = [self._fetch(reference.id, reference.namespace) for reference in self.references(namespace)]
        return [reference for reference in found if reference is not None]

    def forget(
        self,
        namespace: str,
        *,
        document_id: str | None = None,
        session: str | None = None,
        spare: Callable[[Reference], bool] | None = None,
        tokens: Sequence[TokenIds] = (),
        text_of: Callable[[TokenIds], str] | None = None,
    ) -> int:
        """Drop entries of ``namespace`` with the document and of the session, as far as given; return how many.

        Of every state of the model, but for those that ``spare`` is true of. Expired entries do not count, because
        other calls may have dropped them before. For ``tokens`` and ``text_of`` see ``entries_with``. Raises nothing if
        the disk cannot be written: see ``require_gone``.
        """
        with Work(self._entries):
            found = self._entries.select(namespace)
            if document_id is not None:
                found = entries_with(document_id, found, tokens, text_of)
            if session is not None:
                found = [entry for entry in found if entry.reference.session == session]
            doomed = [entry for entry in found if spare is None or not spare(entry.reference)]
            return self._entries.remove_all(doomed, self._entries.list_names(namespace))

    def find_forms(self, document_id: str, namespace: str, tokens: Sequence[TokenIds]) -> list[TokenIds]:
        """Return a document's tokens: those given, and those where entries hold it whole; see ``forms_of``."""
        with self._lock:
            return forms_of(document_id, self._entries.select(namespace), tokens)

    def clear(self) -> int:
        """Drop every entry of every namespace; return how many. If the disk cannot be written, see ``require_gone``."""
        with self._lock:
            return self._entries.remove_all(self._entries.select(None))

    def free_device(self) -> tuple[int, int]:
        """Move KV from the device to lower tiers, or give it up, but not what is pinned. Return bytes gone and left."""
        with Work(self._entries):
            return self._entries.tiers.empty_device()

    def require_gone(self) -> None:
        """Raise ``StoreWriteError`` if the disk still has some of what was forgotten last. Tries nothing anew."""
        if self._entries.leaves_on_disk:
            raise StoreWriteError(
                "the store's directory could not be written: what is forgotten is gone from memory, but some of it "
                "still lies there; when there is room, forget it again"
            )

    def collect_left(self, *namespaces: str) -> dict[str, list[Reference]]:
        """Return the references left in ``namespaces`` and in those that lost entries since the last call, by name."""
        with self._lock:
            lost, self._entries.lost = self._entries.lost | set(namespaces), set()
            return {name: [entry.reference for entry in self._entries.select(name)] for name in lost}

    def stats(self) -> dict[str, int]:
        """Return number of entries, bytes and bounds by tier, counts of hits, misses, moves, evictions and troubles."""
        with self._lock:
            return self._entries.stats()

    def check(self) -> None:
        """Assert that bytes are exact and bounded in every tier, ids and namespaces fit, every entry has its KV."""
        with self._lock:
            self._entries.check()

    def _fetch(self, reference_id: str, namespace: str) -> Reference | None:
        with Work(self._entries):
            entry = self._entries.find(reference_id, self.list_readable(namespace), self._state)
            return self._entries.load(entry, entry.node.path()) if entry is not None else None

    def _find_namespace(self, namespace: str) -> Namespace | None:
        return self._entries.namespaces.get(make_space_name(namespace, self._state or ""))

    def _put_new(self, space: Namespace, reference: Reference, *, frees: bool) -> bool:
        """Store ``reference``, which no entry has yet, and absorb entries that are its prefix; False if refused."""
        layers, checkpoints = reference.layers, reference.checkpoints
        reference = replace(reference, layers=(), checkpoints={})
        entry = Entry(reference, space.tree.insert(reference.token_ids), self._clock())
        node = entry.node
        self._entries.add(entry)
        if node.held is None and node.on_disk is None:
            make = partial(PackedKV.pack, layers, self.config.kv_bits, node.start, checkpoints)
            packed = self._entries.tiers.make(make, node.path() if frees else None)
            owner = None if reference.state else reference.namespace  # None: not on disk
            new_on_disk = [before for before in node.path() if before.on_disk is None]
            placed = packed is not None and self._entries.tiers.place(node, packed, owner)
            self._entries.note_written(new_on_disk)
            if not placed:
                return self._refuse(entry)
        self._entries.tiers.add_checkpoints(node.path(), checkpoints)
        if node.on_disk is None and not reference.state:
            self._entries.waiting[entry.key] = None
        self._entries.absorb(entry)
        return True

    def _put_tainted(self, reference: Reference, *, frees: bool) -> bool:
        """Store a tainted reference in memory in place of the one of its session; False if refused."""
        tiers = self._entries.tiers
        packed = tiers.make(partial(PackedKV.pack, reference.layers, self.config.kv_bits), () if frees else None)
        if reference.session is None or packed is None:
            return self._refuse()
        if not any(tier.can_hold(packed.num_bytes, ()) for tier in tiers.memory):  # beside pinned nodes
            return self._refuse()
        entry = Entry(replace(reference, layers=(), pinned=False), Node(reference.token_ids), self._clock())
        former = self._entries.by_key.get(entry.key)
        if former is not None:
            former_ids = former.reference.token_ids
            if count_common_tokens(former_ids, reference.token_ids) == len(former_ids):
                entry.reference = replace(join_labels(entry.reference, former.reference), segments=reference.segments)
            self._entries.remove(former)
        self._entries.add(entry)
        return tiers.place(entry.node, packed, None) or self._refuse(entry)

    def _refuse(self, entry: Entry | None = None) -> bool:
        """Remove ``entry``, if given; count a refusal, and return False."""
        if entry is not None:
            self._entries.remove(entry)
        self._entries.counts["refused"] += 1
        return False

    def _find_runs(self, token_ids: TokenIds, namespace: str, start: int, stop: int) -> list[Run]:
        """Return the runs in one namespace, but for KV not readable now. Searches again if an entry is gone."""
        assert self.min_run_tokens is not None, "a store made without min_run_tokens keeps no index of runs"
        while (space := self._find_namespace(namespace)) is not None:
            found = space.find_runs(token_ids[start:stop])
            loaded: dict[str, Reference | None] = {}
            unavailable = set()
            for key, entry in {run.key: space.ordinary[run.key] for run in found}.items():
                if key in self._entries.by_key:  # what is loaded may push others out
                    try:
                        loaded[key] = self._entries.load(entry, entry.node.path())
                    except UnavailableFileError:
                        unavailable.add(key)
            known = [(run, reference) for run in found if (reference := loaded.get(run.key)) is not None]
            if len(known) + sum(run.key in unavailable for run in found) == len(found):
                return [Run(start + run.start, ref, run.source_start, run.num_tokens) for run, ref in known]
        return []
