"""The catalog of one directory, in SQLite: which tokens lie in which KV file, and which prompts need them.

Every row carries a digest over its fields: SQLite does not notice a flipped byte in a value, and wrong token ids would
serve wrong KV. The digest finds damage, not forgery. Knows nothing about KV files, nor which records fit together.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from semsharekv_integrations.store.ownership import open_private, require_plain
from semsharekv_integrations.store.records import Contents, EntryRecord, FileRecord, NodeRecord, is_sound

FORMAT_VERSION = 1
CATALOG = "catalog.sqlite"
DAMAGED = "catalog.damaged"
_LOG = f"{CATALOG}-wal"
_SIDECARS = (_LOG, f"{CATALOG}-shm", f"{CATALOG}-journal")
# Errors of the disk or other processes, which say nothing about the bytes of the catalog.
_TRANSIENT_NAMES = "ABORT AUTH BUSY CANTOPEN FULL INTERRUPT IOERR LOCKED NOLFS NOMEM PERM PROTOCOL"
_TRANSIENT = {getattr(sqlite3, f"SQLITE_{name}") for name in _TRANSIENT_NAMES.split()}
_PAGE_ERROR = re.compile(r"error code=(\d+)")  # in what a check reports when it could not read a page


class UnusableCatalogError(Exception):
    """The catalog cannot be used: damaged, with other tables, or of another format version (``foreign`` is True)."""

    def __init__(self, reason: object, *, foreign: bool = False) -> None:
        super().__init__(str(reason))
        self.foreign = foreign


class _Table(NamedTuple):
    name: str
    columns: str
    pack: Callable[[Any], tuple[Any, ...]]  # a record to a row
    unpack: Callable[..., Any]


def _pack_node(node: NodeRecord) -> tuple[Any, ...]:
    token_ids = node.token_ids.astype("<i4")  # half the bytes to write and to read
    assert np.array_equal(token_ids, node.token_ids), "token ids of more than 32 bits"
    return node.id, node.parent, node.namespace, token_ids.tobytes(), node.file, int(node.first)


def _unpack_node(id: str, parent: str | None, namespace: str, token_ids: bytes, file: str, first: int) -> NodeRecord:
    return NodeRecord(id, parent, namespace, np.frombuffer(token_ids, "<i4").astype(np.int64), file, first)


def _pack_entry(entry: EntryRecord) -> tuple[Any, ...]:
    return (*entry[:3], json.dumps(dict(entry.labels)), float(entry.hits), float(entry.used_s))


def _unpack_entry(id: str, namespace: str, node: str, labels: str, hits: float, used_s: float) -> EntryRecord:
    return EntryRecord(id, namespace, node, json.loads(labels), hits, used_s)


_FILES = "id TEXT PRIMARY KEY, num_tokens INTEGER, num_bytes INTEGER"
_NODES = "id TEXT PRIMARY KEY, parent TEXT, namespace TEXT, token_ids BLOB, file TEXT, first INTEGER"
_ENTRIES = "id TEXT PRIMARY KEY, namespace TEXT, node TEXT, labels TEXT, hits REAL, used_s REAL"
_TABLES = (  # in the order of Contents
    _Table("files", _FILES, tuple, FileRecord),
    _Table("nodes", _NODES, _pack_node, _unpack_node),
    _Table("entries", _ENTRIES, _pack_entry, _unpack_entry),
)


class Catalog:
    """An open catalog. Any thread may use it, but only one at a time."""

    def __init__(self, database: sqlite3.Connection, fingerprint: str) -> None:
        self._db = database
        self._fingerprint = fingerprint

    def change(self, gone: Mapping[str, Iterable[str]], put: Contents) -> None:
        """Delete the rows of the ids in ``gone``, by table, then insert or replace ``put``, in one transaction.

        Raises ``sqlite3.Error`` or ``UnicodeEncodeError`` if that fails; the catalog stays as it was.
        """
        with self._transact():
            for table, ids in gone.items():
                self._db.executemany(f"DELETE FROM {table} WHERE id = ?", [(id,) for id in ids])
            self._insert(put)

    def replace(self, contents: Contents) -> None:
        """Delete all rows and insert ``contents``, in one transaction. If that fails, the catalog stays as it was."""
        with self._transact():
            for table in _TABLES:
                self._db.execute(f"DELETE FROM {table.name}")
            self._insert(contents)

    def read(self) -> Contents:
        """Return all sound rows as records, and the number of damaged rows, which are left out."""
        return _read(self._db, self._fingerprint)

    def find_files(self, nodes: Iterable[str]) -> Iterator[str]:
        """Yield the file of each id in ``nodes`` that the catalog has; skip the other ids."""
        for id in nodes:
            yield from (file for (file,) in self._db.execute("SELECT file FROM nodes WHERE id = ?", (id,)))

    def empty_log(self) -> None:
        """Move SQLite's log, which still has deleted rows, into the catalog. No error if a reader prevents this."""
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def close(self) -> None:
        """Close the connection. May be called again."""
        self._db.close()

    def abandon(self) -> None:
        """In a forked child: let go of the connection without closing it. Methods but ``close`` fail from then on.

        SQLite would take the parent's locks for its own, and closing would write to the parent's files. Python closes a
        connection without references, so this adds one that stays.
        """
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._db))
        self._db = sqlite3.connect(":memory:")
        self._db.close()

    def _insert(self, contents: Contents) -> None:
        """Insert the records of ``contents``, each with its digest; replace rows of the same id."""
        kinds: tuple[Sequence[Any], ...] = (contents.files, contents.nodes, contents.entries)
        for table, records in zip(_TABLES, kinds, strict=True):
            packed = map(table.pack, records)
            rows = ((*values, _digest(self._fingerprint, table.name, values)) for values in packed)
            places = ", ".join("?" * (table.columns.count(",") + 2))
            self._db.executemany(f"INSERT OR REPLACE INTO {table.name} VALUES ({places})", rows)

    @contextmanager
    def _transact(self) -> Iterator[None]:
        """Run the block in one transaction: commit at its end; if it raises, roll back and raise the same error."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise


def open_catalog(path: Path, fingerprint: str) -> tuple[Catalog, Contents]:
    """Open the catalog in the directory ``path``, created if missing; return it with all its sound rows.

    Raises:
        UnusableCatalogError: if it is damaged or of another format; ``set_aside`` makes room for a new one.
        OSError, sqlite3.Error: if a file of it is not plain or not yours, or the disk does not allow it.
    """
    file = path / CATALOG
    if not os.path.lexists(file):
        _remove_sidecars(path)
    os.close(open_private(file))  # SQLite gives the files beside it the same permissions
    for name in _SIDECARS:
        require_plain(path / name)
    database = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("PRAGMA secure_delete = ON")  # what is forgotten is overwritten
        _create_tables(database)
        _check(database)
        return Catalog(database, fingerprint), _read(database, fingerprint)
    except BaseException as error:
        database.close()
        if _is_damage(error):
            raise UnusableCatalogError(error) from error
        raise


def look_into(path: Path, fingerprint: str) -> Contents:
    """Return the sound rows of the catalog in the directory ``path``, while its owner may write. Changes nothing.

    Raises ``UnusableCatalogError``, ``sqlite3.Error`` or ``OSError`` if it cannot be read.
    """
    file = path / CATALOG
    for name in (CATALOG, *_SIDECARS):
        require_plain(path / name, own=False)
    # Without a log nobody has it open, and SQLite would begin one.
    mode = "mode=ro" if path.joinpath(_LOG).exists() else "mode=ro&immutable=1"
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?{mode}", uri=True, isolation_level=None)) as database:
        database.execute("BEGIN")
        _require_version(database)
        return _read(database, fingerprint)


def set_aside(path: Path) -> None:
    """Rename the catalog in ``path``, a directory, to ``DAMAGED``, over an earlier one; delete SQLite's other files."""
    _remove_sidecars(path)
    os.replace(path / CATALOG, path / DAMAGED)


