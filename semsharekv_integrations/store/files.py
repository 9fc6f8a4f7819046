"""KV files of one directory: safetensors, written whole or not at all, memory-mapped when read, and checked.

A file says in its header whose it is: format version, model fingerprint, its own id and its number of tokens; a digest
covers the header and all tensors. It finds damage, not forgery. Knows nothing about what the tensors mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from semsharekv_integrations.errors import StoreFileError, StoreWriteError
from semsharekv_integrations.store.private import is_own_directory
from semsharekv_integrations.store.records import FileRecord
from semsharekv_integrations.store.verified import DamageError, verified_metadata

FORMAT_VERSION = 1
SUFFIX = ".safetensors"
TEMPORARY = ".tmp"  # what a temporary begins with: ours, and those that safetensors puts beside it
TOKEN_DIM = 2
_NAME = re.compile(r"[0-9a-f]{32}" + re.escape(SUFFIX))


class UnavailableFileError(StoreFileError):
    """The system cannot read a KV file now: it is out of handles or memory, or the disk fails or is away."""


class KVFiles:
    """The KV files in ``path``. ``counts`` is told of whatever is found wrong."""

    def __init__(self, path: Path, fingerprint: str, counts: Counter[str]) -> None:
        self.path = path
        self._fingerprint = fingerprint
        self._counts = counts
        self._verified: set[str] = set()
        self._doomed: list[str] = []  # files that are still to be deleted

    def write(self, file: str, tensors: Mapping[str, torch.Tensor], num_tokens: int) -> FileRecord:
        """Write a temporary, then rename it: after a crash the file is there whole or not at all.

        Raises:
            StoreWriteError: if it cannot be written; nothing is left of it.
            ValueError: if a tensor has another number of tokens.
        """
        for name, tensor in tensors.items():
            if tensor.ndim <= TOKEN_DIM or tensor.shape[TOKEN_DIM] != num_tokens:
                raise ValueError(f"tensor {name!r} has shape {tuple(tensor.shape)}, without {num_tokens} at dim 2")
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        header = json.dumps(self._header(file, num_tokens))
        metadata = {"semsharekv": header, "digest": tensor_digest(header, sorted(on_cpu.items()))}
        temporary, path = self.path / f"{TEMPORARY}{file}", self._path(file)
        try:
            if not is_own_directory(self.path):
                raise OSError("its directory is not in its place")
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            save_file(on_cpu, temporary, metadata=metadata)
            os.chmod(temporary, 0o600)
            _sync(temporary)
            num_bytes = temporary.stat().st_size
            os.replace(temporary, path)
            _sync(self.path)
        except BaseException as error:
            self._remove(temporary)
            self._remove(path)
            if isinstance(error, (OSError, SafetensorError)):
                self._counts["write_failed"] += 1
                raise StoreWriteError(f"{path} could not be written: {error}") from error
            raise
        return FileRecord(file, num_tokens, num_bytes)

    def read(self, record: FileRecord) -> dict[str, torch.Tensor]:
        """Tensors on the CPU that are private maps of the file: bytes are read when touched.

        The first time that a file is read its digest is verified, which reads all of them.

        Raises:
            UnavailableFileError: if the system cannot read it now, which says nothing about the file.
            StoreFileError: if the file is missing, damaged, or another than the one recorded.
        """
        path = self._path(record.id)
        if record.id not in self._verified or _size_of(path) != record.num_bytes:
            self._verify(record)
        try:
            with safe_open(path, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in sorted(opened.keys())}
        except (OSError, SafetensorError, RuntimeError, MemoryError) as error:  # safetensors takes some for others
            self._verify(record)  # it was verified before, and may have been harmed since
            raise self._unavailable(path, error) from error

    def _verify(self, record: FileRecord) -> None:
        """Raise as ``read`` does, and count it, unless the file is the one recorded."""
        path = self._path(record.id)
        self._verified.discard(record.id)
        try:
            header = json.loads(verified_metadata(path, record.num_bytes)["semsharekv"])
            for name, wanted in self._header(record.id, record.num_tokens).items():
                if header[name] != wanted:
                    self._counts["foreign"] += 1
                    raise StoreFileError(f"{path} has {name} {header[name]!r}; accepted is {wanted!r}")
        except (DamageError, KeyError, TypeError, ValueError) as error:
            self._counts["damaged"] += 1
            raise StoreFileError(f"{path} is not a readable KV file: {error}") from error
        except FileNotFoundError as error:
            if not is_own_directory(self.path):
                raise self._unavailable(path, error) from error
            self._counts["vanished"] += 1
            raise StoreFileError(f"{path} is missing") from error
        except (OSError, MemoryError) as error:
            raise self._unavailable(path, error) from error
        self._verified.add(record.id)

    def _unavailable(self, path: Path, error: BaseException) -> UnavailableFileError:
        self._counts["unavailable"] += 1
        return UnavailableFileError(f"{path} cannot be read now: {error}")

    def sizes(self) -> dict[str, int]:
        """Bytes of every KV file on disk; none is opened."""
        found: dict[str, int] = {}
        with os.scandir(self.path) as items:
            for item in items:
                if _NAME.fullmatch(item.name):
                    with suppress(FileNotFoundError):  # its owner may have deleted it meanwhile
                        found[item.name.removesuffix(SUFFIX)] = item.stat(follow_symlinks=False).st_size
        return found

    def remove(self, *files: str, most: int | None = None) -> None:
        """Delete KV files, and those that are still to be deleted: ``most`` of them now, the others the next time.

        One that cannot be deleted is left to the next opening.
        """
        self._verified.difference_update(files)
        self._doomed += files
        now = self._doomed[:most]
        del self._doomed[:most]
        for file in now:
            self._remove(self._path(file))

    def remove_temporaries(self) -> int:
        """Delete what writers that were killed have left, and tell how many there were."""
        names = [name for name in os.listdir(self.path) if name.startswith(TEMPORARY)]
        for name in names:
            self._remove(self.path / name)
        return len(names)

    def _path(self, file: str) -> Path:
        return self.path / f"{file}{SUFFIX}"

    def _header(self, file: str, num_tokens: int) -> dict[str, Any]:
        return {
            "version": FORMAT_VERSION,
            "fingerprint": self._fingerprint,
            "file": file,
            "num_tokens": num_tokens,
        }

    def _remove(self, path: Path) -> None:
        if is_own_directory(self.path):  # and no link in its place
            with suppress(OSError):
                os.unlink(path)


def tensor_digest(header: str, named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Of the header and of every tensor's name, dtype, shape and bytes, in the order given."""
    digest = hashlib.blake2b(header.encode(), digest_size=16)
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _size_of(path: Path) -> int | None:
    """Bytes of a file, or None if they cannot be told."""
    try:
        return path.lstat().st_size
    except OSError:
        return None


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
