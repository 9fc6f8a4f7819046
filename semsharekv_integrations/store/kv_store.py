"""The store: stored prompts by namespace, found by what they begin with and by runs anywhere in them.

Knows nothing about models. What several prompts begin with is kept once (``store.radix``), wherever there is room for
it (``store.tiers``). A hit is always verified token by token. Tainted entries, whose KV is approximate, lie apart: the
latest of each session, in memory alone, found by that session alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path

import torch

from semsharekv_integrations.concurrency.threads import do_when_free, hold_at_forks, tell_of_forks
from semsharekv_integrations.config import StoreConfig
from semsharekv_integrations.errors import make_plain
from semsharekv_integrations.kv import PrefixMatch, Reference, Run, TokenIds, make_space_name
from semsharekv_integrations.store.codec import pack_if_room
from semsharekv_integrations.store.directory import KVDirectory
from semsharekv_integrations.store.entries import Entries
from semsharekv_integrations.store.files import UnavailableFileError
from semsharekv_integrations.store.namespace import Entry, Namespace, begins_with, find_gaps, join_labels
from semsharekv_integrations.store.radix import Node
from semsharekv_integrations.store.records import reference_id, require_writable
from semsharekv_integrations.store.standing import entries_with, forms_of


class KVStore:
    """References by namespace. Safe to use from several threads; every method holds one lock.

    A child that is forked has a copy, which goes on in memory alone.

    Args:
        config: bounds.
        clock: seconds that only grow; passed in by tests.
        wall_clock: seconds since the epoch, for what outlives the process; may jump.
        min_run_tokens: shortest run that ``find_runs`` finds, at least 1; None if it is never asked, which saves
            about 20 bytes for each stored token, not counted in the byte bounds.
    """

    def __init__(
        self,
        config: StoreConfig,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        *,
        min_run_tokens: int | None = None,
    ) -> None:
        self.config = config
        self.min_run_tokens = min_run_tokens
        self._state: str | None = None
        self._clock = clock
        self._entries = Entries(config, clock, wall_clock, min_run_tokens)
        tell_of_forks(self)

    def view_state(self, state: str) -> KVStore:
        """As one state of the model sees it, ``""`` being the first, which alone is kept on disk."""
        view = copy(self)
        view._state = state
        return view

    def open(self, fingerprint: str, dtype: torch.dtype, device: torch.device) -> int:
        """Take up what lies in the configured directory; how many entries. Without a directory, none.

        Args:
            fingerprint: of the model that the KV is of, in hexadecimal digits; another one's KV is left alone.
            dtype: in which the model takes KV.
            device: where it does.

        Raises:
            StoreLockedError: if another process uses the directory with this model.
            StoreFileError: if the directory cannot be used.
        """
        if self.config.directory is None:
            return 0
        with self._lock:
            return self._entries.open(KVDirectory(Path(self.config.directory), fingerprint), dtype, device)

    def close(self) -> None:
        """Write down what was used when, and leave the directory to others; what is in memory stays there."""
        with self._lock:
            self._entries.close()

    def go_on_in_child(self) -> None:
        """Go on with what is in memory: the directory is the parent's."""
        self._entries.lock = hold_at_forks(threading.Lock())
        self._entries.abandon()

    @property
    def _lock(self) -> threading.Lock:
        return self._entries.lock  # one for all states

    def abandon(self) -> None:
        """Close, as soon as nobody is at work here. Never waits, so that the garbage collector may call it anywhere."""
        do_when_free(self._lock, self._entries.close)

    def list_readable(self, namespace: str) -> list[str]:
        """The namespaces that requests of ``namespace`` may read: itself, then the shared one."""
        shared = self.config.shared_namespace
        return [namespace] if shared in (None, namespace) else [namespace, make_plain(shared)]

    def find_prefix(
        self, token_ids: TokenIds, namespace: str, *, max_tokens: int, session: str | None = None
    ) -> PrefixMatch | None:
        """The entry of ``namespace`` that agrees longest with the start of ``token_ids``, and for how many tokens.

        The shared namespace is read as well, and the tainted entry of ``session`` if it agrees for longer than the
        others. Counts as a use of the entry. None if no entry shares the first token.
        """
        with self._working():
            while True:
                found = [
                    match
                    for name in self.list_readable(namespace)
                    if (space := self._find_namespace(name)) is not None
                    and (match := space.find_prefix(token_ids, max_tokens, session if name == namespace else None))
                ]
                found.sort(key=lambda match: (-match.num_tokens, match.entry.reference.is_tainted))
                for match in found:
                    try:
                        reference = self._entries.load(match.entry, match.path)
                    except UnavailableFileError:
                        continue
                    if reference is None:
                        break  # and look again among what is left
                    self._entries.counts["hits"] += 1
                    return PrefixMatch(reference, match.num_tokens)
                else:
                    self._entries.counts["misses"] += 1
                    return None

    def find_runs(self, token_ids: TokenIds, namespace: str, *, start: int, stop: int) -> list[Run]:
        """Stretches of ``token_ids[start:stop]`` that stand anywhere in entries of ``namespace``; exact KV only.

        In order, without overlap, each at least ``min_run_tokens`` long and as long as its entry agrees. Every window
        of ``min_run_tokens`` that occurs in an entry starts inside a run. Where the namespace has nothing, the shared
        one is read. Counts as a use of the entries.
        """
        with self._working():
            runs: list[Run] = []
            for name in self.list_readable(namespace):
                for first, last in find_gaps(runs, start, stop):
                    runs += self._find_runs(token_ids, name, first, last)
                runs.sort(key=lambda run: run.start)
            return runs

    def put(self, reference: Reference) -> bool:
        """Keep ``reference``; whether it, or a longer entry that contains it, is in the store afterwards.

        Entries that are a prefix of it are replaced by it, their labels joined to its own; one that lies on disk stays
        where this one could not be written there. A tainted one replaces that of its session instead, and is never
        pinned. Refused, and counted, if there is no room beside pinned entries, if it is tainted and without a session,
        or if it is rounded and this store keeps KV as it is; nothing changes then.

        Raises:
            ValueError: if what is known of it beside its KV cannot be written down; nothing changes.
        """
        require_writable(reference)
        with self._working():
            if self._state is not None and reference.state != self._state:
                own_id = reference_id(reference.namespace, reference.token_ids, self._state)
                reference = replace(reference, id=own_id, state=self._state)
            if reference.rounded and self.config.kv_bits is None:
                return self._refuse()
            if reference.is_tainted:
                return self._put_tainted(reference)
            space = self._entries.ensure_namespace(reference.space)
            container = space.ordinary.get(reference.id) or space.find_container(reference)
            if container is None:
                return self._put_new(space, reference)
            pinned = reference.pinned or container.reference.pinned
            container.last_used_s = self._clock()
            self._entries.tiers.touch(container.node.path())
            self._entries.relabel(container, replace(join_labels(container.reference, reference), pinned=pinned))
            return True

    def fetch(self, reference_id: str, namespace: str) -> Reference | None:
        """An entry with its KV, by the id that ``references`` gives. Counts as a use.

        None if it is not there, or cannot be read now.
        """
        try:
            return self._fetch(reference_id, namespace)
        except UnavailableFileError:
            return None

    def references(self, namespace: str | None = None) -> list[Reference]:
        """The stored references of one namespace, or of all, oldest use first, without KV; no tainted ones."""
        with self._working():
            entries = sorted(self._entries.select(namespace, self._state), key=lambda entry: entry.last_used_s)
            return [entry.reference for entry in entries if not entry.reference.is_tainted]

    def fetch_all(self, namespace: str | None = None) -> list[Reference]:
        """As ``references``, with KV. Counts as a use of each.

        Raises:
            StoreFileError: if one of them cannot be read now, so that nobody takes the others for all.
        """
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
        """Drop the entries of ``namespace`` with the document, or of the session (all, if neither is given).

        They may be of any state of the model. The ones that ``spare`` is true of stay. How many entries went, without
        those that had expired, so that the count does not tell what others did since. For ``tokens`` and ``text_of``
        see ``entries_with``.
        """
        with self._working():
            found = self._entries.select(namespace)
            if document_id is not None:
                found = entries_with(document_id, found, tokens, text_of)
            if session is not None:
                found = [entry for entry in found if entry.reference.session == session]
            doomed = [entry for entry in found if spare is None or not spare(entry.reference)]
            return self._entries.remove_all(doomed, self._entries.list_names(namespace))

    def find_forms(self, document_id: str, namespace: str, tokens: Sequence[TokenIds]) -> list[TokenIds]:
        """The tokens of a document: those given, and those that entries have where they say that it stands."""
        with self._lock:
            return forms_of(document_id, self._entries.select(namespace), tokens)

    def clear(self) -> int:
        """Drop every entry of every namespace; how many there were."""
        with self._lock:
            return self._entries.remove_all(self._entries.select(None))

    def require_gone(self) -> None:
        """Raise ``StoreWriteError`` if what was forgotten last still lies on disk, which could not be written."""
        self._entries.require_gone()

    def collect_left(self, *namespaces: str) -> dict[str, list[Reference]]:
        """What is left in the namespaces that lost entries since this was asked last, and in those named."""
        with self._lock:
            lost, self._entries.lost = self._entries.lost | set(namespaces), set()
            return {name: [entry.reference for entry in self._entries.select(name)] for name in lost}

    def stats(self) -> dict[str, int]:
        """Entries, bytes and bounds by tier, and counts of hits, misses, moves, ways out and troubles."""
        with self._lock:
            return self._entries.stats()

    def check(self) -> None:
        """The law: bytes are exact and bounded in every tier, ids and namespaces fit, and every entry has its KV."""
        with self._lock:
            self._entries.check()

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Hold the lock; what has expired goes first, and the catalog is told of all changes at the end, at once."""
        with self._lock:
            try:
                self._entries.expire()
                yield
            finally:
                self._entries.tiers.disk.commit(retry=False)

    def _fetch(self, reference_id: str, namespace: str) -> Reference | None:
        with self._working():
            entry = self._entries.find(reference_id, self.list_readable(namespace), self._state)
            return self._entries.load(entry, entry.node.path()) if entry is not None else None

    def _find_namespace(self, namespace: str) -> Namespace | None:
        """What this state left in it."""
        return self._entries.namespaces.get(make_space_name(namespace, self._state or ""))

    def _put_new(self, space: Namespace, reference: Reference) -> bool:
        """An entry that no other one contains."""
        layers, reference = reference.layers, replace(reference, layers=())
        entry = Entry(reference, space.tree.insert(reference.token_ids), self._clock())
        node = entry.node
        self._entries.add(entry)
        if node.held is None and node.on_disk is None:
            packed = pack_if_room(layers, self.config.kv_bits, node.start)
            owner = None if reference.state else reference.namespace  # None: not on disk
            if packed is None or not self._entries.tiers.place(node, packed, owner):
                return self._refuse(entry)
        absorbed = space.find_contained(entry)
        for other in absorbed:
            reference = join_labels(reference, other.reference)
            entry.hits = max(entry.hits, other.hits)
        self._entries.relabel(entry, reference)
        for other in absorbed:
            other.stays = node.on_disk is None and other.node.on_disk is not None  # else the disk would have neither
            if not other.stays:
                self._entries.remove(other)
        return True

    def _put_tainted(self, reference: Reference) -> bool:
        packed = pack_if_room(reference.layers, self.config.kv_bits)
        if reference.session is None or packed is None or not self._entries.tiers.could_hold(packed.num_bytes):
            return self._refuse()
        entry = Entry(replace(reference, layers=(), pinned=False), Node(reference.token_ids), self._clock())
        former = self._entries.by_key.get(entry.key)
        if former is not None:
            if begins_with(reference.token_ids, former.reference.token_ids):
                entry.reference = replace(join_labels(entry.reference, former.reference), segments=reference.segments)
            self._entries.remove(former)
        self._entries.add(entry)
        return self._entries.tiers.place(entry.node, packed, None) or self._refuse(entry)

    def _refuse(self, entry: Entry | None = None) -> bool:
        if entry is not None:
            self._entries.remove(entry)
        self._entries.counts["refused"] += 1
        return False

    def _find_runs(self, token_ids: TokenIds, namespace: str, start: int, stop: int) -> list[Run]:
        """Those of one namespace; again, if one of its entries turns out to be gone."""
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
