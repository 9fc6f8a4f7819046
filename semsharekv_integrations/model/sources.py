"""Where each token of a prompt takes its KV from, and how one layer's KV is brought into the prompt's order.

Two ways give the same numbers. On an accelerator each step costs a launch, so the tokens of several layers are picked
at once, by index. On the CPU each byte costs time, so each stretch of consecutive tokens is copied, and turned on its
way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semsharekv_integrations.kv import KVPiece, LayerKV, LayerRotation, Reference, Rotation, list_pieces
from semsharekv_integrations.model.transfers import send_together
from semsharekv_integrations.reuse.plan import ReusePlan

Pieces = Sequence[LayerKV]  # what each piece that tokens are taken from has of one layer
Places = NDArray[np.int64]
_NOWHERE = -1


class Stretch(NamedTuple):
    """Tokens ``start`` to ``stop`` of a prompt take those of a piece from ``source`` on, moved by ``shift`` positions.

    ``piece`` is ``_NOWHERE`` if they take none.
    """

    start: int
    stop: int
    piece: int
    source: int
    shift: int


class Index(NamedTuple):
    """On one device: the tokens [T] of all pieces in a row to pick, their shifts [T], and which [M] have no source."""

    rows: Tensor
    shifts: Tensor
    empty: Tensor


class Sources:
    """The stored pieces that the tokens [T] of a prompt take their KV from. Reads no KV but by ``read``."""

    def __init__(self, plan: ReusePlan) -> None:
        self._pieces = np.full(len(plan.token_ids), _NOWHERE, dtype=np.int64)  # number of each token's piece
        self._rows, self._shifts = np.zeros((2, len(plan.token_ids)), dtype=np.int64)
        self._kept: list[KVPiece] = []
        self._numbers: dict[int, int] = {}  # by identity: several references may share a piece
        self._angles: dict[tuple[int, torch.device | int], tuple[Tensor, Tensor]] = {}  # of each rotation
        self._indices: dict[torch.device, Index] = {}
        if plan.prefix is not None:
            first = np.arange(plan.prefix_tokens)
            self._add(plan.prefix.reference, first, first)
        for borrowing in plan.borrowings:
            self._add(borrowing.reference, borrowing.targets, borrowing.sources)
        self._ranges = [self._trim(number) for number in range(len(self._kept))]

    def _add(self, reference: Reference, targets: Places, sources: Places) -> None:
        """Note that tokens ``targets`` [N] take the KV of tokens ``sources`` [N] of ``reference``."""
        pieces = list_pieces(reference.layers, len(reference.token_ids))
        starts = np.cumsum([0, *(piece.num_tokens for piece in pieces)])
        which = starts.searchsorted(sources, side="right") - 1
        numbers = np.full(len(pieces), _NOWHERE)
        for place in np.unique(which):
            piece = pieces[place]
            if id(piece) not in self._numbers:
                self._numbers[id(piece)] = len(self._kept)
                self._kept.append(piece)
            numbers[place] = self._numbers[id(piece)]
        self._pieces[targets], self._rows[targets] = numbers[which], sources - starts[which]
        self._shifts[targets] = targets - sources

    def _trim(self, number: int) -> slice:
        """Return which tokens of a piece are needed, from the first to the last; count its rows from there."""
        mine = self._pieces == number
        needed = self._rows[mine]
        start, stop = int(needed.min()), int(needed.max()) + 1
        self._rows[mine] -= start
        return slice(start, stop)

    def read(self, index: int) -> Pieces:
        """Return what each piece has of layer ``index``, the tokens that are needed."""
        layers = (piece.layer(index) for piece in self._kept)
        return [
            LayerKV(keys[:, :, needed], values[:, :, needed])
            for (keys, values), needed in zip(layers, self._ranges, strict=True)
        ]

    @cached_property
    def stretches(self) -> list[Stretch]:
        """The prompt in stretches of consecutive tokens that take consecutive tokens of one piece, or take none."""
        goes_on = (np.diff(self._pieces) == 0) & (np.diff(self._shifts) == 0)
        goes_on &= (np.diff(self._rows) == 1) | (self._pieces[1:] == _NOWHERE)
        starts = np.flatnonzero(np.concatenate([[True], ~goes_on]))
        stops = [*starts[1:].tolist(), len(self._pieces)]
        columns = (array[starts].tolist() for array in (self._pieces, self._rows, self._shifts))
        return [Stretch(*each) for each in zip(starts.tolist(), stops, *columns, strict=True)]

    def copy(self, pieces: Pieces, turning: LayerRotation) -> LayerKV:
        """Return one layer's KV [B, H, T, D] in the prompt's order, copied from ``pieces`` stretch by stretch."""
        parts = zip(*pieces, strict=True)
        return LayerKV(*(self._copy_part(*part) for part in zip(parts, turning, strict=True)))

    def _copy_part(self, parts: Sequence[Tensor], rotation: Rotation | None) -> Tensor:
        like = parts[0]
        whole = like.new_empty((*like.shape[:2], len(self._pieces), like.shape[3]))
        for start, stop, piece, source, shift in self.stretches:
            place = whole[:, :, start:stop]
            if piece == _NOWHERE:
                place.zero_()
                continue
            part = parts[piece][:, :, source : source + stop - start]
            if rotation is None or not shift:
                place.copy_(part)
                continue
            known = id(rotation), shift
            if known not in self._angles:
                self._angles[known] = rotation.angles(torch.tensor([shift], device=like.device))
            rotation.turn(part, *self._angles[known], out=place)
        return whole

    def pick(self, group: Sequence[Pieces], turning: LayerRotation) -> list[LayerKV]:
        """Return the KV [B, H, T, D] of a ``group`` of layers that turn alike, in the prompt's order, picked by index.

        They share memory.
        """
        num_layers, index = len(group), self._send_index(group[0][0].keys.device)
        keys, values = ([part[kind] for pieces in group for part in pieces] for kind in (0, 1))
        if all(k.shape == v.shape and k.dtype == v.dtype for k, v in group[0]):
            both = _pick([*keys, *values], 2 * num_layers, index)
            picked = both[:, :, :num_layers], both[:, :, num_layers:]
        else:
            picked = _pick(keys, num_layers, index), _pick(values, num_layers, index)
        for tensor, rotation in zip(picked, turning, strict=True):
            if rotation is not None and self._shifts.any():
                known = id(rotation), tensor.device
                if known not in self._angles:
                    self._angles[known] = rotation.angles(index.shifts)
                rotation.turn(tensor, *self._angles[known], out=tensor)
        return [LayerKV(*both) for both in zip(*(tensor.unbind(2) for tensor in picked), strict=True)]

    def _send_index(self, device: torch.device) -> Index:
        """Return the index on ``device``, sent there once."""
        if device not in self._indices:
            lengths = [needed.stop - needed.start for needed in self._ranges]
            starts = np.cumsum([0, *lengths])  # the last one for what has no piece, -1
            is_empty = self._pieces == _NOWHERE
            rows = np.where(is_empty, 0, starts[self._pieces] + self._rows)
            self._indices[device] = Index(*send_together([rows, self._shifts, np.flatnonzero(is_empty)], device))
        return self._indices[device]


def _pick(parts: Sequence[Tensor], num_layers: int, index: Index) -> Tensor:
    """Return [B, H, layers, T, D] of the pieces [B, H, S, D] of ``num_layers``, one layer's behind the other's."""
    joined = torch.cat(list(parts), dim=2) if len(parts) > 1 else parts[0]
    picked = joined.unflatten(2, (num_layers, -1)).index_select(3, index.rows)
    return picked.index_fill_(3, index.empty, 0) if len(index.empty) else picked
