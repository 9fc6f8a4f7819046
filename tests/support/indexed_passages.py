"""What always holds of an index of stored passages."""

from __future__ import annotations

import numpy as np

from semsharekv_integrations.reuse.similarity import SegmentIndex, _NamespaceIndex


def check_index(index: SegmentIndex) -> None:
    """Assert the law: one vector of norm 1 for each text, and every text owned by references of its namespace."""
    with index._lock:
        for namespace, part in index._namespaces.items():
            _check_namespace(part, namespace)


def _check_namespace(index: _NamespaceIndex, namespace: str) -> None:
    assert index._references.keys() == index.segments.keys(), "a reference is not indexed"
    owned = {(key, segment) for key, segments in index.segments.items() for segment in segments}
    assert owned == {owner for text in index._rows.values() for owner in text.owners}, "owners do not fit"
    assert index._texts == {text.token_ids.tobytes(): text for text in index._rows.values()}, "a text has no own row"
    assert all(text.owners for text in index._rows.values()), "a text has no owner"
    assert (index._vectors.ntotal if index._vectors else 0) == len(index._rows), "vectors and texts differ in number"
    for row, text in index._rows.items():
        assert text.row == row, "a text has another's row"
        assert abs(np.linalg.norm(index._vectors.reconstruct(row)) - 1) < 1e-3, "a vector is not of norm 1"
    for reference in filter(None, (reference() for reference in index._references.values())):
        assert reference.namespace == namespace, "a reference of another namespace"
        for text in index._rows.values():
            for segment in (segment for key, segment in text.owners if key == reference.id):
                assert np.array_equal(reference.token_ids[segment.start : segment.stop], text.token_ids)
                assert reference.exact_tokens is None or segment.stop <= reference.exact_tokens, "a tainted segment"
