"""Computes the KV of documents: in this process, or in several, each with a copy of the model.

Every document is computed as a prompt of its own, by ``SemShareEngine.warm``, as it would be in an engine's store.
"""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from semsharekv_integrations.config import EngineConfig, ReuseConfig, StoreConfig
from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.errors import SemShareError, StoreFileError
from semsharekv_integrations.kv import Reference
from semsharekv_integrations.model.loading import hide_progress_bars
from semsharekv_integrations.store.codec import read_references
from semsharekv_integrations.store.library import NAMESPACE, KVFacts, digest_text
from semsharekv_integrations.warming.folder import UnusableDocumentError, read_document

INCOMING = ".incoming-"  # what folders begin with in which workers leave what they computed
_UNBOUNDED = 2**62
Task = tuple[str, Path]  # a document's id and file


class ModelSpec(NamedTuple):
    """Which model to load, as ``SemShareEngine.from_pretrained`` takes it."""

    model: str
    device: str | None = None
    dtype: str = "auto"


class Computed(NamedTuple):
    """What became of a document: its KV, or the reason why it has none."""

    key: str
    digest: str = ""  # of the text that was read
    references: Sequence[Reference] = ()
    reason: str = ""


class Computing(Protocol):
    """A way to compute documents."""

    def describe(self) -> KVFacts:
        """Load the model and return what its KV fits to."""
        ...

    def compute(self, tasks: Iterable[Task]) -> Iterator[Computed]:
        """Yield what becomes of each task, in any order."""
        ...


class Computer:
    """Computes documents in this process, one after another."""

    def __init__(self, spec: ModelSpec) -> None:
        hide_progress_bars()
        config = EngineConfig(reuse=ReuseConfig(mode="exact"), store=StoreConfig(max_bytes=_UNBOUNDED))
        self._engine = SemShareEngine.from_pretrained(spec.model, config, spec.device, spec.dtype)

    def describe(self) -> KVFacts:
        """Load the model and return what its KV fits to."""
        _ = self._engine.model
        return self._engine.describe_kv()

    def compute(self, tasks: Iterable[Task]) -> Iterator[Computed]:
        """Yield what becomes of each task, in order."""
        yield from (self.compute_one(*task) for task in tasks)

    def compute_one(self, key: str, path: Path) -> Computed:
        """Read a document and compute its KV. Only the latest document's stays here."""
        try:
            return self.compute_text(key, read_document(key, path))
        except UnusableDocumentError as error:
            return Computed(key, reason=str(error))

    def compute_text(self, key: str, text: str) -> Computed:
        """Compute the KV of a document. Only the latest document's stays here."""
        self._engine.clear()
        try:
            self._engine.warm({key: text}, namespace=NAMESPACE)
        except (SemShareError, ValueError) as error:  # too long, too large for the device, beyond the vocabulary
            return Computed(key, reason=f"its KV cannot be computed: {error}")
        references = self._engine.store.fetch_all(NAMESPACE)
        reason = "" if references else "the model keeps no KV of it that another prompt could use"
        return Computed(key, digest_text(text), references, reason)

    def save(self, path: Path) -> None:
        """Write what the latest document left to a file."""
        self._engine.save(path)


class _Handed(NamedTuple):
    """What a worker tells of a document; its KV lies in a file."""

    computed: Computed
    path: Path


_computer: Computer | None = None  # of a worker


def _begin_worker(spec: ModelSpec, numbers: SimpleQueue[int], threads: int) -> None:
    """Prepare a worker: it leaves Ctrl-C to the process that began it. Loads nothing yet, so that errors are told."""
    global _computer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    number, devices = numbers.get(), torch.cuda.device_count()
    if spec.device is None and devices > 1:
        spec = spec._replace(device=f"cuda:{number % devices}")
    torch.set_num_threads(threads)
    _computer = Computer(spec)


def _describe_worker() -> KVFacts:
    assert _computer is not None
    return _computer.describe()


def _compute_in_worker(key: str, path: Path, to: Path) -> _Handed:
    """Compute a document, and leave its KV in the file ``to``."""
    assert _computer is not None
    computed = _computer.compute_one(key, path)
    if not computed.reason:
        _computer.save(to)
    return _Handed(computed._replace(references=()), to)


class Pool:
    """Computes documents in ``count`` processes, which hand over KV in files of ``folder``."""

    def __init__(self, executor: ProcessPoolExecutor, count: int, folder: Path) -> None:
        self._executor = executor
        self._count = count
        self._folder = folder
        self._facts: KVFacts | None = None

    def describe(self) -> KVFacts:
        """Load the model in a worker, and return what its KV fits to."""
        self._facts = self._executor.submit(_describe_worker).result()
        return self._facts

    def compute(self, tasks: Iterable[Task]) -> Iterator[Computed]:
        """Yield what becomes of each task, as they finish. So many are begun that no worker waits, and no more."""
        upcoming, number = iter(tasks), 0
        pending: set[Future[_Handed]] = set()
        while True:
            for key, path in islice(upcoming, 2 * self._count - len(pending)):
                number += 1
                to = self._folder / f"{number}.safetensors"
                pending.add(self._executor.submit(_compute_in_worker, key, path, to))
            if not pending:
                return
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                handed = future.result()
                is_done = bool(handed.computed.reason)
                yield handed.computed if is_done else take_handed(handed.computed, handed.path, self._facts)


def take_handed(computed: Computed, path: Path, facts: KVFacts | None) -> Computed:
    """Return what a worker computed, with the KV in a file of its, which is deleted. ``facts`` are the first worker's.

    Raises ``SemShareError`` if the KV is of a model in another state.
    """
    assert facts is not None
    try:
        found = read_references(path, facts.fingerprint, torch.device("cpu"))
    except StoreFileError as error:
        raise SemShareError(f"a worker's model is in another state than the first one's: {error}") from error
    path.unlink()
    return computed._replace(references=found)


def open_computing(
    spec: ModelSpec, workers: int | None, folder: Path, *, on_ray: bool = False
) -> AbstractContextManager[Computing]:
    """Return a context in which documents are computed: here for one worker, else in so many processes, or on Ray.

    Raises ``SemShareError`` if Ray is asked for, and not installed.
    """
    if on_ray:
        try:
            from semsharekv_integrations.warming.cluster import open_cluster
        except ImportError as error:
            raise SemShareError(f'Ray needs {error.name}: pip install -e ".[ray]"') from error
        return open_cluster(spec, workers, folder)
    return _open_pool(spec, workers, folder) if workers and workers > 1 else _open_here(spec)


@contextmanager
def _open_here(spec: ModelSpec) -> Iterator[Computing]:
    yield Computer(spec)


@contextmanager
def _open_pool(spec: ModelSpec, workers: int, folder: Path) -> Iterator[Computing]:
    spawning: Any = get_context("spawn")
    numbers = spawning.SimpleQueue()
    for number in range(workers):
        numbers.put(number)
    given = spec, numbers, max(1, torch.get_num_threads() // workers)
    executor = ProcessPoolExecutor(workers, spawning, _begin_worker, given)
    try:
        with tempfile.TemporaryDirectory(prefix=INCOMING, dir=folder) as handed:
            yield Pool(executor, workers, Path(handed))
    except BrokenProcessPool as error:
        lost = "a worker ended before its time, perhaps for lack of memory; what was computed is kept"
        raise OSError(f"{lost}: run the command again, with fewer workers") from error
    finally:
        executor.shutdown(cancel_futures=True)
