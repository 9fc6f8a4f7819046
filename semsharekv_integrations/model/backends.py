"""Which code computes attention of rows on a GPU: a kernel of this package where Triton has one, never cuDNN's.

cuDNN plans for every new shape, which takes 40 to 1,000 ms, and rows picked from a prompt are of a new shape each time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from semsharekv_integrations.concurrency.threads import free_in_children
from semsharekv_integrations.logs import LOGGER
from semsharekv_integrations.model.sight import Sight
from semsharekv_integrations.model.views import Window, find_unseen

Kernel = Callable[..., Tensor]
RowAttention = Callable[[Tensor, Tensor, Tensor, Sight, float | None], Tensor]
_TILES = ((64, 64, 3), (64, 32, 2), (32, 32, 1))  # rows and keys at a time, and steps loaded ahead: what fits a GPU
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_WIDEST, _TRIED_ROWS, _TRIED_TOKENS = 256, 40, 150
_tiles: dict[_Shape, tuple[int, int, int] | None] = {}  # that a kernel was found to work with
_switching = free_in_children(threading.Lock())


@contextmanager
def without_cudnn(device: torch.device) -> Iterator[None]:
    """Keep cuDNN out of the attention that is computed on ``device`` inside.

    PyTorch's switch is one for the whole process. It is back as it was after each call, which only queues work; what
    another thread computes meanwhile gets the same results from another kernel.
    """
    if device.type != "cuda":
        yield
        return
    with _switching:
        before = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            yield
        finally:
            torch.backends.cuda.enable_cudnn_sdp(before)


class WithoutCudnn(TorchFunctionMode):
    """As ``without_cudnn``, around every attention that this thread computes inside: that of models' own code."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``, without cuDNN if it is attention."""
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with without_cudnn((args[0] if args else (kwargs or {})["query"]).device):
            return func(*args, **(kwargs or {}))


class _Shape(NamedTuple):
    """What a kernel is compiled for: heads, their sizes, and whether rows see a window or keys are split."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    width: int
    depth: int
    window: bool | None
    is_split: bool


def find_row_attention(query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> RowAttention | None:
    """Return this package's kernel for query [1, heads, N, D] over key and value [1, H, T, D]; None if none does it.

    A kernel is tried on a few random rows before its first use. One that fails is not used again, and a warning says
    why.
    """
    if query.device.type != "cuda" or not torch.cuda.is_available() or len(query) > 1 or sight.hidden is not None:
        return None
    fits = query.dtype in _TOLERANCES and query.dtype == key.dtype == value.dtype
    sizes = query.shape[3], value.shape[3]
    if not fits or max(sizes) > _WIDEST or not (key.is_contiguous() and value.is_contiguous() and query.stride(3) == 1):
        return None
    kernels = _import_kernels()
    if kernels is None:
        return None
    heads, is_windowed = (query.shape[1], key.shape[1]), None if sight.window is None else sight.window.chunked
    splits = kernels.choose_splits(query.shape[2], *heads, sight.num_tokens, _TILES[0])
    shape = _Shape(query.device, query.dtype, *heads, *sizes, is_windowed, splits > 1)
    if shape not in _tiles:
        _tiles[shape] = find_tiles(shape, kernels.attend_rows)
    tiles = _tiles[shape]
    if tiles is None:
        return None
    return partial(_attend, kernels.attend_rows, tiles, splits)


def _attend(
    kernel: Kernel, tiles: Any, splits: int, query: Tensor, key: Tensor, value: Tensor, sight: Sight, scale: Any
) -> Tensor:
    positions = sight.rows.on_device.to(query.device)
    return kernel(query, key, value, positions, sight.window, scale, tiles, splits)


@cache
def _import_kernels() -> ModuleType | None:
    try:
        return import_module("semsharekv_integrations.model.row_kernel")
    except ImportError:  # there is no Triton
        return None


def find_tiles(shape: _Shape, kernel: Kernel) -> tuple[int, int, int] | None:
    """Return the tiles by which ``kernel`` gives what PyTorch does on random rows of ``shape``; None if none do."""
    problem = ""
    for tiles in _TILES:
        try:
            error = _measure_error(shape, partial(kernel, tiles=tiles, splits=2 if shape.is_split else 1))
        except torch.OutOfMemoryError:
            raise
        except Exception as reason:  # whatever a compiler or a driver says
            problem = f"{type(reason).__name__}: {reason}"
            continue
        if error <= _TOLERANCES[shape.dtype]:
            return tiles
        problem = f"it is off by {error:.2g}"
    LOGGER.warning("attention of single rows goes without its kernel for %s: %s", shape, problem)
    return None


def _measure_error(shape: _Shape, attend: Callable[..., Tensor]) -> float:
    """Return how far ``attend`` is off at most from PyTorch's attention in float32, with a mask."""
    source, device = torch.Generator().manual_seed(0), shape.device
    positions = torch.randperm(_TRIED_TOKENS, generator=source)[:_TRIED_ROWS].sort().values
    window = None if shape.window is None else Window(_TRIED_TOKENS // 3, shape.window)
    heads = (shape.heads, _TRIED_ROWS, shape.width), (shape.key_heads, _TRIED_TOKENS, shape.width)
    query, key, value = (
        torch.randn((1, *size), generator=source).to(device, shape.dtype)
        for size in (*heads, (shape.key_heads, _TRIED_TOKENS, shape.depth))
    )
    seen = ~find_unseen(positions, _TRIED_TOKENS, window).to(device)
    keys, values = (each.float().repeat_interleave(shape.heads // shape.key_heads, 1) for each in (key, value))
    with without_cudnn(device):
        wanted = scaled_dot_product_attention(query.float(), keys, values, seen)
    found = attend(query, key, value, positions.to(device), window, None)
    return float((found.float() - wanted.transpose(1, 2)).abs().max())
