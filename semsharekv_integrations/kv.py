"""The data that the parts hand to each other: token ids, KV, references, runs, rendered prompts; and how keys move.

Axis legend, for every shape comment in this package:
    B batch (1 unless calls decode together), T tokens, S stored tokens, H key-value heads, D head size, V vocabulary.

RoPE (arXiv 2104.09864) turns every pair of key dimensions by position times inverse frequency, so a key moves by
``shift`` positions when its pairs are turned by ``shift`` times that frequency. Models that scale cosine and sine
(YaRN) have done so already: only the pure angle is applied here. Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NamedTuple, Protocol, overload

import numpy as np
import torch
from numpy.typing import NDArray

TokenIds = NDArray[np.int64]
Mask = NDArray[np.bool_]
State = Mapping[str, torch.Tensor]  # what a model's layers keep of all tokens before a place, by name
SpaceName = str | tuple[str, str]  # a namespace, with a state of the model that is not the first
UNPLACED = -1  # before all tokens


class LayerKV(NamedTuple):
    """Keys (after RoPE) and values of one layer, both [B, H, S, D]. A layer without KV per token has H and D of 0."""

    keys: torch.Tensor
    values: torch.Tensor


class KVPiece(Protocol):
    """KV of consecutive tokens, wherever and in whatever form it is kept. Never mutated."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the piece."""

    def layer(self, index: int) -> LayerKV:
        """Return keys and values of one layer, in the dtype and on the device that the model takes."""


class PiecedLayers(Sequence[LayerKV]):
    """The layers of KV that lies in consecutive pieces. Indexing puts a layer together anew each time.

    Args:
        pieces: at least one.
        num_layers: of each.
    """

    def __init__(self, pieces: Sequence[KVPiece], num_layers: int) -> None:
        self.pieces = pieces
        self._num_layers = num_layers

    def __len__(self) -> int:
        return self._num_layers

    @overload
    def __getitem__(self, index: int) -> LayerKV: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LayerKV]: ...
    def __getitem__(self, index: int | slice) -> LayerKV | Sequence[LayerKV]:
        """Return one layer, put together now (not copied if in one piece), or a list of layers for a slice."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        index = range(self._num_layers)[index]  # which knows its bounds
        parts = [piece.layer(index) for piece in self.pieces]
        return parts[0] if len(parts) == 1 else LayerKV(*(torch.cat(both, dim=2) for both in zip(*parts, strict=True)))

    def covering(self, num_tokens: int) -> PiecedLayers:
        """Return the layers of the whole pieces that hold the first ``num_tokens`` tokens, 1 to all. Copies nothing."""
        needed, have = 0, 0
        while have < num_tokens:
            have += self.pieces[needed].num_tokens
            needed += 1
        return PiecedLayers(self.pieces[:needed], self._num_layers)


class _OnePiece(NamedTuple):
    """``KVPiece`` of layers that lie in one piece."""

    layers: Sequence[LayerKV]
    num_tokens: int

    def layer(self, index: int) -> LayerKV:
        return self.layers[index]


def list_pieces(layers: Sequence[LayerKV], num_tokens: int) -> Sequence[KVPiece]:
    """Return the pieces that ``layers``, of ``num_tokens`` tokens, lie in."""
    return layers.pieces if isinstance(layers, PiecedLayers) else [_OnePiece(layers, num_tokens)]


def take_first_tokens(layers: Sequence[LayerKV], num_tokens: int) -> Iterator[LayerKV]:
    """Yield each layer's keys and values of the first ``num_tokens`` tokens; not copied if in one piece."""
    for keys, values in layers.covering(num_tokens) if isinstance(layers, PiecedLayers) else layers:
        yield LayerKV(keys[:, :, :num_tokens], values[:, :, :num_tokens])


class Span(NamedTuple):
    """A document's place: it begins at ``start`` or is ``UNPLACED``; the prompt's first ``stop`` tokens hold it."""

    start: int
    stop: int


class Segment(NamedTuple):
    """Tokens ``start`` to ``stop`` (exclusive) of a prompt are the document ``document_id``, or a passage (id "")."""

    document_id: str
    start: int
    stop: int


class Substitution(NamedTuple):
    """Tokens ``start`` to ``stop`` (exclusive) of a sequence, in whose place ``token_ids`` [N] stand in another one.

    ``documents`` are the caller's documents that stand in front of these, or hold them, where they were taken from.
    """

    start: int
    stop: int
    token_ids: TokenIds
    documents: tuple[str, ...] = ()

    @property
    def growth(self) -> int:
        """How many tokens longer the other sequence is by it; negative if it is shorter."""
        return len(self.token_ids) - (self.stop - self.start)


def substitute(token_ids: TokenIds, substitutions: Sequence[Substitution]) -> TokenIds:
    """Return ``token_ids`` [T] with all ``substitutions`` made; they are in order, and none overlap."""
    if not substitutions:
        return token_ids
    parts, last = [], 0
    for each in substitutions:
        parts += [token_ids[last : each.start], each.token_ids]
        last = each.stop
    return np.concatenate([*parts, token_ids[last:]])


