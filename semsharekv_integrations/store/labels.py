"""What is known of a stored prompt beside its KV, how two of them become one, and how it is written down."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from semsharekv_integrations.checks import IN_UTF8, is_utf8, require, shown
from semsharekv_integrations.kv import UNPLACED, Reference, Segment, Span, TokenIds, standing_within
from semsharekv_integrations.store.directory import EntryRecord
from semsharekv_integrations.store.radix import Node


@dataclass(eq=False)
class Entry:
    """A stored prompt.

    Attributes:
        reference: its labels and token ids, without KV.
        node: the node that it ends with.
        last_used_s: by the store's clock.
        hits: number of times it was found.
    """

    reference: Reference
    node: Node
    last_used_s: float
    hits: float = 0.0

    @property
    def key(self) -> str:
        """Unique in a store: the reference's id, or, of a tainted one, its session's name."""
        reference = self.reference
        if not reference.is_tainted:
            return reference.id
        name = f"{len(reference.namespace)} {reference.namespace}{reference.session}"
        return f"{reference.state} {name}" if reference.state else name  # whatever stands in the names


def reference_id(namespace: str, token_ids: TokenIds, state: str = "") -> str:
    """A stable digest of namespace, token ids and the model's state, 16 hexadecimal digits."""
    owner = hashlib.blake2b(namespace.encode(), key=state.encode()).digest()
    return hashlib.blake2b(token_ids.tobytes(), digest_size=8, key=owner).hexdigest()


def at_state(reference: Reference, state: str) -> Reference:
    """``reference`` as what ``state`` of the model made."""
    return replace(reference, id=reference_id(reference.namespace, reference.token_ids, state), state=state)


def stops_of(labels: Mapping[str, Any]) -> dict[str, int]:
    """The ``document_stops`` in written labels; earlier versions wrote them for their own segments alone."""
    written = labels.get("document_stops")
    if written is not None:
        return dict(written)
    return {key: stop for key, start, stop in labels["segments"] if labels["document_starts"].get(key) == start}


def require_writable(reference: Reference) -> None:
    """Raise ``ValueError`` unless what is known of a reference beside its KV can be written down.

    What cannot must not even wait to be written: it would keep all that waits with it from the directory.
    """
    names = [reference.namespace, *reference.document_starts, *(segment.document_id for segment in reference.segments)]
    for name in names if reference.session is None else [*names, reference.session]:
        require(isinstance(name, str) and is_utf8(name), "a name in a reference", name, f"a string{IN_UTF8}")
    try:
        json.dumps(_labels_of(reference), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the labels of a reference are {shown(_labels_of(reference))}: {error}") from error


def joined(kept: Reference, absorbed: Reference) -> Reference:
    """``kept`` with the labels of an entry that it contains; it expires as soon as either would."""
    lifetimes = [s for s in (kept.expires_after_s, absorbed.expires_after_s) if s is not None]
    spans = {key: min(own, absorbed.spans.get(key, own), key=_order) for key, own in kept.spans.items()}
    return replace(
        kept.labelled(absorbed.spans | spans),
        segments=kept.segments or absorbed.segments,
        session=kept.session or absorbed.session,
        expires_after_s=min(lifetimes, default=None),
    )


def _order(span: Span) -> tuple[bool, int]:
    """Of two places of one document, the lower counts: one that is known, then the first to end."""
    return span.start == UNPLACED, span.stop


def shortened(reference: Reference, num_tokens: int) -> Reference:
    """The first ``num_tokens`` tokens of an entry as an entry of their own, without KV."""
    token_ids = reference.token_ids[:num_tokens]
    return replace(
        reference.labelled(standing_within(reference.spans, num_tokens)),
        id=reference_id(reference.namespace, token_ids, reference.state),
        token_ids=token_ids,
        segments=tuple(segment for segment in reference.segments if segment.stop <= num_tokens),
    )


def record_of(entry: Entry, used_s: float) -> EntryRecord:
    """An entry as it is written, with the wall clock's time of its last use."""
    reference = entry.reference
    return EntryRecord(reference.id, reference.namespace, entry.node.id, _labels_of(reference), entry.hits, used_s)


def _labels_of(reference: Reference) -> dict[str, Any]:
    return {
        "document_starts": dict(reference.document_starts),
        "document_stops": dict(reference.document_stops),
        "segments": [list(segment) for segment in reference.segments],
        "session": reference.session,
        "pinned": reference.pinned,
        "expires_after_s": reference.expires_after_s,
    }


def reference_of(record: EntryRecord, token_ids: TokenIds) -> Reference:
    """The labels that ``record_of`` wrote, without KV.

    Raises:
        ValueError: if they are not those of ``token_ids``.
    """
    labels = record.labels
    if record.id != reference_id(record.namespace, token_ids):
        raise ValueError(f"entry {record.id} has other tokens")
    return Reference(
        record.id,
        record.namespace,
        token_ids,
        (),
        labels["document_starts"],
        stops_of(labels),
        tuple(Segment(*segment) for segment in labels["segments"]),
        session=labels["session"],
        pinned=labels["pinned"],
        expires_after_s=labels["expires_after_s"],
    )
