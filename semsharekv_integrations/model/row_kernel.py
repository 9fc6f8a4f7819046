"""Attention of rows picked from a prompt, by their positions, as one kernel in Triton; no mask is made.

A row sees the keys up to its own, within its window. Queries of one key head come as more rows of it, and so share its
keys. A block of rows stops at the last one's position. Few rows over many keys are split by keys, and put together.
Importing this needs Triton, which nothing else here does.
"""

# what Triton compiles has types of its own
# mypy: disable-error-code="no-untyped-def,import-not-found,import-untyped,misc,untyped-decorator,no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from semsharekv_integrations.model.views import Window

_WHOLE, _SLIDING, _CHUNKED = 0, 1, 2
_LEAST_PROGRAMS, _MOST_SPLITS, _KEYS_PER_SPLIT = 128, 8, 1024
_LOG2_E = 1.4426950408889634


Tiles = tuple[int, int, int]  # rows and keys at a time, and how many steps are loaded ahead


def choose_splits(num_rows: int, num_heads: int, num_key_heads: int, num_keys: int, tiles: Tiles) -> int:
    """Return into how many parts the keys are split, so that a GPU has enough to do at once."""
    programs = triton.cdiv(num_rows * (num_heads // num_key_heads), tiles[0]) * num_key_heads
    return max(1, min(_LEAST_PROGRAMS // programs, num_keys // _KEYS_PER_SPLIT, _MOST_SPLITS))


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    window: Window | None,
    scale: float | None,
    tiles: Tiles,
    splits: int = 1,
) -> Tensor:
    """Return attention [1, N, heads, V] of query [1, heads, N, D] over key [1, H, T, D] and value [1, H, T, V].

    Key and value are contiguous, the numbers of a head of the query lie side by side.

    Args:
        positions: [N], ascending, of the rows that the queries belong to.
        scale: of the products; None for one by D.
        splits: into how many parts the keys are split.
    """
    (_, heads, num_rows, width), (_, key_heads, num_keys, depth) = query.shape, value.shape
    out = query.new_empty((1, num_rows, heads, depth))
    parts, sums = out, out
    if splits > 1:
        parts = torch.empty((splits, num_rows, heads, depth), dtype=torch.float32, device=query.device)
        sums = torch.empty((2, splits, num_rows, heads), dtype=torch.float32, device=query.device)
    kind = _WHOLE if window is None else _CHUNKED if window.chunked else _SLIDING
    group = heads // key_heads
    _attend[(triton.cdiv(num_rows * group, tiles[0]), key_heads, splits)](
        *(query, key, value, parts, sums, positions),
        *(num_rows, num_keys, 0 if window is None else window.num_tokens),
        triton.cdiv(triton.cdiv(num_keys, splits), tiles[1]) * tiles[1],
        (width**-0.5 if scale is None else scale) * _LOG2_E,
        *(query.stride(1), query.stride(2)),
        **_describe(width, depth, heads, group, kind, splits, query.dtype, tiles),
    )
    if splits == 1:
        return out
    best, total = sums  # [splits, N, heads]
    weights = torch.exp2(best - best.amax(0))
    mixed = (parts * weights[..., None]).sum(0) / (total * weights).sum(0)[..., None]
    return mixed.to(query.dtype)[None]


def _describe(
    width: int, depth: int, heads: int, group: int, kind: int, splits: int, dtype: torch.dtype, tiles: Tiles
) -> dict[str, Any]:
    """Return what a kernel is compiled for."""
    return {
        **{"WIDTH": width, "DEPTH": depth, "HEADS": heads, "GROUP": group, "KIND": kind, "SPLITS": splits},
        **{"PADDED_WIDTH": max(16, triton.next_power_of_2(width))},
        **{"PADDED_DEPTH": max(16, triton.next_power_of_2(depth))},
        **{"ROWS": tiles[0], "KEYS": tiles[1], "num_warps": 4, "num_stages": tiles[2]},
        **{"PRECISION": "ieee" if dtype == torch.float32 else "tf32"},
    }


@triton.jit
def _load(base, rows, stride, columns, valid, COLUMNS: tl.constexpr):
    """Return numbers [rows, columns], 0 where a row is not ``valid``."""
    places = rows[:, None].to(tl.int64) * stride + columns[None, :]
    return tl.load(base + places, mask=valid[:, None] & (columns < COLUMNS)[None, :], other=0.0)


@triton.jit
def _find_first(position, window, KIND: tl.constexpr):
    """Return the first key that each row sees; below 0 if all before it."""
    if KIND == 0:
        first = position * 0
    elif KIND == 1:
        first = position - window + 1
    else:
        first = position - position % window
    return first


@triton.jit
def _find_range(position, first, valid, num_keys, keys_per_split, SPLITS: tl.constexpr, KEYS: tl.constexpr):
    """Return the keys, as start and stop, that rows see any of, in the part of this program."""
    stop = tl.max(tl.where(valid, position, 0), 0) + 1
    start = tl.maximum(0, tl.min(tl.where(valid, first, num_keys), 0)) // KEYS * KEYS
    if SPLITS > 1:
        part = tl.program_id(2)
        start = tl.maximum(start, part * keys_per_split)
        stop = tl.minimum(stop, (part + 1) * keys_per_split)
    return start, stop


@triton.jit
def _store(out, sums, place, num_places, best, total, mixed, columns, valid, DEPTH: tl.constexpr, SPLITS: tl.constexpr):
    """Write a block of attention; where keys are split, not divided yet, and the sums to divide by beside it."""
    places = place.to(tl.int64)[:, None] * DEPTH + columns[None, :]
    kept = valid[:, None] & (columns < DEPTH)[None, :]
    if SPLITS > 1:
        tl.store(out + places, mixed, mask=kept)
        tl.store(sums + place, best, mask=valid)
        tl.store(sums + SPLITS * num_places + place, total, mask=valid)
    else:
        mixed = mixed / tl.maximum(total, 1.0e-30)[:, None]
        tl.store(out + places, mixed.to(out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["num_rows", "num_keys", "window", "keys_per_split"])
def _attend(
    query,
    key,
    value,
    out,
    sums,
    positions,
    num_rows,
    num_keys,
    window,
    keys_per_split,
    scale,
    query_head,
    query_row,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    PADDED_DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    packed = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # queries of one key head, row by row
    row, head = packed // GROUP, tl.program_id(1) * GROUP + packed % GROUP
    valid, across, deep = row < num_rows, tl.arange(0, PADDED_WIDTH), tl.arange(0, PADDED_DEPTH)
    position = tl.load(positions + row, mask=valid, other=0).to(tl.int32)
    first = _find_first(position, window, KIND)
    places = head.to(tl.int64) * query_head + row.to(tl.int64) * query_row
    q = _load(query, places, 1, across, valid, WIDTH)
    best = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, PADDED_DEPTH], tl.float32)
    key_head = tl.program_id(1).to(tl.int64) * num_keys
    start, stop = _find_range(position, first, valid, num_keys, keys_per_split, SPLITS, KEYS)
    for begin in range(start, stop, KEYS):
        token = begin + tl.arange(0, KEYS)
        k = _load(key, key_head + token, WIDTH, across, token < stop, WIDTH)
        seen = (token[None, :] <= position[:, None]) & (token[None, :] >= first[:, None]) & (token < stop)[None, :]
        logits = tl.where(seen, tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, -1.0e30)
        higher = tl.maximum(best, tl.max(logits, 1))
        weights = tl.where(seen, tl.exp2(logits - higher[:, None]), 0.0)
        shrink = tl.exp2(best - higher)
        v = _load(value, key_head + token, DEPTH, deep, token < stop, DEPTH)
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        best = higher
    place = (tl.program_id(2) * num_rows + row) * HEADS + head
    _store(out, sums, place, num_rows * HEADS, best, total, mixed, deep, valid, DEPTH, SPLITS)
