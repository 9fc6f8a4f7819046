"""Attention of rows picked from a prompt, on a CPU: the stairs under which rows see keys, cut into what is computed.

Most of it are rectangles of rows that see all of their keys, which need no mask, and are as large as can be. What is
left are steps, which do. PyTorch's own kernel computes each of them, and the parts of a row are put together by the
sums that it gives away. Masks for all would cost more: kernels are slower with them, and compute what is hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semsharekv_integrations.model.sight import Block, Sight

FEWEST_ROWS = 384  # that are worth it
ROWS_PER_STEP = 96
_KERNEL = "_scaled_dot_product_flash_attention_for_cpu"  # the one that sdpa takes; it returns sums, too


def can_attend(query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> bool:
    """Return whether ``attend_by_steps`` takes these, and is worth it."""
    plain = sight.window is None and sight.hidden is None and len(query) == 1 and len(sight.rows) >= FEWEST_ROWS
    alike = query.dtype == key.dtype == value.dtype and query.shape[3] == value.shape[3] and query.is_floating_point()
    return plain and alike and query.device.type == "cpu" and hasattr(torch.ops.aten, _KERNEL)


def attend_by_steps(query: Tensor, key: Tensor, value: Tensor, sight: Sight, scale: float | None) -> Tensor:
    """Return attention [1, N, heads, D] of query [1, heads, N, D] over key and value [1, H, T, D]."""
    grouped = query[0].unflatten(0, (key.shape[1], -1))  # [H, heads / H, N, D]
    keys, values = (each[0][:, None].expand(-1, grouped.shape[1], -1, -1) for each in (key, value))
    mixed = query.new_empty((query.shape[2], *grouped.shape[:2], query.shape[3]), dtype=torch.float32)
    by_head = mixed.permute(1, 2, 0, 3)
    sums = query.new_empty(grouped.shape[:3], dtype=torch.float32)  # log of each row's sum of weights
    for block in cut_stairs(sight):
        rows, seen = slice(block.start, block.stop), slice(block.first_key, block.num_keys)
        mask = None if block.sees_all else sight.get_mask(block, query.dtype, query.device)
        part, own = getattr(torch.ops.aten, _KERNEL)(
            grouped[:, :, rows], keys[:, :, seen], values[:, :, seen], attn_mask=mask, scale=scale
        )
        if block.first_key == 0:  # the first part of these rows
            by_head[:, :, rows], sums[:, :, rows] = part, own
        else:
            known = sums[:, :, rows]
            by_head[:, :, rows].lerp_(part.float(), torch.sigmoid(own - known)[..., None])
            torch.logaddexp(known, own, out=known)
    return mixed.flatten(1, 2)[None].to(query.dtype)


def cut_stairs(sight: Sight) -> list[Block]:
    """Return what the rows of ``sight`` see, without windows, as blocks; those of one row come by ascending keys."""
    if sight.steps is None:
        sight.steps = list(_cut(sight.rows.positions, 0, len(sight.rows), 0))
    return sight.steps


def _cut(positions: NDArray[np.int64], start: int, stop: int, first_key: int) -> Iterator[Block]:
    """Yield what rows ``start`` to ``stop`` see from ``first_key`` on, which is not behind the first of them."""
    if stop - start > ROWS_PER_STEP:
        middle = (start + stop) // 2
        yield from _cut(positions, start, middle, first_key)
        edge = int(positions[middle])
        yield Block(middle, stop, edge, first_key, sees_all=True)
        yield from _cut(positions, middle, stop, edge)
        return
    edge = int(positions[start])
    if edge > first_key:
        yield Block(start, stop, edge, first_key, sees_all=True)
    yield Block(start, stop, int(positions[stop - 1]) + 1, edge)
