"""Several calls at once: taking turns, and what a batch comes to."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar, cast

from semsharekv_integrations.forks import tell_of_forks
from semsharekv_integrations.streams import Stream

T = TypeVar("T")
Item = TypeVar("Item")


class Turns:
    """Calls that run at the same time, one of which at a time has its turn."""

    def __init__(self) -> None:
        self.go_on_in_child()
        tell_of_forks(self)

    def go_on_in_child(self) -> None:
        """The turn is nobody's; who has it in a parent has it there."""
        self._turn = threading.Lock()

    @contextmanager
    def taken(self, waiting: AbstractContextManager[object] | None = None) -> Iterator[None]:
        """Wait for the turn, inside of ``waiting`` if it is not free, and have it inside."""
        if not self._turn.acquire(blocking=False):
            with waiting or nullcontext():
                self._turn.acquire()
        try:
            yield
        finally:
            self._turn.release()


def outcomes_of(call: Callable[[Item], T], items: Sequence[Item], max_threads: int) -> list[T | Exception]:
    """What ``call`` returns for each item, or raises, in order; each in a thread, so many at a time.

    An item whose call fails takes none of the others down.
    """
    pool = ThreadPoolExecutor(max_threads)
    try:
        return _outcomes([pool.submit(contextvars.copy_context().run, call, item) for item in items])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # interrupted, it waits for none


def all_of_streams(
    begin: Iterable[Callable[[], Stream[T]]], hear: Callable[[T], object] = lambda item: None
) -> list[list[T] | Exception]:
    """All items of each stream, or what it raises, in order; they run at the same time. ``hear`` is told the first's.

    A stream that fails takes none of the others down; what interrupts this, such as Ctrl-C, ends them all.
    """
    begun: list[Stream[T] | Exception] = []
    done: list[list[T] | Exception] = []
    try:
        for begin_one in begin:
            try:
                begun.append(begin_one().run_ahead())
            except Exception as error:
                begun.append(error)
        for index, stream in enumerate(begun):
            try:
                done.append(stream if isinstance(stream, Exception) else _all_of(stream, None if index else hear))
            except Exception as error:
                done.append(error)
        return done
    finally:
        for stream in begun:
            if not isinstance(stream, Exception):
                stream.close()


def _all_of(stream: Stream[T], hear: Callable[[T], object] | None) -> list[T]:
    items = []
    for item in stream:
        if hear is not None:
            hear(item)
        items.append(item)
    return items


def _outcomes(futures: Iterable[Future[T]]) -> list[T | Exception]:
    """What each future comes to, in order; what is no ``Exception`` is raised."""
    found: list[T | Exception] = []
    for future in futures:
        error = future.exception()
        if error is not None and not isinstance(error, Exception):
            raise error
        found.append(future.result() if error is None else error)
    return found


def raising(outcomes: Sequence[T | BaseException]) -> list[T]:
    """The outcomes, if none of them is an error; else the first error is raised."""
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return cast(list[T], list(outcomes))