def _create_tables(database: sqlite3.Connection) -> None:
    """Create the tables in an empty database. Else raise unless version and tables are right and it is writable."""
    found = [sql for (sql,) in database.execute("SELECT sql FROM sqlite_master WHERE type = 'table' ORDER BY rowid")]
    wanted = [f"CREATE TABLE {t.name} ({t.columns}, digest BLOB) WITHOUT ROWID" for t in _TABLES]
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if not found and not version:
        database.executescript(f"BEGIN; {'; '.join(wanted)}; PRAGMA user_version = {FORMAT_VERSION}; COMMIT;")
        return
    _require_version(database)
    if found != wanted:
        raise UnusableCatalogError("its tables are not those of a catalog")
    database.execute(f"PRAGMA user_version = {FORMAT_VERSION}")  # fails if it cannot be written


def _check(database: sqlite3.Connection) -> None:
    """Run a quick check. Raise ``OSError`` if a page cannot be read, ``UnusableCatalogError`` if it finds damage."""
    (state,) = database.execute("PRAGMA quick_check(1)").fetchone()
    unread = _PAGE_ERROR.search(state)
    if unread and _is_transient(int(unread[1])):
        raise OSError(f"a page of the catalog cannot be read: {state}")
    if state != "ok":
        raise UnusableCatalogError(state)


