"""A look from outside at directories of stored KV: nothing is locked or changed; their owners may write meanwhile."""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from semsharekv_integrations.errors import StoreFileError
from semsharekv_integrations.store.catalog import CATALOG, UnusableCatalogError, look_into
from semsharekv_integrations.store.directory import FINGERPRINT, LOCK
from semsharekv_integrations.store.files import KVFiles
from semsharekv_integrations.store.private import require_directory
from semsharekv_integrations.store.records import EntryRecord, sound


class PeekedEntry(NamedTuple):
    """An entry on disk, with the tokens of its whole path and the bytes of their KV, those shared with others too."""

    entry: EntryRecord
    num_tokens: int
    num_bytes: int


class Peeked(NamedTuple):
    """What a look from outside finds: the sound entries, and how many records are damaged or lack what they need."""

    entries: list[PeekedEntry]
    num_unusable: int


def directories(path: Path) -> list[Path]:
    """The directories of single models under ``path``, by their names, which are fingerprints.

    Raises:
        StoreFileError: if ``path`` is missing, or cannot be read.
    """
    try:
        found = [child for child in Path(path).iterdir() if FINGERPRINT.fullmatch(child.name)]
        return sorted(child for child in found if any(os.path.lexists(child / name) for name in (CATALOG, LOCK)))
    except OSError as error:
        raise StoreFileError(f"{path} cannot be read: {error}") from error


def peek(path: Path) -> Peeked:
    """What is in ``path``, a directory of a single model.

    Takes no lock and changes nothing; another process may have it open, and write.

    Raises:
        StoreFileError: if it cannot be read.
    """
    fingerprint = path.absolute().name
    try:
        require_directory(path)
        found = look_into(path, fingerprint)
        kept = sound(found, KVFiles(path, fingerprint, Counter()).sizes())
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
