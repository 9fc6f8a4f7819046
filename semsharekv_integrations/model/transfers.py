"""What goes from host to device before a pass, without the host waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def send(values: NDArray[np.generic] | Tensor, device: torch.device) -> Tensor:
    """Return ``values``, an array or a tensor of the host, as a tensor on ``device``: a copy if that is another one.

    To CUDA it goes through pinned memory, so that the host goes on at once; ``values`` may change after that.
    """
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    try:
        pinned = tensor.pin_memory()
    except RuntimeError:  # no more memory can be pinned
        return tensor.to(device)
    return pinned.to(device, non_blocking=True)


def send_together(arrays: Sequence[NDArray[np.int64]], device: torch.device) -> tuple[Tensor, ...]:
    """Return ``arrays`` [N] as tensors on ``device``, in one transfer."""
    together = send(np.concatenate(arrays), device)
    return together.split([len(array) for array in arrays])
