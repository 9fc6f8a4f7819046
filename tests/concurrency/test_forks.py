"""A forked child goes on in memory alone: whatever it does and however it ends, the parent's directory is as it was."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from kept_prompts import FINGERPRINT, Clock, config_of, lookup, opened, put_all, reference
from semsharekv_integrations.concurrency import threads as forks
from semsharekv_integrations.errors import StoreLockedError, StoreWriteError
from semsharekv_integrations.store import KVStore
from semsharekv_integrations.store.directory import KVDirectory
from stored_kv import entry, fill, records
from tiny_models import EngineMaker

IN_MEMORY, ON_DISK = (7, 7, 7), (1, 2, 3, 4)


def in_child(run: Callable[[], object]) -> None:
    """Run it in a forked child, with all that is collected at its end; its errors are this one's."""
    child = os.fork()
    if child == 0:
        try:
            run()
            gc.collect()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, "the child failed"


@pytest.fixture
def store(tmp_path: Path) -> KVStore:
    """One prompt on disk alone, one in memory as well."""
    clock = Clock()
    with closing(opened(config_of(directory=tmp_path), clock)) as first:
        put_all(first, clock, [ON_DISK])
    store = opened(config_of(directory=tmp_path), clock)
    put_all(store, clock, [IN_MEMORY])
    return store


def files_of(path: Path) -> dict[str, bytes]:
    """All but the index of the log, in which readers leave marks."""
    return {item.name: item.read_bytes() for item in (path / FINGERPRINT).iterdir() if not item.name.endswith("-shm")}


TRY = """
import fcntl, os, sys
try:
    fcntl.flock(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("free")
except BlockingIOError:
    print("taken")
"""


