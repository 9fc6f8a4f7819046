"""What a directory holds becomes entries again: its nodes in radix trees, its prompts at the nodes they end with.

Knows nothing about tiers: whoever calls says where a node's KV lies. Reads no KV.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from semsharekv_integrations.kv import Reference
from semsharekv_integrations.store.radix import FileRange, Node, RadixTree
from semsharekv_integrations.store.records import EntryRecord, NodeRecord, reference_id, unpack_reference

Attached = Mapping[str, tuple[Node, FileRange]]  # nodes in their trees, each with its place, by id


class Reopened(NamedTuple):
    """A stored prompt, and the nodes that it goes through."""

    record: EntryRecord
    reference: Reference
    path: list[Node]


def attach_nodes(records: Iterable[NodeRecord], tree_of: Callable[[str], RadixTree]) -> Attached:
    """Put the nodes that fit together into the trees of their namespaces, and return them. Skips the others.

    Parents must stand before children.
    """
    nodes: dict[str, tuple[Node, FileRange]] = {}
    for record in records:
        tree = tree_of(record.namespace)
        parent, _ = (tree.root, None) if record.parent is None else nodes.get(record.parent, (None, None))
        if parent is not None and int(record.token_ids[0]) not in parent.children:
            node = tree.attach(parent, record.token_ids, record.id)
            nodes[record.id] = node, FileRange(record.file, record.first)
    return nodes


def reopen_entries(records: Iterable[EntryRecord], nodes: Attached) -> list[Reopened]:
    """Return the prompts whose nodes are there and whose ids are theirs, least recently used first.

    Adds their uses to those of their nodes.
    """
    found = []
    for record in sorted(records, key=lambda record: record.used_s):
        node, _ = nodes.get(record.node, (None, None))
        if node is None:
            continue
        path = node.path()
        ids = np.concatenate([step.token_ids for step in path]) if len(path) > 1 else node.token_ids
        if record.id != reference_id(record.namespace, ids):
            continue
        found.append(Reopened(record, unpack_reference(record.labels, record.namespace, ids, id=record.id), path))
        for step in path:
            step.hits += record.hits
    return found
