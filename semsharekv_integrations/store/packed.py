"""KV of consecutive tokens as it lies in memory: as the model made it, or in 8 bits with scales.

Eight bits take absolute maxima by head and token for scales, so a large key in one place costs no precision in another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch

from semsharekv_integrations.kv import LayerKV
from semsharekv_integrations.logs import log_trouble

_KEYS, _VALUES, _SCALES = "keys", "values", "scales"
_LARGEST = 127
OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
_HOST_IS_FULL = "DefaultCPUAllocator"  # in the plain RuntimeError by which torch says so


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise one of ``OUT_OF_MEMORY`` for the host as for a device."""
    try:
        yield
    except RuntimeError as error:
        if _HOST_IS_FULL not in str(error):
            raise
        raise MemoryError(str(error)) from error


@dataclass(frozen=True, eq=False)
class PackedKV:
    """One piece of KV. Never mutated.

    Attributes:
        tensors: by name, all with tokens at dimension 2: ``0.keys`` and ``0.values`` [B, H, N, D] of layer 0 and so on,
            and for 8 bits ``0.keys.scales`` and ``0.values.scales`` [B, H, N, 1].
        dtype: in which the model takes it.
        device: on which the model takes it.
    """

    tensors: Mapping[str, torch.Tensor]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    @memory_errors()
    def of(cls, layers: Sequence[LayerKV], bits: int | None = None, start: int = 0) -> PackedKV:
        """What ``layers`` have from token ``start`` on: the tensors themselves, or copies of a part, or packed."""
        tensors: dict[str, torch.Tensor] = {}
        for index, layer in enumerate(layers):
            for name, tensor in zip((_KEYS, _VALUES), layer, strict=True):
                part = tensor[:, :, start:].clone() if start and bits is None else tensor[:, :, start:]
                tensors |= _quantized(f"{index}.{name}", part) if bits == 8 else {f"{index}.{name}": part}
        return cls(tensors, layers[0].keys.dtype, layers[0].keys.device)

    @cached_property
    def num_tokens(self) -> int:
        """How many tokens."""
        return next(iter(self.tensors.values())).shape[2]

    @cached_property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @cached_property
    def is_rounded(self) -> bool:
        """Whether it lies in 8 bits."""
        return any(name.endswith(_SCALES) for name in self.tensors)

    @cached_property
    def num_layers(self) -> int:
        """Of the model."""
        return sum(name.endswith(f".{_KEYS}") for name in self.tensors)

    def layer(self, index: int) -> LayerKV:
        """Keys and values [B, H, N, D] as the model takes them."""
        return LayerKV(self._tensor(f"{index}.{_KEYS}"), self._tensor(f"{index}.{_VALUES}"))

    def part(self, start: int, stop: int) -> PackedKV:
        """Its tokens from ``start`` to ``stop`` (exclusive), copied, so that the rest may go."""
        return self._changed(lambda tensor: tensor[:, :, start:stop].clone())

    def view(self, start: int, stop: int) -> PackedKV:
        """As ``part``, not copied."""
        return self._changed(lambda tensor: tensor[:, :, start:stop])

    def copied(self, device: torch.device) -> PackedKV:
        """A copy on ``device``, which needs no file to stay; pinned in host memory if the model is on CUDA."""
        return self._changed(lambda tensor: self._pinned(tensor.to(device, copy=True)))

    def moved(self, device: torch.device) -> PackedKV:
        """On ``device``, if it is not there already; pinned likewise, so that it can return at full speed."""
        return self._changed(lambda tensor: self._pinned(tensor.to(device)))

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "cpu" or self.device.type != "cuda":
            return tensor
        try:
            return tensor.pin_memory()
        except RuntimeError:  # no more memory can be pinned
            return tensor

    @memory_errors()
    def _changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedKV:
        return PackedKV({name: change(tensor) for name, tensor in self.tensors.items()}, self.dtype, self.device)

    def _tensor(self, name: str) -> torch.Tensor:
        stored = self.tensors[name].to(self.device, non_blocking=True)
        scales = self.tensors.get(f"{name}.{_SCALES}")
        if scales is None:
            return stored
        return (stored.float() * scales.to(self.device, non_blocking=True).float()).to(self.dtype)


def packed_if_room(layers: Sequence[LayerKV], bits: int | None, start: int = 0) -> PackedKV | None:
    """As ``PackedKV.of``; None if there is no memory for it."""
    try:
        return PackedKV.of(layers, bits, start)
    except OUT_OF_MEMORY:
        log_trouble("out_of_memory")
        return None


def _quantized(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Eight-bit numbers [B, H, N, D] and what each head's token is to be multiplied by [B, H, N, 1]."""
    largest = tensor.float().abs().amax(dim=-1, keepdim=True)
    scales = (largest / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    rounded = (tensor.float() / scales).round().to(torch.int8)
    return {name: rounded, f"{name}.{_SCALES}": scales}
