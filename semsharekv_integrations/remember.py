"""What a finished prefill leaves for later: its exact part as a reference, the rest for its own session alone.

KV that was computed behind a borrowed token is approximate. It never becomes a reference, or the error would be handed
on as exact; the same session may continue from it, since its earlier answers rest on it anyway.
"""

from __future__ import annotations

from collections.abc import Mapping

from semsharekv_integrations.kv import LayerKV, Reference, Segment, TokenIds
from semsharekv_integrations.store.labels import reference_id


def references_of(
    token_ids: TokenIds,
    layers: tuple[LayerKV, ...],
    exact_tokens: int,
    segments: tuple[Segment, ...],
    namespace: str,
    document_starts: Mapping[str, int],
    session: str | None = None,
) -> list[Reference]:
    """The references that may be stored, none to two.

    Args:
        token_ids: [S] of prompt and answer.
        layers: KV of the same tokens.
        exact_tokens: number of leading tokens whose KV is that of a full prefill.
        segments: of the prompt.
        namespace: who may read them.
        document_starts: the caller's documents, each with its first token.
        session: whose conversation it is, or None.
    """
    found = []
    exact = min(exact_tokens, len(token_ids))
    kept = tuple(segment for segment in segments if segment.stop <= exact)
    starts = {key: start for key, start in document_starts.items() if start < exact}
    if exact == len(token_ids):
        starts = dict(document_starts)
    if exact:
        parts = tuple(_first_tokens(layer, exact) for layer in layers)
        ids = token_ids[:exact]
        found.append(Reference(reference_id(namespace, ids), namespace, ids, parts, starts, kept, session=session))
    if session is not None and exact < len(token_ids):
        key = reference_id(namespace, token_ids)
        found.append(
            Reference(key, namespace, token_ids, layers, document_starts, kept, exact_tokens=exact, session=session)
        )
    return found


def _first_tokens(layer: LayerKV, num_tokens: int) -> LayerKV:
    """A copy of the first tokens' KV, so that it does not keep the rest in memory; the whole as it is."""
    if layer.keys.shape[2] == num_tokens:
        return layer
    return LayerKV(layer.keys[:, :, :num_tokens].clone(), layer.values[:, :, :num_tokens].clone())