def invert(token_ids: TokenIds, substitutions: Sequence[Substitution]) -> tuple[Substitution, ...]:
    """Return what turns ``substitute(token_ids, substitutions)`` into ``token_ids`` again."""
    found, growth = [], 0
    for each in substitutions:
        start = each.start + growth
        own = token_ids[each.start : each.stop]
        found.append(Substitution(start, start + len(each.token_ids), own, each.documents))
        growth += each.growth
    return tuple(found)


@dataclass(frozen=True)
class Reference:
    """KV of a token sequence from position 0, as a stored entry. Never mutated.

    Attributes:
        id: stable digest of namespace, state and token ids.
        namespace: who may read it; all, if it is shared.
        token_ids: [S], one for each position that has KV.
        layers: one pair for each layer; none in what the store lists, which ``KVStore.fetch`` brings KV for.
        document_starts: the caller's documents that stand in it, for ``forget``, each with its first token, or
            ``UNPLACED`` if it may stand anywhere.
        document_stops: how many of the first tokens each of them needs to stand there whole; one that is not here,
            as in what earlier versions wrote, stands wherever it begins.
        segments: the documents and passages that stand in its exact part, in order; what is matched by similarity.
        exact_tokens: number of leading tokens whose KV is that of a full prefill; None for all. What follows is
            tainted: it came after a borrowed token. Only an exact continuation in the same session may use it.
        session: the conversation it came from, or None.
        pinned: never evicted by the byte bound.
        expires_after_s: seconds after its last use at which it expires, or None.
        state: of the model that made it; empty for the one that the store began with.
        rounded: whether its KV lay in 8 bits, which makes none of it exact, whatever else is said of it.
        substitutions: turn ``token_ids``, which the model read, into ``asked_ids``. Only a tainted one has any.
        checkpoints: states behind so many of the first tokens, of a model that goes on from such places alone.
    """

    id: str
    namespace: str
    token_ids: TokenIds
    layers: Sequence[LayerKV]
    document_starts: Mapping[str, int] = field(default_factory=dict)
    document_stops: Mapping[str, int] = field(default_factory=dict)
    segments: tuple[Segment, ...] = ()
    exact_tokens: int | None = None
    session: str | None = None
    pinned: bool = False
    expires_after_s: float | None = None
    state: str = ""
    rounded: bool = False
    substitutions: tuple[Substitution, ...] = ()
    checkpoints: Mapping[int, State] = field(default_factory=dict)

    @property
    def asked_ids(self) -> TokenIds:
        """The tokens [S] as they were asked, where the model read a stored wording instead."""
        return substitute(self.token_ids, self.substitutions)

    @property
    def space(self) -> SpaceName:
        """The space in which the store looks for it: that of its namespace and its state of the model."""
        return make_space_name(self.namespace, self.state)

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys, values and states; 0 without layers."""
        states = (tensor for state in self.checkpoints.values() for tensor in state.values())
        kept = chain((tensor for layer in self.layers for tensor in layer), states)
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    @property
    def spans(self) -> dict[str, Span]:
        """Where each of the caller's documents stands, by id. One without a stop gets its start and one more."""
        stops = self.document_stops
        return {key: Span(start, stops.get(key, start + 1)) for key, start in self.document_starts.items()}

    def labelled(self, spans: Mapping[str, Span]) -> Reference:
        """Return a copy with ``spans`` as its only documents. Shares the KV."""
        starts, stops = ({key: span[end] for key, span in spans.items()} for end in (0, 1))
        return replace(self, document_starts=starts, document_stops=stops)

    @property
    def is_tainted(self) -> bool:
        """Whether some of its KV comes after ``exact_tokens``, and so is approximate. Ignores ``rounded``."""
        return self.exact_tokens is not None and self.exact_tokens < len(self.token_ids)


def select_within(spans: Mapping[str, Span], num_tokens: int) -> dict[str, Span]:
    """Return the documents that the first ``num_tokens`` tokens hold whole."""
    return {key: span for key, span in spans.items() if span.stop <= num_tokens}


def make_space_name(namespace: str, state: str) -> SpaceName:
    """Return the name for what a state of the model made in a namespace: unlike that of any other pair."""
    return (namespace, state) if state else namespace


class PrefixMatch(NamedTuple):
    """The first ``num_tokens`` tokens of a prompt equal those of ``reference``."""

    reference: Reference
    num_tokens: int

    def cut_to_checkpoint(self) -> PrefixMatch:
        """Return this match up to its last checkpoint, which leaves no token if it has none."""
        places = (at for at in self.reference.checkpoints if at <= self.num_tokens)
        return self._replace(num_tokens=max(places, default=0))


