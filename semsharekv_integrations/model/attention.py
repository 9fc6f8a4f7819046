"""Attention of one forward pass, watched or shortened through transformers' attention interface.

``watched_attention`` collects what some rows attend to. ``blocked_attention`` computes rows in blocks, each over the
keys up to its last row alone. Rows behind a prefix, or picked from a prompt, need an explicit mask. Without blocks,
every row then meets every key: twice the work of causal attention.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, softmax
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ROWS_PER_BLOCK, MOST_BLOCKS = 64, 8
_WATCHED, _BLOCKED = "semsharekv_watched", "semsharekv_blocked"
_SOFTMAXES = {torch.softmax, torch.Tensor.softmax, softmax}
_collected: ContextVar[list[Tensor] | None] = ContextVar("collected", default=None)
_blocks: ContextVar[Sequence[Block]] = ContextVar("blocks", default=())


class Block(NamedTuple):
    """Rows ``start`` to ``stop`` (exclusive) of those computed see none of the keys from ``num_keys`` on."""

    start: int
    stop: int
    num_keys: int


def blocks_of(positions: Tensor) -> Sequence[Block]:
    """Split rows at ascending ``positions`` [N] into 2 to 8 blocks; return none if there are fewer than 128 rows."""
    num_blocks = min(MOST_BLOCKS, len(positions) // ROWS_PER_BLOCK)
    if num_blocks < 2:
        return ()
    edges = [len(positions) * index // num_blocks for index in range(num_blocks + 1)]
    last_rows = positions[torch.tensor(edges[1:]) - 1].tolist()
    return [Block(*block) for block in zip(edges, edges[1:], (row + 1 for row in last_rows), strict=False)]


def use_blocks(blocks: Sequence[Block]) -> None:
    """Replace the blocks that ``blocked_attention`` uses in this context (thread or task), from now on."""
    _blocks.set(blocks)


@contextmanager
def blocked_attention(config: PreTrainedConfig, blocks: Sequence[Block] = ()) -> Iterator[None]:
    """Compute attention by ``blocks`` inside, with the same result up to rounding; no effect unless ``sdpa`` is set."""
    if config._attn_implementation != "sdpa":
        yield
        return
    token = _blocks.set(blocks)
    try:
        with _switch_attention(config, _BLOCKED):
            yield
    finally:
        _blocks.reset(token)


@contextmanager
def watched_attention(config: PreTrainedConfig) -> Iterator[list[Tensor]]:
    """Yield a list to which every layer that runs inside appends its attention [heads, T], averaged over the rows.

    Meant for a few rows: their weights are materialized. Needs an explicit 4D mask. Biases beyond scale, mask and soft
    cap (attention sinks, for one) are left out, as the weights only serve as a signal. Models that compute attention
    without transformers' interface append nothing; ``watch_operations`` sees theirs.
    """
    collected: list[Tensor] = []
    token = _collected.set(collected)
    try:
        with _switch_attention(config, _WATCHED):
            yield collected
    finally:
        _collected.reset(token)


@contextmanager
def watch_operations(num_rows: int, num_keys: int) -> Iterator[list[Tensor]]:
    """As ``watched_attention``, by the operations that run inside: softmax or attention of so many rows and keys."""
    with _OperationWatch(num_rows, num_keys) as watch:
        yield watch.collected


class _OperationWatch(TorchFunctionMode):
    """Appends to ``collected`` the weights [heads, T], averaged over rows, of each attention of [B, heads, N, T]."""

    def __init__(self, num_rows: int, num_keys: int) -> None:
        super().__init__()
        self.collected: list[Tensor] = []
        self._size = (num_rows, num_keys)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``, and keep the weights if it computes attention."""
        output = func(*args, **(kwargs or {}))
        if func in _SOFTMAXES and output.ndim == 4 and output.shape[2:] == self._size:
            self.collected.append(output[0].float().mean(1))
        elif func is scaled_dot_product_attention:
            self.collected.append(_weigh(*args, **(kwargs or {}))[0].mean(1))
        return output


def _weigh(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: float | None = None, **_: Any
) -> Tensor:
    """Return the weights [B, heads, N, T] that ``scaled_dot_product_attention`` uses, which gives none away."""
    key = repeat_kv(key, query.shape[1] // key.shape[1])
    logits = (query @ key.mT).float() * (scale if scale is not None else query.shape[3] ** -0.5)
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    return logits.softmax(-1)


@contextmanager
def _switch_attention(config: PreTrainedConfig, name: str) -> Iterator[None]:
    """Set the attention function ``name`` in ``config`` inside; another thread's passes get the same results by it.

    No effect on models that compute attention without transformers' interface: Falcon's takes a name for another.
    """
    if not _uses_interface(config):
        yield
        return
    if name not in AttentionInterface():
        AttentionInterface.register(name, {_WATCHED: _watch, _BLOCKED: _attend_by_blocks}[name])
        AttentionMaskInterface.register(name, sdpa_mask)
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def _uses_interface(config: PreTrainedConfig) -> bool:
    """Return False if the code of the model of ``config`` is known, and without transformers' attention interface."""
    code = sys.modules.get(type(config).__module__.replace("configuration_", "modeling_"))
    return code is None or hasattr(code, "ALL_ATTENTION_FUNCTIONS")


def _attend_by_blocks(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Return attention [B, N, heads, D] of query [B, heads, N, D] over [B, H, T, D], and None; no mask is causal."""
    num_rows = query.shape[2]
    if attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    attend = partial(scaled_dot_product_attention, scale=options.get("scaling"))
    groups = query.shape[1] // key.shape[1]
    blocks = _blocks.get()
    if not blocks or blocks[-1].stop != num_rows:
        # queries of one key head come as more rows of it: copies of the keys would cost more than these few rows
        grouped = query.reshape(len(query), key.shape[1], -1, query.shape[3])
        mixed = attend(grouped, key, value, attention_mask.repeat(1, 1, groups, 1)).reshape(*query.shape[:3], -1)
    else:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)  # [B, heads, T, D]
        parts = [
            attend(query[:, :, i:j], key[:, :, :end], value[:, :, :end], attention_mask[:, :, i:j, :end])
            for i, j, end in blocks
        ]
        mixed = torch.cat(parts, dim=2)
    return mixed.transpose(1, 2).contiguous(), None  # [B, N, heads, D]


def _watch(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return attention [B, N, heads, D], and None; in this context's watch, also append weights, averaged over rows."""
    collected = _collected.get()
    if collected is None:  # somebody else's pass through the same model
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
    assert attention_mask is not None, "rows come with a mask"
    batch, heads, rows, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width)  # [B, H, heads / H * N, D]
    logits = (grouped @ key.mT).float() * (scaling if scaling is not None else width**-0.5)
    logits = logits.reshape(batch, heads, rows, -1)
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    weights = (logits + attention_mask.float()).softmax(-1)  # [B, heads, N, T]
    collected.append(weights[0].mean(1))
    mixed = weights.to(value.dtype).reshape(batch, key.shape[1], -1, key.shape[2]) @ value  # [B, H, heads / H * N, D]
    return mixed.reshape(batch, heads, rows, -1).transpose(1, 2).contiguous(), None
