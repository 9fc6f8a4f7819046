"""Brings a library up to date with its folder: what is new or changed is computed, what is gone is dropped.

Whatever ends a run, what was computed until then is there for the next one. No engine mounts what is not finished: the
manifest says that it is, last of all. One process at a time writes to a library.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from semsharekv_integrations.config import StoreConfig
from semsharekv_integrations.errors import StoreFileError, StoreWriteError, require
from semsharekv_integrations.store import KVStore
from semsharekv_integrations.store.directory import LOCK, DirectoryLock
from semsharekv_integrations.store.library import (
    NAMESPACE,
    TEMPORARY,
    LibraryDocument,
    Manifest,
    digest_text,
    find_owner,
    is_library,
    open_library,
    read_manifest,
    require_same_model,
    write_manifest,
)
from semsharekv_integrations.warming.computing import INCOMING, Computed, ModelSpec, open_computing
from semsharekv_integrations.warming.folder import SUFFIXES, UnusableDocumentError, find_documents, read_document

_SAVED_EVERY_S = 10.0  # the manifest: what a killed run computed in so much time is computed again
_UNBOUNDED = 2**62


@dataclass
class Summary:
    """What a run did, and what the library holds now."""

    documents: int = 0
    computed: int = 0
    kept: int = 0
    dropped: int = 0
    blank: int = 0  # files without text, which need no KV
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)  # why, by id


def warm_folder(
    folder: Path,
    to: Path,
    spec: ModelSpec,
    workers: int | None = None,
    watch: Callable[[int], Callable[[], object]] = lambda total: lambda: None,
    *,
    on_ray: bool = False,
) -> Summary:
    """Compute the KV of the documents of ``folder`` into the library ``to``, as far as it is not there.

    Args:
        folder: with texts in UTF-8, at any depth.
        to: a folder that is missing, empty or a library of this model.
        spec: the model.
        workers: processes that compute, each with a model of its own. None for one; with ``on_ray``, for one on each
            GPU, or on each machine if there are none.
        watch: is told how many documents are to be computed; what it returns is called for each.
        on_ray: whether workers are those of a Ray cluster: the one that this process is connected to, or that
            ``RAY_ADDRESS`` names.

    Returns:
        What was done. Documents that could not be read or computed are ``skipped``, and not in the library.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
        StoreFileError: if ``to`` is another model's library, or something else.
        StoreLockedError: if another process writes to it.
        StoreWriteError: if it cannot be written; what was stored until then is kept.
        SemShareError: if Ray is asked for and not installed.
        OSError: if the folder cannot be read, or a worker ended before its time. Others: if the model does not load.
    """
    began, folder, to = time.monotonic(), folder.resolve(), to.resolve()
    require(folder.is_dir(), "folder", str(folder), "a folder of documents")
    require(workers is None or workers >= 1, "workers", workers, "1 or more processes")
    tasks = dict(find_documents(folder, to))
    require(bool(tasks), "folder", str(folder), f"a folder with files that end in {' or '.join(SUFFIXES)}")
    summary = Summary()
    digests = {key: digest_text(text) for key, text in _read_all(tasks, summary)}
    with ExitStack() as stack:
        former = _take_over(to, stack)
        computing = stack.enter_context(open_computing(spec, workers, to, on_ray=on_ray))
        facts = computing.describe()
        if former is not None:
            require_same_model(to, former.facts, facts)
        manifest = former or Manifest(spec.model, facts)
        if not _is_up_to_date(to, manifest, digests):
            with _open_building(to, manifest) as building:
                summary.dropped = building.drop_all_but(digests)
                missing = [(key, tasks[key]) for key in digests if key not in building.documents]
                step = watch(len(missing))
                for computed in computing.compute(missing):
                    building.take(computed, summary)
                    step()
    summary.seconds = time.monotonic() - began
    return _count(to, summary)


def _take_over(to: Path, stack: ExitStack) -> Manifest | None:
    """Lock ``to`` until ``stack`` is left, made if missing; return the manifest, None if there is none yet.

    Raises ``StoreFileError`` for what is neither empty nor a library. Deletes what a killed run left.
    """
    if to.exists() and not is_library(to):
        names = [item.name for item in to.iterdir()] if to.is_dir() else [to.name]
        if any(name not in (LOCK, TEMPORARY) and not name.startswith(INCOMING) for name in names):
            raise StoreFileError(f"{to} holds something else; accepted is a new or empty folder, or a library of KV")
    to.parent.mkdir(parents=True, exist_ok=True)
    to.mkdir(mode=0o700, exist_ok=True)
    find_owner(to)
    stack.callback(DirectoryLock(to).release)
    for left in to.glob(f"{INCOMING}*"):
        shutil.rmtree(left, ignore_errors=True)
    return read_manifest(to) if is_library(to) else None


def _read_all(tasks: Mapping[str, Path], summary: Summary) -> Iterator[tuple[str, str]]:
    """Yield the id and text of every document that can be read and is not blank; note the others."""
    for key, path in tasks.items():
        try:
            text = read_document(key, path)
        except UnusableDocumentError as error:
            summary.skipped[key] = str(error)
            continue
        summary.blank += not text
        if text:
            yield key, text


def _is_up_to_date(to: Path, manifest: Manifest, digests: Mapping[str, str]) -> bool:
    """Return whether a library is finished and whole, and has just the documents with these digests, by id."""
    if not manifest.is_complete or {key: known.digest for key, known in manifest.documents.items()} != digests:
        return False
    opened = open_library(to, manifest.facts)
    held = {key for entry in opened.contents.entries for key in entry.labels["document_starts"]}
    return not opened.num_unusable and held == digests.keys()


def _count(to: Path, summary: Summary) -> Summary:
    """Add what a finished library holds to ``summary``, and return it."""
    manifest = read_manifest(to)
    opened = open_library(to, manifest.facts)
    summary.documents = len(manifest.documents)
    summary.kept = summary.documents - summary.computed
    summary.tokens = sum(document.tokens for document in manifest.documents.values())
    summary.bytes = sum(file.num_bytes for file in opened.contents.files)
    return summary


class _Building:
    """A library that is being written. ``documents`` are those in it whose KV is there."""

    def __init__(self, path: Path, manifest: Manifest, store: KVStore) -> None:
        self.documents = dict(manifest.documents)
        self._path = path
        self._manifest = manifest
        self._store = store
        self._saved_s = time.monotonic()

    def drop_all_but(self, digests: Mapping[str, str]) -> int:
        """Drop what is not among the documents with these digests, by id; return how many documents are gone.

        A document that shares its KV with one that goes is dropped as well, and so computed again.
        """
        stale = {key for key, known in self.documents.items() if digests.get(key) != known.digest}
        stale |= self._list_held() - self.documents.keys()
        if stale:
            self._store.forget(NAMESPACE, spare=lambda reference: not stale & reference.document_starts.keys())
            self._store.require_gone()
        held, former = self._list_held() - stale, self.documents
        self.documents = {key: known for key, known in former.items() if key in held}
        return len(former.keys() - digests.keys())

    def take(self, computed: Computed, summary: Summary) -> None:
        """Store what was computed; now and then, note how far it is. ``StoreWriteError`` if it cannot be written."""
        if computed.reason:
            summary.skipped[computed.key] = computed.reason
            return
        if not all(self._store.put(reference) for reference in computed.references):
            raise StoreWriteError(f"{self._path} could not be written; what was stored until now is kept")
        tokens = max(len(reference.token_ids) for reference in computed.references)
        self.documents[computed.key] = LibraryDocument(computed.digest, tokens)
        summary.computed += 1
        if time.monotonic() - self._saved_s > _SAVED_EVERY_S:
            self.save(is_complete=False)

    def save(self, *, is_complete: bool) -> None:
        """Write the manifest."""
        write_manifest(self._path, replace(self._manifest, documents=self.documents, is_complete=is_complete))
        self._saved_s = time.monotonic()

    def _list_held(self) -> set[str]:
        """Return the ids of the documents whose KV is there."""
        return {key for reference in self._store.references(NAMESPACE) for key in reference.document_starts}


@contextmanager
def _open_building(path: Path, manifest: Manifest) -> Iterator[_Building]:
    """Open a library for writing. It is finished only if the block ends without an error."""
    write_manifest(path, replace(manifest, is_complete=False))
    store = KVStore(StoreConfig(max_bytes=0, directory=path, disk_max_bytes=_UNBOUNDED))
    store.open(manifest.facts.fingerprint, getattr(torch, manifest.facts.dtype), torch.device("cpu"))
    building = _Building(path, manifest, store)
    try:
        yield building
    finally:
        store.close()
        building.save(is_complete=False)
    building.save(is_complete=True)
