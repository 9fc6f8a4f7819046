"""The records of stored KV: files, the nodes of radix trees that lie in them, and the prompts that need these nodes.

How a reference becomes a record, what every field may be, and which records fit together. Whoever can write a catalog
can make a right digest, so every value is checked. Knows nothing about the disk.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from semsharekv_integrations.errors import IN_UTF8, is_number, is_utf8, is_whole, require, show_value
from semsharekv_integrations.kv import UNPLACED, LayerKV, Reference, Segment, TokenIds

_MOST_TOKENS = 2**31 - 1
_MOST_BYTES = 2**62
_LARGEST = 2.0**53  # up to which a float counts exactly
_FILE_ID = re.compile(r"[0-9a-f]{32}")  # it becomes a file's name


class FileRecord(NamedTuple):
    """A KV file as it was written."""

    id: str
    num_tokens: int
    num_bytes: int


class NodeRecord(NamedTuple):
    """A node of the radix tree of one namespace: consecutive tokens, and where their KV is."""

    id: str
    parent: str | None  # None at position 0
    namespace: str  # who may read it; all, if shared
    token_ids: TokenIds  # [N]
    file: str
    first: int  # the token of the file that is its first


class EntryRecord(NamedTuple):
    """A stored prompt: the path to a node, and its labels."""

    id: str
    namespace: str  # who may read it; all, if shared
    node: str  # that it ends with
    labels: Mapping[str, Any]  # see ``pack_labels``
    hits: float
    used_s: float  # since the epoch


class Contents(NamedTuple):
    """All records, and the number of damaged rows, which are left out."""

    files: list[FileRecord]
    nodes: list[NodeRecord]
    entries: list[EntryRecord]
    num_damaged: int = 0

    @property
    def num_records(self) -> int:
        """Number of records of all kinds."""
        return len(self.files) + len(self.nodes) + len(self.entries)


def reference_id(namespace: str, token_ids: TokenIds, state: str = "") -> str:
    """Return a stable digest of namespace, token ids and the model's state, 16 hexadecimal digits."""
    return hashlib.blake2b(
        np.ascontiguousarray(token_ids).data, digest_size=8, key=_digest_owner(namespace, state)
    ).hexdigest()


@lru_cache(maxsize=256)
def _digest_owner(namespace: str, state: str) -> bytes:
    return hashlib.blake2b(namespace.encode(), key=state.encode()).digest()


def pack_labels(reference: Reference) -> dict[str, Any]:
    """Return documents, segments, session, pin and lifetime of a reference as JSON can hold them."""
    return {
        "document_starts": dict(reference.document_starts),
        "document_stops": dict(reference.document_stops),
        "segments": [list(segment) for segment in reference.segments],
        "session": reference.session,
        "pinned": reference.pinned,
        "expires_after_s": reference.expires_after_s,
    }


def unpack_reference(
    labels: Mapping[str, Any], namespace: str, token_ids: TokenIds, layers: Sequence[LayerKV] = (), id: str = ""
) -> Reference:
    """Return a reference with the labels that ``pack_labels`` made, also in earlier versions. Checks none of them.

    Its ``id`` is computed if it is not given.
    """
    starts, stops = labels["document_starts"], labels.get("document_stops")
    if stops is None:  # earlier versions wrote them for their own segments alone
        stops = {key: stop for key, start, stop in labels["segments"] if starts.get(key) == start}
    return Reference(
        id or reference_id(namespace, token_ids),
        namespace,
        token_ids,
        layers,
        starts,
        dict(stops),
        tuple(Segment(*segment) for segment in labels["segments"]),
        session=labels["session"],
        pinned=labels["pinned"],
        expires_after_s=labels["expires_after_s"],
        rounded=labels.get("rounded", False),
    )


