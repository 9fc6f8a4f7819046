"""Which stored segment is most like a segment of a prompt: vectors of segments, searched by inner product.

This is the reference lookup of SemShareKV (arXiv 2509.24832, section 3), with two departures. It compares segments, not
whole prompts, since new documents beside known ones must borrow nothing. And each embedder brings a threshold of its
own in place of the paper's 0.8, since cosines of different embeddings mean different things. Vectors lie in one FAISS
index for each namespace. Knows nothing about KV, tokenizers or models.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from semsharekv_integrations.concurrency.threads import hold_at_forks
from semsharekv_integrations.kv import Reference, Segment, TokenIds

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Vectors = NDArray[np.float32]
# Both by examples/lab/calibrate_similarity.py, on the safe side: some reworded documents borrow nothing.
POOLED_THRESHOLD = 0.8
SENTENCE_THRESHOLD = 0.7
MOST_WIDTH = 256
_SAMPLED_TOKENS = 16_384
_FLOOR = 0.01  # share of the mean variance that is added to every direction's
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
        """Compute one vector of norm 1 for each segment, [N, W]; equal tokens give equal vectors, up to rounding."""

    def fit_to(self, stored: Sequence[TokenIds]) -> Embedder:
        """Return an embedder fitted to the segments of one namespace, or itself; vectors of the two do not compare."""


class PooledEmbedder:
    """The mean of a segment's token embeddings (the pooled E-cache), made to tell segments apart.

    Token embeddings share a few strong directions, so plain means are all alike (cosine 0.95 and up between unrelated
    news). So this embedder whitens them over the vocabulary (as BERT-whitening, arXiv 2103.15316, does with sentence
    vectors), brings them to norm 1, and weights each token by its rarity in stored segments. It needs no forward pass.

    Args:
        embedding_matrix: [V, hidden], of the model's input embedding layer; read, never written or copied.
    """

    threshold = POOLED_THRESHOLD

    def __init__(self, embedding_matrix: torch.Tensor) -> None:
        self._matrix = embedding_matrix.detach()
        self._centre, self._whitening = compute_whitening(self._matrix)
        self._counts: Counter[int] = Counter()  # token -> number of stored segments that have it
        self._num_segments = 0

    def embed(self, token_ids: Sequence[TokenIds]) -> Vectors:
        """Return one vector for each segment, [N, W], of norm 1."""
        pooled = torch.stack([self._pool(ids) for ids in token_ids])  # [N, W]
        return normalize(pooled, dim=1).cpu().numpy()

    def fit_to(self, stored: Sequence[TokenIds]) -> PooledEmbedder:
        """Return a copy that weights tokens by how few of the stored segments have them; it shares the matrix."""
        other = copy(self)
        other._counts = Counter(token_id for ids in stored for token_id in np.unique(ids).tolist())
        other._num_segments = len(stored)
        return other

    def _pool(self, ids: TokenIds) -> torch.Tensor:
        """Return the weighted sum [W] of the whitened embeddings of a segment's tokens, of any norm."""
        distinct, counts = np.unique(ids, return_counts=True)
        rows = self._matrix[torch.from_numpy(distinct).to(self._matrix.device)].float()  # [D, hidden]
        whitened = normalize((rows - self._centre) @ self._whitening, dim=1)  # [D, W]
        weights = torch.from_numpy(counts * self._weigh(distinct)).to(whitened)  # [D]
        return weights @ whitened  # [W]

    def _weigh(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the inverse document frequency of each token, above 0."""
        having = np.fromiter((self._counts[token_id] for token_id in ids.tolist()), dtype=np.float64, count=len(ids))
        return np.log1p((self._num_segments + _PRIOR_SEGMENTS) / (having + _PRIOR_SEGMENTS * _PRIOR_SHARE))


class SentenceEmbedder:
    """A sentence-transformers model, by hub id or folder, on the segments' text; it is loaded when first used.

    Such models read the first tokens only (256 for all-MiniLM-L6-v2) and ignore what follows.

    Args:
        name_or_path: hub id or folder.
        decode: returns the text of token ids.
        device: where the model goes, or None for CUDA if there is one, else the CPU.
    """

    threshold = SENTENCE_THRESHOLD  # calibrated for all-MiniLM-L6-v2

    def __init__(self, name_or_path: str, decode: Callable[[TokenIds], str], device: str | None = None) -> None:
        self.name_or_path = name_or_path
        self._decode = decode
        self._device = device

    def embed(self, token_ids: Sequence[TokenIds]) -> Vectors:
        """Return one vector for each segment, [N, W], of norm 1. The first call loads the model."""
        texts = [self._decode(ids) for ids in token_ids]
        vectors = self._model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)

    def fit_to(self, stored: Sequence[TokenIds]) -> SentenceEmbedder:
        """Return itself: there is nothing to fit."""
        return self

    @cached_property
    def _model(self) -> SentenceTransformer:
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(self.name_or_path, device=self._device)


class SegmentIndex:
    """Stored segments by namespace. Safe to use from several threads; every method holds one lock.

    References are held weakly: one that the store has dropped costs no memory and is never returned.
    """

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self._lock = hold_at_forks(threading.RLock())
        self._namespaces: dict[str, _NamespaceIndex] = {}

    def sync(self, references: Sequence[Reference], namespace: str) -> None:
        """Make the segments of ``references`` the only ones found in ``namespace``: add new ones, drop all others.

        Only new texts are embedded, all in one batch. Where nothing changed it costs one comparison per reference.

        Raises:
            ValueError: if a reference belongs to another namespace.
        """
        foreign = next((r.namespace for r in references if r.namespace != namespace), None)
        if foreign is not None:
            raise ValueError(f"reference.namespace is {foreign!r}; accepted is {namespace!r}")
        with self._lock:
            index = self._namespaces.setdefault(namespace, _NamespaceIndex(self.embedder))
            index.sync({reference.id: reference for reference in references})
            if not references:
                del self._namespaces[namespace]

    def find_nearest(self, token_ids: Sequence[TokenIds], namespace: str, *, k: int = 1) -> list[list[SegmentMatch]]:
        """Return for each segment up to ``k`` stored ones of ``namespace`` with different texts, most alike first.

        Nothing is filtered: the embedder's ``threshold`` tells whether a match is near enough. Of the references that
        have a text, the one synced last is named.
        """
        with self._lock:
            index = self._namespaces.get(namespace)
            return [[] for _ in token_ids] if index is None else index.find_nearest(token_ids, k)

    def measure(self, token_ids: Sequence[TokenIds], others: Sequence[TokenIds], namespace: str) -> Vectors:
        """Return how alike two series of texts are, [N, M]: cosines, by the embedder fitted to ``namespace``."""
        with self._lock:
            index = self._namespaces.get(namespace)
            embedder = self.embedder if index is None else index.embedder
            vectors = embedder.embed([*token_ids, *others])
        return vectors[: len(token_ids)] @ vectors[len(token_ids) :].T

    def keep_only(self, namespace: str, reference_ids: Collection[str]) -> None:
        """Drop the references of ``namespace`` with other ids, and the texts that stood in no other reference."""
        with self._lock:
            index = self._namespaces.get(namespace)
            if index is not None:
                index.drop(index.segments.keys() - set(reference_ids))
                if not index.segments:
                    del self._namespaces[namespace]


class _Text(NamedTuple):
    """A distinct text, the row of its vector, and where it stands: reference ids and segments, latest last."""

    row: int
    token_ids: TokenIds
    owners: dict[tuple[str, Segment], None]


class _NamespaceIndex:
    """The segments of one namespace. Texts that stand in several references have one row."""

    def __init__(self, embedder: Embedder) -> None:
        self.segments: dict[str, tuple[Segment, ...]] = {}  # by reference id, as they were indexed
        self.embedder = embedder
        self._references: dict[str, weakref.ref[Reference]] = {}
        self._texts: dict[bytes, _Text] = {}  # by token ids
        self._rows: dict[int, _Text] = {}
        self._vectors: Any = None  # FAISS index, by row
        self._next_row = 0
        self._fitted_texts = 0  # number of texts that the embedder was fitted to

    def sync(self, current: dict[str, Reference]) -> None:
        """Index references that are new or whose segments changed, and drop those that are not in ``current``."""
        segments = {key: tuple(s for s in found.segments if s.start < s.stop) for key, found in current.items()}
        self.drop({key for key, known in self.segments.items() if segments.get(key) != known})
        self._references = {key: weakref.ref(reference) for key, reference in current.items()}
        self._add({key: reference for key, reference in current.items() if key not in self.segments}, segments)

    def find_nearest(self, token_ids: Sequence[TokenIds], k: int) -> list[list[SegmentMatch]]:
        """Drop references that no longer exist, then return up to ``k`` matches for each segment, most alike first."""
        alive = {key: found for key, reference in self._references.items() if (found := reference()) is not None}
        self.drop(self._references.keys() - alive.keys())
        if not self._texts or not token_ids:
            return [[] for _ in token_ids]

        def match(row: int, similarity: float) -> SegmentMatch:
            reference_id, segment = next(reversed(self._rows[row].owners))
            return SegmentMatch(alive[reference_id], segment, similarity)

        similarities, rows = self._vectors.search(self.embedder.embed(token_ids), min(k, len(self._texts)))
        return [list(map(match, *found)) for found in zip(rows.tolist(), similarities.tolist(), strict=True)]

    def drop(self, reference_ids: Iterable[str]) -> None:
        """Remove references, and the texts with their vectors that stood in no other reference."""
        gone = set(reference_ids)
        if not gone:
            return
        for key in gone:
            self._references.pop(key, None)
            self.segments.pop(key, None)
        for text in self._rows.values():
            for owner in [owner for owner in text.owners if owner[0] in gone]:
                del text.owners[owner]
        rows = [row for row, text in self._rows.items() if not text.owners]
        for row in rows:
            del self._texts[self._rows.pop(row).token_ids.tobytes()]
        if rows:
            self._vectors.remove_ids(np.array(rows, dtype=np.int64))

    def _add(self, references: dict[str, Reference], segments: dict[str, tuple[Segment, ...]]) -> None:
        """Index new references. Where texts doubled or halved, refit the embedder; embed all again if it changed."""
        new: list[_Text] = []
        for key, reference in references.items():
            self.segments[key] = segments[key]
            for segment in segments[key]:
                token_ids = reference.token_ids[segment.start : segment.stop]
                text = self._texts.get(token_ids.tobytes())
                if text is None:
                    text = self._texts[token_ids.tobytes()] = _Text(self._next_row, token_ids.copy(), {})
                    self._rows[text.row] = text
                    self._next_row += 1
                    new.append(text)
                text.owners[key, segment] = None
        if not max(1, self._fitted_texts // 2) <= len(self._texts) < 2 * self._fitted_texts and self._texts:
            fitted = self.embedder.fit_to([text.token_ids for text in self._texts.values()])
            self._fitted_texts = len(self._texts)
            if fitted is not self.embedder:
                self.embedder, self._vectors, new = fitted, None, list(self._texts.values())
        if new:
            self._add_vectors(new)

    def _add_vectors(self, texts: Sequence[_Text]) -> None:
        """Embed texts, and add their vectors to the FAISS index, which the first ones make."""
        import faiss

        vectors = self.embedder.embed([text.token_ids for text in texts])
        if self._vectors is None:
            self._vectors = faiss.IndexIDMap2(faiss.IndexFlatIP(vectors.shape[1]))
        self._vectors.add_with_ids(vectors, np.array([text.row for text in texts], dtype=np.int64))


def compute_whitening(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean [hidden] of embeddings [V, hidden], and a map [hidden, W] that levels their variance."""
    sample = matrix[:: max(1, len(matrix) // _SAMPLED_TOKENS)].float()  # evenly, to keep it cheap
    centre, hidden = sample.mean(dim=0), matrix.shape[1]
    projection = torch.eye(hidden)
    if hidden > MOST_WIDTH:
        generator = torch.Generator().manual_seed(0)
        projection = torch.randn(hidden, MOST_WIDTH, generator=generator) / hidden**0.5  # likewise
    projection = projection.to(sample.device)
    projected = (sample - centre) @ projection  # [sample, W]
    variance, directions = torch.linalg.eigh(projected.T @ projected / len(projected))
    floor = _FLOOR * variance.mean() + torch.finfo(torch.float32).tiny
    scale = (variance.clamp_min(0) + floor).rsqrt()  # [W]
    return centre, projection @ (directions * scale) @ directions.T
