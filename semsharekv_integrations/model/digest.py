"""A digest of every byte of a tensor, at about the speed of its memory and the same on every device; and samples.

Words are mixed, multiplied by fixed random odd numbers and added up, block by block; the sums are hashed. Digests tell
tensors apart that differ by accident or training, not those that somebody forged. Samples are a few values of each
tensor, cheap enough to compare at every call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BLOCK = 1 << 17  # words of eight bytes that share one sum
_ROWS = 64  # blocks in one step where starting a step costs more than memory does
_SHIFT = 29  # brings high bits down: two flipped signs would cancel out
_FEW, _MANY, _LARGE = 16, 64, 1 << 20  # sampled values of a tensor, and of one with so many values
_AT_ONCE, _AT_ONCE_ELSEWHERE = 1024, 128  # tensors that are looked at in one go; on other devices it takes longer
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def compute_digest(tensor: Tensor) -> bytes:
    """Return 16 bytes made from dtype, shape and content of a plain ``tensor``, the same on every device."""
    plain = tensor.detach()
    if plain.is_quantized:
        plain = plain.int_repr()
    flat = plain.contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    num_words = len(flat) // 8
    digest = hashlib.blake2b(repr((tensor.dtype, tuple(tensor.shape))).encode(), digest_size=16)
    digest.update(flat[num_words * 8 :].cpu().numpy().tobytes())
    if num_words:
        digest.update(_sum_blocks(flat[: num_words * 8].view(torch.int64)).cpu().numpy().tobytes())
    return digest.digest()


def _sum_blocks(words: Tensor) -> Tensor:
    """Return a weighted sum for each block of ``words`` [N]; the last block may be short."""
    factors = _make_factors(words.device)
    whole = len(words) // _BLOCK * _BLOCK
    step = 1 if words.device.type == "cpu" else _ROWS
    groups = [*words[:whole].view(-1, _BLOCK).split(step)] if whole else []
    if whole < len(words):
        groups.append(words[None, whole:])
    found = []
    for group in groups:
        mixed = group >> _SHIFT
        found.append(mixed.bitwise_xor_(group).mul_(factors[: group.shape[1]]).sum(1))
    return torch.cat(found)


@lru_cache(maxsize=16)
def _make_factors(device: torch.device) -> Tensor:
    """Return odd random numbers [_BLOCK] on ``device``, the same in every process."""
    random = bytearray(hashlib.shake_256(b"semsharekv").digest(8 * _BLOCK))
    return (torch.frombuffer(random, dtype=torch.int64) | 1).to(device)


def sample(tensor: Tensor) -> Tensor:
    """Return at most 64 values [S], spread over the memory of ``tensor``: a view, so later writes show in it."""
    start = tensor.storage_offset()
    room = tensor.untyped_storage().nbytes() // max(1, tensor.element_size()) - start
    size = min(tensor.numel(), room)
    count = min(size, _MANY if size >= _LARGE else _FEW)
    return tensor.detach().as_strided((count,), (max(1, size // max(1, count)),), start)


def read_samples(samples: Sequence[Tensor]) -> bytes:
    """Return the present values of ``samples``, all of one dtype and device, as bytes."""
    return torch.cat(list(samples)).view(torch.uint8).cpu().numpy().tobytes()


class Samples:
    """Samples of many tensors, on any devices, with their values at the start; ``hold`` compares a part at a time."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(sample(tensor))
        self._kinds = [_split_kind(samples) for samples in kinds.values()]
        self._next = 0

    def hold(self) -> bool:
        """Compare the next part of each kind's samples and return True if its values are those of the start."""
        self._next += 1
        chosen = (parts[self._next % len(parts)] for parts in self._kinds)
        return all(show() == before for show, before in chosen)


def _split_kind(samples: list[Tensor]) -> list[tuple[Callable[[], object], object]]:
    """Split samples of one kind into parts. Return for each a function that reads its values, and those of now."""
    on_host = samples[0].device.type == "cpu" and samples[0].element_size() in _INTEGERS
    most = _AT_ONCE if on_host else _AT_ONCE_ELSEWHERE
    reads: list[Callable[[], object]] = []
    for part in (samples[i : i + most] for i in range(0, len(samples), most)):
        if on_host:
            integers = _INTEGERS[part[0].element_size()]
            reads.append(partial(_read_arrays, [values.view(integers).numpy() for values in part]))
        else:
            reads.append(partial(read_samples, part))
    return [(read, read()) for read in reads]


def _read_arrays(arrays: list[NDArray[np.generic]]) -> list[bytes]:
    return [array.tobytes() for array in arrays]
