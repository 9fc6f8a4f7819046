"""Probes of one call: seconds and rows of every decoder layer, and how much memory it took at its peak."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

Said = TypeVar("Said")
_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"  # what Linux takes in clear_refs


class LayerUse(NamedTuple):
    """What one decoder layer did before the first new token, over all passes.

    Attributes:
        seconds: from before its first hook to after its forward, choosing rows included.
        rows: tokens that came out of it.
    """

    seconds: float
    rows: int


class LayerClock:
    """Times every decoder layer by hooks. Passes of a single row are decoding, and left out.

    On CUDA events are recorded and nothing is waited for, so that the clock does not slow what it times.

    Args:
        layers: the decoder layers, in order.
        device: of the model.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._entered: list[Any] = [None] * len(layers)
        self._passes: list[list[tuple[Any, Any, int]]] = [[] for _ in layers]
        self._handles: list[Any] = []
        for index, layer in enumerate(layers):
            self._handles.append(layer.register_forward_pre_hook(partial(self._enter, index)))
            self._handles.append(layer.register_forward_hook(partial(self._leave, index)))

    def start(self) -> None:
        """Forget what was timed."""
        for passes in self._passes:
            passes.clear()

    def read(self) -> tuple[LayerUse, ...]:
        """What each layer did since the start; on CUDA this waits for it."""
        if self._on_gpu:
            torch.cuda.synchronize()
        return tuple(LayerUse(sum(map(self._seconds, passes)), sum(p[2] for p in passes)) for passes in self._passes)

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, index: int, *_: object) -> None:
        self._entered[index] = self._now()

    def _leave(self, index: int, _: object, __: object, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output  # [B, N, hidden]
        if hidden.shape[1] > 1:
            self._passes[index].append((self._entered[index], self._now(), hidden.shape[1]))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, one_pass: tuple[Any, Any, int]) -> float:
        began, ended, _ = one_pass
        return float(began.elapsed_time(ended) / 1000 if self._on_gpu else ended - began)


def with_peak(call: Callable[[], Said], device: torch.device) -> tuple[Said, int | None]:
    """What ``call`` returns, and by how many bytes memory grew at its peak over what was in use before it.

    On CUDA that is what PyTorch's allocator gave out; on a Linux CPU, resident memory, after free memory was handed
    back to the system. None where neither can be measured.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        said = call()
        return said, torch.cuda.max_memory_allocated(device) - before
    resident = _reset_resident_peak() if device.type == "cpu" else None
    said = call()
    return said, None if resident is None else max(0, _resident_bytes("VmHWM") - resident)


def _reset_resident_peak() -> int | None:
    """Resident bytes now, with the peak set to them; None where the system does not tell."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
        return _resident_bytes("VmRSS")
    except (OSError, AttributeError, TypeError):
        return None


def _resident_bytes(name: str) -> int:
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
