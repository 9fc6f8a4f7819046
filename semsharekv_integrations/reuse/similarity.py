"""Token embeddings made fit for averaging: whitened over the vocabulary.

Trained token embeddings share a few strong directions, so that means of them are all alike. Whitening (as in
BERT-whitening, arXiv 2103.15316, there of sentence vectors) takes that away. Knows nothing about models or segments.

Which stored segment is most like a segment of a prompt: vectors of segments, searched by inner product.

This is the reference lookup of SemShareKV (arXiv 2509.24832, section 3), with two departures: segments are compared
and not whole prompts, since new documents beside known ones must borrow nothing; and each embedder brings a threshold
of its own in place of the paper's 0.8, since cosines of different embeddings mean different things. Vectors lie in
one FAISS index for each namespace. Knows nothing about KV, tokenizers or models.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from semsharekv_integrations.concurrency.threads import hold_at_forks
from semsharekv_integrations.kv import Reference, Segment, TokenIds

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MOST_WIDTH = 256
_SAMPLED_TOKENS = 16_384
_FLOOR = 0.01  # share of the mean variance that is added to every direction's


def compute_whitening(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [hidden] of token embeddings [V, hidden], and the map [hidden, W] behind which all directions vary alike.

    Wide embeddings are first projected at random, and large vocabularies sampled evenly, to keep it cheap.
    """
    sample = matrix[:: max(1, len(matrix) // _SAMPLED_TOKENS)].float()
    centre, hidden = sample.mean(dim=0), matrix.shape[1]
    projection = torch.eye(hidden)
    if hidden > MOST_WIDTH:
        generator = torch.Generator().manual_seed(0)
        projection = torch.randn(hidden, MOST_WIDTH, generator=generator) / hidden**0.5
    projection = projection.to(sample.device)
    projected = (sample - centre) @ projection  # [sample, W]
    variance, directions = torch.linalg.eigh(projected.T @ projected / len(projected))
    floor = _FLOOR * variance.mean() + torch.finfo(torch.float32).tiny
    scale = (variance.clamp_min(0) + floor).rsqrt()  # [W]
    return centre, projection @ (directions * scale) @ directions.T


Vectors = NDArray[np.float32]
# Both by examples/lab/calibrate_similarity.py, on the safe side: some reworded documents borrow nothing.
POOLED_THRESHOLD = 0.8
SENTENCE_THRESHOLD = 0.7
_PRIOR_SEGMENTS, _PRIOR_SHARE = 4, 0.1  # a token nobody has seen counts as if in 10% of four segments


class SegmentMatch(NamedTuple):
    """A stored segment and its similarity to the one asked about: a cosine, 1 for the same meaning."""

    reference: Reference
    segment: Segment
    similarity: float


class Embedder(Protocol):
    """Turns segments into vectors whose inner product tells how alike the segments are."""

    @property
    def threshold(self) -> float:
        """Similarity from which two segments tell the same story; below, nothing may be borrowed."""

    def embed(self, token_ids: Sequence[TokenIds]) -> Vectors:
        """One vector for each segment, [N, W], of norm 1; the same tokens give the same vector up to rounding."""

    def fit_to(self, stored: Sequence[TokenIds]) -> Embedder:
        """An embedder fitted to the segments of one namespace, or itself; embeddings of the two do not compare."""


class PooledEmbedder:
    """The mean of a segment's token embeddings (the pooled E-cache), made to tell segments apart.

    Plain means of token embeddings are all alike (cosine 0.95 and up between unrelated news). So embeddings are
    whitened over the vocabulary and brought to norm 1, and each token is weighted by how rare it is among the stored
    segments. Costs no forward pass. See ``examples/lab/calibrate_similarity.py`` for what this brings.

    Args:
        embedding_matrix: [V, hidden], of the model's input embedding layer; read, never written or copied.
        threshold: see ``Embedder``; the default is calibrated.
    """

    def __init__(self, embedding_matrix: torch.Tensor, threshold: float = POOLED_THRESHOLD) -> None:
        self.threshold = threshold
        self._matrix = embedding_matrix.detach()
        self._centre, self._whitening = compute_whitening(self._matrix)
        self._counts: Counter[int] = Counter()  # token -> number of stored segments that have it
        self._num_segments = 0

    def embed(self, token_ids: Sequence[TokenIds]) -> Vectors:
        """One vector for each segment, [N, W], of norm 1."""
        pooled = torch.stack([self._pooled(ids) for ids in token_ids])  # [N, W]
        return normalize(pooled, dim=1).cpu().numpy()

    def fit_to(self, stored: Sequence[TokenIds]) -> PooledEmbedder:
        """One that weights tokens by how few of the stored segments have them; it shares the matrix."""
        other = copy(self)
        other._counts = Counter(token_id for ids in stored for token_id in np.unique(ids).tolist())
        other._num_segments = len(stored)
        return other

    def _pooled(self, ids: TokenIds) -> torch.Tensor:
        distinct, counts = np.unique(ids, return_counts=True)
        rows = self._matrix[torch.from_numpy(distinct).to(self._matrix.device)].float()  # [D, hidden]
        whitened = normalize((rows - self._centre) @ self._whitening, dim=1)  # [D, W]
        weights = torch.from_numpy(counts * self._rarity(distinct)).to(whitened)  # [D]
        return weights @ whitened  # [W]

    def _rarity(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Inverse document frequency of tokens, above 0."""
        having = np.fromiter((self._counts[token_id] for token_id in ids.tolist()), dtype=np.float64, count=len(ids))
        return np.log1p((self._num_segments + _PRIOR_SEGMENTS) / (having + _PRIOR_SEGMENTS * _PRIOR_SHARE))


class SentenceEmbedder:
    """A sentence-transformers model on the segments' text; it is loaded when first used.

    Such models read the first tokens only (256 for all-MiniLM-L6-v2) and ignore what follows.

    Args:
        name_or_path: hub id or local folder.
        decode: text of token ids.
        threshold: see ``Embedder``; the default is calibrated for all-MiniLM-L6-v2.
        device: where the model goes, or None for CUDA if there is one, else the CPU.
    """

    def __init__(
        self,
        name_or_path: str,
        decode: Callable[[TokenIds], str],
        threshold: float = SENTENCE_THRESHOLD,
        device: str | None = None,
    ) -> None:
        self.name_or_path = name_or_path
        self.threshold = threshold
        self._decode = decode
        self._device = device
        self._model: SentenceTransformer | None = None

    def embed(self, token_ids: Sequence[TokenIds]) -> Vectors:
        """One vector for each segment, [N, W], of norm 1."""
        texts = [self._decode(ids) for ids in token_ids]
        vectors = self._loaded().encode(texts, normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)

    def fit_to(self, stored: Sequence[TokenIds]) -> SentenceEmbedder:
        """Itself: there is nothing to fit."""
        return self

    def _loaded(self) -> SentenceTransformer:
        if self._model is None:
            from sentence_transformers import SentenceTransformer

            self._model = SentenceTransformer(self.name_or_path, device=self._device)
        return self._model


_Owner = tuple[str, Segment]  # reference id, and where in it


@dataclass(eq=False)
class _Namespace:
    """The segments of one namespace. Texts that stand in several references have one row."""

    embedder: Embedder
    references: dict[str, weakref.ref[Reference]] = field(default_factory=dict)
    segments: dict[str, tuple[Segment, ...]] = field(default_factory=dict)  # by reference id, as they were indexed
    rows: dict[bytes, int] = field(default_factory=dict)  # token ids -> row
    token_ids: dict[int, TokenIds] = field(default_factory=dict)  # by row
    owners: dict[int, dict[_Owner, None]] = field(default_factory=dict)  # by row, latest last
    vectors: Any = None  # FAISS index, by row
    next_row: int = 0
    fitted_rows: int = 0  # number of rows that ``embedder`` was fitted to


class SegmentIndex:
    """Stored segments by namespace. Safe to use from several threads; every method holds one lock.

    References are held weakly: one that the store has dropped costs no memory and is never returned.

    Args:
        embedder: what makes segments comparable.
    """

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self._lock = hold_at_forks(threading.RLock())
        self._namespaces: dict[str, _Namespace] = {}

    def sync(self, references: Sequence[Reference], namespace: str) -> None:
        """Make the segments of ``references``, all of ``namespace``, the ones that are found there.

        Only new texts are embedded, all in one batch. Where nothing changed it costs one comparison per reference.

        Raises:
            ValueError: if a reference belongs to another namespace.
        """
        foreign = next((r.namespace for r in references if r.namespace != namespace), None)
        if foreign is not None:
            raise ValueError(f"reference.namespace is {foreign!r}; accepted is {namespace!r}")
        with self._lock:
            group = self._namespaces.setdefault(namespace, _Namespace(self.embedder))
            current = {reference.id: reference for reference in references}
            segments = {key: _segments_of(reference) for key, reference in current.items()}
            self._drop(group, [key for key, known in group.segments.items() if segments.get(key) != known])
            new = [reference for key, reference in current.items() if key not in group.segments]
            group.references = {key: weakref.ref(reference) for key, reference in current.items()}
            self._add(group, new)
            if not group.references:
                del self._namespaces[namespace]

    def find_nearest(self, token_ids: Sequence[TokenIds], namespace: str, *, k: int = 1) -> list[list[SegmentMatch]]:
        """For each segment up to ``k`` stored ones of ``namespace`` with different texts, most alike first.

        Nothing is filtered: whether a match is near enough is told by the embedder's ``threshold``. Of the references
        that have a text, the one synced last is named.
        """
        with self._lock:
            group = self._namespaces.get(namespace)
            if group is None or not token_ids:
                return [[] for _ in token_ids]
            alive = {key: found for key, reference in group.references.items() if (found := reference()) is not None}
            self._drop(group, [key for key in group.references if key not in alive])
            if not group.rows:
                return [[] for _ in token_ids]
            similarities, rows = group.vectors.search(group.embedder.embed(token_ids), min(k, len(group.rows)))
            return [
                [_match(group, alive, row, similarity) for row, similarity in zip(*found, strict=True)]
                for found in zip(rows.tolist(), similarities.tolist(), strict=True)
            ]

    def keep_only(self, namespace: str, reference_ids: Collection[str]) -> None:
        """Drop the references of ``namespace`` with other ids, and the texts that stood in no other one."""
        with self._lock:
            group = self._namespaces.get(namespace)
            if group is not None:
                self._drop(group, [key for key in group.segments if key not in reference_ids])
                if not group.segments:
                    del self._namespaces[namespace]

    def forget(self, namespace: str) -> None:
        """Drop the segments of ``namespace``."""
        with self._lock:
            self._namespaces.pop(namespace, None)

    def clear(self) -> None:
        """Drop every segment of every namespace."""
        with self._lock:
            self._namespaces.clear()

    def check(self) -> None:
        """The law: one vector of norm 1 for each distinct text, and every text owned by references of its namespace."""
        with self._lock:
            for namespace, group in self._namespaces.items():
                _check(namespace, group)

    def _add(self, group: _Namespace, references: Iterable[Reference]) -> None:
        """Index the segments of new references; the embedder is fitted anew when the number of texts has doubled."""
        first_new = group.next_row
        for reference in references:
            group.segments[reference.id] = _segments_of(reference)
            for segment in group.segments[reference.id]:
                row = _row_of(group, reference.token_ids[segment.start : segment.stop])
                group.owners[row][reference.id, segment] = None
        new = [row for row in group.token_ids if row >= first_new]
        if not max(1, group.fitted_rows // 2) <= len(group.rows) < 2 * group.fitted_rows and group.rows:
            fitted = self.embedder.fit_to(list(group.token_ids.values()))
            group.fitted_rows = len(group.rows)
            if fitted is not group.embedder:
                group.embedder, group.vectors, new = fitted, None, list(group.token_ids)
        if new:
            _add_vectors(group, new)

    def _drop(self, group: _Namespace, reference_ids: Iterable[str]) -> None:
        """Take references out, and the texts that stood in no other one."""
        gone = set(reference_ids)
        if not gone:
            return
        for reference_id in gone:
            group.references.pop(reference_id, None)
            group.segments.pop(reference_id, None)
        for owners in group.owners.values():
            for owner in [owner for owner in owners if owner[0] in gone]:
                del owners[owner]
        rows = [row for row, owners in group.owners.items() if not owners]
        for row in rows:
            del group.owners[row], group.rows[group.token_ids.pop(row).tobytes()]
        if rows:
            group.vectors.remove_ids(np.array(rows, dtype=np.int64))


def _segments_of(reference: Reference) -> tuple[Segment, ...]:
    return tuple(segment for segment in reference.segments if segment.start < segment.stop)


def _row_of(group: _Namespace, token_ids: TokenIds) -> int:
    """The row of a text, a new one without a vector yet if it is not known."""
    key = token_ids.tobytes()
    if key not in group.rows:
        row = group.rows[key] = group.next_row
        group.next_row += 1
        group.token_ids[row], group.owners[row] = token_ids.copy(), {}
    return group.rows[key]


def _add_vectors(group: _Namespace, rows: list[int]) -> None:
    """Embed the texts of ``rows`` in one batch."""
    import faiss

    vectors = group.embedder.embed([group.token_ids[row] for row in rows])
    if group.vectors is None:
        group.vectors = faiss.IndexIDMap2(faiss.IndexFlatIP(vectors.shape[1]))
    group.vectors.add_with_ids(vectors, np.array(rows, dtype=np.int64))


def _match(group: _Namespace, alive: dict[str, Reference], row: int, similarity: float) -> SegmentMatch:
    reference_id, segment = next(reversed(group.owners[row]))
    return SegmentMatch(alive[reference_id], segment, similarity)


def _check(namespace: str, group: _Namespace) -> None:
    assert group.references.keys() == group.segments.keys(), "a reference is not indexed"
    owned = {(key, segment) for key, segments in group.segments.items() for segment in segments}
    assert owned == {owner for owners in group.owners.values() for owner in owners}, "owners do not fit"
    assert group.rows == {ids.tobytes(): row for row, ids in group.token_ids.items()}, "a text has no row of its own"
    assert group.owners.keys() == group.token_ids.keys() and all(group.owners.values()), "a text has no owner"
    assert (group.vectors.ntotal if group.vectors else 0) == len(group.rows), "vectors and texts differ in number"
    for row in group.rows.values():
        assert abs(np.linalg.norm(group.vectors.reconstruct(row)) - 1) < 1e-3, "a vector is not of norm 1"
    for reference in filter(None, (reference() for reference in group.references.values())):
        assert reference.namespace == namespace, "a reference of another namespace"
        for row, owners in group.owners.items():
            for segment in (segment for key, segment in owners if key == reference.id):
                assert np.array_equal(reference.token_ids[segment.start : segment.stop], group.token_ids[row])
                assert reference.exact_tokens is None or segment.stop <= reference.exact_tokens, "a tainted segment"
