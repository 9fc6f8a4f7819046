"""The documents that a tenant's stored KV is known by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from semsharekv_integrations.kv import UNPLACED, Reference


def list_documents(references: Iterable[Reference]) -> list[dict[str, Any]]:
    """Return each document once, by id: its tokens if known, how many entries hold it, and if one is pinned."""
    found: dict[str, dict[str, Any]] = {}
    for reference in references:
        for key, start in reference.document_starts.items():
            stop = reference.document_stops.get(key)
            tokens = stop - start if stop is not None and start != UNPLACED else None
            blank = {"id": key, "object": "document", "tokens": tokens, "entries": 0, "pinned": False}
            known = found.setdefault(key, blank)
            known["entries"] += 1
            known["pinned"] |= reference.pinned
            known["tokens"] = tokens if known["tokens"] is None else known["tokens"]
    return sorted(found.values(), key=lambda document: str(document["id"]))