def is_locked(path: Path) -> bool:
    """As another process sees it."""
    command = [sys.executable, "-c", TRY, str(path / FINGERPRINT / "lock")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout == "taken\n"


def refuse(store: KVStore) -> None:
    with pytest.raises(StoreLockedError):
        opened(store.config)


DEEDS: dict[str, Callable[[KVStore], object]] = {
    "nothing": lambda store: None,
    "closing": lambda store: store.close(),
    "forgetting": lambda store: (store.clear(), store.check()),
    "writing": lambda store: (store.put(reference((5, 6))), store.check()),
    "reading": lambda store: (lookup(store, IN_MEMORY), store.check()),
    "opening": refuse,
}


@pytest.mark.parametrize("deed", DEEDS)
def test_what_a_child_does_never_reaches_the_directory(store: KVStore, tmp_path: Path, deed: str) -> None:
    before = files_of(tmp_path)
    in_child(lambda: DEEDS[deed](store))
    assert files_of(tmp_path) == before and is_locked(tmp_path)
    assert store.put(reference((8, 9))) and store.stats()["write_failed"] == 0
    store.check()
    store.close()
    again = opened(config_of(directory=tmp_path))
    assert {tuple(kept.token_ids.tolist()) for kept in again.references()} == {IN_MEMORY, ON_DISK, (8, 9)}
    again.close()


def test_a_child_has_what_is_in_memory(store: KVStore) -> None:
    def go_on() -> None:
        assert lookup(store, IN_MEMORY) == 3 and lookup(store, ON_DISK) == 0
        assert store.put(reference((5, 6))) and lookup(store, (5, 6)) == 2
        assert store.stats()["disk_bytes"] == 0
        store.check()
        in_child(lambda: lookup(store, (5, 6)) == 2 or os._exit(1))

    in_child(go_on)
    assert lookup(store, ON_DISK) == 4 and lookup(store, (5, 6)) == 0
    store.close()


def test_a_child_that_outlives_its_parents_store_holds_nothing(store: KVStore, tmp_path: Path) -> None:
    """Others may open the directory, and what the child then does harms them no more."""
    go, gone = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.read(go[0], 1)
        store.close()
        gc.collect()
        is_refused = False
        try:
            KVDirectory(tmp_path, FINGERPRINT)
        except StoreLockedError as error:
            is_refused = "was open when this process was forked" in str(error)
        os.write(gone[1], b"." if is_refused else b"x")
        os._exit(0)
    store.close()
    assert not is_locked(tmp_path)
    again = opened(config_of(directory=tmp_path))
    again.put(reference((8, 9)))
    os.write(go[1], b".")
    assert os.read(gone[0], 1) == b"."
    os.waitpid(child, 0)
    again.check()
    again.close()
    assert len(opened(config_of(directory=tmp_path)).references()) == 3


def test_a_directory_fails_in_the_child_and_serves_the_parent(tmp_path: Path) -> None:
    with closing(KVDirectory(tmp_path, FINGERPRINT)) as directory:
        fill(directory)
        before = records(directory)

        def use() -> None:
            with pytest.raises(StoreWriteError):
                directory.record(entries=[entry("new", "r")])
            directory.close()

        in_child(use)
        assert records(directory) == before
        directory.record(entries=[entry("new", "r")])
        directory.check()


def test_a_lock_that_another_thread_holds_is_free_in_the_child(store: KVStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fork waits until it is let go, so that nothing is half-done."""
    held, waiting = threading.Event(), threading.Event()
    steps: list[str] = []

    class Waited:
        """The lock of the store, which tells that a fork waits for it."""

        def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
            waiting.set()
            return store._lock.acquire(blocking, timeout)

        def release(self) -> None:
            store._lock.release()

    def work() -> None:
        with store._lock:
            held.set()
            waiting.wait(30)
            steps.append("done")

    monkeypatch.setattr(forks, "_locks", {Waited()})
    thread = threading.Thread(target=work)
    thread.start()
    held.wait(30)
    in_child(lambda: (steps == ["done"] and lookup(store, IN_MEMORY) == 3) or os._exit(1))
    thread.join()
    assert lookup(store, IN_MEMORY) == 3
    store.close()


def test_a_lock_that_is_never_let_go_delays_a_fork_no_longer(store: KVStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "LONGEST_WAIT_S", 0.01)
    held, go = threading.Event(), threading.Event()

    def work() -> None:
        with store._lock:
            held.set()
            go.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    held.wait(30)
    in_child(lambda: store.stats()["entries"] == 1 or os._exit(1))
    go.set()
    thread.join()
    assert store.stats()["entries"] == 2
    store.close()


ENDING = """
import multiprocessing, os, sys
from pathlib import Path
from kept_prompts import config_of, opened, reference
store = opened(config_of(directory=Path(sys.argv[1])))
store.put(reference((7, 7, 7)))
import weakref
class Engine: pass
engine = Engine()
weakref.finalize(engine, store.close)
if sys.argv[2] == "fork":
    if os.fork() == 0:
        sys.exit(0)
    os.wait()
else:
    worker = multiprocessing.get_context("fork").Process(target=store.put, args=(reference((8, 8)),))
    worker.start()
    worker.join()
import subprocess
lock = next(Path(sys.argv[1]).glob("*/lock"))
print(subprocess.run([sys.executable, "-c", sys.argv[3], str(lock)], capture_output=True, text=True).stdout.strip())
store.put(reference((9, 9)))
store.check()
print(store.stats()["write_failed"])
"""


@pytest.mark.parametrize("way", ["fork", "multiprocessing"])
def test_a_child_that_ends_as_scripts_do(tmp_path: Path, way: str) -> None:
    """With all finalizers, and the modules torn down."""
    path = os.pathsep.join([str(Path(__file__).parents[1] / "support"), *sys.path])
    command = [sys.executable, "-c", ENDING, str(tmp_path), way, TRY]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.stdout.split() == ["taken", "0"], done
    again = opened(config_of(directory=tmp_path))
    assert len(again.references()) == 2 and not any(again.stats()[f"disk_{name}"] for name in ("damaged", "orphans"))
    again.close()


def test_a_child_computes_while_its_parents_threads_are_in_the_middle(
    make_engine: EngineMaker, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a forward pass, which may take longer than a fork may wait, and in what takes any of the other locks."""
    monkeypatch.setattr(forks, "LONGEST_WAIT_S", 0.01)
    engine, parent = make_engine("semantic"), os.getpid()
    asked = {"documents": {"a": "The mayor of Velmar."}, "max_new_tokens": 3}
    prompt = "The mayor of Velmar. Who?"
    wanted = engine.generate(prompt, **asked).token_ids
    inside, go = threading.Event(), threading.Event()
    forward = llama.forward

    def held(*args: Any, **options: Any) -> Any:
        if os.getpid() == parent:
            inside.set()
            go.wait(60)
        return forward(*args, **options)

    def use() -> None:
        signal.alarm(30)  # which ends a child that hangs
        assert engine.generate(prompt, **asked).token_ids == wanted
        assert engine.forget("a") > 0
        engine.stats()

    monkeypatch.setattr(llama, "forward", held)
    with ExitStack() as locks:
        thread = threading.Thread(target=engine.generate, args=["Another"], kwargs={"max_new_tokens": 1})
        thread.start()
        assert inside.wait(60)
        for lock in (engine._memory._lock, engine._memory.known._lock, engine.auditor._lock, engine._counting):
            locks.enter_context(held_elsewhere(lock))
        in_child(use)
    go.set()
    thread.join()
    assert engine.generate(prompt, **asked).token_ids == wanted


@contextmanager
def held_elsewhere(lock: Any) -> Iterator[None]:
    """Inside, another thread has the lock."""
    has, go = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            has.set()
            go.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    has.wait(60)
    try:
        yield
    finally:
        go.set()
        thread.join()


def test_a_fork_waits_for_locks_in_whatever_order_others_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has one may wait for another that the fork has already."""
    first, second = threading.Lock(), threading.Lock()
    monkeypatch.setattr(forks, "_locks", {first: None, second: None})
    has, steps = threading.Event(), list[str]()

    def work() -> None:
        with second:
            has.set()
            with first:
                steps.append("done")

    first.acquire()
    thread = threading.Thread(target=work)
    thread.start()
    has.wait(60)
    first.release()
    in_child(lambda: (steps == ["done"] and not first.locked() and not second.locked()) or os._exit(1))
    thread.join()
