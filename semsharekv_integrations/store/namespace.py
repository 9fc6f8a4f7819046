"""The entries of one namespace and one state of the model, with their radix tree and their index of runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from semsharekv_integrations.kv import (
    UNPLACED,
    Reference,
    Run,
    SpaceName,
    Span,
    TokenIds,
    count_common_tokens,
    select_within,
)
from semsharekv_integrations.store.radix import Node, RadixTree
from semsharekv_integrations.store.records import reference_id
from semsharekv_integrations.store.runs import BYTES_PER_WINDOW, IndexedRun, RunIndex


@dataclass(eq=False)
class Entry:
    """A stored prompt."""

    reference: Reference  # its labels and token ids, without KV
    node: Node  # that it ends with
    last_used_s: float  # by the store's clock
    hits: float = 0.0  # number of times it was found
    stays: bool = False  # on disk, because a longer entry that begins with it could not be written there

    @property
    def key(self) -> str:
        """Unique in a store: the reference's id; of a tainted entry, made of its state, namespace and session."""
        reference = self.reference
        if not reference.is_tainted:
            return reference.id
        name = f"{len(reference.namespace)} {reference.namespace}{reference.session}"
        return f"{reference.state} {name}" if reference.state else name  # whatever stands in the names


def join_labels(kept: Reference, absorbed: Reference) -> Reference:
    """Return ``kept`` with the labels of ``absorbed``, its beginning, added. The shorter lifetime counts."""
    lifetimes = [s for s in (kept.expires_after_s, absorbed.expires_after_s) if s is not None]
    spans = {key: min(own, absorbed.spans.get(key, own), key=_order) for key, own in kept.spans.items()}
    return replace(
        kept.labelled(absorbed.spans | spans),
        segments=kept.segments or absorbed.segments,
        session=kept.session or absorbed.session,
        expires_after_s=min(lifetimes, default=None),
    )


def _order(span: Span) -> tuple[bool, int]:
    """Return a sort key for places of one document: those that are known come first, then the first to end."""
    return span.start == UNPLACED, span.stop


def shorten(reference: Reference, num_tokens: int) -> Reference:
    """Return ``reference``, of an entry, for its first ``num_tokens`` tokens, with the labels that lie within them."""
    token_ids = reference.token_ids[:num_tokens]
    return replace(
        reference.labelled(select_within(reference.spans, num_tokens)),
        id=reference_id(reference.namespace, token_ids, reference.state),
        token_ids=token_ids,
        segments=tuple(segment for segment in reference.segments if segment.stop <= num_tokens),
    )


class Match(NamedTuple):
    """An entry, and how many of its first tokens a prompt begins with."""

    entry: Entry
    num_tokens: int

    @property
    def path(self) -> list[Node]:
        """The nodes of the entry that have at least one of these tokens."""
        return [node for node in self.entry.node.path() if node.start < self.num_tokens]


