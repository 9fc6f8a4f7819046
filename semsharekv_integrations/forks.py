"""Both sides of a fork: locks are free on either side, and what the child must not share with its parent it gives up.

A fork copies a lock as it is, though the thread that would release it is not copied. So the locks named here are taken
before a fork, which leaves behind them nothing half-done, and released after it. Knows nothing about what they guard.
"""

from __future__ import annotations

import os
import threading
from typing import Protocol, TypeVar
from weakref import WeakSet

LONGEST_WAIT_S = 10.0  # for a lock: one that is not free then might never be

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
_known = threading.RLock()  # which guards both
_held: list[Lock] = []  # while a fork is under way


def hold_at_forks(lock: _Lock) -> _Lock:
    """``lock``, which is held from now on while the process forks; no thread may hold it for long."""
    with _known:
        _locks.add(lock)
    return lock


def tell_of_forks(one: Forked) -> None:
    """Call ``one.go_on_in_child()`` in every child, for as long as something else keeps ``one``."""
    with _known:
        _told.add(one)


def _before() -> None:
    _known.acquire()
    _held.extend(lock for lock in list(_locks) if lock.acquire(timeout=LONGEST_WAIT_S))


def _release() -> None:
    while _held:
        _held.pop().release()
    _known.release()


def _go_on() -> None:
    _release()
    for one in list(_told):
        one.go_on_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_release, after_in_child=_go_on)
