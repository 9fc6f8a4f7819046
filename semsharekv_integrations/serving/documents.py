"""The documents that a tenant's stored KV is known by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from semsharekv_integrations.kv import UNPLACED, Reference
from semsharekv_integrations.store import KVStore


def list_all_documents(store: KVStore, tenant: str) -> list[dict[str, Any]]:
    """Return the tenant's documents, then those of libraries, which all tenants read and none forgets."""
    mounted = (reference for name in store.list_libraries() for reference in store.references(name))
    own, shared = list_documents(store.references(tenant)), list_documents(mounted)
    return [{**one, "library": False} for one in own] + [{**one, "library": True} for one in shared]


def stands_in_library(store: KVStore, document_id: str) -> bool:
    """Return whether a library holds a document of this id."""
    return any(
        document_id in reference.document_starts
        for name in store.list_libraries()
        for reference in store.references(name)
    )


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
