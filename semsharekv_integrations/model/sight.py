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
    """Rows ``start`` to ``stop`` (exclusive) of those computed, and keys ``first_key`` to ``num_keys`` (exclusive).

    ``sees_all`` is True if each of the rows is known to see each of the keys.
    """

    start: int
    stop: int
    num_keys: int
    first_key: int = 0
    sees_all: bool = False


def blocks_of(
    positions: NDArray[np.int64] | Sequence[int], kind: str = "cpu", window: Window | None = None
) -> Sequence[Block]:
    """Split rows at ascending ``positions`` [N] on the host, at least one, into blocks for a device of type ``kind``.

    The rows of a block see no other keys than its own.
    """
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
        self.steps: list[Block] | None = None  # cut by whoever computes attention by them
        self._masks: dict[tuple[Block, torch.dtype, torch.device], Tensor] = {}
        self._kept_bytes = 0

    @cached_property
    def blocks(self) -> Sequence[Block]:
        """The rows in blocks, split when they are first asked for."""
        return blocks_of(self.rows.positions, self.rows.on_device.device.type, self.window)

    def get_mask(self, block: Block, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the additive mask [1, 1, rows, keys] of ``block``."""
        mask = self._masks.get((block, dtype, device))
        if mask is None:
            mask = self._make_mask(block, dtype).to(device)
            if self._kept_bytes + mask.nbytes <= MOST_KEPT_BYTES:
                self._masks[block, dtype, device] = mask
                self._kept_bytes += mask.nbytes
        return mask

    def get_whole_mask(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the additive mask [1, 1, N, T] of all rows and tokens, for code that takes no other."""
        key = Block(0, len(self.rows), self.num_tokens), dtype, device
        if key not in self._masks:
            self._masks[key] = self._make_mask(key[0], dtype).to(device)
        return self._masks[key]

    def _make_mask(self, block: Block, dtype: torch.dtype) -> Tensor:
        start, stop, num_keys, first_key, _ = block
        unseen = find_unseen(self.rows.on_device[start:stop], num_keys, self.window, first_key)
        if self.hidden is not None:
            unseen |= self.hidden[first_key:num_keys]
        width = -(-unseen.shape[1] // _ALIGNMENT) * _ALIGNMENT
        mask = torch.zeros((1, 1, len(unseen), width), dtype=dtype, device=unseen.device)[..., : unseen.shape[1]]
        return mask.masked_fill_(unseen, torch.finfo(dtype).min)
