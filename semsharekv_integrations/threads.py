"""Work in threads that no signal reaches: what a signal's handler raises, it raises in the main thread alone."""

from __future__ import annotations

import _thread
import contextvars
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar, cast

T = TypeVar("T")


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


def carried_out(work: Callable[[], T]) -> T:
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