class Run(NamedTuple):
    """Tokens from ``start`` on of a prompt equal those of ``reference`` from ``source_start`` on."""

    start: int
    reference: Reference
    source_start: int
    num_tokens: int


class Rendered(NamedTuple):
    """A prompt as token ids [T], where the caller's documents stand in it, and where the last user turn does.

    ``passages`` are the paragraphs of the prompt, which stand in for documents where none are known.
    ``question`` is the last user turn as a range of tokens, or None in a plain text prompt.
    ``unplaced`` are the documents in it whose place is unknown, each with how many tokens surely come before.
    """

    token_ids: TokenIds
    segments: Sequence[Segment]
    passages: Sequence[Segment] = ()
    question: tuple[int, int] | None = None
    unplaced: Mapping[str, int] = {}

    def substitute(self, substitutions: Sequence[Substitution]) -> Rendered:
        """Return the prompt as it is read where ``substitutions``, in order, are made; itself without any.

        A range that begins or ends inside of one holds all of it.
        """
        if not substitutions:
            return self

        def move(start: int, stop: int) -> tuple[int, int]:
            """Return where the range ``start`` to ``stop`` lies now."""
            before = sum(each.growth for each in substitutions if each.stop <= start)
            within = sum(each.growth for each in substitutions if start < each.stop and each.start < stop)
            first = min([start, *(each.start for each in substitutions if each.start < start < each.stop)])
            last = max([stop, *(each.stop for each in substitutions if each.start < stop < each.stop)])
            return first + before, last + before + within

        def move_all(segments: Sequence[Segment]) -> list[Segment]:
            return [Segment(segment.document_id, *move(segment.start, segment.stop)) for segment in segments]

        return Rendered(
            substitute(self.token_ids, substitutions),
            move_all(self.segments),
            move_all(self.passages),
            None if self.question is None else move(*self.question),
            {key: move(before, before)[0] for key, before in self.unplaced.items()},
        )


def count_common_tokens(first: TokenIds, second: TokenIds) -> int:
    """Return how many leading tokens of the sequences [T] and [S] are equal."""
    shared = min(len(first), len(second))
    different = np.flatnonzero(first[:shared] != second[:shared])
    return int(different[0]) if different.size else shared


@dataclass(frozen=True, eq=False)
class Rotation:
    """How one layer turns its keys.

    Attributes:
        inverse_frequencies: [R] radians for each position, one for each pair; the other D - 2R dimensions stay.
        interleaved: whether neighbours (0, 1), (2, 3), ... are pairs, instead of the two halves (0, R), (1, R + 1), ...
        start: the first dimension that turns.
    """

    inverse_frequencies: torch.Tensor
    interleaved: bool = False
    start: int = 0
    _on_device: dict[torch.device, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def angles(self, shifts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and sine, both [N, R] in float32, for ``shifts`` [N] in positions, which may be negative."""
        frequencies = self._on_device.get(shifts.device)
        if frequencies is None:  # a copy for each device: the host would wait for each further one
            frequencies = self._on_device[shifts.device] = self.inverse_frequencies.to(shifts.device, torch.float32)
        turned = shifts[:, None].to(torch.float32) * frequencies  # [N, R]
        return turned.cos(), turned.sin()

    def turn(
        self, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As ``rotate``, with ``cos`` and ``sin`` from ``angles``, [N, R] or for all tokens alike [1, R].

        Writes to ``out``, of the shape and dtype of ``keys``, if given; it may be ``keys`` itself, but not overlap it.
        """
        out = torch.empty_like(keys) if out is None else out
        stop = self.start + 2 * cos.shape[-1]
        if out is not keys:
            for rest in (slice(0, self.start), slice(stop, None)):
                if out[..., rest].numel():
                    out[..., rest] = keys[..., rest]
        (first, second), places = (self._pair(tensor[..., self.start : stop]) for tensor in (keys, out))
        in_place = out is not keys and keys.dtype == torch.promote_types(keys.dtype, torch.float32)
        turned = [  # [..., N, R]
            torch.mul(one, cos, out=place if in_place else None).addcmul_(other, sin, value=sign)
            for one, other, sign, place in ((first, second, -1, places[0]), (second, first, 1, places[1]))
        ]
        for place, half in zip(() if in_place else places, turned, strict=False):
            place.copy_(half)
        return out

    def _pair(self, rotary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of the first and the second numbers [..., R] of all pairs in ``rotary`` [..., 2R]."""
        if self.interleaved:
            return rotary[..., 0::2], rotary[..., 1::2]
        first, second = rotary.chunk(2, dim=-1)
        return first, second


class LayerRotation(NamedTuple):
    """How one layer's keys turn, and its values: of latent attention, what it keeps as values. None for what stays."""

    keys: Rotation | None = None
    values: Rotation | None = None


def rotate(keys: torch.Tensor, shifts: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Return a copy of keys [B, H, N, D], each moved by ``shifts`` [N] positions: in float32 at least, same dtype."""
    return rotation.turn(keys, *rotation.angles(shifts))