def _is_damage(error: BaseException) -> bool:
    """Return True for an error of SQLite that is not transient, and for names that are not text; else False."""
    if isinstance(error, sqlite3.Error):
        return not _is_transient(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR))
    return isinstance(error, UnicodeDecodeError)


def _is_transient(code: int) -> bool:
    """Return True if a code says nothing about the bytes; False for plain READONLY, which a damaged head causes."""
    return code & 0xFF in _TRANSIENT or (code & 0xFF == sqlite3.SQLITE_READONLY != code)


def _require_version(database: sqlite3.Connection) -> None:
    (found,) = database.execute("PRAGMA user_version").fetchone()
    if found != FORMAT_VERSION:
        raise UnusableCatalogError(f"it has version {found}; accepted is {FORMAT_VERSION}", foreign=True)


def _read(database: sqlite3.Connection, fingerprint: str) -> Contents:
    """Return all sound records, and the number of rows with a wrong digest, unsound values or a repeated id."""
    found: dict[str, dict[str, Any]] = {}
    num_damaged = 0
    for table in _TABLES:
        records = found[table.name] = {}
        for *values, digest in _list_rows(database, table):
            record = _unpack(table, values) if _digest(fingerprint, table.name, values) == digest else None
            if record is None or record.id in records:
                num_damaged += 1
            else:
                records[record.id] = record
    kinds = {name: list(records.values()) for name, records in found.items()}
    return Contents(**kinds, num_damaged=num_damaged)


def _list_rows(database: sqlite3.Connection, table: _Table) -> list[tuple[Any, ...]]:
    """Return all rows of a table. Where something is text that is none, it gets signs that fail its row's digest."""
    query = f"SELECT * FROM {table.name}"
    try:
        database.text_factory = str
        return database.execute(query).fetchall()
    except sqlite3.OperationalError as error:
        if not str(error).startswith("Could not decode to UTF-8"):
            raise
        database.text_factory = lambda text: text.decode(errors="replace")
        return database.execute(query).fetchall()


def _unpack(table: _Table, values: Sequence[Any]) -> Any:
    """Return the record of a row, or None if its values are not sound."""
    try:
        record = table.unpack(*values)
        return record if is_sound(record) else None
    except (RecursionError, TypeError, ValueError):
        return None


def _digest(fingerprint: str, table: str, values: Sequence[Any]) -> bytes:
    """Return a digest over the fingerprint, the table's name and all values of a row."""
    blobs = [value for value in values if type(value) is bytes]
    plain = [value for value in values if type(value) is not bytes] if blobs else values
    digest = blake2b(ascii((fingerprint, table, *plain)).encode(), digest_size=16)
    for blob in blobs:
        digest.update(blob)
    return digest.digest()


def _remove_sidecars(path: Path) -> None:
    for name in _SIDECARS:
        path.joinpath(name).unlink(missing_ok=True)
