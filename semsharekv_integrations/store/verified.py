"""Whether the bytes of a safetensors file are those that its digest was made of, found by plain reads.

A map of the file would hide what is wrong with the disk: a page that cannot be read ends the process. Plain reads tell
the one from the other: bytes that differ are damage, an error of the system says nothing about them.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from semsharekv_integrations.checks import is_whole

_LENGTH_BYTES = 8  # of the header's length, before the header
_AT_ONCE_BYTES = 2**20
_DTYPES = {
    "BOOL": "torch.bool",
    "U8": "torch.uint8",
    "I8": "torch.int8",
    "I16": "torch.int16",
    "I32": "torch.int32",
    "I64": "torch.int64",
    "F16": "torch.float16",
    "BF16": "torch.bfloat16",
    "F32": "torch.float32",
    "F64": "torch.float64",
    "F8_E4M3": "torch.float8_e4m3fn",
    "F8_E5M2": "torch.float8_e5m2",
}


class DamageError(Exception):
    """The bytes of a file are not those that were written."""


def verified_metadata(path: Path, num_bytes: int) -> dict[str, str]:
    """The metadata of the file, after its size and its digest were found right.

    Raises:
        DamageError: if they are not, or it is no file.
        OSError: if it cannot be read.
    """
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise DamageError("it is no file")
    if found.st_size != num_bytes:
        raise DamageError(f"it has {found.st_size} bytes in place of {num_bytes}")
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(handle, "rb") as file:
        try:
            metadata, digest = _read(file, num_bytes)
            wanted = metadata["digest"]
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise DamageError(f"its header is none: {error}") from error
    if digest != wanted:
        raise DamageError("its digest is wrong")
    return metadata


def _read(file: BinaryIO, num_bytes: int) -> tuple[dict[str, str], str]:
    """The metadata, and the digest of what is there: see ``files.tensor_digest``."""
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    first = _LENGTH_BYTES + length
    if first > num_bytes:
        raise ValueError(f"it would have {length} bytes")
    header: dict[str, Any] = json.loads(file.read(length))
    metadata = header.pop("__metadata__")
    digest = hashlib.blake2b(metadata["semsharekv"].encode(), digest_size=16)
    for name, about in sorted(header.items()):
        digest.update(f"{name} {_DTYPES[about['dtype']]} {tuple(about['shape'])}".encode())
        start, stop = about["data_offsets"]
        if not (is_whole(start, 0) and is_whole(stop, start) and first + stop <= num_bytes):
            raise ValueError(f"{name} would lie at {start} to {stop}")
        for part in _parts(file, first + start, stop - start):
            digest.update(part)
    return metadata, digest.hexdigest()


def _parts(file: BinaryIO, start: int, num_bytes: int) -> Iterator[bytes]:
    file.seek(start)
    while num_bytes:
        part = file.read(min(num_bytes, _AT_ONCE_BYTES))
        if not part:
            raise ValueError("the file ends before its tensors do")
        num_bytes -= len(part)
        yield part
