"""``semsharekv inspect``: what a store's directory holds. Changes nothing, loads no model.

It may run beside the process that uses the directory.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from semsharekv_integrations.cli.terminal import fold_error, print_table
from semsharekv_integrations.errors import StoreFileError
from semsharekv_integrations.store.directory import PeekedEntry, find_directories, peek
from semsharekv_integrations.store.disk import DISK

_COLUMNS = ("namespace", "entry", "tokens", "KV", "documents", "session", "pinned", "uses", "last used")
_NUMBERS = ("tokens", "KV", "uses", "last used")
_SHOWN_DIGITS = 12  # of a model's fingerprint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("directory", type=Path, help="StoreConfig.directory")
    parser.add_argument("--namespace", help="only entries of this one")
    parser.add_argument("--document", metavar="ID", help="only entries that carry this document")
    parser.add_argument("--json", action="store_true", help="JSON on standard output, for machines")


def run(args: argparse.Namespace) -> int:
    """List what is stored, by model; the exit code.

    Raises:
        StoreFileError: if the directory, or that of a model, cannot be read; the others are listed before.
    """
    found: dict[str, list[PeekedEntry]] = {}
    troubles: list[str] = []
    for path in find_directories(args.directory):
        try:
            peeked = peek(path)
        except StoreFileError as error:
            troubles.append(str(error))
            continue
        found[path.name] = list(_chosen(args, peeked.entries))
        if peeked.num_unusable:
            left_out = f"{peeked.num_unusable} records that are damaged or belong to no entry"
            sys.stderr.write(f"{fold_error(f'left out of {path}: {left_out}')}\n")
    if args.json:
        plain = {model: [_plain(peeked) for peeked in entries] for model, entries in found.items()}
        sys.stdout.write(json.dumps(plain, indent=1) + "\n")
    else:
        _print(found, args.directory, nothing=not troubles)
    if troubles:
        raise StoreFileError("; ".join(troubles))
    return 0


def _print(found: dict[str, list[PeekedEntry]], directory: Path, *, nothing: bool) -> None:
    console = Console()
    for model, entries in found.items():
        print_table(console, _table(model, entries))
    if nothing and not found:
        console.print(f"Nothing is stored in {directory}.", highlight=False, markup=False)


def _chosen(args: argparse.Namespace, entries: list[PeekedEntry]) -> Iterator[PeekedEntry]:
    """Those asked for, latest use first."""
    for peeked in sorted(entries, key=lambda peeked: -peeked.entry.used_s):
        entry = peeked.entry
        is_named = args.namespace in (None, entry.namespace)
        if is_named and (args.document is None or args.document in entry.labels["document_starts"]):
            yield peeked


def _plain(peeked: PeekedEntry) -> dict[str, Any]:
    entry = peeked.entry
    labels = {name: entry.labels[name] for name in ("session", "pinned", "expires_after_s")}
    documents = sorted(entry.labels["document_starts"])
    sizes = {"tokens": peeked.num_tokens, "kv_bytes": peeked.num_bytes}
    uses = {"uses": round(entry.hits), "last_used_s": entry.used_s}
    named = {"id": entry.id, "namespace": entry.namespace, "tier": DISK}
    return {**named, **sizes, "documents": documents, **labels, **uses}


def _table(model: str, entries: list[PeekedEntry]) -> Table:
    table = Table(title=f"model {model[:_SHOWN_DIGITS]}, tier {DISK}", title_justify="left", title_style="bold")
    for name in _COLUMNS:
        table.add_column(name, justify="right" if name in _NUMBERS else "left")
    for peeked in entries:
        plain = _plain(peeked)
        cells = (
            plain["namespace"],
            plain["id"],
            str(plain["tokens"]),
            _size(plain["kv_bytes"]),
            ", ".join(plain["documents"]),
            plain["session"] or "",
            "yes" if plain["pinned"] else "",
            str(plain["uses"]),
            f"{_age(time.time() - plain['last_used_s'])} ago",
        )
        table.add_row(*(Text(_printable(cell)) for cell in cells))  # names as they are, brackets and all
    return table


def _printable(text: str) -> str:
    """What would break a line, or tell a terminal to do something, is escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1024**2:.1f} MiB"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
