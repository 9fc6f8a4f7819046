"""An in-memory store of references, bounded in bytes, private to namespaces.

Knows nothing about models: tensors go in and come out as they are, and are never mutated. Entries are found by
comparing token ids, so a hit is always verified. Least recently used entries go first; pinned ones stay. Tainted
references, whose KV is approximate, lie apart: the latest of each session, found by that session alone.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from semsharekv_integrations.config import StoreConfig
from semsharekv_integrations.core.prefix import common_prefix_tokens
from semsharekv_integrations.kv import PrefixMatch, Reference, Run, TokenIds
from semsharekv_integrations.store.run_index import RunIndex


def reference_id(namespace: str, token_ids: TokenIds) -> str:
    """A stable digest of namespace and token ids, 16 hexadecimal digits."""
    digest = hashlib.blake2b(token_ids.tobytes(), digest_size=8, key=hashlib.blake2b(namespace.encode()).digest())
    return digest.hexdigest()


@dataclass(eq=False)
class _Entry:
    reference: Reference
    last_used_s: float


@dataclass(eq=False)
class _Space:
    """One namespace: ordinary entries by reference id, tainted ones by session, and where runs of the former are."""

    runs: RunIndex | None
    ordinary: dict[str, _Entry] = field(default_factory=dict)
    tainted: dict[str, _Entry] = field(default_factory=dict)

    def entries(self) -> list[_Entry]:
        return [*self.ordinary.values(), *self.tainted.values()]

    def add(self, entry: _Entry) -> None:
        reference = entry.reference
        if reference.is_tainted:
            self.tainted[str(reference.session)] = entry
            return
        self.ordinary[reference.id] = entry
        if self.runs is not None:
            self.runs.add(reference.id, reference.token_ids)

    def remove(self, entry: _Entry) -> None:
        if entry.reference.is_tainted:
            del self.tainted[str(entry.reference.session)]
            return
        del self.ordinary[entry.reference.id]
        if self.runs is not None:
            self.runs.remove(entry.reference.id)


class KVStore:
    """References by namespace. Safe to use from several threads; every method holds one lock, briefly.

    Args:
        config: bounds.
        clock: seconds that only grow; passed in by tests.
        min_run_tokens: shortest run that ``identical_runs`` finds, at least 1; None if it is never asked, which saves
            about 20 bytes for each stored token, not counted in the byte bound.
    """

    def __init__(
        self,
        config: StoreConfig,
        clock: Callable[[], float] = time.monotonic,
        *,
        min_run_tokens: int | None = None,
    ) -> None:
        self.config = config
        self.min_run_tokens = min_run_tokens
        self._clock = clock
        self._lock = threading.RLock()
        self._spaces: dict[str, _Space] = {}  # by namespace; none is empty
        self._num_bytes = 0
        self._counts: Counter[str] = Counter()

    def longest_prefix(
        self, token_ids: TokenIds, namespace: str, *, max_tokens: int, session: str | None = None
    ) -> PrefixMatch | None:
        """The entry of ``namespace`` that agrees longest with the start of ``token_ids``, and for how many tokens.

        The tainted entry of ``session`` is found like the others, if it agrees for longer than they do. Counts as a
        use of the entry. None if no entry shares the first token.
        """
        with self._lock:
            self._expire()
            best: _Entry | None = None
            best_tokens = 0
            for entry in self._readable(namespace, session):
                shared = min(common_prefix_tokens(entry.reference.token_ids, token_ids), max_tokens)
                if shared > best_tokens:
                    best, best_tokens = entry, shared
            self._counts["hits" if best else "misses"] += 1
            if best is None:
                return None
            best.last_used_s = self._clock()
            return PrefixMatch(best.reference, best_tokens)

    def identical_runs(self, token_ids: TokenIds, namespace: str, *, start: int, stop: int) -> list[Run]:
        """Stretches of ``token_ids[start:stop]`` that stand anywhere in entries of ``namespace``; exact KV only.

        In order, without overlap, each at least ``min_run_tokens`` long and as long as its entry agrees. Every window
        of ``min_run_tokens`` that occurs in an entry starts inside a run. Counts as a use of the entries.
        """
        assert self.min_run_tokens is not None, "a store made without min_run_tokens keeps no index of runs"
        with self._lock:
            self._expire()
            space = self._spaces.get(namespace)
            if space is None or space.runs is None:
                return []
            runs = []
            for found in space.runs.runs(token_ids[start:stop]):
                entry = space.ordinary[found.key]
                entry.last_used_s = self._clock()
                runs.append(Run(start + found.start, entry.reference, found.source_start, found.num_tokens))
            return runs

    def put(self, reference: Reference) -> bool:
        """Keep ``reference``; whether it, or a longer entry that contains it, is in the store afterwards.

        Entries that are a prefix of it are replaced by it, their labels joined to its own. A tainted one replaces that
        of its session instead, and is never pinned. Refused, and counted, if it is larger than what the bound leaves
        beside pinned entries, or tainted and without a session; nothing changes then.
        """
        with self._lock:
            self._expire()
            container = None if reference.is_tainted else self._container_of(reference)
            if container is not None:
                container.reference = _joined(container.reference, reference)
                container.last_used_s = self._clock()
                return True
            homeless = reference.is_tainted and reference.session is None
            if homeless or not self._fits(reference.num_bytes):
                self._counts["refused"] += 1
                return False
            reference = self._replacing(reference)
            self._evict_for(reference.num_bytes)
            self._add(_Entry(reference, self._clock()))
            return True

    def forget(self, namespace: str, *, document_id: str | None = None, session: str | None = None) -> int:
        """Drop the entries of ``namespace`` that carry the document or session (all, if neither is given)."""
        with self._lock:
            doomed = [
                entry
                for entry in self._entries(namespace)
                if (document_id is None or document_id in entry.reference.document_starts)
                and (session is None or entry.reference.session == session)
            ]
            for entry in doomed:
                self._remove(entry)
            return len(doomed)

    def clear(self) -> int:
        """Drop every entry of every namespace; how many there were."""
        with self._lock:
            return sum(self.forget(namespace) for namespace in list(self._spaces))

    def references(self, namespace: str | None = None) -> list[Reference]:
        """The stored references of one namespace, or of all, oldest use first; without tainted ones."""
        with self._lock:
            self._expire()
            entries = sorted(self._entries(namespace), key=lambda entry: entry.last_used_s)
            return [entry.reference for entry in entries if not entry.reference.is_tainted]

    def stats(self) -> dict[str, int]:
        """Entries, how many of them are tainted, bytes, the bound, and counts of hits, misses and ways out."""
        with self._lock:
            entries = self._entries()
            return {
                "entries": len(entries),
                "tainted_entries": sum(entry.reference.is_tainted for entry in entries),
                "bytes": self._num_bytes,
                "max_bytes": self.config.max_bytes,
                **{name: self._counts[name] for name in ("hits", "misses", "evicted", "expired", "refused")},
            }

    def check(self) -> None:
        """The law: bytes are exact and bounded, ids and namespaces fit, no unpinned entry is a prefix of another.

        Tainted entries lie apart, at most one for each session, and what can be found as runs is what is ordinary.
        """
        with self._lock:
            references = [entry.reference for entry in self._entries()]
            assert self._num_bytes == sum(r.num_bytes for r in references), "bytes are not exactly accounted"
            assert self._num_bytes <= self.config.max_bytes, "the byte bound is exceeded"
            for reference in references:
                assert reference.id == reference_id(reference.namespace, reference.token_ids)
            for namespace, space in self._spaces.items():
                assert space.entries(), "an empty namespace is kept"
                assert all(entry.reference.namespace == namespace for entry in space.entries())
                for key, entry in space.ordinary.items():
                    assert entry.reference.id == key and not entry.reference.is_tainted
                    assert self._prefixes_of(entry.reference) in ([], [entry]), "an unpinned entry is a prefix"
                for session, entry in space.tainted.items():
                    assert entry.reference.session == session and entry.reference.is_tainted
                    assert not entry.reference.pinned
                self._check_runs(space)

    def _check_runs(self, space: _Space) -> None:
        assert (space.runs is None) == (self.min_run_tokens is None)
        if space.runs is not None:
            assert space.runs.keys == set(space.ordinary), "the index of runs differs from the ordinary entries"
            space.runs.check()

    def _entries(self, namespace: str | None = None) -> list[_Entry]:
        """Those of one namespace, or of all."""
        return [e for name, space in self._spaces.items() if namespace in (None, name) for e in space.entries()]

    def _readable(self, namespace: str, session: str | None) -> Iterator[_Entry]:
        """What a session may continue from: ordinary entries, then its own tainted one."""
        space = self._spaces.get(namespace)
        if space is not None:
            yield from space.ordinary.values()
            if session in space.tainted:
                yield space.tainted[session]

    def _ordinary(self, namespace: str) -> list[_Entry]:
        return list(self._readable(namespace, None))

    def _container_of(self, reference: Reference) -> _Entry | None:
        num_tokens = len(reference.token_ids)
        for entry in self._ordinary(reference.namespace):
            if reference.pinned and not entry.reference.pinned:
                continue
            if common_prefix_tokens(entry.reference.token_ids, reference.token_ids) == num_tokens:
                return entry
        return None

    def _prefixes_of(self, reference: Reference) -> list[_Entry]:
        """Entries that ``reference`` begins with or equals; pinned ones are left to stand by themselves."""
        return [
            entry
            for entry in self._ordinary(reference.namespace)
            if not entry.reference.pinned and _begins_with(reference, entry.reference)
        ]

    def _replacing(self, reference: Reference) -> Reference:
        """``reference`` as it is kept, with the labels of what it contains, after removing what it replaces."""
        if not reference.is_tainted:
            for entry in self._prefixes_of(reference):
                reference = _joined(reference, entry.reference)
                self._remove(entry)
            return reference
        space = self._spaces.get(reference.namespace)
        former = space.tainted.get(str(reference.session)) if space is not None else None
        if former is not None:
            if _begins_with(reference, former.reference):
                reference = replace(_joined(reference, former.reference), segments=reference.segments)
            self._remove(former)
        return replace(reference, pinned=False)

    def _fits(self, num_bytes: int) -> bool:
        """Whether the bound leaves so much beside pinned entries."""
        pinned = (entry.reference.num_bytes for entry in self._entries() if entry.reference.pinned)
        return num_bytes + sum(pinned) <= self.config.max_bytes

    def _evict_for(self, num_bytes: int) -> None:
        """Remove unpinned entries, least recently used first, until so much fits."""
        evictable = [entry for entry in self._entries() if not entry.reference.pinned]
        for entry in sorted(evictable, key=lambda entry: entry.last_used_s):
            if self._num_bytes + num_bytes <= self.config.max_bytes:
                return
            self._remove(entry)
            self._counts["evicted"] += 1

    def _expire(self) -> None:
        now = self._clock()
        for entry in self._entries():
            ttl_s = entry.reference.expires_after_s or self.config.ttl_s
            if ttl_s is not None and now - entry.last_used_s >= ttl_s:
                self._remove(entry)
                self._counts["expired"] += 1

    def _add(self, entry: _Entry) -> None:
        runs = RunIndex(self.min_run_tokens) if self.min_run_tokens is not None else None
        self._spaces.setdefault(entry.reference.namespace, _Space(runs)).add(entry)
        self._num_bytes += entry.reference.num_bytes

    def _remove(self, entry: _Entry) -> None:
        space = self._spaces[entry.reference.namespace]
        space.remove(entry)
        self._num_bytes -= entry.reference.num_bytes
        if not space.entries():
            del self._spaces[entry.reference.namespace]


def _begins_with(reference: Reference, other: Reference) -> bool:
    return common_prefix_tokens(reference.token_ids, other.token_ids) == len(other.token_ids)


def _joined(kept: Reference, absorbed: Reference) -> Reference:
    """``kept`` with the labels of an entry that it contains; it expires as soon as either would."""
    lifetimes = [s for s in (kept.expires_after_s, absorbed.expires_after_s) if s is not None]
    return replace(
        kept,
        document_starts={**absorbed.document_starts, **kept.document_starts},
        segments=kept.segments or absorbed.segments,
        session=kept.session or absorbed.session,
        expires_after_s=min(lifetimes, default=None),
    )
