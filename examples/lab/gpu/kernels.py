"""Section ``kernels``: attention of a tenth of a prompt's rows, several ways, in the shape of one layer.

Where the package has a kernel for the device, it is compared with the plain way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gpu.checks import Checks
from semsharekv_integrations.model.backends import find_row_attention, without_cudnn
from semsharekv_integrations.model.sight import Rows, Sight

SHARE = 10  # one row of so many is computed


def check_kernels(checks: Checks) -> None:
    """At each length but the shortest, where there are several."""
    lengths = checks.options.lengths
    for length in lengths[1:3] or lengths[:1]:
        checks.attempt(f"{length} tokens", partial(_compare_attention, checks, length))


def draw_layer(checks: Checks, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries [1, heads, N, D] of the rows, keys and values [1, H, T, D], and the rows' positions [N]."""
    heads, groups, width = (32, 8, 128) if checks.on_gpu else (8, 2, 16)
    dtype = torch.bfloat16 if checks.on_gpu else torch.float32
    generator = torch.Generator().manual_seed(0)
    half = length // SHARE // 2  # of the rows: one document; the others are scattered
    document = torch.arange(length // 3, length // 3 + half)
    scattered = torch.randperm(length, generator=generator)[:half]
    rows = torch.unique(torch.cat([document, scattered])).to(checks.device)
    sizes = ((heads, len(rows)), (groups, length), (groups, length))
    drawn = (torch.randn(1, *size, width, generator=generator).to(checks.device, dtype) for size in sizes)
    query, key, value = drawn
    return query, key, value, rows


def list_ways(query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> dict[str, Callable[[], Tensor]]:
    """Ways to compute attention [1, heads, N, D] of the rows, the plainest first."""
    whole = sight.get_whole_mask(query.dtype, query.device)
    repeated = [tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value)]
    ways: dict[str, Callable[[], Tensor]] = {
        "one call, mask": lambda: scaled_dot_product_attention(query, *repeated, attn_mask=whole),
        "grouped": lambda: scaled_dot_product_attention(query, key, value, attn_mask=whole, enable_gqa=True),
        "blocks": partial(_attend_by_blocks, query, *repeated, sight),
    }
    kernel = find_row_attention(query, key, value, sight)
    if kernel is not None:
        ways["the package's kernel"] = lambda: kernel(query, key, value, sight, None).transpose(1, 2)
    return ways


def _attend_by_blocks(query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
    parts = []
    with without_cudnn(query.device):
        for block in sight.blocks:
            seen, mask = slice(block.first_key, block.num_keys), sight.get_mask(block, query.dtype, query.device)
            rows = query[:, :, block.start : block.stop]
            parts.append(scaled_dot_product_attention(rows, key[:, :, seen], value[:, :, seen], attn_mask=mask))
    return torch.cat(parts, dim=2)


def _compare_attention(checks: Checks, length: int) -> None:
    query, key, value, rows = draw_layer(checks, length)
    sight = Sight(Rows(rows.cpu().numpy(), rows), length, None)
    ways = list_ways(query, key, value, sight)
    wanted, tolerance = next(iter(ways.values()))().float(), 3e-2 if checks.on_gpu else 1e-4
    for name, call in ways.items():
        error = float((call().float() - wanted).abs().max())
        ms = 1e3 * checks.time(call, 30 if checks.on_gpu else 1)
        checks.check(f"{length} tokens, {len(rows)} rows, {name}", error < tolerance, ms=ms, error=error)
    full = query.new_zeros(1, query.shape[1], length, query.shape[3])
    causal = partial(scaled_dot_product_attention, full, full, full, is_causal=True)
    checks.say(f"{length} tokens, full causal", ms=1e3 * checks.time(causal))