class Namespace:
    """Entries of one namespace: ordinary ones by reference id, tainted ones by session.

    Without ``min_run_tokens``, the length of the shortest run, runs cannot be asked for. ``on_split`` is that of
    ``RadixTree``.
    """

    def __init__(self, min_run_tokens: int | None, on_split: Callable[[Node, Node], None]) -> None:
        self.tree = RadixTree(on_split)
        self.ordinary: dict[str, Entry] = {}
        self.tainted: dict[str, Entry] = {}
        self._min_run_tokens = min_run_tokens
        self._runs: RunIndex | None = None  # made when first asked for: opening a large store must not wait for it

    def __iter__(self) -> Iterator[Entry]:
        yield from self.ordinary.values()
        yield from self.tainted.values()

    def add(self, entry: Entry) -> None:
        """Add ``entry``, with its pin, documents and runs. Its node is in the tree, or alone for a tainted entry."""
        reference, node = entry.reference, entry.node
        node.entries.add(entry.key)
        if reference.is_tainted:
            self.tainted[str(reference.session)] = entry
            return
        self.ordinary[reference.id] = entry
        self.label(entry)
        self.pin(entry, +reference.pinned)
        if self._runs is not None:
            self._runs.add(reference.id, reference.token_ids)

    def remove(self, entry: Entry) -> list[Node]:
        """Remove ``entry``; return the nodes that no entry needs any more, the last one first."""
        entry.node.entries.discard(entry.key)
        if entry.reference.is_tainted:
            del self.tainted[str(entry.reference.session)]
            return [entry.node]
        del self.ordinary[entry.reference.id]
        self.pin(entry, -entry.reference.pinned)
        if self._runs is not None:
            self._runs.remove(entry.reference.id)
        return self.tree.prune(entry.node)

    def purge(self) -> None:
        """Drop what the index of runs, if there is one, still has of removed entries."""
        if self._runs is not None:
            self._runs.purge()

    def label(self, entry: Entry) -> None:
        """Note in each node of ``entry`` which documents end there: every prompt through the node has them."""
        spans = entry.reference.spans.items()
        for node in entry.node.path() if spans else ():
            node.documents |= {key: span for key, span in spans if node.start < span.stop <= node.stop}

    def pin(self, entry: Entry, change: int) -> None:
        """Add ``change`` to the number of pinned entries of each node of ``entry``."""
        for node in entry.node.path():
            node.pins += change

    def find_prefix(self, token_ids: TokenIds, max_tokens: int, session: str | None) -> Match | None:
        """Return the entry that agrees longest, None if none does; that of ``session`` only if it agrees longer."""
        node, agreed = self.tree.find(token_ids)
        while agreed and not node.entries:  # any entry that goes through the node will do
            node = next(iter(node.children.values()))
        best = Match(self.ordinary[next(iter(node.entries))], min(agreed, max_tokens)) if agreed else None
        own = self.tainted.get(session) if session is not None else None
        if own is not None:
            shared = min(count_common_tokens(own.reference.token_ids, token_ids), max_tokens)
            if shared > (best.num_tokens if best else 0):
                best = Match(own, shared)
        return best if best and best.num_tokens else None

    def find_container(self, reference: Reference) -> Entry | None:
        """Return an ordinary entry that begins with ``reference``, pinned if that is pinned; None if there is none."""
        node, agreed = self.tree.find(reference.token_ids)
        if agreed < len(reference.token_ids):
            return None
        found = (self.ordinary[key] for below in node.below() for key in below.entries)
        return next((entry for entry in found if entry.reference.pinned or not reference.pinned), None)

    def find_contained(self, entry: Entry) -> list[Entry]:
        """Return the entries that ``entry`` replaces: it begins with them, they are not pinned and need not stay."""
        found = [self.ordinary[key] for node in entry.node.path() for key in node.entries if key != entry.key]
        is_on_disk = entry.node.on_disk is not None
        return [other for other in found if not other.reference.pinned and (is_on_disk or not other.stays)]

    def find_runs(self, token_ids: TokenIds) -> list[IndexedRun]:
        """Return runs of ``token_ids`` [T] in ordinary entries: see ``RunIndex.find``. Makes the index if needed."""
        if self._runs is None:
            assert self._min_run_tokens is not None, "a store made without min_run_tokens finds no runs"
            self._runs = RunIndex(self._min_run_tokens)
            self._runs.add_all((key, entry.reference.token_ids) for key, entry in self.ordinary.items())
        return self._runs.find(token_ids)

    def find_documents(self, path: list[Node]) -> dict[str, Span]:
        """Return the documents that end in the nodes of ``path``, with their places."""
        return {key: span for node in path for key, span in node.documents.items()}

    @property
    def index_bytes(self) -> int:
        """Size of the index of runs; 0 if it was not made yet."""
        return BYTES_PER_WINDOW * self._runs.num_windows if self._runs is not None else 0

    def check(self, name: SpaceName) -> None:
        """Assert that every entry is the path to its node and belongs here, and that runs are found in all of them."""
        self.tree.check()
        assert self.ordinary or self.tainted, "an empty namespace is kept"
        for key, entry in self.ordinary.items():
            reference, path = entry.reference, entry.node.path()
            assert reference.id == key and not reference.is_tainted and reference.space == name
            assert entry.node.stop == len(reference.token_ids) and key in entry.node.entries
            for node in path:
                assert (reference.token_ids[node.start : node.stop] == node.token_ids).all(), "a path of other tokens"
            placed = {document for document, span in reference.spans.items() if span.start != UNPLACED}
            assert placed <= set(self.find_documents(path)), "documents that its nodes miss"
            assert all(other is entry for other in self.find_contained(entry)), "an unpinned entry begins another"
        for session, entry in self.tainted.items():
            reference = entry.reference
            assert reference.session == session and reference.is_tainted and reference.space == name
            assert not reference.pinned and entry.node.parent is None and entry.key in entry.node.entries
        for node in self.tree.nodes():
            assert node.pins == sum(
                self.ordinary[key].reference.pinned for below in node.below() for key in below.entries
            )
        if self._runs is not None:
            assert self._runs.keys == set(self.ordinary), "the index of runs differs from the ordinary entries"
            self._runs.check()


def find_gaps(runs: Iterable[Run], start: int, stop: int) -> list[tuple[int, int]]:
    """Return the stretches from ``start`` to ``stop`` that ``runs``, in order and without overlap, leave out."""
    edges = [start, *(edge for run in runs for edge in (run.start, run.start + run.num_tokens)), stop]
    return [(first, last) for first, last in zip(edges[::2], edges[1::2], strict=True) if first < last]
