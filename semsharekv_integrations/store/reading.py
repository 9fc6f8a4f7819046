"""A file of tensors (safetensors), read by plain reads straight into memory of our own, and checked on the way.

In a mapped file, a page that cannot be read ends the process, and every page costs a fault. Plain reads tell damage
(other bytes) from an error of the system, which says nothing about the bytes. Several threads read at once, ahead of
what takes the tensors over. Knows nothing about what the tensors mean.
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from io import FileIO
from math import prod
from typing import Any, NamedTuple, Self, TypeVar

import torch

from semsharekv_integrations.errors import is_whole
from semsharekv_integrations.store.checksums import CHECKSUMS, digest_in_blake2b, make_seal, make_sum, view_bytes

HEADER, DIGEST = "semsharekv", "digest"  # in a file's metadata
TOKEN_DIM = 2
_LENGTH_BYTES = 8  # of the header's length, before the header
_AT_ONCE_BYTES = 2**20  # read, then checked while they are still near the processor
_MOST_THREADS = 4
_WORTH_THREADS_BYTES = 2**23
_NAMES_IN_FILES = "BOOL U8 I8 I16 I32 I64 F16 BF16 F32 F64 F8_E4M3 F8_E5M2"
_NAMES_IN_TORCH = "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64 float8_e4m3fn float8_e5m2"
_DTYPES = dict(zip(_NAMES_IN_FILES.split(), _NAMES_IN_TORCH.split(), strict=True))

T = TypeVar("T")
GetRoom = Callable[[str, torch.Tensor], torch.Tensor]  # a contiguous tensor on the CPU for one of this name and form


class DamageError(Exception):
    """A file has other bytes than were written."""


class _Place(NamedTuple):
    """Where a tensor lies in the file."""

    form: torch.Tensor  # without bytes
    start: int
    num_bytes: int

    def cut(self, part: tuple[int, int] | None) -> torch.Tensor:
        """Return the form of its tokens from a first to a last one (exclusive), of all of it for None."""
        return self.form if part is None else self.form[:, :, part[0] : part[1]]

    def list_ranges(self, part: tuple[int, int] | None) -> list[tuple[int, int]]:
        """Return start and length of the bytes of these tokens."""
        if part is None or not self.num_bytes:
            return [(self.start, self.num_bytes)]
        num_rows, num_tokens = prod(self.form.shape[:TOKEN_DIM]), self.form.shape[TOKEN_DIM]
        row_bytes = self.num_bytes // num_rows
        first, stop = (row_bytes * token // num_tokens for token in part)
        return [(self.start + row * row_bytes + first, stop - first) for row in range(num_rows)]


class TensorFile:
    """An open file. ``forms`` has its tensors by name, without bytes; ``header`` what ours says. Close it by ``with``.

    Opening checks the seal, if the file has one, and reads no tensor.

    Args:
        file: open for reading, without a buffer.
        num_bytes: its size.

    Raises:
        DamageError: if the header is not as it was written.
    """

    def __init__(self, file: FileIO, num_bytes: int) -> None:
        self._file = file
        self._turn = threading.Lock()
        try:
            self._text, self._digest, self._places = self._read_header(num_bytes)
            self.header: dict[str, Any] = json.loads(self._text)
            self._sums: Mapping[str, str] | None = self.header.get(CHECKSUMS)
            if self._sums is not None:
                self._require_seal(self._sums)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise DamageError(f"its header is none: {error}") from error
        self.forms = {name: place.form for name, place in self._places.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. May be called again."""
        self._file.close()

    def measure(self) -> os.stat_result:
        """Return what the system says of the open file."""
        return os.fstat(self._file.fileno())

    @property
    def is_sealed(self) -> bool:
        """Whether it has a checksum for each tensor, and so was checked as far as it was read."""
        return self._sums is not None

    def verify(self) -> None:
        """Read and check all bytes. Raises ``DamageError`` if any are others than were written."""
        if self._sums is not None:
            jobs = (partial(self._check, name, place) for name, place in self._places.items())
            deque(_run_ahead(jobs, self._count_bytes()), maxlen=0)
            return
        tensors = ((name, p.form.dtype, p.form.shape, self._yield_parts(p)) for name, p in self._places.items())
        if digest_in_blake2b(self._text, tensors) != self._digest:
            raise DamageError("its digest is wrong")

    def load(
        self, get_room: GetRoom, cut: Mapping[str, tuple[int, int]] | None = None, *, checks: bool
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each name and tensor, in order: those in ``cut`` only from a first to a last token (exclusive).

        ``get_room`` is called in this thread, for a few tensors ahead of the one that is taken. With ``checks``, for a
        sealed file and without ``cut``, ``DamageError`` is raised for other bytes than were written.
        """
        assert not checks or (self._sums is not None and not cut), "only what is read whole can be checked"
        sums = self._sums if checks else None
        jobs = (
            partial(
                self._fill, name, place, part, get_room(name, place.cut(part)), sums[name] if sums is not None else None
            )
            for name, place in self._places.items()
            for part in [(cut or {}).get(name)]
        )
        yield from _run_ahead(jobs, self._count_bytes())

    def _fill(
        self, name: str, place: _Place, part: tuple[int, int] | None, room: torch.Tensor, wanted: str | None
    ) -> tuple[str, torch.Tensor]:
        """Read a tensor, or a part of it, into ``room``; compare its checksum with ``wanted``, if there is one."""
        view, total, at = view_bytes(room), make_sum(), 0
        for start, num_bytes in place.list_ranges(part):
            for first in range(start, start + num_bytes, _AT_ONCE_BYTES):
                piece = view[at : at + min(_AT_ONCE_BYTES, start + num_bytes - first)]
                self._read_into(piece, first)
                at += len(piece)
                if wanted is not None:
                    total.update(piece)
        if wanted not in (None, total.hexdigest()):
            raise DamageError(f"{name} has other bytes than were written")
        return name, room

    def _check(self, name: str, place: _Place) -> None:
        """Read a tensor and keep none of it. Raises ``DamageError`` if its checksum is wrong."""
        assert self._sums is not None
        total = make_sum()
        for piece in self._yield_parts(place):
            total.update(piece)
        if total.hexdigest() != self._sums[name]:
            raise DamageError(f"{name} has other bytes than were written")

    def _yield_parts(self, place: _Place) -> Iterator[memoryview]:
        """Yield a tensor's bytes in order; each part is overwritten by the next."""
        room = memoryview(bytearray(min(_AT_ONCE_BYTES, place.num_bytes)))
        for at in range(0, place.num_bytes, _AT_ONCE_BYTES):
            piece = room[: place.num_bytes - at]
            self._read_into(piece, place.start + at)
            yield piece

    def _read_into(self, room: memoryview, start: int) -> None:
        """Fill ``room`` with the bytes from ``start`` on. Raises ``DamageError`` if the file ends before."""
        while len(room):
            if hasattr(os, "preadv"):
                count = os.preadv(self._file.fileno(), [room], start)
            else:
                with self._turn:  # of the one place that the system reads from
                    self._file.seek(start)
                    count = self._file.readinto(room)
            if not count:
                raise DamageError("the file ends before its tensors do")
            room, start = room[count:], start + count

    def _read_header(self, num_bytes: int) -> tuple[str, str, dict[str, _Place]]:
        """Return our header and the digest, both as text, and where the tensors lie, by name and in order of names."""
        length = int.from_bytes(self._read(0, _LENGTH_BYTES), "little")
        first = _LENGTH_BYTES + length
        if first > num_bytes:
            raise ValueError(f"it would have {length} bytes")
        found: dict[str, Any] = json.loads(self._read(_LENGTH_BYTES, length))
        metadata = found.pop("__metadata__")
        places = {}
        for name, about in sorted(found.items()):
            form = torch.empty(about["shape"], dtype=getattr(torch, _DTYPES[about["dtype"]]), device="meta")
            start, stop = about["data_offsets"]
            if not (is_whole(start, 0) and is_whole(stop, start) and first + stop <= num_bytes):
                raise ValueError(f"{name} would lie at {start} to {stop}")
            if stop - start != form.numel() * form.element_size():
                raise ValueError(f"{name} would have {stop - start} bytes")
            places[name] = _Place(form, first + start, stop - start)
        return metadata[HEADER], metadata[DIGEST], places

    def _read(self, start: int, num_bytes: int) -> bytes:
        room = bytearray(num_bytes)
        self._read_into(memoryview(room), start)
        return bytes(room)

    def _require_seal(self, sums: Mapping[str, str]) -> None:
        """Raise ``ValueError`` unless the seal is right and there is a checksum for each tensor."""
        layout = ((name, place.form.dtype, place.form.shape) for name, place in self._places.items())
        if make_seal(self._text, layout) != self._digest:
            raise ValueError("its checksum is wrong")
        if sums.keys() != self._places.keys():
            raise ValueError("it has checksums of other tensors")

    def _count_bytes(self) -> int:
        return sum(place.num_bytes for place in self._places.values())


def _run_ahead(jobs: Iterable[Callable[[], T]], num_bytes: int) -> Iterator[T]:
    """Yield what each job returns, in order. If ``num_bytes`` are many, threads are a few jobs ahead.

    A job is taken from ``jobs`` in this thread, just before it may begin.
    """
    num_threads = min(_MOST_THREADS, os.cpu_count() or 1)
    if num_threads == 1 or num_bytes < _WORTH_THREADS_BYTES:
        yield from (job() for job in jobs)
        return
    pool, begun = ThreadPoolExecutor(num_threads, "semsharekv-read"), deque[Future[T]]()
    try:
        for job in jobs:
            begun.append(_begin(pool, job))
            if len(begun) > 2 * num_threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(pool: ThreadPoolExecutor, job: Callable[[], T]) -> Future[T]:
    """Return the job's result to come; the job has run by now if there are no more threads."""
    try:
        return pool.submit(job)
    except RuntimeError:
        done = Future[T]()
        done.set_result(job())
        return done
