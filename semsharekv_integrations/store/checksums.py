"""Checksums of files of tensors: they find damage, not forgery.

XXH3 in 128 bits is about as fast as memory, so checking costs less than reading. Each tensor has one, listed in the
file's header, so several are checked at once; the seal covers that header with every name, type and shape. Files of
earlier versions have one BLAKE2b digest over all of it instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
import xxhash

CHECKSUMS = "checksums"  # where they stand in a header, by the tensor's name


def make_sum() -> xxhash.xxh3_128:
    """Return a new sum, which is told a tensor's bytes in order, in as many parts as one likes."""
    return xxhash.xxh3_128()


def sum_tensor(tensor: torch.Tensor) -> str:
    """Return the checksum of the bytes of a contiguous tensor on the CPU."""
    return xxhash.xxh3_128_hexdigest(view_bytes(tensor))


def view_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, not copied."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def make_seal(header: str, layout: Iterable[tuple[str, torch.dtype, Sequence[int]]]) -> str:
    """Return the checksum of a header and of all tensors' names, types and shapes, in the order given."""
    seal = xxhash.xxh3_128(header.encode())
    for name, dtype, shape in layout:
        seal.update(_describe(name, dtype, shape))
    return seal.hexdigest()


def digest_in_blake2b(
    header: str, tensors: Iterable[tuple[str, torch.dtype, Sequence[int], Iterable[memoryview]]]
) -> str:
    """Return the digest of earlier versions, over the header and every tensor with its bytes, in the order given."""
    digest = hashlib.blake2b(header.encode(), digest_size=16)
    for name, dtype, shape, parts in tensors:
        digest.update(_describe(name, dtype, shape))
        for part in parts:
            digest.update(part)
    return digest.hexdigest()


def _describe(name: str, dtype: torch.dtype, shape: Sequence[int]) -> bytes:
    return f"{name} {dtype} {tuple(shape)}".encode()
