"""Attention of one forward pass, watched or shortened through transformers' attention interface.

``watched_attention`` collects what some rows attend to. ``blocked_attention`` computes rows in blocks, each over the
keys up to its last row alone, or by a kernel of this package. Rows behind a prefix, or picked from a prompt, fit no
kernel's own pattern: without blocks, every row would meet every key, twice the work of causal attention.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, softmax
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from semsharekv_integrations.model.backends import find_row_attention, without_cudnn
from semsharekv_integrations.model.sight import Block, Sight
from semsharekv_integrations.model.staircase import attend_by_steps, can_attend

_WATCHED, _BLOCKED = "semsharekv_watched", "semsharekv_blocked"
_SOFTMAXES = {torch.softmax, torch.Tensor.softmax, softmax}
_NOT_OURS = ("softcap", "s_aux", "position_bias")  # options of attention that kernels of this package do not know
FEW_ROWS = 32
_collected: ContextVar[list[Tensor] | None] = ContextVar("collected", default=None)
_blocks: ContextVar[Sequence[Block]] = ContextVar("blocks", default=())
_sight: ContextVar[Sight | None] = ContextVar("sight", default=None)


@contextmanager
def watch_by_sight() -> Iterator[None]:
    """Let ``use_sight`` be called inside, in this context (thread or task); forget its last call after."""
    tokens = _blocks.set(()), _sight.set(None)
    try:
        yield
    finally:
        _blocks.reset(tokens[0])
        _sight.reset(tokens[1])


def use_sight(sight: Sight, by_positions: bool) -> None:
    """Have attention go by the blocks of ``sight`` from now on.

    Args:
        by_positions: whether masks of one element stand for what ``sight`` says; else they say it themselves.
    """
    _blocks.set(sight.blocks)
    _sight.set(sight if by_positions else None)


@contextmanager
def blocked_attention(config: PreTrainedConfig, blocks: Sequence[Block] = ()) -> Iterator[None]:
    """Compute attention by ``blocks`` inside, with the same result up to rounding; no effect unless ``sdpa`` is set."""
    if not takes_blocks(config):
        yield
        return
    token = _blocks.set(blocks)
    try:
        with _switch_attention(config, _BLOCKED):
            yield
    finally:
        _blocks.reset(token)


def takes_blocks(config: PreTrainedConfig) -> bool:
    """Return whether ``blocked_attention`` has an effect."""
    return config._attn_implementation in ("sdpa", _BLOCKED) and _uses_interface(config)


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
    if attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    sight, is_told = _find_sight(attention_mask, query.shape[2])
    scale = options.get("scaling")
    if sight is not None and not is_told and all(options.get(name) is None for name in _NOT_OURS):
        if can_attend(query, key, value, sight):
            return attend_by_steps(query, key, value, sight, scale), None
        attend_rows = find_row_attention(query, key, value, sight)
        if attend_rows is not None:
            return attend_rows(query, key, value, sight, scale), None
    blocks = _blocks.get()
    if not blocks or blocks[-1].stop != query.shape[2]:
        blocks = (Block(0, query.shape[2], key.shape[2]),)
    return _attend_blocks(blocks, sight, attention_mask if is_told else None, query, key, value, scale), None


def _attend_blocks(
    blocks: Sequence[Block],
    sight: Sight | None,
    given: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
) -> Tensor:
    """Return attention [B, N, heads, D] over what ``sight`` and the mask ``given`` both show."""
    # heads of one key head are a batch of their own, for which the keys are not copied
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(0, 1)  # [B * H, heads / H, N, D]
    keys, values = (each.flatten(0, 1)[:, None].expand(-1, grouped.shape[1], -1, -1) for each in (key, value))
    mixed: Tensor | None = None
    for block in blocks:
        i, j, end, first, _ = block
        mask = given[..., i:j, first:end] if given is not None else None
        if sight is not None:
            made = sight.get_mask(block, query.dtype, query.device)
            mask = made if mask is None else mask + made
        if mask is not None and len(blocks) == 1 and j < FEW_ROWS and query.device.type == "cpu":
            return _attend_few(query, key[:, :, first:end], value[:, :, first:end], mask, scale)
        with without_cudnn(query.device):
            part = scaled_dot_product_attention(
                grouped[:, :, i:j], keys[:, :, first:end], values[:, :, first:end], mask, scale=scale
            )
        part = part.unflatten(0, (len(query), -1)).permute(0, 3, 1, 2, 4)  # [B, rows, H, heads / H, D]
        if len(blocks) == 1:
            return part.flatten(2, 3).contiguous()
        if mixed is None:
            mixed = part.new_empty((len(part), query.shape[2], *part.shape[2:]))
        mixed[:, i:j] = part
    assert mixed is not None, "there are rows"
    return mixed.flatten(2, 3)


def _attend_few(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Return attention [B, N, heads, D]; queries of one key head come as more rows of it, which few rows gain by."""
    groups = query.shape[1] // key.shape[1]
    together = query.reshape(len(query), key.shape[1], -1, query.shape[3])  # [B, H, heads / H * N, D]
    mixed = scaled_dot_product_attention(together, key, value, mask.repeat(1, 1, groups, 1), scale=scale)
    return mixed.reshape(*query.shape[:3], -1).transpose(1, 2).contiguous()


def _find_sight(mask: Tensor, num_rows: int) -> tuple[Sight | None, bool]:
    """Return what this context's rows see, and whether ``mask`` restricts it further; None and True if only it tells.

    Raises:
        RuntimeError: if other rows come with the mask that stands for what those rows see.
    """
    sight = _sight.get()
    if sight is None:
        return None, True
    is_told = mask.numel() > 1
    if len(sight.rows) != num_rows:
        if is_told:
            return None, True
        raise RuntimeError(f"attention of {num_rows} rows, where a layer has {len(sight.rows)}")
    sight.uses += 1
    return sight, is_told


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
    sight, is_told = _find_sight(attention_mask, rows)
    mask = attention_mask.float()
    if sight is not None:
        made = sight.get_whole_mask(torch.float32, query.device)
        mask = mask + made if is_told else made
    grouped = query.reshape(batch, key.shape[1], -1, width)  # [B, H, heads / H * N, D]
    logits = (grouped @ key.mT).reshape(batch, heads, rows, -1)
    scaling = scaling if scaling is not None else width**-0.5
    if softcap is not None:
        logits, scaling = (logits.float() * (scaling / softcap)).tanh(), softcap
    weights = torch.add(mask, logits, alpha=scaling).softmax(-1)  # [B, heads, N, T]
    collected.append(weights[0].mean(1))
    mixed = weights.to(value.dtype).reshape(batch, key.shape[1], -1, key.shape[2]) @ value  # [B, H, heads / H * N, D]
    return mixed.reshape(batch, heads, rows, -1).transpose(1, 2).contiguous(), None
