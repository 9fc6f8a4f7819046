"""KV files of one directory: safetensors, written whole or not at all, memory-mapped when read, and verified.

A file's header names its format version, the model's fingerprint, its own id and its number of tokens. A digest covers
header and tensors; it finds damage, not forgery. Where others may write, a name can be a link to a file of yours: these
functions follow no link and refuse what others could have planted. Knows nothing about what the tensors mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from semsharekv_integrations.errors import StoreFileError, StoreWriteError, is_whole
from semsharekv_integrations.store.records import FileRecord

FORMAT_VERSION = 1
SUFFIX = ".safetensors"
TEMPORARY = ".tmp"  # what a temporary begins with: ours, and those that safetensors puts beside it
TOKEN_DIM = 2
STATE_MARK = "@"  # in the names of tensors that stand for tokens before a place, not for one each
_NAME = re.compile(r"[0-9a-f]{32}" + re.escape(SUFFIX))
_LENGTH_BYTES = 8  # of the header's length, before the header
_AT_ONCE_BYTES = 2**20
_NAMES_IN_FILES = "BOOL U8 I8 I16 I32 I64 F16 BF16 F32 F64 F8_E4M3 F8_E5M2"
_NAMES_IN_TORCH = "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64 float8_e4m3fn float8_e5m2"
_DTYPES = dict(zip(_NAMES_IN_FILES.split(), _NAMES_IN_TORCH.split(), strict=True))
_KINDS = {  # but for plain files
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class UnavailableFileError(StoreFileError):
    """The system cannot read a KV file now: handles or memory ran out, or the disk failed. The file may be whole."""


class DamageError(Exception):
    """A file has other bytes than were written."""


class KVFiles:
    """The KV files in ``path``. Increments ``counts`` for every trouble: see ``KVDirectory.counts``."""

    def __init__(self, path: Path, fingerprint: str, counts: Counter[str]) -> None:
        self.path = path
        self.records: dict[str, FileRecord] = {}  # by id, of the files in use and of those just written
        self._fingerprint = fingerprint
        self._counts = counts
        self._verified: set[str] = set()
        self._doomed: list[str] = []  # files that are still to be deleted

    def write(self, tensors: Mapping[str, torch.Tensor], num_tokens: int) -> str:
        """Write a new file and return its id: a temporary is renamed, so a crash leaves it whole or not at all.

        The caller records a node in it with ``KVDirectory.record``, or discards it.

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
        header = json.dumps(self._make_header(file, num_tokens))
        metadata = {"semsharekv": header, "digest": digest_tensors(header, sorted(on_cpu.items()))}
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
        self.records[file] = FileRecord(file, num_tokens, num_bytes)
        return file

    def read(self, file: str) -> dict[str, torch.Tensor]:
        """Map a file and return its tensors by name, on the CPU, privately mapped; bytes are read when touched.

        The first read, or one after the size changed, verifies the digest, which reads all bytes. Counts failed reads.

        Raises:
            UnavailableFileError: if the system cannot read it now.
            StoreFileError: if the file is missing, damaged, or another than the one recorded.
        """
        if file not in self.records:
            raise StoreFileError(f"{self.path} has no KV file {file!r}")
        record, path = self.records[file], self._locate(file)
        if record.id not in self._verified or _measure(path) != record.num_bytes:
            self._verify(record)
        try:
            with safe_open(path, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in sorted(opened.keys())}
        except (OSError, SafetensorError, RuntimeError, MemoryError) as error:  # safetensors takes some for others
            self._verify(record)  # it was verified before, and may have been harmed since
            raise self._note_unavailable(path, error) from error

    def _verify(self, record: FileRecord) -> None:
        """Compare the file on disk with its record and digest. On trouble, count it and raise as ``read`` does."""
        path = self._locate(record.id)
        self._verified.discard(record.id)
        try:
            header = json.loads(verify_metadata(path, record.num_bytes)["semsharekv"])
            for name, wanted in self._make_header(record.id, record.num_tokens).items():
                if header[name] != wanted:
                    self._counts["foreign"] += 1
                    raise StoreFileError(f"{path} has {name} {header[name]!r}; accepted is {wanted!r}")
        except (DamageError, KeyError, TypeError, ValueError) as error:
            self._counts["damaged"] += 1
            raise StoreFileError(f"{path} is not a readable KV file: {error}") from error
        except FileNotFoundError as error:
            if not is_own_directory(self.path):
                raise self._note_unavailable(path, error) from error
            self._counts["vanished"] += 1
            raise StoreFileError(f"{path} is missing") from error
        except (OSError, MemoryError) as error:
            raise self._note_unavailable(path, error) from error
        self._verified.add(record.id)

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
        self._verified.difference_update(files)
        for file in files:
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


