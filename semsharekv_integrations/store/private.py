"""Files and directories of one user alone: no link is followed, and what somebody else could have planted is refused.

In a place where others may write, a name can be a link to a file of yours. Knows nothing about what the files hold.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def make_private_directory(path: Path) -> None:
    """Make a directory that only its owner may enter, and likewise those above it that are missing.

    Raises:
        OSError: naming the path, if that fails, if ``path`` or the directory that it lies in is a link or belongs to
            another user, or if another user has made a link of one above, or if this system knows no owners of files.
    """
    if not hasattr(os, "geteuid"):
        raise OSError(f"{path} needs a system on which files have owners (Linux, macOS); keep KV in memory here")
    for above in path.parents[1:]:
        if above.is_symlink() and not _is_trusted(above.lstat()):
            raise OSError(f"{above} is a link that another user has made; accepted are links of your own")
    _make(path.parent)
    require_directory(path.parent)
    if not _is_trusted(path.parent.stat()):
        raise OSError(f"{path.parent} belongs to {_name(path.parent.stat())}; accepted is a directory of your own")
    path.mkdir(mode=0o700, exist_ok=True)
    require_directory(path)
    _require_own(path, path.stat())
    path.chmod(0o700)


def _make(path: Path) -> None:
    if not os.path.lexists(path):
        _make(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


def require_directory(path: Path) -> None:
    """Raise ``OSError`` unless ``path`` is a directory, and no link to one."""
    if (kind := _kind_of(path.lstat())) != "a directory":
        raise OSError(f"{path} is {kind}; accepted is a directory, and no link to one")


def require_plain(path: Path, *, own: bool = True) -> None:
    """Raise ``OSError`` unless ``path`` is missing, or a plain file: yours, under one name alone, if ``own``."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if (kind := _kind_of(found)) is not None:
        raise OSError(f"{path} is {kind}; accepted is a plain file")
    if own:
        _require_own(path, found)
        if found.st_nlink > 1:
            raise OSError(f"{path} is a file that has another name as well; accepted is one without hard links")


def open_private(path: Path) -> int:
    """A handle of a plain file that only its owner may read or write; an empty one is made if there is none.

    Raises:
        OSError: naming the path, if it is anything else.
    """
    require_plain(path)
    handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        os.fchmod(handle, 0o600)
    except BaseException:
        os.close(handle)
        raise
    return handle


def is_own_directory(path: Path) -> bool:
    """Whether ``path`` is a directory of yours, now; not where its disk cannot be reached."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _require_own(path: Path, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid():
        raise OSError(f"{path} belongs to {_name(found)}; accepted is what belongs to you")


def _is_trusted(found: os.stat_result) -> bool:
    """Whether it belongs to you, or to the administrator."""
    return found.st_uid in (0, os.geteuid())


def _name(found: os.stat_result) -> str:
    return f"another user (number {found.st_uid})"


def _kind_of(found: os.stat_result) -> str | None:
    """What it is, or None for a plain file."""
    return next((name for matches, name in _KINDS if matches(found.st_mode)), None)
