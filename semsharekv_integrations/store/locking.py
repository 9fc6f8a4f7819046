"""One process at a time: a lock on a file, which ends with the process that took it, however that ends.

A child that was forked has the handle as well. It closes that, which leaves the lock to the parent.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from semsharekv_integrations.store.private import open_private

_ATTEMPTS = 10  # until the file that was locked is the one that has the name: others may delete it meanwhile


class TakenError(Exception):
    """Another process holds the lock."""


class DirectoryLock:
    """An exclusive lock on the file ``path``, taken at once or not at all.

    Raises:
        TakenError: if another process, or another lock of this one, holds it.
        OSError: if the file cannot be opened, or its disk knows no locks.
    """

    def __init__(self, path: Path) -> None:
        self._owner = os.getpid()
        self._handle: int | None = None
        for _ in range(_ATTEMPTS):
            handle = open_private(path)
            try:
                _take(handle)
                if _is_named(handle, path):
                    self._handle = handle
                    return
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)
        raise TakenError(f"{path} is being replaced")

    def release(self) -> None:
        """Let others take it; in a child that was forked, only close its handle. May be called again."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        try:
            if os.getpid() == self._owner:
                _free(handle)
        finally:
            os.close(handle)


def _take(handle: int) -> None:
    import fcntl  # where there is none, stores in memory work

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TakenError from error


def _free(handle: int) -> None:
    import fcntl

    with suppress(OSError):  # which closing the handle does in any case
        fcntl.flock(handle, fcntl.LOCK_UN)


def _is_named(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False
