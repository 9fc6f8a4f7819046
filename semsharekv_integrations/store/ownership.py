"""Whose a file or directory is, and what it is: what another user could have planted is neither read nor written.

Where others may write, a name can be a link to a file of yours, so these functions follow no link. Knows nothing about
what files hold.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

_KINDS = {
    stat.S_IFREG: "a plain file",
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


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
    if (kind := _KINDS.get(stat.S_IFMT(found.st_mode))) != "a plain file":
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
    return stat.S_ISDIR(found.st_mode) and is_own(found)


def is_directory(path: Path) -> bool:
    """Return whether ``path`` is a directory and no link; False if it is missing or cannot be reached."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def is_own(found: os.stat_result) -> bool:
    """Return whether what was found belongs to you."""
    return found.st_uid == os.geteuid()


def _require_own(path: Path, found: os.stat_result) -> None:
    if not is_own(found):
        raise OSError(f"{path} belongs to another user (number {found.st_uid}); accepted is what belongs to you")


def _is_trusted(found: os.stat_result) -> bool:
    """Return whether what was found belongs to you or to the administrator."""
    return found.st_uid in (0, os.geteuid())
