"""What the catalog of stored KV says: files, nodes of the radix trees in them, and the prompts that need these.

Pure data, and the rules by which records that were found together may be used. Knows nothing about the disk.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from semsharekv_integrations.kv import TokenIds


class FileRecord(NamedTuple):
    """A KV file as it was written."""

    id: str
    num_tokens: int
    num_bytes: int


class NodeRecord(NamedTuple):
    """A node of the radix tree of one namespace: consecutive tokens, and where their KV is.

    Attributes:
        id: unique, chosen by the caller.
        parent: id of the node before it, None at position 0.
        namespace: the only namespace that may read it.
        token_ids: [N], its own tokens.
        file: id of the KV file that has its KV.
        first: the token of that file that is its first.
    """

    id: str
    parent: str | None
    namespace: str
    token_ids: TokenIds
    file: str
    first: int


class EntryRecord(NamedTuple):
    """A stored prompt: the path to a node, and its labels.

    Attributes:
        id: unique, chosen by the caller.
        namespace: the only namespace that may read it.
        node: id of the node that it ends with.
        labels: whatever JSON can hold.
        hits: how often it was of use; it may decay.
        used_s: when it was last of use, in seconds since the epoch.
    """

    id: str
    namespace: str
    node: str
    labels: Mapping[str, Any]
    hits: float
    used_s: float


class Contents(NamedTuple):
    """All records, and how many rows were left out because they are damaged."""

    files: list[FileRecord]
    nodes: list[NodeRecord]
    entries: list[EntryRecord]
    num_damaged: int = 0

    @property
    def num_records(self) -> int:
        """Of all kinds."""
        return len(self.files) + len(self.nodes) + len(self.entries)


def sound(found: Contents, sizes: Mapping[str, int]) -> Contents:
    """What of ``found`` can be used, given the bytes of the KV files that there are; parents stand before children.

    A file must have the bytes recorded, at least one for each token, a node its KV in such a file and a sound parent in
    its namespace, an entry a sound node in its namespace, and its segments within the tokens up to there. A node that
    no entry needs is left out, and so is a file that no node needs.
    """
    files = {f.id: f for f in found.files if sizes.get(f.id) == f.num_bytes >= f.num_tokens}
    order = rooted(node for node in found.nodes if node.file in files and fits(node, files[node.file]))
    nodes = {node.id: node for node in order}
    stops: dict[str | None, int] = {None: 0}
    for node in order:
        stops[node.id] = stops[node.parent] + len(node.token_ids)
    entries = [
        entry
        for entry in found.entries
        if entry.node in nodes
        and nodes[entry.node].namespace == entry.namespace
        and all(stop <= stops[entry.node] for _, _, stop in entry.labels["segments"])
    ]
    needed: set[str] = set()
    for entry in entries:
        above: str | None = entry.node
        while above is not None and above not in needed:
            needed.add(above)
            above = nodes[above].parent
    kept = [node for node in order if node.id in needed]
    used = {node.file for node in kept}
    return Contents([file for file in files.values() if file.id in used], kept, entries)


def rooted(nodes: Iterable[NodeRecord]) -> list[NodeRecord]:
    """The nodes whose ancestors are all there, in the same namespace; parents stand before children."""
    children: dict[str | None, list[NodeRecord]] = defaultdict(list)
    for node in nodes:
        children[node.parent].append(node)
    order = list(children[None])
    for node in order:  # which grows meanwhile
        order += [child for child in children.get(node.id, ()) if child.namespace == node.namespace]
    return order


def fits(node: NodeRecord, file: FileRecord) -> bool:
    """Whether ``file`` has KV for every token of ``node``, which has some."""
    return 0 <= node.first < node.first + len(node.token_ids) <= file.num_tokens
