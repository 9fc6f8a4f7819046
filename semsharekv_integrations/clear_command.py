"""``semsharekv clear``: delete what a store's directory holds. Loads no model, and needs the directory to itself."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console

from semsharekv_integrations.config import StoreConfig
from semsharekv_integrations.errors import require
from semsharekv_integrations.store import KVStore
from semsharekv_integrations.store.directory import find_directories
from semsharekv_integrations.store.disk import DISK

_UNUSABLE = ("damaged", "foreign", "vanished", "orphans")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("directory", type=Path, help="StoreConfig.directory")
    parser.add_argument("--namespace", help="only entries of this one (default: all)")
    parser.add_argument("--document", metavar="ID", help="only entries of the namespace that carry this document")
    parser.add_argument("--session", metavar="NAME", help="only entries of the namespace and of this session")


def run(args: argparse.Namespace) -> int:
    """Delete entries, and the KV that no other one needs; the exit code.

    What is damaged is deleted by opening the directory.

    Raises:
        ValueError: if a document or session is given without its namespace.
        StoreLockedError: if a process uses the directory with any model; nothing is deleted then.
        StoreFileError: if it cannot be used.
    """
    for name in ("document", "session"):
        alone = getattr(args, name) is not None and args.namespace is None
        require(not alone, "namespace", None, f"a string where a {name} is given")
    with ExitStack() as opened:
        stores = [_opened(args.directory, path.name, opened) for path in find_directories(args.directory)]
        removed = sum(_cleared(args, store) for store in stores)
        unusable = sum(store.stats()[f"{DISK}_{name}"] for store in stores for name in _UNUSABLE)
    console = Console(highlight=False, markup=False)
    console.print(f"{removed} entries deleted from {args.directory}.")
    if unusable:
        console.print(f"{unusable} files and records that were damaged or out of use were deleted as well.")
    return 0


def _opened(directory: Path, fingerprint: str, opened: ExitStack) -> KVStore:
    """The store of a model, until ``opened`` is closed."""
    store = KVStore(StoreConfig(max_bytes=0, directory=directory, disk_max_bytes=2**62))
    store.open(fingerprint, torch.float32, torch.device("cpu"))  # no KV is read
    opened.callback(store.close)
    return store


def _cleared(args: argparse.Namespace, store: KVStore) -> int:
    if args.namespace is None:
        return store.clear()
    return store.forget(args.namespace, document_id=args.document, session=args.session)
