"""Threads that no signal reaches, and both sides of a fork.

A signal's handler raises only in the main thread, so work that must not stop half-way runs in another one. A fork
copies a lock, but not the thread that would release it: locks named here are taken before a fork and released after.
"""

from __future__ import annotations

import _thread
import contextvars
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from time import monotonic
from typing import Protocol, TypeVar, cast
from weakref import WeakSet

T = TypeVar("T")
LONGEST_WAIT_S = 10.0  # for a lock: one that is not free then might never be


def start_thread(target: Callable[[], None]) -> None:
    """Have a helper thread, which no signal reaches, start ``target`` in a new thread; return at once."""

    def start() -> None:
        try:
            threading.Thread(target=target, name="semsharekv", daemon=False).start()  # Python joins it at exit
        except RuntimeError:  # there are no more threads than this one
            target()

    _thread.start_new_thread(start, ())  # a signal's handler that raises in ``Thread.start`` could leave it stuck


def carry_out(work: Callable[[], T]) -> T:
    """Return or raise what ``work`` does. It runs to its end, even if a signal's handler raises in the caller."""
    if threading.current_thread() is not threading.main_thread():
        return work()
    found: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
    context = contextvars.copy_context()

    def run() -> None:
        """Run ``work`` in the caller's context, and hand over its result or its error."""
        try:
            found.put((context.run(work), None))
        except BaseException as error:
            found.put((None, error))

    start_thread(run)
    result, error = found.get()
    if error is not None:
        raise error
    return cast(T, result)


def do_when_free(lock: threading.Lock, work: Callable[[], object]) -> None:
    """Run ``work`` with ``lock`` held: here if the lock is free, else later in a new thread. Does not wait."""

    def do_later() -> None:
        with lock:
            work()

    if not lock.acquire(blocking=False):
        start_thread(do_later)
        return
    try:
        work()
    finally:
        lock.release()


_Lock = TypeVar("_Lock", bound="Lock")


class Lock(Protocol):
    """A lock as ``threading`` has them, or an object that acts like one."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Acquire the lock; return False if that was not possible at once or in time."""

    def release(self) -> None:
        """Release the lock, so that others can acquire it."""


class Forked(Protocol):
    """An object that is told in a child process that it was forked, before any other thread is there."""

    def go_on_in_child(self) -> None:
        """Give up what belongs to the parent. Replace every lock that another of its threads may hold."""


_locks: WeakSet[Lock] = WeakSet()
_told: WeakSet[Forked] = WeakSet()
_known = threading.RLock()  # which guards these
_free: WeakSet[Lock] = WeakSet()
_held: list[Lock] = []  # while a fork is under way
_not_held: list[Lock] = []  # not let go in time


def hold_at_forks(lock: _Lock) -> _Lock:
    """Have every later fork wait for ``lock`` and hold it; return ``lock``. No thread may hold it for long."""
    with _known:
        _locks.add(lock)
    return lock


def free_in_children(lock: _Lock) -> _Lock:
    """Have ``lock`` free in every child, unless the forking thread holds it; return ``lock``. No fork waits for it."""
    with _known:
        _free.add(lock)
    return lock


def tell_of_forks(one: Forked) -> None:
    """Have ``one.go_on_in_child()`` called in every later child. Does not keep ``one`` alive."""
    with _known:
        _told.add(one)


def _take_locks() -> None:
    """Before a fork: acquire all locks to hold. Those not free within ``LONGEST_WAIT_S`` are noted as not held."""
    _known.acquire()
    until = monotonic() + LONGEST_WAIT_S
    locks = list(_locks)
    while (taken := _first_taken(locks)) is not None:
        for lock in locks[: locks.index(taken)]:  # the holder of ``taken`` may wait for these
            lock.release()
        has_time = taken.acquire(timeout=max(0.0, until - monotonic()))
        if not has_time:
            _held.extend(lock for lock in locks if lock.acquire(blocking=False))
            _not_held.extend(lock for lock in locks if lock not in _held)
            return
        taken.release()
    _held.extend(locks)


def _first_taken(locks: list[Lock]) -> Lock | None:
    """Acquire the locks in order; return the first that is not free, those before it held, or None if all were free."""
    return next((lock for lock in locks if not lock.acquire(blocking=False)), None)


def _release() -> None:
    """After a fork: release every lock that ``_take_locks`` acquired, and empty the list of those that it could not."""
    while _held:
        _held.pop().release()
    _not_held.clear()
    _known.release()


def _renew_in_child() -> None:
    """After a fork, in the child: reset locks of other threads, release ours, and call each ``go_on_in_child``."""
    for lock in [*_not_held, *_free]:
        renew = getattr(lock, "_at_fork_reinit", None)
        if renew is not None and not _is_own(lock):
            renew()
    _release()
    for one in list(_told):
        one.go_on_in_child()


def _is_own(lock: Lock) -> bool:
    """Return whether the running thread, which goes on in the child, holds ``lock``. False if the lock cannot say."""
    is_owned = getattr(lock, "_is_owned", None)
    return is_owned is not None and is_owned()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_take_locks, after_in_parent=_release, after_in_child=_renew_in_child)
