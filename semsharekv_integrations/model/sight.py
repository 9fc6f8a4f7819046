"""What rows of a prompt see of it, told by their positions.

Rows picked from a prompt see what is before each of them, so no attention kernel knows their pattern by itself. Masks
are made for blocks of rows, each over the keys that one of them sees: never for all rows and tokens, unless a model's
own code wants that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semsharekv_integrations.model.views import Window, find_unseen

# Fewest rows of a block. On a CPU every key that no row sees costs; on others every launch does, and memory.
ROWS_PER_BLOCK, ROWS_PER_LAUNCH = 96, 1024
MOST_KEPT_BYTES = 1 << 26  # of masks of one set of rows, which layers share; more are made in every layer
_ALIGNMENT = 16  # numbers: kernels copy masks whose rows do not begin at a multiple


class Block(NamedTuple):
    """Rows ``start`` to ``stop`` (exclusive) of those computed see none but keys ``first_key`` to ``num_keys``."""

    start: int
    stop: int
    num_keys: int
    first_key: int = 0


def blocks_of(positions: NDArray[np.int64], kind: str = "cpu", window: Window | None = None) -> Sequence[Block]:
    """Split rows at ascending ``positions`` [N], at least one, into blocks for a device of type ``kind``."""
    fewest = ROWS_PER_BLOCK if kind == "cpu" else ROWS_PER_LAUNCH
    num_blocks = max(1, len(positions) // fewest)
    edges = [len(positions) * index // num_blocks for index in range(num_blocks + 1)]
    return [
        Block(i, j, int(positions[j - 1]) + 1, _find_first_key(int(positions[i]), window)) for i, j in pairwise(edges)
    ]


def _find_first_key(position: int, window: Window | None) -> int:
    """Return the first key that the row at ``position`` sees; later rows see none before it."""
    if window is None:
        return 0
    return position - position % window.num_tokens if window.chunked else max(0, position - window.num_tokens + 1)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a prompt: their ``positions`` [N] on the host, ascending, and the same numbers ``on_device``."""

    positions: NDArray[np.int64]
    on_device: Tensor

    def __len__(self) -> int:
        return len(self.positions)


class Sight:
    """What ``rows`` see of ``num_tokens``: themselves and their ``window`` before, except ``hidden`` tokens.

    Attributes:
        hidden: [T], on the device of the rows, or None.
        blocks: of the rows, as their device likes them.
        uses: how often attention was computed by it.
    """

    def __init__(self, rows: Rows, num_tokens: int, window: Window | None, hidden: Tensor | None = None) -> None:
        self.rows, self.num_tokens, self.window, self.hidden = rows, num_tokens, window, hidden
        self.uses = 0
        self._masks: dict[tuple[int | None, torch.dtype, torch.device], Tensor] = {}

    @cached_property
    def blocks(self) -> Sequence[Block]:
        """The blocks; reading them sets them."""
        return blocks_of(self.rows.positions, self.rows.on_device.device.type, self.window)

    def get_mask(self, index: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the additive mask [1, 1, rows, keys] of block ``index``."""
        key = index, dtype, device
        mask = self._masks.get(key)
        if mask is None:
            mask = self._make_mask(self.blocks[index], dtype).to(device)
            if self._count_bytes(dtype) <= MOST_KEPT_BYTES:
                self._masks[key] = mask
        return mask

    def get_whole_mask(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the additive mask [1, 1, N, T] of all rows and tokens, for code that takes no other."""
        key = None, dtype, device
        if key not in self._masks:
            whole = Block(0, len(self.rows), self.num_tokens)
            self._masks[key] = self._make_mask(whole, dtype).to(device)
        return self._masks[key]

    def _count_bytes(self, dtype: torch.dtype) -> int:
        return sum((stop - start) * (end - first) for start, stop, end, first in self.blocks) * dtype.itemsize

    def _make_mask(self, block: Block, dtype: torch.dtype) -> Tensor:
        start, stop, num_keys, first_key = block
        unseen = find_unseen(self.rows.on_device[start:stop], num_keys, self.window, first_key)
        if self.hidden is not None:
            unseen |= self.hidden[first_key:num_keys]
        width = -(-unseen.shape[1] // _ALIGNMENT) * _ALIGNMENT
        mask = torch.zeros((1, 1, len(unseen), width), dtype=dtype, device=unseen.device)[..., : unseen.shape[1]]
        return mask.masked_fill_(unseen, torch.finfo(dtype).min)