def digest_tensors(header: str, named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return a digest over the header and every tensor's name, dtype, shape and bytes, in the order given."""
    digest = hashlib.blake2b(header.encode(), digest_size=16)
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def verify_metadata(path: Path, num_bytes: int) -> dict[str, str]:
    """Check size and digest of a KV file by plain reads; return its metadata.

    In a mapped file, a page that cannot be read ends the process. Plain reads tell damage (other bytes) from an error
    of the system, which says nothing about the bytes.

    Raises:
        DamageError: if size, header or digest are wrong, or it is no plain file.
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
            metadata, digest = _digest_file(file, num_bytes)
            wanted = metadata["digest"]
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise DamageError(f"its header is none: {error}") from error
    if digest != wanted:
        raise DamageError("its digest is wrong")
    return metadata


def _digest_file(file: BinaryIO, num_bytes: int) -> tuple[dict[str, str], str]:
    """Read a file; return its metadata, and the digest as ``digest_tensors`` makes it. Compares nothing."""
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    first = _LENGTH_BYTES + length
    if first > num_bytes:
        raise ValueError(f"it would have {length} bytes")
    header: dict[str, Any] = json.loads(file.read(length))
    metadata = header.pop("__metadata__")
    digest = hashlib.blake2b(metadata["semsharekv"].encode(), digest_size=16)
    for name, about in sorted(header.items()):
        digest.update(f"{name} torch.{_DTYPES[about['dtype']]} {tuple(about['shape'])}".encode())
        start, stop = about["data_offsets"]
        if not (is_whole(start, 0) and is_whole(stop, start) and first + stop <= num_bytes):
            raise ValueError(f"{name} would lie at {start} to {stop}")
        for part in _read_parts(file, first + start, stop - start):
            digest.update(part)
    return metadata, digest.hexdigest()


def _read_parts(file: BinaryIO, start: int, num_bytes: int) -> Iterator[bytes]:
    """Yield ``num_bytes`` bytes from ``start`` on, in parts; raise ``ValueError`` if the file ends before."""
    file.seek(start)
    while num_bytes:
        part = file.read(min(num_bytes, _AT_ONCE_BYTES))
        if not part:
            raise ValueError("the file ends before its tensors do")
        num_bytes -= len(part)
        yield part


def _measure(path: Path) -> int | None:
    """Return the size of a file, or None if it is missing or the system cannot tell."""
    try:
        return path.lstat().st_size
    except OSError:
        return None


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_private_directory(path: Path) -> None:
    """Make ``path`` a directory that only you may enter (also if it exists), and those above it that are missing.

    Raises ``OSError``, naming the path, if ``path`` or its parent is a link or belongs to another user, if another user
    made a link of a directory above, if the system knows no owners of files, or if it fails.
    """
    if not hasattr(os, "geteuid"):
        raise OSError(f"{path} needs a system on which files have owners (Linux, macOS); keep KV in memory here")
    for above in path.parents[1:]:
        if above.is_symlink() and not _is_trusted(above.lstat()):
            raise OSError(f"{above} is a link that another user has made; accepted are links of your own")
    _make(path.parent)
    require_directory(path.parent)
    if not _is_trusted(found := path.parent.stat()):
        whose = f"another user (number {found.st_uid})"
        raise OSError(f"{path.parent} belongs to {whose}; accepted is a directory of your own")
    path.mkdir(mode=0o700, exist_ok=True)
    require_directory(path)
    _require_own(path, path.stat())
    path.chmod(0o700)


def _make(path: Path) -> None:
    if not os.path.lexists(path):
        _make(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


def require_directory(path: Path) -> None:
    """Raise ``OSError`` unless ``path`` is a directory; a link to one or a missing path raises."""
    if (kind := _KINDS.get(stat.S_IFMT(path.lstat().st_mode))) != "a directory":
        raise OSError(f"{path} is {kind}; accepted is a directory, and no link to one")


def require_plain(path: Path, *, own: bool = True) -> None:
    """Raise ``OSError`` unless ``path`` is missing or a plain file; with ``own``, also yours and without hard links."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if (kind := _KINDS.get(stat.S_IFMT(found.st_mode))) is not None:
        raise OSError(f"{path} is {kind}; accepted is a plain file")
    if own:
        _require_own(path, found)
        if found.st_nlink > 1:
            raise OSError(f"{path} is a file that has another name as well; accepted is one without hard links")


def open_private(path: Path) -> int:
    """Open a plain file, created if missing, for its owner only; return the handle. Raises as ``require_plain``."""
    require_plain(path)
    handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        os.fchmod(handle, 0o600)
    except BaseException:
        os.close(handle)
        raise
    return handle


def is_own_directory(path: Path) -> bool:
    """Return whether ``path`` is a directory of yours and no link; False if it is missing or cannot be reached."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _require_own(path: Path, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid():
        raise OSError(f"{path} belongs to another user (number {found.st_uid}); accepted is what belongs to you")


def _is_trusted(found: os.stat_result) -> bool:
    """Return whether what was found belongs to you or to the administrator."""
    return found.st_uid in (0, os.geteuid())
