"""KV files of one directory: safetensors, written whole or not at all, and verified when they are first read.

A file's header names its format version, the model's fingerprint, its own id and its number of tokens, with a checksum
for each tensor. These find damage, not forgery: that is kept out by who may write. Where others may, a name can be a
link to a file of yours: no link is followed, and what others own is refused. Knows nothing about what the tensors mean.
"""

from __future__ import annotations

import json
import os
import re
import stat
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from semsharekv_integrations.errors import StoreFileError, StoreWriteError
from semsharekv_integrations.store.checksums import CHECKSUMS, make_seal, sum_tensor
from semsharekv_integrations.store.ownership import is_own, is_own_directory
from semsharekv_integrations.store.reading import DIGEST, HEADER, TOKEN_DIM, DamageError, GetRoom, TensorFile
from semsharekv_integrations.store.records import FileRecord

FORMAT_VERSION = 2
_READABLE = (1, FORMAT_VERSION)  # version 1 has one digest over everything
SUFFIX = ".safetensors"
TEMPORARY = ".tmp"  # what a temporary begins with: ours, and those that safetensors puts beside it
STATE_MARK = "@"  # in the names of tensors that stand for tokens before a place, not for one each
_NAME = re.compile(r"[0-9a-f]{32}" + re.escape(SUFFIX))
Identity = tuple[int, int, int, int]  # of a file, another one once it was written


class UnavailableFileError(StoreFileError):
    """The system cannot read a KV file now: handles or memory ran out, or the disk failed. The file may be whole."""