def require_writable(reference: Reference) -> None:
    """Raise ``ValueError`` if a reference's labels cannot be written: they would make a whole transaction fail."""
    names = [reference.namespace, *reference.document_starts, *(segment.document_id for segment in reference.segments)]
    for name in names if reference.session is None else [*names, reference.session]:
        require(isinstance(name, str) and is_utf8(name), "a name in a reference", name, f"a string{IN_UTF8}")
    labels = pack_labels(reference)
    try:
        json.dumps(labels, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the labels of a reference are {show_value(labels)}: {error}") from error


def keep_sound(found: Contents, sizes: Mapping[str, int]) -> Contents:
    """Return the records that can be used, given the sizes of the KV files on disk; parents stand before children.

    A file must have the bytes recorded, at least one for each token; a node its KV in such a file, and a sound parent
    in its namespace; an entry a sound node in its namespace, and its segments within the tokens up to there. Nodes that
    no entry needs are left out, and so are files that no node needs.
    """
    files = {f.id: f for f in found.files if sizes.get(f.id) == f.num_bytes >= f.num_tokens}
    order = keep_rooted(node for node in found.nodes if node.file in files and fits(node, files[node.file]))
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


def keep_rooted(nodes: Iterable[NodeRecord]) -> list[NodeRecord]:
    """Return the nodes whose ancestors are all there, in the same namespace; parents stand before children.

    A node lies right behind its parent, where that is in the same file; else it begins a file.
    """
    children: dict[str | None, list[NodeRecord]] = defaultdict(list)
    for node in nodes:
        children[node.parent].append(node)
    order = [node for node in children[None] if node.first == 0]
    for node in order:  # which grows meanwhile
        for child in children.get(node.id, ()):
            first = node.first + len(node.token_ids) if child.file == node.file else 0
            if child.namespace == node.namespace and child.first == first:
                order.append(child)
    return order


def fits(node: NodeRecord, file: FileRecord) -> bool:
    """Return whether ``node`` has tokens and ``file`` has KV for every one of them."""
    return 0 <= node.first < node.first + len(node.token_ids) <= file.num_tokens


def is_sound(record: FileRecord | NodeRecord | EntryRecord) -> bool:
    """Return whether every field of ``record`` is of its type, and within its bounds."""
    return _RULES[type(record)](*record)


def _is_sound_file(id: object, num_tokens: object, num_bytes: Any) -> bool:
    return _is_file_id(id) and _is_position(num_tokens, 1) and is_whole(num_bytes, 1) and num_bytes <= _MOST_BYTES


def _is_sound_node(
    id: object, parent: object, namespace: object, token_ids: object, file: object, first: object
) -> bool:
    named = _is_id(id) and (parent is None or _is_id(parent)) and _is_text(namespace)
    return named and has_token_ids(token_ids) and _is_file_id(file) and _is_position(first)


def _is_sound_entry(id: object, namespace: object, node: object, labels: object, hits: Any, used_s: Any) -> bool:
    named = _is_id(id) and _is_text(namespace) and _is_id(node)
    counted = is_number(hits) and 0 <= hits <= _LARGEST and is_number(used_s) and abs(used_s) <= _LARGEST
    return named and counted and _has_labels(labels)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_id(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_file_id(value: object) -> bool:
    return isinstance(value, str) and _FILE_ID.fullmatch(value) is not None


def _is_position(value: Any, least: int = 0) -> bool:
    return is_whole(value, least) and value <= _MOST_TOKENS


def has_token_ids(value: Any) -> bool:
    """Return whether ``value`` is a one-dimensional array of at least one id, none negative."""
    return isinstance(value, np.ndarray) and value.ndim == 1 and len(value) > 0 and bool(value.min() >= 0)


def _maps_to_positions(value: object) -> bool:
    """Return whether ``value`` maps texts to positions of tokens, which may be ``UNPLACED``."""
    return isinstance(value, Mapping) and all(_is_text(key) and _is_position(at, UNPLACED) for key, at in value.items())


def _has_segments(value: object) -> bool:
    return isinstance(value, list) and all(_is_segment(item) for item in value)


def _is_segment(value: object) -> bool:
    """Return whether ``value`` is a list of a name, a start, and a stop that is not before the start."""
    if not (isinstance(value, list) and len(value) == 3):
        return False
    name, start, stop = value
    return _is_text(name) and _is_position(start) and _is_position(stop) and start <= stop


def _has_labels(value: object) -> bool:
    """Return whether ``value`` has all labels of the first version, and whether these and any later ones are sound."""
    if not isinstance(value, Mapping):
        return False
    for name, rule in _LABELS.items():
        if name not in value or not rule(value[name]):
            return False
    for name, rule in _LATER_LABELS.items():
        if name in value and not rule(value[name]):
            return False
    return (value.get("document_stops") or {}).keys() <= value["document_starts"].keys()


_Rules = dict[str, Callable[[Any], bool]]
_LABELS: _Rules = {
    "document_starts": _maps_to_positions,
    "segments": _has_segments,
    "session": lambda value: value is None or _is_text(value),
    "pinned": lambda value: isinstance(value, bool),
    "expires_after_s": lambda value: value is None or (is_number(value) and value > 0),
}
_LATER_LABELS: _Rules = {  # which earlier versions did not write
    "document_stops": lambda value: value is None or _maps_to_positions(value),
    "rounded": lambda value: isinstance(value, bool),
    "state": _is_text,
}
_RULES: dict[type, Callable[..., bool]] = {
    FileRecord: _is_sound_file,
    NodeRecord: _is_sound_node,
    EntryRecord: _is_sound_entry,
}
