"""``semsharekv inspect`` and ``semsharekv clear``: list or delete what a store's directory holds. Loads no model.

``inspect`` changes nothing and may run beside the process that uses the directory. ``clear`` needs the directory to
itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from semsharekv_integrations.config import StoreConfig
from semsharekv_integrations.errors import StoreFileError, require
from semsharekv_integrations.explaining import explain_report
from semsharekv_integrations.last_report import read_last_report, remove_last_report
from semsharekv_integrations.store import KVStore
from semsharekv_integrations.store.directory import PeekedEntry, find_directories, peek
from semsharekv_integrations.store.disk import DISK
from semsharekv_integrations.store.library import is_library, read_manifest
from semsharekv_integrations.terminal import add_json_argument, fold_error, print_table

_COLUMNS = ("namespace", "entry", "tokens", "KV", "documents", "session", "pinned", "uses", "last used")
_NUMBERS = ("tokens", "KV", "uses", "last used")
_SHOWN_DIGITS = 12  # of a model's fingerprint
_DIRECTORY = "what StoreConfig(directory=...) or semsharekv serve --store named"
_UNUSABLE = ("damaged", "foreign", "vanished", "orphans")


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``semsharekv inspect``."""
    parser.add_argument("directory", type=Path, help=f"{_DIRECTORY}, or a library")
    parser.add_argument("--namespace", help="only entries of this one")
    parser.add_argument("--document", metavar="ID", help="only entries that carry this document")
    add_json_argument(parser)
    parser.add_argument(
        "--last",
        action="store_true",
        help="explain the report of the latest call instead: what was reused, and why no more",
    )


