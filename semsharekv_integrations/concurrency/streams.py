"""What a call yields, read by a thread or by a task; the call is driven elsewhere (``calls``).

Several calls at once: taking turns, and what a batch comes to.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from queue import SimpleQueue
from typing import Any, TypeVar, cast

from semsharekv_integrations.concurrency.scheduler import Job, JobEnd, JobLeft, Scheduler
from semsharekv_integrations.concurrency.threads import tell_of_forks

T = TypeVar("T")


class Stream(Generator[T, None, None]):
    """What a call yields, in the reader's own time; the call begins when its first item is asked for.

    To close it is to leave the call, and so is to drop it: neither waits for anything.

    Args:
        calls: that serve it.
        begin: makes the call's items.
        shows: which of them come out.
    """

    _call: Job[T] | None = None  # also of one whose making was interrupted

    def __init__(
        self, calls: Scheduler, begin: Callable[[], Generator[T, None, None]], shows: Callable[[T], bool]
    ) -> None:
        self._calls = calls
        self._begin = begin
        self._shows = shows
        self._came: SimpleQueue[T | JobEnd] = SimpleQueue()
        self._own: Generator[T, None, None] | None = None  # what is computed here
        self._is_over = False

    def run_ahead(self) -> Stream[T]:
        """Begin the call, and have it go on whether or not it is read; this stream."""
        if not self._calls.serves_here:
            call = self._made()
            call.runs_ahead = True
            self._calls.ask(call)
        return self

    def send(self, value: None) -> T:
        """The next item."""
        if self._is_over:
            raise StopIteration
        try:
            item = self._taken()
        except BaseException:
            self.close()
            raise
        if not isinstance(item, JobEnd):
            return item
        self._is_over = True
        if item.error is None:
            raise StopIteration
        try:
            raise item.error
        finally:
            del item  # which holds the error, and that its traceback, and that this frame

    def throw(self, *error: Any) -> T:
        """Close it and raise the error."""
        self.close()
        return super().throw(*error)

    def close(self) -> None:
        """Leave the call."""
        self._is_over = True
        if self._call is not None:
            self._calls.leave(self._call)
        own, self._own = self._own, None
        if own is not None:
            with suppress(JobLeft, StopIteration):
                own.throw(JobLeft())

    def __del__(self) -> None:
        if self._call is not None:
            self._calls.leave(self._call)

    def _made(self) -> Job[T]:
        if self._call is None:
            self._call = Job(self._begin(), self._shows, self._came.put)
        return self._call

    def _taken(self) -> T | JobEnd:
        if self._own is not None or (self._call is None and self._calls.serves_here):
            self._own = self._own or self._begin()
            return next((item for item in self._own if self._shows(item)), JobEnd())
        call = self._made()
        if self._came.empty() and not call.has_ended:
            call.reader, call.is_wanted = threading.current_thread(), True
            self._calls.ask(call)
        return self._came.get()


async def read_async(
    calls: Scheduler, begin: Callable[[], Generator[T, None, None]], shows: Callable[[T], bool]
) -> AsyncGenerator[T, None]:
    """What a call yields, without blocking the event loop. It runs ahead; ended early, it leaves the call."""
    if calls.serves_here:
        for item in Stream(calls, begin, shows):
            yield item
        return
    loop, came = asyncio.get_running_loop(), asyncio.Queue[T | JobEnd]()
    stream = Stream(calls, begin, shows)  # which leaves the call when it is dropped, even after the loop is closed

    def deliver(item: T | JobEnd) -> None:
        try:
            loop.call_soon_threadsafe(came.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody listens any more
            call.is_left = True

    call = stream._call = Job(begin(), shows, deliver, loop)
    try:
        stream.run_ahead()
        while not isinstance(found := await came.get(), JobEnd):
            yield found
        if found.error is not None:
            raise found.error
    finally:
        stream.close()


Item = TypeVar("Item")


class PrefillQueue:
    """Admits one call at a time to plan and prefill; the others wait."""

    def __init__(self) -> None:
        self.go_on_in_child()
        tell_of_forks(self)

    def go_on_in_child(self) -> None:
        """The turn is nobody's; who has it in a parent has it there."""
        self._turn = threading.Lock()

    @contextmanager
    def admit(self, waiting: AbstractContextManager[object] | None = None) -> Iterator[None]:
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
