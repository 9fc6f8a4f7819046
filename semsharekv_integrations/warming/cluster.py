"""Computes the KV of documents on a Ray cluster, by Ray Data. Needs the extra ``ray``.

Workers get texts and give back KV in bytes, so they need no disk in common with the process that writes the library.
The model's name must mean the same to all of them.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError, RayTaskError

from semsharekv_integrations.errors import SemShareError
from semsharekv_integrations.store.library import KVFacts
from semsharekv_integrations.warming.computing import INCOMING, Computed, Computer, ModelSpec, Task, take_handed
from semsharekv_integrations.warming.folder import UnusableDocumentError, read_document

PIECE_BYTES = 64 * 1024**2  # of KV in one row: a column of Arrow's has 2 GiB at most
_COLUMNS = {
    "key": pa.string(),
    "digest": pa.string(),
    "reason": pa.string(),
    "offset": pa.int64(),
    "total": pa.int64(),
    "piece": pa.binary(),
}


class Workers(NamedTuple):
    """How many compute at the same time, and what each of them takes of the cluster."""

    number: int
    cpus: int = 0
    gpus: int = 0

    @property
    def options(self) -> dict[str, int]:
        """Return it as Ray is told."""
        return {"num_gpus": self.gpus} if self.gpus else {"num_cpus": self.cpus}


class Worker:
    """Computes documents in a process of the cluster's."""

    def __init__(self, spec: ModelSpec, threads: int) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._computer = Computer(spec)

    def __call__(self, texts: pa.Table) -> Iterator[pa.Table]:
        """Yield what becomes of each text, its KV in pieces."""
        for row in texts.to_pylist():
            for told in self._compute(row["key"], row["text"]):
                yield pa.table({name: pa.array([told[name]], kind) for name, kind in _COLUMNS.items()})

    def _compute(self, key: str, text: str) -> Iterator[Mapping[str, Any]]:
        computed = self._computer.compute_text(key, text)
        told = {"key": key, "digest": computed.digest, "reason": computed.reason}
        with tempfile.TemporaryDirectory(prefix=INCOMING) as folder:
            path = Path(folder, "kv.safetensors")
            if not computed.reason:
                self._computer.save(path)
            total = 0 if computed.reason else path.stat().st_size
            yield from ({**told, "offset": at, "total": total, "piece": part} for at, part in _read_pieces(path, total))


def _read_pieces(path: Path, total: int) -> Iterator[tuple[int, bytes]]:
    """Yield the pieces of a file, each with where it begins; a single empty one for a file of no bytes."""
    if not total:
        yield 0, b""
        return
    with path.open("rb") as file:
        for offset in range(0, total, PIECE_BYTES):
            yield offset, file.read(PIECE_BYTES)


class Cluster:
    """Computes documents in as many workers as there are, each with a model of its own."""

    def __init__(self, spec: ModelSpec, workers: Workers, folder: Path) -> None:
        self._spec = spec
        self._workers = workers
        self._incoming = Incoming(folder)
        self._facts: KVFacts | None = None

    def describe(self) -> KVFacts:
        """Load the model in a worker, and return what its KV fits to."""
        described = ray.remote(**self._workers.options)(_describe).remote(self._spec)
        self._facts = ray.get(described)
        return self._facts

    def compute(self, tasks: Iterable[Task]) -> Iterator[Computed]:
        """Yield what becomes of each task, as they finish."""
        texts = []
        for key, path in tasks:
            try:
                texts.append({"key": key, "text": read_document(key, path)})
            except UnusableDocumentError as error:
                yield Computed(key, reason=str(error))
        if not texts:
            return
        rows = ray.data.from_items(texts, override_num_blocks=len(texts)).map_batches(
            Worker,
            fn_constructor_args=(self._spec, self._workers.cpus),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=1, max_size=self._workers.number),
            **self._workers.options,
        )
        rows.context.enable_progress_bars = False
        for row in rows.iter_rows():
            whole = self._incoming.take(row)
            if whole is not None:
                computed = Computed(row["key"], row["digest"], reason=row["reason"])
                yield computed if computed.reason else take_handed(computed, whole, self._facts)


class Incoming:
    """Puts the pieces of files together again, which come in any order."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._missing: dict[str, int] = {}  # bytes, by document
        self._paths: dict[str, Path] = {}

    def take(self, row: Mapping[str, Any]) -> Path | None:
        """Write a piece; return the file if it is whole now."""
        key = row["key"]
        path = self._paths.setdefault(key, self._folder / f"{len(self._paths)}.safetensors")
        with path.open("r+b" if key in self._missing else "wb") as file:
            file.seek(row["offset"])
            file.write(row["piece"])
        left = self._missing[key] = self._missing.get(key, row["total"]) - len(row["piece"])
        return None if left else path


def _describe(spec: ModelSpec) -> KVFacts:
    return Computer(spec).describe()


def find_workers(spec: ModelSpec, count: int | None) -> Workers:
    """Return the workers of the cluster: one for each GPU, or if there are none, for each machine; or ``count``."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(each.get("GPU", 0) for each in resources))
    if gpus and spec.device != "cpu":
        return Workers(gpus if count is None else min(count, gpus), gpus=1)
    cpus = [int(each["CPU"]) for each in resources if each.get("CPU", 0) >= 1]
    if not cpus:
        raise SemShareError("the Ray cluster has no processors for workers")
    count = len(cpus) if count is None else min(count, sum(cpus))
    return Workers(count, cpus=max(1, min(cpus) * len(cpus) // count))


@contextmanager
def open_cluster(spec: ModelSpec, count: int | None, folder: Path) -> Iterator[Cluster]:
    """Compute on the cluster that this process is connected to, else that ``RAY_ADDRESS`` names, else in a new one."""
    is_own = not ray.is_initialized()
    if is_own:
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    try:
        with tempfile.TemporaryDirectory(prefix=INCOMING, dir=folder) as incoming:
            yield Cluster(spec, find_workers(spec, count), Path(incoming))
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        raise OSError(
            f"the Ray cluster failed; what was computed is kept, so run the command again: {error}"
        ) from error
    finally:
        if is_own:
            ray.shutdown()
