"""The documents of a folder: texts by id, which is their path in it. Knows nothing about models."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from semsharekv_integrations.errors import is_utf8

SUFFIXES = (".md", ".txt")


class UnusableDocumentError(Exception):
    """A file that cannot be a document; its text says why."""


def find_documents(folder: Path, leave_out: Path | None = None) -> Iterator[tuple[str, Path]]:
    """Yield the id and path of every file with one of ``SUFFIXES``, at any depth, in order of ids.

    Follows no links to folders, and leaves out all that is in ``leave_out``.

    Raises:
        OSError: if a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    found: list[tuple[str, Path]] = []
    left_out = None if leave_out is None else os.path.realpath(leave_out)
    for above, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(above, name)) != left_out]
        paths = (Path(above, name) for name in names if name.lower().endswith(SUFFIXES))
        found += [(path.relative_to(folder).as_posix(), path) for path in paths]
    yield from sorted(found)


def read_document(key: str, path: Path) -> str:
    """Return the text of a file without blanks around it, as prompts have it; "" if it is blank.

    Raises:
        UnusableDocumentError: if it cannot be read, or is no text in UTF-8.
    """
    if not is_utf8(key):
        raise UnusableDocumentError("its name is not in UTF-8")
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnusableDocumentError("it is no plain file")  # and reading a pipe would wait
        raw = path.read_bytes()
    except OSError as error:
        raise UnusableDocumentError(f"it cannot be read: {error.strerror}") from error
    if b"\0" in raw:
        raise UnusableDocumentError("it is binary")
    try:
        return raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UnusableDocumentError(f"it is no text in UTF-8 (byte {error.start})") from error
