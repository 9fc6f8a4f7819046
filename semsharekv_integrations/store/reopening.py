"""From what lies in a directory to entries, when a store is opened; no KV is read."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from semsharekv_integrations.store.directory import KVDirectory
from semsharekv_integrations.store.disk import DiskShelf
from semsharekv_integrations.store.labels import Entry, reference_of
from semsharekv_integrations.store.radix import FileRange, Node
from semsharekv_integrations.store.records import NodeRecord
from semsharekv_integrations.store.space import Space


@contextmanager
def uncollected() -> Iterator[None]:
    """Without looking for garbage inside: what is opened is all needed, and looking through it takes as long again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def entries_on_disk(
    directory: KVDirectory, disk: DiskShelf, space_of: Callable[[str], Space]
) -> list[tuple[Entry, float]]:
    """Every stored entry, its nodes in their trees and on the disk shelf, with the wall clock's time of its last use.

    Least recently used ones first. What does not fit together is removed from the directory.
    """
    parts, records = directory.nodes(), directory.entries()
    nodes = _nodes_on_disk(parts, space_of)
    found: list[tuple[Entry, float]] = []
    for record in sorted(records, key=lambda record: record.used_s):
        node, _ = nodes.get(record.node, (None, None))
        if node is None:
            continue
        path = node.path()
        ids = np.concatenate([step.token_ids for step in path]) if len(path) > 1 else node.token_ids
        try:
            found.append((Entry(reference_of(record, ids), node, 0.0, record.hits), record.used_s))
        except (ValueError, KeyError, TypeError):
            continue
        for step in path:
            step.hits += record.hits
    file_tokens: Counter[str] = Counter()
    for node, place in nodes.values():
        file_tokens[place.file] += len(node.token_ids)
    for entry, _ in found:  # after all hits are known, which rank the nodes
        for step in reversed(entry.node.path()):
            if step.on_disk is None:
                place = nodes[step.id][1]
                disk.adopt(step, place, file_tokens[place.file])
    for node, _ in nodes.values():
        if node.on_disk is None and node.parent is not None:
            del node.parent.children[int(node.token_ids[0])]
    disk.record(
        gone_nodes=[part.id for part in parts if part.id not in nodes or nodes[part.id][0].on_disk is None],
        gone_entries={record.id for record in records} - {entry.key for entry, _ in found},
    )
    return found


def _nodes_on_disk(parts: Sequence[NodeRecord], space_of: Callable[[str], Space]) -> dict[str, tuple[Node, FileRange]]:
    """The nodes that fit together, in their trees, by id, and where their KV is; parents before children."""
    nodes: dict[str, tuple[Node, FileRange]] = {}
    for part in parts:
        tree = space_of(part.namespace).tree
        parent = tree.root if part.parent is None else nodes[part.parent][0] if part.parent in nodes else None
        if parent is None or int(part.token_ids[0]) in parent.children:
            continue
        node = tree.attach(parent, part.token_ids, part.id)
        nodes[part.id] = node, FileRange(part.file, part.first)
    return nodes