def add_clear_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``semsharekv clear``."""
    parser.add_argument("directory", type=Path, help=_DIRECTORY)
    parser.add_argument("--namespace", help="only entries of this one (default: all)")
    parser.add_argument("--document", metavar="ID", help="only entries of the namespace that carry this document")
    parser.add_argument("--session", metavar="NAME", help="only entries of the namespace and of this session")


def run_inspect(args: argparse.Namespace) -> int:
    """Print what is stored, by model; return 0. Unusable records are counted on standard error.

    Raises:
        StoreFileError: if the directory, or that of a model, cannot be read. The other models are listed first.
    """
    if args.last:
        return _explain_last(args)
    found: dict[str, list[dict[str, Any]]] = {}
    troubles: list[str] = []
    for path in find_directories(args.directory):
        try:
            peeked = peek(path)
        except StoreFileError as error:
            troubles.append(str(error))
            continue
        found[path.name] = _describe_entries(peeked.entries, args.namespace, args.document)
        if peeked.num_unusable:
            left_out = f"{peeked.num_unusable} records that are damaged or belong to no entry"
            sys.stderr.write(f"{fold_error(f'left out of {path}: {left_out}')}\n")
    if args.json:
        sys.stdout.write(f"{json.dumps(found, indent=1)}\n")
    else:
        console = Console(highlight=False, markup=False)
        if is_library(args.directory):
            console.print(_describe_library(args.directory))
        for model, entries in found.items():
            print_table(console, _make_table(model, entries))
        if not found and not troubles:
            console.print(f"Nothing is stored in {args.directory}.")
        elif not any(found.values()) and not troubles:
            is_chosen = args.namespace is not None or args.document is not None
            console.print("No entry fits." if is_chosen else "There are no entries.")
    if troubles:
        raise StoreFileError("; ".join(troubles))
    return 0


def _explain_last(args: argparse.Namespace) -> int:
    for name in ("namespace", "document"):
        require(getattr(args, name) is None, name, getattr(args, name), "none with --last: a report is of one call")
    report, reuse = read_last_report(args.directory)
    if args.json:
        sys.stdout.write(f"{json.dumps(report.to_dict(), indent=1)}\n")
    else:
        lines = explain_report(report, reuse).splitlines()
        sys.stdout.write("".join(f"{_escape(line)}\n" for line in lines))
    return 0


def run_clear(args: argparse.Namespace) -> int:
    """Delete the chosen entries, the KV that no other entry needs, and all that is damaged; print counts, return 0.

    Raises:
        ValueError: if a document or session is given without its namespace.
        StoreLockedError: if a process uses the directory with any model; nothing is deleted then.
        StoreFileError: if the directory cannot be used.
    """
    for name in ("document", "session"):
        is_alone = getattr(args, name) is not None and args.namespace is None
        require(not is_alone, "namespace", None, f"a string where a {name} is given")
    if is_library(args.directory):
        raise StoreFileError(f"{args.directory} is a library of KV; delete its folder, or run semsharekv warm again")
    with ExitStack() as stack:
        stores = []
        for path in find_directories(args.directory):
            store = KVStore(StoreConfig(max_bytes=0, directory=args.directory, disk_max_bytes=2**62))
            store.open(path.name, torch.float32, torch.device("cpu"))  # reads no KV
            stack.callback(store.close)
            stores.append(store)
        chosen = {"document_id": args.document, "session": args.session}
        whole = args.namespace is None
        removed = sum(store.clear() if whole else store.forget(args.namespace, **chosen) for store in stores)
        unusable = sum(store.stats()[f"{DISK}_{name}"] for store in stores for name in _UNUSABLE)
    remove_last_report(args.directory)  # it may name what is gone
    console = Console(highlight=False, markup=False)
    console.print(f"{removed} entries deleted from {args.directory}.")
    if unusable:
        console.print(f"{unusable} files and records that were damaged or out of use were deleted as well.")
    return 0


def _describe_library(path: Path) -> str:
    manifest = read_manifest(path)
    tokens = sum(document.tokens for document in manifest.documents.values())
    state = "" if manifest.is_complete else ", not finished"
    return f"A library of {manifest.model}: {len(manifest.documents)} documents, {tokens} tokens{state}."


def _describe_entries(
    entries: Sequence[PeekedEntry], namespace: str | None, document: str | None
) -> list[dict[str, Any]]:
    """Return the entries of namespace and document (None: any) as plain data, latest use first."""
    described = []
    for entry, num_tokens, num_bytes in sorted(entries, key=lambda peeked: -peeked.entry.used_s):
        documents = entry.labels["document_starts"]
        if namespace not in (None, entry.namespace) or (document is not None and document not in documents):
            continue
        plain: dict[str, Any] = {"id": entry.id, "namespace": entry.namespace, "tier": DISK, "tokens": num_tokens}
        plain |= {"kv_bytes": num_bytes, "documents": sorted(documents)}
        plain |= {name: entry.labels[name] for name in ("session", "pinned", "expires_after_s")}
        described.append({**plain, "uses": round(entry.hits), "last_used_s": entry.used_s})
    return described


def _make_table(model: str, entries: Sequence[dict[str, Any]]) -> Table:
    """Make a table of the entries that ``_describe_entries`` returns, one row each, under the model's title."""
    table = Table(title=f"model {model[:_SHOWN_DIGITS]}, tier {DISK}", title_justify="left", title_style="bold")
    for name in _COLUMNS:
        table.add_column(name, justify="right" if name in _NUMBERS else "left")
    for entry in entries:
        cells = (
            entry["namespace"],
            entry["id"],
            str(entry["tokens"]),
            f"{entry['kv_bytes'] / 1024**2:.1f} MiB",
            ", ".join(entry["documents"]),
            entry["session"] or "",
            "yes" if entry["pinned"] else "",
            str(entry["uses"]),
            f"{_format_age(time.time() - entry['last_used_s'])} ago",
        )
        table.add_row(*(Text(_escape(cell)) for cell in cells))  # as Text, so that brackets are not markup
    return table


def _escape(text: str) -> str:
    """Return the text with every unprintable character escaped, as it might command a terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _format_age(seconds: float) -> str:
    """Return a whole number of the largest unit that fits, as ``3 min``; ``0 s`` for the future."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
