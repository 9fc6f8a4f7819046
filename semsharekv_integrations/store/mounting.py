"""Mounts libraries: their entries stand in namespaces of their own, which every caller of the store may read.

A mounted node is never written, evicted or forgotten. On a CPU its KV is used where it lies, mapped from its file, so
that processes share it; elsewhere it is read to the device like KV of the store's own directory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from semsharekv_integrations.config import StoreConfig
from semsharekv_integrations.logs import log_trouble
from semsharekv_integrations.store.entries import Entries
from semsharekv_integrations.store.homes import Homes
from semsharekv_integrations.store.library import (
    KVFacts,
    OpenedLibrary,
    name_library,
    open_library,
    read_manifest,
    refuse_library,
)
from semsharekv_integrations.store.namespace import Entry
from semsharekv_integrations.store.placed import PlacedKV
from semsharekv_integrations.store.records import reference_id
from semsharekv_integrations.store.reopening import attach_nodes, reopen_entries

_STATE = "library"  # no state of a model, so ids are unlike all others


def mount_libraries(entries: Entries, paths: Iterable[Path], facts: KVFacts, dtype: torch.dtype, homes: Homes) -> None:
    """Mount the libraries ``paths``, each once, all or none; do nothing if that was done before. Reads no KV.

    The caller holds the lock. Raises ``StoreFileError`` as ``open_library`` does.
    """
    if entries.libraries:
        return
    opened = [open_library(path, facts) for path in dict.fromkeys(path.resolve() for path in paths)]
    for number, library in enumerate(opened):
        _mount(entries, library, number, dtype, homes)


def check_libraries(config: StoreConfig) -> None:
    """Raise ``StoreFileError`` if a library has no sound manifest, or the store's own directory is one.

    So what is misnamed is known before a model is loaded.
    """
    if config.directory is not None:
        refuse_library(Path(config.directory))
    for path in config.libraries:
        read_manifest(Path(path).resolve())


def _mount(entries: Entries, library: OpenedLibrary, number: int, dtype: torch.dtype, homes: Homes) -> None:
    name = name_library(number)
    entries.libraries[name] = library.files
    entries.counts["library_unusable"] += library.num_unusable
    if library.num_unusable:
        log_trouble("unreadable_file")
    if not library.contents.entries:
        return
    tree = entries.ensure_namespace(name).tree
    nodes = attach_nodes(library.contents.nodes, lambda _: tree)
    for node, place in nodes.values():
        node.shelved = PlacedKV(library.files, place, len(node.token_ids), dtype, homes)
    for _, reference, path in reopen_entries(library.contents.entries, nodes):
        # an id of its own: the same text may stand in the store, and in another library
        key = reference_id(str(number), reference.token_ids, _STATE)
        entries.add(Entry(replace(reference, id=key, namespace=name), path[-1], 0.0))
