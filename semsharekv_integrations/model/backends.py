"""Which code computes attention of rows on a GPU: a kernel of this package where Triton has one, never cuDNN's.

cuDNN plans for every new shape, which takes 40 to 1,000 ms, and rows picked from a prompt are of a new shape each time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from semsharekv_integrations.concurrency.threads import free_in_children
from semsharekv_integrations.model.sight import Sight

RowAttention = Callable[[Tensor, Tensor, Tensor, Sight, float | None], Tensor]
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


def find_row_attention(query: Tensor, key: Tensor, value: Tensor) -> RowAttention | None:
    """Return this package's kernel for query [B, heads, N, D], key and value [B, H, T, D]; None if it has none."""
    return None
