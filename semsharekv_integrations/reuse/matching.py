"""Fuzzy matches, in mode ``paper``: tokens of a prompt that may take the KV of alike tokens of a stored prompt.

The whole prompt has one reference, as in SemShareKV (arXiv 2509.24832, section 3). Tokens are matched by the embeddings
of the model's own input layer (the E-cache), rotated by RoPE so that order counts. It departs from the paper in two
ways. The nearest few by locality sensitive hash are compared once more by exact cosine. Short texts are compared in
full, which is faster and exact. It knows the tokenizer only as a function from ids to text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from semsharekv_integrations.config import ReuseConfig
from semsharekv_integrations.kv import Mask, Reference, Rendered, Rotation, Segment, TokenIds, rotate
from semsharekv_integrations.reuse.facts import find_guarded_tokens, find_unlike_facts
from semsharekv_integrations.reuse.plan import Borrowing
from semsharekv_integrations.store import KVStore

if TYPE_CHECKING:
    import faiss

LONGEST_EXACT_TOKENS = 1024  # up to which comparing all tokens is exact and faster than hashing them
MOST_CANDIDATES = 8  # stored prompts of a namespace that mode ``paper`` measures by hash
_EMBEDDING_ROPE_BASE, _EMBEDDING_HEAD = 10_000.0, 64  # for models that turn no keys
PAPER_BITS = 64
PAPER_DISTANCE_SCALE = 30.0
_BLOCK_TOKENS = 1024  # target tokens compared at a time by brute force


class FuzzyMatcher:
    """Finds fuzzy matches for one model. What it fetches from the store counts as used.

    Args:
        embed: from token ids [N] to their input embeddings [N, hidden], the E-cache.
        pieces: from token ids [N] to each token's text.
        inverse_frequencies: [R] of the model's own rope, or None for the usual ones.
    """

    def __init__(
        self,
        store: KVStore,
        embed: Callable[[TokenIds], torch.Tensor],
        pieces: Callable[[TokenIds], Sequence[str]],
        inverse_frequencies: torch.Tensor | None,
        rules: ReuseConfig,
    ) -> None:
        self._store = store
        self._embed = embed
        self._pieces = pieces
        self._frequencies = (
            _EMBEDDING_ROPE_BASE ** -(torch.arange(0, _EMBEDDING_HEAD, 2) / _EMBEDDING_HEAD)
            if inverse_frequencies is None
            else inverse_frequencies
        )
        self._rules = rules.resolve()

    def match_prompt(self, rendered: Rendered, open_tokens: Mask, namespace: str) -> list[Borrowing]:
        """Return one borrowing from the stored prompt most alike by LSH distance; none if that is not alike enough."""
        target = self._embed(rendered.token_ids)
        candidates = [
            (compute_paper_similarity(measure_hamming_distance(target, self._embed(reference.token_ids))), reference)
            for name in self._store.list_readable(namespace)
            for reference in choose_candidates(rendered.token_ids, self._store.references(name))
        ]
        similarity, found = max(candidates, key=lambda pair: pair[0], default=(0.0, None))
        if found is None or similarity < (self._rules.min_similarity or 0.0):
            return []
        best = self._store.fetch(found.id, namespace)
        if best is None:
            return []
        whole, stored = Segment("", 0, len(rendered.token_ids)), Segment("", 0, len(best.token_ids))
        borrowing = self._match_tokens(rendered, whole, best, stored, open_tokens)
        return [] if borrowing is None else [borrowing]

    def _match_tokens(
        self, rendered: Rendered, segment: Segment, reference: Reference, stored: Segment, open_tokens: Mask
    ) -> Borrowing | None:
        """Borrow open tokens of a segment that have an alike one in ``stored``, but no unlike facts; None if none."""
        ids, known = rendered.token_ids[segment.start : segment.stop], reference.token_ids[stored.start : stored.stop]
        bits = self._rules.lsh_bits if max(len(ids), len(known)) > LONGEST_EXACT_TOKENS else 0
        matches = find_nearest_tokens(self._rotate(ids), self._rotate(known), bits=bits or None)
        refused = ~open_tokens[segment.start : segment.stop] | (matches.cosine < self._rules.min_token_similarity)
        if self._rules.guard_facts:
            facts, stored_facts = (find_guarded_tokens(self._pieces(text)) for text in (ids, known))
            refused |= find_unlike_facts(ids, facts, known, stored_facts, matches.positions)
        targets = np.flatnonzero(~refused)
        if not len(targets):
            return None
        sources = stored.start + matches.positions[targets]
        return Borrowing(reference, segment.start + targets, sources, np.ones(len(targets), dtype=bool))

    def _rotate(self, token_ids: TokenIds) -> torch.Tensor:
        positions = torch.arange(len(token_ids), device=self._frequencies.device)
        return rotate_embeddings(self._embed(token_ids), positions, self._frequencies)


def list_segments(rendered: Rendered) -> list[Segment]:
    """Return the documents of a prompt, and its passages that overlap none of them, in order."""
    free = [p for p in rendered.passages if not any(p.start < d.stop and d.start < p.stop for d in rendered.segments)]
    return sorted([*rendered.segments, *free], key=lambda segment: segment.start)


def choose_candidates(token_ids: TokenIds, references: Sequence[Reference]) -> Sequence[Reference]:
    """Return the references that hold most of a prompt's tokens, at most ``MOST_CANDIDATES``; all if there are no more.

    The paper measures every stored prompt. A token that a reference holds is at distance 0 from it.
    """
    if len(references) <= MOST_CANDIDATES:
        return references
    held = [np.isin(token_ids, reference.token_ids, kind="table").mean() for reference in references]
    return [references[place] for place in np.argsort(held, kind="stable")[-MOST_CANDIDATES:]]


class TokenMatches(NamedTuple):
    """For every target token the position of its nearest reference token [T], and their cosine [T], -1 to 1."""

    positions: NDArray[np.int64]
    cosine: NDArray[np.float32]


def rotate_embeddings(
    embeddings: torch.Tensor, positions: torch.Tensor, inverse_frequencies: torch.Tensor
) -> torch.Tensor:
    """Return token embeddings turned by RoPE, as the model turns keys, in float32.

    The hidden axis is read as heads of width 2R, each rotated in pairs of its two halves. Dimensions left over behind
    the last whole head stay as they are. Every token keeps its norm.

    Args:
        embeddings: [T, hidden], of the model's input embedding layer.
        positions: [T]; counted from the start of a segment, they match what moved as a whole.
        inverse_frequencies: [R], in radians per position.

    Raises:
        ValueError: if a head is wider than the embeddings.
    """
    width = 2 * len(inverse_frequencies)
    num_heads = embeddings.shape[1] // width
    if num_heads == 0:
        raise ValueError(
            f"embeddings are {embeddings.shape[1]} wide; accepted is {width}, the width of a head, or more"
        )
    whole = embeddings[:, : num_heads * width].float()
    heads = whole.unflatten(1, (num_heads, width)).transpose(0, 1)  # [heads, T, 2R]
    rotated = rotate(heads[None], positions, Rotation(inverse_frequencies))[0].transpose(0, 1).flatten(1)
    return torch.cat([rotated, embeddings[:, num_heads * width :].float()], dim=1)  # [T, hidden]


def find_nearest_tokens(
    target: torch.Tensor, reference: torch.Tensor, *, bits: int | None = None, candidates: int = 4
) -> TokenMatches:
    """Find the nearest reference token of every target token, by cosine. The same input gives the same matches.

    Args:
        target: [T, hidden], rotated or plain.
        reference: [S, hidden], at least one token, treated alike.
        bits: hash bits of a token; None compares every pair exactly, on the tensors' device, which is faster up to
            about 500 tokens on either side. See ``examples/lab/calibrate_similarity.py``.
        candidates: number of nearest tokens by hash whose exact cosines decide; 1 takes the nearest hash as it is.
            Four cost next to nothing more, and at 256 bits raise recall from 0.67 to 0.87 at 4,096 tokens.

    Raises:
        ValueError: if there is no reference token.
    """
    if len(reference) == 0:
        raise ValueError("reference has 0 tokens; accepted is 1 or more")
    first, second = normalize(target.float(), dim=1), normalize(reference.float(), dim=1)
    if bits is None:
        blocks = [(block @ second.T).max(dim=1) for block in first.split(_BLOCK_TOKENS)]
        cosine, positions = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    else:
        _, found = _search(first, second, bits, min(candidates, len(reference)))  # [T, candidates]
        places = torch.from_numpy(found).to(first.device)
        cosines = torch.stack([(first * second[column]).sum(1) for column in places.T], dim=1)  # [T, candidates]
        cosine, best = cosines.max(dim=1)
        positions = places.gather(1, best[:, None])[:, 0]
    return TokenMatches(positions.cpu().numpy(), cosine.clamp(-1, 1).cpu().numpy())


def measure_hamming_distance(target: torch.Tensor, reference: torch.Tensor) -> float:
    """Return in how many of ``PAPER_BITS`` bits a target token differs from its nearest reference token, on average."""
    distances, _ = _search(normalize(target.float(), dim=1), normalize(reference.float(), dim=1), PAPER_BITS, 1)
    return float(distances.mean())


def compute_paper_similarity(distance: float) -> float:
    """Return ``clip(1 - distance / 30, 0, 1)``, by which mode ``paper`` picks its reference; 1 is alike.

    Readers of the paper report the formula, with a loss of quality below about 0.8. What the distance is, is not
    confirmed against the paper. Here it is ``measure_hamming_distance`` with 64 bits, where unrelated directions are 32
    bits apart, which would make 30 a natural scale.
    """
    return float(np.clip(1 - distance / PAPER_DISTANCE_SCALE, 0, 1))


def _search(
    target: torch.Tensor, reference: torch.Tensor, bits: int, candidates: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return Hamming distances and positions of the nearest reference tokens by hash, [T, candidates], in order."""
    import faiss

    index = faiss.clone_index(_make_empty_index(reference.shape[1], bits))
    index.add(reference.cpu().numpy())
    distances, positions = index.search(target.cpu().numpy(), candidates)
    return distances, positions


@lru_cache(maxsize=8)
def _make_empty_index(hidden: int, bits: int) -> faiss.IndexLSH:
    """Return an index with no tokens, cached, for copies: its random rotation, always the same, takes long to make."""
    import faiss

    return faiss.IndexLSH(hidden, bits)
