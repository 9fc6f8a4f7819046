"""What some rows attend to, seen through transformers' attention interface while a forward pass runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedConfig

_NAME = "semsharekv_watched"
_watched: ContextVar[list[torch.Tensor] | None] = ContextVar("watched", default=None)


@contextmanager
def watched_attention(config: PreTrainedConfig) -> Iterator[list[torch.Tensor]]:
    """Collect, for each layer that runs inside, the rows' attention [heads, T], averaged over the rows.

    Meant for a few rows: their weights are materialized. Needs an explicit 4D mask. Biases beyond scale, mask and soft
    cap (attention sinks, for one) are left out, as the weights only serve as a signal.
    """
    if _NAME not in AttentionInterface():
        AttentionInterface.register(_NAME, _watch)
    before, collected = config._attn_implementation, list[torch.Tensor]()
    token = _watched.set(collected)
    config._attn_implementation = _NAME
    try:
        yield collected
    finally:
        config._attn_implementation = before
        _watched.reset(token)


def _watch(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Plain attention of a few rows: query [B, heads, N, D], key and value [B, H, T, D], mask [B, 1, N, T]."""
    batch, heads, rows, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width)  # [B, H, heads / H * N, D]
    logits = (grouped @ key.mT).float() * (scaling if scaling is not None else width**-0.5)
    logits = logits.view(batch, heads, rows, -1)
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    weights = (logits + attention_mask.float()).softmax(-1)  # [B, heads, N, T]
    if (collected := _watched.get()) is not None:
        collected.append(weights[0].mean(1))
    mixed = weights.to(value.dtype).view(batch, key.shape[1], -1, key.shape[2]) @ value  # [B, H, heads / H * N, D]
    return mixed.view(batch, heads, rows, -1).transpose(1, 2).contiguous(), None
