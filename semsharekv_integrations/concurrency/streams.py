"""What a job yields, read by a thread or by a task, and several jobs at once: taking turns, and reading all of them."""

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
Item = TypeVar("Item")


class Stream(Generator[T, None, None]):
    """Iterates over a job's items. Asking for the first begins the job; closing or dropping the stream leaves it.

    Args:
        scheduler: serves the job.
        begin: makes the job's items.
        shows: whether an item comes out. The others are only computed.
    """

    _job: Job[T] | None = None  # also of one whose making was interrupted

    def __init__(
        self, scheduler: Scheduler, begin: Callable[[], Generator[T, None, None]], shows: Callable[[T], bool]
    ) -> None:
        self._scheduler = scheduler
        self._begin = begin
        self._shows = shows
        self._came: SimpleQueue[T | JobEnd] = SimpleQueue()
        self._own: Generator[T, None, None] | None = None  # what is computed here
        self._is_over = False

    def run_ahead(self) -> Stream[T]:
        """Begin the job, which then goes on unread; return this stream. In a scheduler's thread, begin nothing."""
        if not self._scheduler.serves_here:
            job = self._make()
            job.runs_ahead = True
            self._scheduler.ask(job)
        return self

    def send(self, value: None) -> T:
        """Wait for the next item and return it. Raises the job's error, or ``StopIteration`` at its end."""
        if self._is_over:
            raise StopIteration
        try:
            item = self._take()
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
        """Close the stream and raise the error; the job does not see it."""
        self.close()
        return super().throw(*error)

    def close(self) -> None:
        """End the stream and leave the job. What this thread computes itself gets ``JobLeft`` raised in it."""
        self._is_over = True
        if self._job is not None:
            self._scheduler.leave(self._job)
        own, self._own = self._own, None
        if own is not None:
            with suppress(JobLeft, StopIteration):
                own.throw(JobLeft())

    def __del__(self) -> None:
        if self._job is not None:
            self._scheduler.leave(self._job)

    def _make(self) -> Job[T]:
        if self._job is None:
            self._job = Job(self._begin(), self._shows, self._came.put)
        return self._job

    def _take(self) -> T | JobEnd:
        """Return the next shown item or the job's end. Compute it in a scheduler's thread, else wait for it."""
        if self._own is not None or (self._job is None and self._scheduler.serves_here):
            self._own = self._own or self._begin()
            return next((item for item in self._own if self._shows(item)), JobEnd())
        job = self._make()
        if self._came.empty() and not job.has_ended:
            job.reader, job.is_wanted = threading.current_thread(), True
            self._scheduler.ask(job)
        return self._came.get()


async def read_async(
    scheduler: Scheduler, begin: Callable[[], Generator[T, None, None]], shows: Callable[[T], bool]
) -> AsyncGenerator[T, None]:
    """Yield the items of a job without blocking the event loop; raise the job's error. Arguments are as for ``Stream``.

    The job does not wait for its reader. Closing this generator leaves the job.
    """
    if scheduler.serves_here:
        for item in Stream(scheduler, begin, shows):
            yield item
        return
    loop, came = asyncio.get_running_loop(), asyncio.Queue[T | JobEnd]()
    stream = Stream(scheduler, begin, shows)  # which leaves the job when it is dropped, even after the loop is closed

    def deliver(item: T | JobEnd) -> None:
        try:
            loop.call_soon_threadsafe(came.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody listens any more
            job.is_left = True

    job = stream._job = Job(begin(), shows, deliver, loop)
    try:
        stream.run_ahead()
        while not isinstance(found := await came.get(), JobEnd):
            yield found
        if found.error is not None:
            raise found.error
    finally:
        stream.close()


class PrefillQueue:
    """Admits one call at a time to plan and prefill; the others wait."""

    def __init__(self) -> None:
        self.go_on_in_child()
        tell_of_forks(self)

    def go_on_in_child(self) -> None:
        """Make the turn free in this process. In a forked child, the parent keeps its own."""
        self._turn = threading.Lock()

    @contextmanager
    def admit(self, waiting: AbstractContextManager[object] | None = None) -> Iterator[None]:
        """Hold the turn for the block, and free it after. If another call has it, wait for it within ``waiting``."""
        if not self._turn.acquire(blocking=False):
            with waiting or nullcontext():
                self._turn.acquire()
        try:
            yield
        finally:
            self._turn.release()


def run_each(call: Callable[[Item], T], items: Sequence[Item], max_threads: int) -> list[T | Exception]:
    """Call ``call`` with each item in threads, and return in order what it returned or the ``Exception`` it raised.

    A failure does not stop the others. Any other exception, such as Ctrl-C, is raised, and pending calls are dropped.
    """
    pool = ThreadPoolExecutor(max_threads)
    try:
        return _collect([pool.submit(contextvars.copy_context().run, call, item) for item in items])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # interrupted, it waits for none


def read_all(
    begin: Iterable[Callable[[], Stream[T]]], hear: Callable[[T], object] = lambda item: None
) -> list[list[T] | Exception]:
    """Run the streams that ``begin`` makes at the same time; return for each, in order, its items or its ``Exception``.

    ``hear`` gets each item of the first. A failure does not stop the others; Ctrl-C closes them all and is raised.
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
                done.append(stream if isinstance(stream, Exception) else _read_to_end(stream, None if index else hear))
            except Exception as error:
                done.append(error)
        return done
    finally:
        for stream in begun:
            if not isinstance(stream, Exception):
                stream.close()


def _read_to_end(stream: Stream[T], hear: Callable[[T], object] | None) -> list[T]:
    """Return all items of the stream; pass each to ``hear`` as it comes. Raises what either of them raises."""
    items = []
    for item in stream:
        if hear is not None:
            hear(item)
        items.append(item)
    return items


def _collect(futures: Iterable[Future[T]]) -> list[T | Exception]:
    """Wait for the futures; return in order each result or ``Exception``. Raises an error that is no ``Exception``."""
    found: list[T | Exception] = []
    for future in futures:
        error = future.exception()
        if error is not None and not isinstance(error, Exception):
            raise error
        found.append(future.result() if error is None else error)
    return found


def raise_first_error(outcomes: Sequence[T | BaseException]) -> list[T]:
    """Raise the first outcome that is an error. If none is, return all outcomes as a list."""
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return cast(list[T], list(outcomes))