class KVFiles:
    """The KV files in ``path``. Increments ``counts`` for every trouble: see ``KVDirectory.counts``."""

    def __init__(self, path: Path, fingerprint: str, counts: Counter[str]) -> None:
        self.path = path
        self.records: dict[str, FileRecord] = {}  # by id, of the files in use and of those just written
        self._fingerprint = fingerprint
        self._counts = counts
        self._verified: dict[str, Identity] = {}  # files as they were when all of their bytes were checked
        self._doomed: list[str] = []  # files that are still to be deleted

    def write(self, tensors: Mapping[str, torch.Tensor], num_tokens: int) -> str:
        """Write a new file, as ``write_apart`` does, and return its id: it has a record now.

        The caller records a node in it with ``KVDirectory.record``, or discards it.
        """
        record = self.write_apart(tensors, num_tokens)
        self.records[record.id] = record
        return record.id

    def write_apart(self, tensors: Mapping[str, torch.Tensor], num_tokens: int) -> FileRecord:
        """Write a new file: a temporary is renamed, so a crash leaves it whole or not at all. Needs no lock.

        Return its record, which is not among ``records``: else nobody knows of it, and the next opening deletes it.

        Raises:
            StoreWriteError: if it cannot be written; this is counted, and nothing is left of it.
            ValueError: if a tensor, of no state, has another number of tokens at dimension 2.
        """
        for name, tensor in tensors.items():
            fits = tensor.ndim > TOKEN_DIM and tensor.shape[TOKEN_DIM] == num_tokens
            if not (fits or STATE_MARK in name):
                raise ValueError(f"tensor {name!r} has shape {tuple(tensor.shape)}, without {num_tokens} at dim 2")
        file = uuid.uuid4().hex
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = make_metadata(self._make_header(file, num_tokens), on_cpu)
        temporary, path = self.path / f"{TEMPORARY}{file}", self._locate(file)
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

    def describe(self, file: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a file by name, without bytes. Reads its header alone, if that has a seal.

        Counts failed reads, as the other methods do.

        Raises:
            UnavailableFileError: if the system cannot read it now.
            StoreFileError: if the file is missing, damaged, or another than the one recorded.
        """
        record = self._find(file)
        with self._judge(record), self._open(record) as opened:
            if not opened.is_sealed:
                self._verify(record, opened)
            return opened.forms

    def load(
        self, file: str, get_room: GetRoom, cut: Mapping[str, tuple[int, int]] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and tensors of a file, read into what ``get_room`` returns; see ``TensorFile.load``.

        The first time, and once it was written since, all bytes are checked: on the way, where they are read whole.
        Raises as ``describe``.
        """
        record = self._find(file)
        with self._judge(record), self._open(record) as opened:
            identity = identify(opened.measure())
            is_verified = self._verified.get(record.id) == identity
            checks = opened.is_sealed and not cut and not is_verified
            if not (is_verified or checks):
                self._verify(record, opened)
            yield from opened.load(get_room, cut, checks=checks)
            self._verified[record.id] = identity

    def read(self, file: str) -> dict[str, torch.Tensor]:
        """Map a file and return its tensors by name, on the CPU, privately mapped; bytes are read when touched.

        The first read, or one after the file was written, checks all bytes. Raises as ``describe``.
        """
        record = self._find(file)
        if record.id not in self._verified or _identify(self._locate(file)) != self._verified[record.id]:
            self._check(record)
        return self._map(record)

    def _map(self, record: FileRecord) -> dict[str, torch.Tensor]:
        """Map a file that was checked. Raises as ``describe``."""
        path = self._locate(record.id)
        try:
            with safe_open(path, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in sorted(opened.keys())}
        except (OSError, SafetensorError, RuntimeError, MemoryError) as error:  # safetensors takes some for others
            self._check(record)  # it was verified before, and may have been harmed since
            raise self._note_unavailable(path, error) from error

    def _find(self, file: str) -> FileRecord:
        if file not in self.records:
            raise StoreFileError(f"{self.path} has no KV file {file!r}")
        return self.records[file]

    def _check(self, record: FileRecord) -> None:
        """Check all bytes of a file on disk. On trouble, count it and raise as ``describe`` does."""
        with self._judge(record), self._open(record) as opened:
            self._verify(record, opened)

    def _verify(self, record: FileRecord, opened: TensorFile) -> None:
        self._verified.pop(record.id, None)
        identity = identify(opened.measure())
        opened.verify()
        self._verified[record.id] = identity

    def _open(self, record: FileRecord) -> TensorFile:
        """Open a file of the size and owner that it must have, and compare what it says of itself with its record."""
        path = self._locate(record.id)
        opened = self._open_file(path, record.num_bytes)
        try:
            wanted = self._make_header(record.id, record.num_tokens)
            for name, value in wanted.items():
                if opened.header[name] != value and (name != "version" or opened.header[name] not in _READABLE):
                    if not opened.is_sealed:
                        opened.verify()  # what it says may be damage
                    self._counts["foreign"] += 1
                    raise StoreFileError(f"{path} has {name} {opened.header[name]!r}; accepted is {value!r}")
        except BaseException:
            opened.close()
            raise
        return opened

    @contextmanager
    def _judge(self, record: FileRecord) -> Iterator[None]:
        """Count what goes wrong with a file inside, and raise it as ``describe`` does."""
        path = self._locate(record.id)
        try:
            yield
        except StoreFileError:
            self._verified.pop(record.id, None)
            raise
        except (DamageError, KeyError, TypeError, ValueError) as error:
            self._verified.pop(record.id, None)
            self._counts["damaged"] += 1
            raise StoreFileError(f"{path} is not a readable KV file: {error}") from error
        except FileNotFoundError as error:
            if not self._is_there():
                raise self._note_unavailable(path, error) from error
            self._counts["vanished"] += 1
            raise StoreFileError(f"{path} is missing") from error
        except (OSError, MemoryError) as error:
            raise self._note_unavailable(path, error) from error

    def measure(self) -> dict[str, int]:
        """Return the size of every KV file on disk, recorded or not, by id; opens none."""
        found: dict[str, int] = {}
        with os.scandir(self.path) as items:
            for item in items:
                if _NAME.fullmatch(item.name):
                    with suppress(FileNotFoundError):  # its owner may have deleted it meanwhile
                        found[item.name.removesuffix(SUFFIX)] = item.stat(follow_symlinks=False).st_size
        return found

    def remove(self, *files: str, most: int | None = None) -> None:
        """Delete ``files`` and those left from earlier calls: at most ``most`` now (None: all), others in later calls.

        A file that cannot be deleted is tried again in later calls, and at the next opening. Raises nothing.
        """
        for file in files:
            self._verified.pop(file, None)
            self.records.pop(file, None)
        self._doomed += files
        now = self._doomed[:most]
        del self._doomed[:most]
        self._doomed += [file for file in now if not self._remove(self._locate(file))]

    def require_removed(self) -> None:
        """Raise ``OSError`` if a file that ``remove`` was given is still there."""
        if self._doomed:
            raise OSError(f"{len(self._doomed)} KV files could not be deleted")

    def remove_temporaries(self) -> int:
        """Try to delete the temporaries that killed writers left; return how many there were."""
        names = [name for name in os.listdir(self.path) if name.startswith(TEMPORARY)]
        for name in names:
            self._remove(self.path / name)
        return len(names)

    def _open_file(self, path: Path, num_bytes: int) -> TensorFile:
        return open_kv(path, num_bytes)

    def _is_there(self) -> bool:
        return is_own_directory(self.path)

    def _locate(self, file: str) -> Path:
        return self.path / f"{file}{SUFFIX}"

    def _make_header(self, file: str, num_tokens: int) -> dict[str, Any]:
        return {"version": FORMAT_VERSION, "fingerprint": self._fingerprint, "file": file, "num_tokens": num_tokens}

    def _note_unavailable(self, path: Path, error: BaseException) -> UnavailableFileError:
        self._counts["unavailable"] += 1
        return UnavailableFileError(f"{path} cannot be read now: {error}")

    def _remove(self, path: Path) -> bool:
        """Try to delete a file; return whether it is gone."""
        try:
            if is_own_directory(self.path):  # and no link in its place
                os.unlink(path)
                return True
        except FileNotFoundError:
            return True
        except OSError:
            pass
        return False


def make_metadata(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return a file's metadata: ``header`` with a checksum for each tensor, which lies on the CPU, and the seal."""
    text = json.dumps({**header, CHECKSUMS: {name: sum_tensor(tensor) for name, tensor in tensors.items()}})
    layout = ((name, tensor.dtype, tensor.shape) for name, tensor in sorted(tensors.items()))
    return {HEADER: text, DIGEST: make_seal(text, layout)}


def open_kv(path: Path, num_bytes: int, owner: int | None = None) -> TensorFile:
    """Open a plain file of yours with so many bytes. If others may read or write it, they may no longer.

    With ``owner``, the number of a user: open a file of theirs, and leave its permissions. Others may read it.

    Raises:
        DamageError: if it has another size, belongs to another user, everybody may write to it, it is no plain file, or
            its header is damaged.
        OSError: if it cannot be opened or read.
    """
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise DamageError("it is no file")
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    file = os.fdopen(handle, "rb", buffering=0)
    try:
        found = os.fstat(handle)
        if not (is_own(found) if owner is None else found.st_uid == owner):
            raise DamageError(f"it belongs to another user (number {found.st_uid})")
        if found.st_size != num_bytes:
            raise DamageError(f"it has {found.st_size} bytes in place of {num_bytes}")
        if owner is None and stat.S_IMODE(found.st_mode) & 0o077:
            os.fchmod(handle, 0o600)
        if found.st_mode & stat.S_IWOTH and owner is not None:
            raise DamageError("everybody may write to it")
        return TensorFile(file, num_bytes)
    except BaseException:
        file.close()
        raise


def identify(found: os.stat_result) -> Identity:
    """Return what tells a file from another one, and from itself before it was written."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _identify(path: Path) -> Identity | None:
    """Return what ``identify`` does for a path; None if the file is missing or the system cannot tell."""
    try:
        return identify(path.lstat())
    except OSError:
        return None


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
