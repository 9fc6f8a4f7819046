"""Threads that no signal reaches, and both sides of a fork.

A signal's handler raises in the main thread alone, so work that must not stop half-way runs in another one. A fork
copies a lock as it is, but not the thread that would release it. So the module takes the locks named here before a
fork, while nothing behind them is half-done, and releases them after it. Knows nothing about what they guard.
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
    """Run ``target`` in a thread that Python joins at its end.

    An exception that a signal's handler raises in ``Thread.start`` may leave a lock there behind, for which the new
    thread waits for ever. So a thread that no signal reaches does it.
    """

    def start() -> None:
        try:
            threading.Thread(target=target, name="semsharekv", daemon=False).start()
        except RuntimeError:  # there are no more threads than this one
            target()

    _thread.start_new_thread(start, ())


def carry_out(work: Callable[[], T]) -> T:
    """What ``work`` returns. It is carried out whole, even if a signal's handler raises in the caller."""
    if threading.current_thread() is not threading.main_thread():
        return work()
    found: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
    context = contextvars.copy_context()

    def run() -> None:
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
    """Do ``work`` with ``lock`` held: now if nobody has it, else in a thread of its own. Never waits."""

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
    """As those of ``threading``."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Whether it is held now."""

    def release(self) -> None:
        """Let others take it."""


class Forked(Protocol):
    """What is told, in a child, that it was forked. No other thread is there yet."""

    def go_on_in_child(self) -> None:
        """Give up what belongs to the parent, and make locks that may be held anew."""


_locks: WeakSet[Lock] = WeakSet()
_told: WeakSet[Forked] = WeakSet()
_known = threading.RLock()  # which guards these
_free: WeakSet[Lock] = WeakSet()
_held: list[Lock] = []  # while a fork is under way
_not_held: list[Lock] = []  # not let go in time


def hold_at_forks(lock: _Lock) -> _Lock:
    """Hold ``lock`` during every fork from now on, and return it. No thread may hold it for long."""
    with _known:
        _locks.add(lock)
    return lock


def free_in_children(lock: _Lock) -> _Lock:
    """Make ``lock`` free in every child, unless the forking thread has it; return it. May be held for long."""
    with _known:
        _free.add(lock)
    return lock


def tell_of_forks(one: Forked) -> None:
    """Call ``one.go_on_in_child()`` in every child, for as long as something else keeps ``one``."""
    with _known:
        _told.add(one)


def _take_locks() -> None:
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
    """Take all, or those before the first that is not free."""
    return next((lock for lock in locks if not lock.acquire(blocking=False)), None)


def _release() -> None:
    while _held:
        _held.pop().release()
    _not_held.clear()
    _known.release()


def _renew_in_child() -> None:
    for lock in [*_not_held, *_free]:
        renew = getattr(lock, "_at_fork_reinit", None)
        if renew is not None and not _is_own(lock):
            renew()
    _release()
    for one in list(_told):
        one.go_on_in_child()


def _is_own(lock: Lock) -> bool:
    """Whether the running thread has it, which goes on in the child."""
    is_owned = getattr(lock, "_is_owned", None)
    return is_owned is not None and is_owned()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_take_locks, after_in_parent=_release, after_in_child=_renew_in_child)
