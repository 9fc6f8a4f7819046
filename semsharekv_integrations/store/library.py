"""A library: the KV of a folder of documents, computed once by ``semsharekv warm``, which any number of engines read.

It is a folder with a manifest and the directory of one model. The manifest says which model and which documents, and
whether the last run came to its end. Engines write nothing there, take no lock, and change no permission. Whoever names
a library trusts its owner: what another user planted in it is not read. Knows nothing about what is mounted.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from semsharekv_integrations.errors import StoreFileError, StoreWriteError, is_whole
from semsharekv_integrations.store.catalog import UnusableCatalogError, look_into
from semsharekv_integrations.store.directory import FINGERPRINT
from semsharekv_integrations.store.ownership import require_directory, require_plain
from semsharekv_integrations.store.records import Contents, keep_sound
from semsharekv_integrations.store.shared_files import LibraryFiles

MANIFEST = "library.json"
NAMESPACE = "library"  # of all entries in its catalog
FORMAT_VERSION = 1
TEMPORARY = ".tmp-library.json"
_MARK = "\udc80"  # a lone surrogate, which no caller's namespace can have


class KVFacts(NamedTuple):
    """What KV and token ids fit to. The fingerprint decides; the rest tells what differs."""

    fingerprint: str
    architecture: str
    layers: int
    dtype: str
    tokenizer: str  # a digest of its vocabulary
    weights: str  # a digest


class LibraryDocument(NamedTuple):
    """A document as it was computed."""

    digest: str  # of its text
    tokens: int


@dataclass(frozen=True)
class Manifest:
    """What a library says of itself."""

    model: str  # as it was named
    facts: KVFacts
    documents: Mapping[str, LibraryDocument] = field(default_factory=dict)  # by id
    is_complete: bool = False


class OpenedLibrary(NamedTuple):
    """A library's sound records, and its files; ``num_unusable`` records or files are damaged or missing."""

    path: Path
    contents: Contents
    files: LibraryFiles
    num_unusable: int


def name_library(number: int) -> str:
    """Return the name under which a store keeps the entries of its library of this number: no caller's namespace."""
    return f"{_MARK}{number}"


def is_library(path: Path) -> bool:
    """Return whether a folder has a manifest, sound or not."""
    return os.path.lexists(path / MANIFEST)


def refuse_library(path: Path) -> None:
    """Raise ``StoreFileError`` if ``path`` is a library, which nobody but ``semsharekv warm`` may write to."""
    if is_library(path):
        raise StoreFileError(f"{path} is a library of KV, which is only read; name it in StoreConfig.libraries")


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of the library in ``path``. Raises ``StoreFileError`` if it is none, or cannot be read."""
    file = path / MANIFEST
    try:
        require_directory(path)
        require_plain(file, own=False)
        found = json.loads(file.read_text(encoding="utf-8"))
        if (version := found["format"]) != FORMAT_VERSION:
            raise StoreFileError(f"library {path} has format {version!r}; accepted is {FORMAT_VERSION}")
        if found["digest"] != _digest(found):
            raise ValueError("its digest is wrong")
        return _unpack(found)
    except FileNotFoundError as error:
        raise StoreFileError(f"{path} is no library of KV: {error.filename or path} is missing") from error
    except OSError as error:
        raise StoreFileError(f"library {path} cannot be read: {error}") from error
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise StoreFileError(f"library {path} has a damaged {MANIFEST}: {error!r}") from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest of the library in ``path``: a reader finds the old one or the new one.

    Raises ``StoreWriteError`` if it cannot be written; the old one stays.
    """
    told = asdict(manifest) | {"format": FORMAT_VERSION, "facts": manifest.facts._asdict()}
    told["documents"] = {key: list(document) for key, document in sorted(manifest.documents.items())}
    temporary = path / TEMPORARY
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(told | {"digest": _digest(told)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path / MANIFEST)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreWriteError(f"{path / MANIFEST} could not be written: {error}") from error


def require_same_model(path: Path, found: KVFacts, wanted: KVFacts) -> None:
    """Raise ``StoreFileError``, naming what differs, unless the library's KV is that of the wanted model."""
    if found.fingerprint == wanted.fingerprint:
        return
    differing = next((name for name in KVFacts._fields[1:] if getattr(found, name) != getattr(wanted, name)), "weights")
    values = f"{getattr(found, differing)!r}; accepted is {getattr(wanted, differing)!r}, as this model has"
    raise StoreFileError(f"library {path} is another model's: its {differing} is {values}")


def open_library(path: Path, facts: KVFacts) -> OpenedLibrary:
    """Return what lies in the library ``path``, for the model of these ``facts``. Writes nothing; reads no KV.

    Raises:
        StoreFileError: if it is no library, not finished, another model's, or cannot be read.
    """
    manifest = read_manifest(path)
    require_same_model(path, manifest.facts, facts)
    if not manifest.is_complete:
        raise StoreFileError(f"library {path} is not finished; run semsharekv warm on it again until it says so")
    directory, counts = path / facts.fingerprint, Counter[str]()
    try:
        require_directory(directory)
        files = LibraryFiles(directory, facts.fingerprint, counts, find_owner(path))
        contents = look_into(directory, facts.fingerprint)
        kept = keep_sound(contents, files.measure())
    except (OSError, ValueError, sqlite3.Error, UnusableCatalogError) as error:
        raise StoreFileError(f"library {path} cannot be read: {error}") from error
    files.records = {file.id: file for file in kept.files}
    return OpenedLibrary(path, kept, files, contents.num_damaged + contents.num_records - kept.num_records)


def find_owner(path: Path) -> int:
    """Return who owns the folder. Raises ``OSError`` if everybody may write there."""
    found = path.lstat()
    if found.st_mode & stat.S_IWOTH:
        raise OSError(f"everybody may write to {path}")
    return found.st_uid


def digest_text(text: str) -> str:
    """Return a digest of a document's text, 32 hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _digest(told: Mapping[str, Any]) -> str:
    return digest_text(json.dumps({key: value for key, value in told.items() if key != "digest"}, sort_keys=True))


def _unpack(found: Mapping[str, Any]) -> Manifest:
    """Return a manifest. Raises one of several errors if a value is missing or of a wrong kind."""
    facts = KVFacts(**found["facts"])
    named = all(isinstance(value, str) for value in (found["model"], *facts._replace(layers="")))  # type: ignore[arg-type]
    if not (named and is_whole(facts.layers, 1) and FINGERPRINT.fullmatch(facts.fingerprint)):
        raise ValueError("it has values of a wrong kind")
    documents = {key: LibraryDocument(*values) for key, values in found["documents"].items()}
    if not all(isinstance(document.digest, str) and is_whole(document.tokens, 0) for document in documents.values()):
        raise ValueError("its documents have values of a wrong kind")
    return Manifest(found["model"], facts, documents, found["is_complete"] is True)
