"""``semsharekv warm``: compute the KV of a folder of documents once, for any number of engines.

    semsharekv warm FOLDER --model X --to DIR

FOLDER's files that end in .txt or .md, at any depth, become documents, named by their path in it. Links to folders are
not followed. Run it again after changes: only what is new or changed is computed, and what is gone is dropped. Engines
mount DIR with StoreConfig(libraries=[DIR]), servers with --library DIR.

On a Ray cluster, workers get the texts and give back KV; this process reads FOLDER and writes DIR. X must mean the same
model to all of them.

Files that cannot be read, or whose KV cannot be computed, are named and left out; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from tqdm.auto import tqdm

from semsharekv_integrations.terminal import DEFAULT_MODEL, add_json_argument, fold_error

_MIB = 1024**2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``semsharekv warm``, and this module's text for its help."""
    parser.description = __doc__
    parser.add_argument("folder", type=Path, help="a folder of documents: .txt and .md files in UTF-8")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="the library: new, or made by this command"
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"folder or hub id (default: {DEFAULT_MODEL})")
    several = "processes that compute, each with a copy of the model (default: 1; on Ray one for each GPU, or machine)"
    parser.add_argument("--workers", type=int, metavar="N", help=several)
    cluster = "workers are those of a Ray cluster (default: if RAY_ADDRESS names one, and the extra ray is installed)"
    parser.add_argument("--ray", action=argparse.BooleanOptionalAction, help=cluster)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    parser.add_argument("--dtype", default="auto", help="torch dtype, or auto for that of the weights (default)")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Bring the library up to date and print a summary; return 0, or 1 if documents were left out.

    Raises what ``warm_folder`` does.
    """
    from semsharekv_integrations.warming import ModelSpec, warm_folder

    spec = ModelSpec(args.model, args.device, args.dtype)
    on_ray = _is_on_cluster() if args.ray is None else args.ray
    watch = partial(_show_progress, is_shown=not args.json)
    summary = warm_folder(args.folder, args.to, spec, args.workers, watch, on_ray=on_ray)
    for key, reason in sorted(summary.skipped.items()):
        sys.stderr.write(f"{fold_error(f'left out {key!a}: {reason}')}\n")
    if args.json:
        sys.stdout.write(f"{json.dumps(asdict(summary))}\n")
        return int(bool(summary.skipped))
    console = Console(highlight=False, markup=False)
    console.print(
        f"{args.to}: {summary.documents} documents, {summary.tokens} tokens, {summary.bytes / _MIB:.1f} MiB "
        f"in {summary.seconds:.1f} s"
    )
    blank = f", {summary.blank} blank" if summary.blank else ""
    left_out = f", {len(summary.skipped)} left out" if summary.skipped else ""
    console.print(f"{summary.computed} computed, {summary.kept} kept, {summary.dropped} dropped{blank}{left_out}")
    return int(bool(summary.skipped))


def _is_on_cluster() -> bool:
    """Return whether there is a Ray cluster that workers can be on."""
    return bool(os.environ.get("RAY_ADDRESS")) and find_spec("ray") is not None


def _show_progress(total: int, *, is_shown: bool) -> Callable[[], object]:
    """Return what counts a document; a terminal shows a bar."""
    bar = tqdm(total=total, desc="computing KV", unit="document", leave=False, disable=None if is_shown else True)
    return bar.update
