"""An in-memory store of references, bounded in bytes, private to namespaces.

Knows nothing about models: tensors go in and come out as they are, and are never mutated. Entries are found by
comparing token ids, so a hit is always verified. Least recently used entries go first; pinned ones stay.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from semsharekv_integrations.config import StoreConfig
from semsharekv_integrations.core.prefix import common_prefix_tokens
from semsharekv_integrations.kv import PrefixMatch, Reference, TokenIds


def reference_id(namespace: str, token_ids: TokenIds) -> str:
    """A stable digest of namespace and token ids, 16 hexadecimal digits."""
    digest = hashlib.blake2b(token_ids.tobytes(), digest_size=8, key=hashlib.blake2b(namespace.encode()).digest())
    return digest.hexdigest()


@dataclass(eq=False)
class _Entry:
    reference: Reference
    last_used_s: float


class KVStore:
    """References by namespace. Safe to use from several threads; every method holds one lock, briefly.

    Args:
        config: bounds.
        clock: seconds that only grow; passed in by tests.
    """

    def __init__(self, config: StoreConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self._clock = clock
        self._lock = threading.RLock()
        self._entries: dict[str, dict[str, _Entry]] = {}  # namespace -> reference id -> entry
        self._num_bytes = 0
        self._counts: Counter[str] = Counter()

    def longest_prefix(self, token_ids: TokenIds, namespace: str, *, max_tokens: int) -> PrefixMatch | None:
        """The entry of ``namespace`` that agrees longest with the start of ``token_ids``, and for how many tokens.

        Counts as a use of the entry. None if no entry shares the first token.
        """
        with self._lock:
            self._expire()
            best: _Entry | None = None
            best_tokens = 0
            for entry in self._entries.get(namespace, {}).values():
                shared = min(common_prefix_tokens(entry.reference.token_ids, token_ids), max_tokens)
                if shared > best_tokens:
                    best, best_tokens = entry, shared
            self._counts["hits" if best else "misses"] += 1
            if best is None:
                return None
            best.last_used_s = self._clock()
            return PrefixMatch(best.reference, best_tokens)

    def put(self, reference: Reference) -> bool:
        """Keep ``reference``; whether it, or a longer entry that contains it, is in the store afterwards.

        Entries that are a prefix of it are replaced by it, their labels joined to its own. Refused, and counted,
        if it is larger than what the bound leaves beside pinned entries; nothing changes then.
        """
        with self._lock:
            self._expire()
            entries = self._entries.setdefault(reference.namespace, {})
            container = self._container_of(reference)
            if container is not None:
                container.reference = _joined(container.reference, reference)
                container.last_used_s = self._clock()
                return True
            if not self._fits(reference.num_bytes):
                self._counts["refused"] += 1
                return False
            for entry in self._prefixes_of(reference):
                reference = _joined(reference, entry.reference)
                self._remove(entry)
            self._evict_for(reference.num_bytes)
            entries[reference.id] = _Entry(reference, self._clock())
            self._num_bytes += reference.num_bytes
            return True

    def forget(self, namespace: str, *, document_id: str | None = None, session: str | None = None) -> int:
        """Drop the entries of ``namespace`` that carry the document or session (all, if neither is given)."""
        with self._lock:
            doomed = [
                entry
                for entry in self._entries.get(namespace, {}).values()
                if (document_id is None or document_id in entry.reference.document_starts)
                and (session is None or entry.reference.session == session)
            ]
            for entry in doomed:
                self._remove(entry)
            return len(doomed)

    def clear(self) -> int:
        """Drop every entry of every namespace; how many there were."""
        with self._lock:
            return sum(self.forget(namespace) for namespace in list(self._entries))

    def references(self, namespace: str | None = None) -> list[Reference]:
        """The stored references of one namespace, or of all, oldest use first."""
        with self._lock:
            self._expire()
            entries = [e for name, group in self._entries.items() if namespace in (None, name) for e in group.values()]
            return [entry.reference for entry in sorted(entries, key=lambda entry: entry.last_used_s)]

    def stats(self) -> dict[str, int]:
        """Entries, bytes, the bound, and counts of hits, misses, evictions, expiries and refusals."""
        with self._lock:
            names = ("hits", "misses", "evicted", "expired", "refused")
            counts = {name: self._counts[name] for name in names}
            num_entries = sum(map(len, self._entries.values()))
            return {"entries": num_entries, "bytes": self._num_bytes, "max_bytes": self.config.max_bytes, **counts}

    def check(self) -> None:
        """The law: bytes are exact and bounded, ids and namespaces fit, no unpinned entry is a prefix of another."""
        with self._lock:
            references = [e.reference for group in self._entries.values() for e in group.values()]
            assert self._num_bytes == sum(r.num_bytes for r in references), "bytes are not exactly accounted"
            assert self._num_bytes <= self.config.max_bytes, "the byte bound is exceeded"
            for namespace, group in self._entries.items():
                for key, entry in group.items():
                    assert entry.reference.namespace == namespace and entry.reference.id == key
                    assert key == reference_id(namespace, entry.reference.token_ids)
                    assert self._prefixes_of(entry.reference) in ([], [entry]), "an unpinned entry is a prefix"

    def _container_of(self, reference: Reference) -> _Entry | None:
        num_tokens = len(reference.token_ids)
        for entry in self._entries[reference.namespace].values():
            if reference.pinned and not entry.reference.pinned:
                continue
            if common_prefix_tokens(entry.reference.token_ids, reference.token_ids) == num_tokens:
                return entry
        return None

    def _prefixes_of(self, reference: Reference) -> list[_Entry]:
        """Entries that ``reference`` begins with or equals; pinned ones are left to stand by themselves."""
        return [
            entry
            for entry in self._entries[reference.namespace].values()
            if not entry.reference.pinned
            and common_prefix_tokens(entry.reference.token_ids, reference.token_ids) == len(entry.reference.token_ids)
        ]

    def _fits(self, num_bytes: int) -> bool:
        """Whether the bound leaves so much beside pinned entries."""
        pinned = [e.reference for group in self._entries.values() for e in group.values() if e.reference.pinned]
        return num_bytes + sum(reference.num_bytes for reference in pinned) <= self.config.max_bytes

    def _evict_for(self, num_bytes: int) -> None:
        """Remove unpinned entries, least recently used first, until so much fits."""
        evictable = [e for group in self._entries.values() for e in group.values() if not e.reference.pinned]
        for entry in sorted(evictable, key=lambda entry: entry.last_used_s):
            if self._num_bytes + num_bytes <= self.config.max_bytes:
                return
            self._remove(entry)
            self._counts["evicted"] += 1

    def _expire(self) -> None:
        now = self._clock()
        for entry in [e for group in self._entries.values() for e in group.values()]:
            ttl_s = entry.reference.expires_after_s or self.config.ttl_s
            if ttl_s is not None and now - entry.last_used_s >= ttl_s:
                self._remove(entry)
                self._counts["expired"] += 1

    def _remove(self, entry: _Entry) -> None:
        del self._entries[entry.reference.namespace][entry.reference.id]
        self._num_bytes -= entry.reference.num_bytes


def _joined(kept: Reference, absorbed: Reference) -> Reference:
    """``kept`` with the labels of an entry that it contains; it expires as soon as either would."""
    lifetimes = [s for s in (kept.expires_after_s, absorbed.expires_after_s) if s is not None]
    return replace(
        kept,
        document_starts={**absorbed.document_starts, **kept.document_starts},
        session=kept.session or absorbed.session,
        expires_after_s=min(lifetimes, default=None),
    )
