"""The KV of one model on disk: a directory with a catalog and KV files, safe against crashes.

The catalog alone says what is there; memory holds no copy of its rows, only how many nodes lie in each file. A KV file
is written whole before the catalog names it, and deleted after the catalog has forgotten it. So a crash leaves at worst
a file that nothing names, which the next opening deletes. Damaged rows and files are dropped with everything that needs
them, and counted; they never cause a wrong answer. Knows nothing about matching, eviction or expiry.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from semsharekv_integrations.concurrency.threads import tell_of_forks
from semsharekv_integrations.errors import StoreFileError, StoreLockedError, StoreWriteError
from semsharekv_integrations.store.catalog import (
    CATALOG,
    DAMAGED,
    Catalog,
    UnusableCatalogError,
    look_into,
    open_catalog,
    set_aside,
)
from semsharekv_integrations.store.files import KVFiles
from semsharekv_integrations.store.ownership import make_private_directory, open_private, require_directory
from semsharekv_integrations.store.records import (
    Contents,
    EntryRecord,
    FileRecord,
    NodeRecord,
    fits,
    keep_rooted,
    keep_sound,
)

LOCK = "lock"
MOST_REMOVED = 100  # files deleted with one change: thousands that expire together must not delay a call
COUNTS = ("damaged", "foreign", "vanished", "unavailable", "orphans", "write_failed")
FINGERPRINT = re.compile(r"[0-9a-f]+")
_LOCK_ATTEMPTS = 10  # until the file that was locked is the one that has the name: others may delete it meanwhile
_inherited: set[str] = set()  # what was open when this process was forked: SQLite believes that it still is


class KVDirectory:
    """The KV of one model on disk, locked against other processes.

    Not thread-safe: the caller's lock guards it. A forked child must not use it: what needs the catalog fails there,
    without consequence for the parent.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Open or create ``path``/``fingerprint``, and delete what cannot be used there.

        Raises:
            StoreLockedError: if another process has it open, or had when it forked this one.
            StoreFileError: if the directory cannot be used.
            ValueError: if ``fingerprint`` is not made of hexadecimal digits.
        """
        if not FINGERPRINT.fullmatch(fingerprint):
            raise ValueError(f"fingerprint is {fingerprint!r}; accepted are the digits 0-9 and a-f")
        self.path = Path(path) / fingerprint
        self._fingerprint = fingerprint
        self._counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
        self.files = KVFiles(self.path, fingerprint, self._counts)
        self._resources = ExitStack()
        self._is_open = False
        try:
            make_private_directory(self.path)
            if os.path.realpath(self.path) in _inherited:
                raise StoreLockedError(f"{self.path} was open when this process was forked; use another directory here")
            self._lock = DirectoryLock(self.path)
            self._resources.callback(self._lock.release)
            self._catalog, found = self._open_catalog()
            self._resources.callback(self._catalog.close)
            kept = self._keep(found)
        except (OSError, ValueError, sqlite3.Error, UnusableCatalogError) as error:
            self._resources.close()
            raise StoreFileError(f"{self.path} cannot be used to store KV: {error}") from error
        except BaseException:
            self._resources.close()
            raise
        self._found: Contents | None = kept  # until somebody takes it, or changes it
        self.files.records = {file.id: file for file in kept.files}
        self._uses = Counter(node.file for node in kept.nodes)  # number of nodes of each file in use
        self._is_open = True
        self.num_bytes = sum(file.num_bytes for file in kept.files)  # of files in use, without the catalog
        tell_of_forks(self)

    def contents(self) -> Contents:
        """Return all sound records, parents before children. The first call may return what the opening read."""
        found, self._found = self._found, None
        if found is None:
            found = self._catalog.read()
            found = found._replace(nodes=keep_rooted(found.nodes))
        return found

    def discard(self, file: str) -> None:
        """Delete a file that ``KVFiles.write`` made; do nothing if a recorded node lies in it."""
        if not self._uses[file]:
            self.files.remove(file)

    def record(
        self,
        *,
        nodes: Iterable[NodeRecord] = (),
        entries: Iterable[EntryRecord] = (),
        gone_nodes: Iterable[str] = (),
        gone_entries: Iterable[str] = (),
    ) -> None:
        """Delete the gone, insert or replace the others, in one transaction; then delete some files out of use.

        Raises:
            StoreWriteError: if the catalog cannot be written; this is counted, and nothing has changed.
            ValueError: if a node does not lie within a file that was written; nothing has changed.
        """
        put, gone_nodes, known = {node.id: node for node in nodes}, set(gone_nodes), self.files.records
        for node in put.values():
            if node.file not in known or not fits(node, known[node.file]):
                raise ValueError(f"node {node.id} has {len(node.token_ids)} tokens that file {node.file} does not have")
        more = Counter(node.file for node in put.values())
        try:
            more.subtract(file for file in self._catalog.find_files(gone_nodes | put.keys()) if file in known)
            begun = [known[file] for file in more if not self._uses[file]]
            ended = [known[file] for file in more if not self._uses[file] + more[file]]
            gone = {"files": [file.id for file in ended], "nodes": gone_nodes, "entries": gone_entries}
            self._catalog.change(gone, Contents(begun, list(put.values()), list(entries)))
        except (sqlite3.Error, UnicodeEncodeError) as error:
            raise self._note_failure(f"{self.path / CATALOG} could not be written: {error}") from error
        self._found = None
        self._uses.update(more)
        self.num_bytes += sum(file.num_bytes for file in begun) - sum(file.num_bytes for file in ended)
        for file in ended:
            del self._uses[file.id]
        self.files.remove(*(file.id for file in ended), most=MOST_REMOVED)

    def scrub(self, *, whole: bool = True) -> None:
        """Empty the catalog's log and delete a catalog that was set aside: both may name forgotten tokens.

        With ``whole``, first delete all files out of use. Raises ``StoreWriteError`` if any of this fails.
        """
        self.files.remove(most=None if whole else 0)
        try:
            if whole:
                self.files.require_removed()
            self.path.joinpath(DAMAGED).unlink(missing_ok=True)
            self._catalog.empty_log()
        except (OSError, sqlite3.Error) as error:
            raise self._note_failure(f"{self.path} still names what is forgotten: {error}") from error

    def counts(self) -> dict[str, int]:
        """Return how often each trouble was met since opening.

        ``damaged``: catalogs, rows and files with other bytes than were written. ``foreign``: catalogs and files of
        another model or format version. ``vanished``: missing files. ``unavailable``: reads that failed because handles
        or memory ran out, or the disk failed; the files stay. ``orphans``: rows, files and temporaries without what
        they belong to, deleted at opening. ``write_failed``: files and transactions that could not be written.
        """
        return dict(self._counts)

    def check(self) -> None:
        """Assert that every node lies in a file, files in use are on disk as recorded, and their bytes are exact."""
        found, sizes = self._catalog.read(), self.files.measure()
        assert self._uses == Counter(node.file for node in found.nodes), "uses of files"
        assert found.num_damaged == 0 and {file.id: file for file in found.files} == self._in_use(), "files recorded"
        assert all(fits(node, self.files.records[node.file]) for node in found.nodes), "nodes outside of their files"
        assert {id: file.num_bytes for id, file in self.files.records.items()}.items() <= sizes.items(), "files on disk"
        assert self.num_bytes == sum(sizes[file] for file in self._uses), "bytes of files in use"

    def close(self) -> None:
        """Delete written files without a recorded node, close the catalog, release the lock. May be called again."""
        if self._is_open:
            self.files.remove(*(self.files.records.keys() - self._in_use().keys()))
        self._is_open = False
        self._resources.close()

    def go_on_in_child(self) -> None:
        """In a forked child: leave catalog and lock to the parent. This process cannot open the directory any more."""
        if self._is_open:
            self._is_open = False
            _inherited.add(os.path.realpath(self.path))
            self._resources.pop_all()  # which closes nothing
            self._catalog.abandon()
            self._lock.release()

    def _in_use(self) -> dict[str, FileRecord]:
        return {id: file for id, file in self.files.records.items() if self._uses[id]}

    def _note_failure(self, reason: str) -> StoreWriteError:
        self._counts["write_failed"] += 1
        return StoreWriteError(reason)

    def _open_catalog(self) -> tuple[Catalog, Contents]:
        """Open and read the catalog. Count one that is unusable, set it aside, and open an empty one instead."""
        try:
            return open_catalog(self.path, self._fingerprint)
        except UnusableCatalogError as error:
            self._counts["foreign" if error.foreign else "damaged"] += 1
            set_aside(self.path)
            return open_catalog(self.path, self._fingerprint)

    def _keep(self, found: Contents) -> Contents:
        """Return the sound part of ``found``. Count the rest, and delete it from the catalog and the disk."""
        sizes = self.files.measure()
        kept = keep_sound(found, sizes)
        missing = [file.id for file in found.files if file.id not in sizes]
        resized = [file.id for file in found.files if sizes.get(file.id, file.num_bytes) != file.num_bytes]
        unused = sizes.keys() - {file.id for file in kept.files}
        self._counts["damaged"] += found.num_damaged + len(resized)
        self._counts["vanished"] += len(missing)
        self._counts["orphans"] += len(found.nodes) - len(kept.nodes) + len(found.entries) - len(kept.entries)
        self._counts["orphans"] += len(unused - set(resized)) + self.files.remove_temporaries()
        if found.num_damaged or found.num_records != kept.num_records:
            self._catalog.replace(kept)
        self.files.remove(*unused)
        return kept


class DirectoryLock:
    """An exclusive lock on a directory, by a file in it, taken at once or not at all.

    A forked child has the handle as well. ``release`` only closes it there, which leaves the lock to the parent.

    Raises:
        StoreLockedError: if another process, or another lock of this one, holds it.
        OSError: if the file cannot be opened, or its disk knows no locks.
    """

    def __init__(self, path: Path) -> None:
        import fcntl  # where there is none, stores in memory work

        self._owner = os.getpid()
        file = path / LOCK
        for _ in range(_LOCK_ATTEMPTS):
            handle = open_private(file)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(handle), os.lstat(file)):
                        self._handle: int | None = handle
                        return
            except BaseException as error:
                os.close(handle)
                if isinstance(error, BlockingIOError):
                    break
                raise
            os.close(handle)
        raise StoreLockedError(
            f"{path} is in use by another process; end that process, or use another directory in this one"
        )

    def release(self) -> None:
        """Give up the lock; in a forked child, only close the handle: the parent keeps it. May be called again."""
        import fcntl

        handle, self._handle = self._handle, None
        if handle is None:
            return
        try:
            if os.getpid() == self._owner:
                with suppress(OSError):  # which closing the handle does in any case
                    fcntl.flock(handle, fcntl.LOCK_UN)
        finally:
            os.close(handle)


class PeekedEntry(NamedTuple):
    """An entry on disk, with the tokens and KV bytes of its whole path, shared ones included."""

    entry: EntryRecord
    num_tokens: int
    num_bytes: int


class Peeked(NamedTuple):
    """The sound entries of a directory, and how many records are damaged or lack what they need."""

    entries: list[PeekedEntry]
    num_unusable: int


def find_directories(path: Path) -> list[Path]:
    """Return the directories of single models under ``path``, sorted; their names are fingerprints.

    Raises ``StoreFileError`` if ``path`` is missing or cannot be read.
    """
    try:
        found = [child for child in Path(path).iterdir() if FINGERPRINT.fullmatch(child.name)]
        return sorted(child for child in found if any(os.path.lexists(child / name) for name in (CATALOG, LOCK)))
    except OSError as error:
        raise StoreFileError(f"{path} cannot be read: {error}") from error


def peek(path: Path) -> Peeked:
    """Return what is in ``path``, the directory of a single model, while another process may write there.

    Takes no lock and changes nothing. Raises ``StoreFileError`` if it cannot be read.
    """
    fingerprint = path.absolute().name
    try:
        require_directory(path)
        found = look_into(path, fingerprint)
        kept = keep_sound(found, KVFiles(path, fingerprint, Counter()).measure())
    except (OSError, ValueError, sqlite3.Error, UnusableCatalogError) as error:
        raise StoreFileError(f"{path} cannot be read: {error}") from error
    files = {file.id: file for file in kept.files}
    totals: dict[str | None, tuple[int, int]] = {None: (0, 0)}
    for node in kept.nodes:
        num_tokens, num_bytes = totals[node.parent]
        file, own_tokens = files[node.file], len(node.token_ids)
        totals[node.id] = num_tokens + own_tokens, num_bytes + file.num_bytes * own_tokens // file.num_tokens
    entries = [PeekedEntry(entry, *totals[entry.node]) for entry in kept.entries]
    return Peeked(entries, found.num_damaged + found.num_records - kept.num_records)
