"""What a finished prefill leaves for later: its exact part as a reference, the rest for its own session alone.

KV that was computed behind a borrowed token is approximate. It never becomes a reference, or the error would be handed
on as exact; the same session may continue from it, since its earlier answers rest on it anyway.
"""

from __future__ import annotations

from collections.abc import Mapping

from semsharekv_integrations.kv import LayerKV, Reference, Segment, Span, TokenIds, standing_within
from semsharekv_integrations.store.records import reference_id


def references_of(
    token_ids: TokenIds,
    layers: tuple[LayerKV, ...],
    exact_tokens: int,
    segments: tuple[Segment, ...],
    namespace: str,
    documents: Mapping[str, Span],
    session: str | None = None,
    borrowed: Mapping[str, Span] | None = None,
) -> list[Reference]:
    """The references that may be stored, none to two.

    Args:
        token_ids: [S] of prompt and answer.
        layers: KV of the same tokens.
        exact_tokens: number of leading tokens whose KV is that of a full prefill.
        segments: of the prompt.
        namespace: who may read them.
        documents: the caller's, and where each stands. One that is not exact as a whole is not kept in part, where
            it could not be told from others that begin alike.
        session: whose conversation it is, or None.
        borrowed: the documents that KV was borrowed from, which the exact part keeps no word of either.
    """
    found = []
    exact = min(exact_tokens, len(token_ids))
    kept = tuple(segment for segment in segments if segment.stop <= exact)
    cut = [span.start for span in documents.values() if 0 <= span.start < exact < span.stop]
    whole = min([exact, *cut, *(span.start for span in (borrowed or {}).values())])
    if whole:
        parts = tuple(_first_tokens(layer, whole) for layer in layers)
        ids, own = token_ids[:whole], tuple(segment for segment in kept if segment.stop <= whole)
        exactly = Reference(reference_id(namespace, ids), namespace, ids, parts, segments=own, session=session)
        found.append(exactly.labelled(standing_within(documents, whole)))
    if session is not None and exact < len(token_ids):
        key = reference_id(namespace, token_ids)
        rest = Reference(key, namespace, token_ids, layers, segments=kept, exact_tokens=exact, session=session)
        found.append(rest.labelled({**(borrowed or {}), **documents}))
    return found


def _first_tokens(layer: LayerKV, num_tokens: int) -> LayerKV:
    """A copy of the first tokens' KV, so that it does not keep the rest in memory; the whole as it is."""
    if layer.keys.shape[2] == num_tokens:
        return layer
    return LayerKV(layer.keys[:, :, :num_tokens].clone(), layer.values[:, :, :num_tokens].clone())
