"""Calls in progress: who waits, which thread computes, and what becomes of a call that nobody reads any more.

A call is a ``Job``: a generator that the threads of a ``Scheduler`` compute, while callers only read what comes of it.
So a signal, such as Ctrl-C, or the garbage collector can stop a caller at any point, but no computation half-way. To
leave a job, that is to give it up unread, they only put it into a queue, which takes no lock; a thread then ends it.
Jobs beyond the bound wait in line, not computed.

Each idle thread waits for its own bell, not on a shared queue. There, another thread may take the job first, and
``SimpleQueue.get`` of Python 3.11 then goes on to wait without its timeout.
"""

from __future__ import annotations

import contextvars
import threading
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from itertools import islice
from queue import SimpleQueue
from time import perf_counter
from typing import Any, Generic, TypeVar

from semsharekv_integrations.concurrency.threads import carry_out, start_thread, tell_of_forks
from semsharekv_integrations.logs import log_trouble

T = TypeVar("T")
LOOK_S = 0.1  # how often an idle thread looks for work; it may delay the interpreter's exit so long
LINGER_S = 30.0  # the last idle thread waits so long for work: libraries take long to set up a new thread
_SERVED = threading.local()  # ``scheduler``: whose thread this is
GROUP: ContextVar[deque[Job[Any]] | None] = ContextVar("group", default=None)  # those that belong together
_CURRENT: ContextVar[Job[Any] | None] = ContextVar("call", default=None)


class JobLeft(BaseException):
    """Raised inside a job that nobody wants any more; the job may still save what it has."""


class JobEnd:
    """Marks the end of what a job yields, with the error that ended it, if any."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class Job(Generic[T]):
    """One call, as a generator that threads compute. Making a job adds it to the open group, if there is one.

    Args:
        items: generator of what the job yields; running it is the work.
        shows: whether the reader is told of an item.
        deliver: called with each such item, then with the ``JobEnd``, in the thread that computes.
        loop: the event loop in which the job is read, or None for a thread.

    Attributes:
        runs_ahead: whether it goes on without being asked for the next item.
        is_driven: whether a thread is at work on it.
        waited_s: how long it stood in line.
    """

    def __init__(
        self,
        items: Generator[T, None, None],
        shows: Callable[[T], bool],
        deliver: Callable[[T | JobEnd], object],
        loop: AbstractEventLoop | None = None,
    ) -> None:
        self.items: Generator[T, None, None] | None = items
        self.shows = shows
        self.deliver = deliver
        self.loop = loop
        self.runs_ahead = self.is_driven = self.is_left = self.has_begun = self.has_ended = False
        self.is_wanted = True
        self.waited_s = 0.0
        self.asked_at = perf_counter()
        self.reader = threading.current_thread()
        self.listeners: deque[SimpleQueue[None]] = deque()
        self.context = contextvars.copy_context()
        self.context.run(_CURRENT.set, self)
        group = GROUP.get()
        if group is not None:
            group.append(self)

    @property
    def is_read(self) -> bool:
        """Whether a reader of the job can still be there; always true while the main thread lives.

        Once it has ended, only a thread that Python joins, or code that runs at exit, can read a job. The main
        thread must not ask: a signal that interrupts ``is_alive`` could make it look ended.
        """
        main = threading.main_thread()
        if main.is_alive():
            return True
        if self.reader is not main:
            return self.reader.is_alive() and not self.reader.daemon
        return self.is_wanted or self.runs_ahead if self.loop is None else self.loop.is_running()

    def end(self) -> None:
        """Mark the job as ended, drop its generator and context, and wake every listener. Delivers nothing."""
        self.items = None
        self.context = contextvars.Context()
        self.has_ended = True
        while self.listeners:  # more may come meanwhile
            self.listeners.popleft().put(None)


def get_current_job() -> Job[Any] | None:
    """Return the job that the running code belongs to, or None outside of every job."""
    return _CURRENT.get()


def check_wanted() -> None:
    """Raise ``JobLeft`` if the job that the running code belongs to was left. Do nothing outside of every job."""
    job = _CURRENT.get()
    if job is not None and job.is_left:
        raise JobLeft


class Scheduler:
    """The calls of one engine, served first in, first out; one at a time takes its first step.

    A job that was begun goes from item to item as its reader asks for them, unless it runs ahead. While others stand
    in line, all that were begun run ahead to their end, so that a reader who is busy elsewhere holds up nobody.

    Args:
        most: bound on the jobs that are begun and not ended.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._is_dismissed = False
        self.go_on_in_child()
        tell_of_forks(self)

    def go_on_in_child(self) -> None:
        """Reset to no calls, threads or groups. In a forked child: those of the parent process stay with it."""
        self._lock = threading.Lock()  # of the threads that compute; no caller ever takes it
        self._mail: deque[Job[Any]] = deque()  # calls that want something
        self._idle: deque[threading.Lock] = deque()  # the bells of idle threads, last that of who computed last
        self._line: dict[Job[Any], None] = {}
        self._begun: dict[Job[Any], None] = {}
        self._leaving: deque[Job[Any]] = deque()  # left between two items
        self._groups: set[int] = set()
        self._threads: set[threading.Thread] = set()
        self._starting: list[bool] = [True]  # empty until the first of them is there

    @property
    def serves_here(self) -> bool:
        """Whether the running thread is one of this scheduler's, which compute themselves what they call."""
        return getattr(_SERVED, "scheduler", None) is self

    @property
    def has_concurrent_calls(self) -> bool:
        """Whether more than one job is begun or in line, or a group of jobs is open, so that more may come."""
        return bool(self._groups) or len(self._begun) + len(self._line) > 1

    @contextmanager
    def group_jobs(self) -> Iterator[None]:
        """Keep ``has_concurrent_calls`` true while the block runs, as it may make more jobs.

        Ctrl-C, or another error that is no ``Exception``, ends the block and leaves all jobs that it made.
        """
        group: deque[Job[Any]] = deque()
        former = GROUP.set(group)
        try:
            self._groups.add(id(group))
            yield
        except BaseException as error:
            if not isinstance(error, Exception):
                while group:
                    self.leave(group.pop())
            raise
        finally:
            self._groups.discard(id(group))
            GROUP.reset(former)

    def ask(self, job: Job[Any]) -> None:
        """Queue a job that its reader wants, and wake an idle thread or start the first one. Does not wait."""
        self._mail.append(job)
        self._wake_one()
        if not self._threads and self._starting:
            starting: list[bool] = []
            start_thread(partial(self._serve, starting))
            self._starting = starting  # only now, as an interruption may come in between

    def leave(self, job: Job[Any]) -> None:
        """Give up a job: have a thread end it. Do nothing if it has ended. Takes no lock and never waits."""
        if job.has_ended or job.is_left:
            return
        job.is_left = True
        is_computed = job.is_driven and (job.is_wanted or job.runs_ahead)
        if job.has_begun and not is_computed:  # also while its thread has yet to see that its reader wants no more
            self._leaving.append(job)
        self._mail.append(job)
        self._wake_one()

    def settle(self) -> None:
        """Wait until jobs left between two items have ended and saved their work. No wait in a scheduler's thread."""
        while self._leaving and not self.serves_here:
            job, heard = self._leaving[0], SimpleQueue[None]()
            job.listeners.append(heard)
            if job.has_ended:
                self._forget_leaving(job)
                continue
            self.ask(job)
            heard.get()

    def carry_out(self, work: Callable[[], T]) -> T:
        """Return or raise what ``work`` does. It runs to its end even if a signal's handler raises in the caller."""
        return work() if self.serves_here else carry_out(work)

    def dismiss(self) -> None:
        """Let idle threads end once no call is in progress, without lingering. Takes no lock and never waits."""
        self._is_dismissed = True

    def _wake_one(self) -> None:
        """Wake the idle thread that computed last, if any. Busy threads read the mail after their item."""
        with suppress(IndexError):
            self._idle.pop().release()

    def _serve(self, starting: list[bool]) -> None:
        """Be one thread: fill ``starting``, then drive jobs, waiting for a bell in between, until it may retire."""
        here = threading.current_thread()
        self._threads.add(here)
        starting.append(True)
        _SERVED.scheduler = self
        has_computed, idle_since = False, perf_counter()
        while True:
            bell = threading.Lock()
            bell.acquire()
            (self._idle.append if has_computed else self._idle.appendleft)(bell)
            job = self._take_next(bell)  # only now: whatever comes later finds the bell
            if job is None:
                alive = threading.main_thread().is_alive()
                lingers = alive and perf_counter() - idle_since < LINGER_S
                is_rung = bell.acquire(timeout=LOOK_S if alive else LOOK_S / 10)
                if not is_rung and self._may_retire(here, bell, lingers=lingers):
                    return
                continue
            while job is not None:
                self._drive(job)
                job = self._take_next(bell)
            has_computed, idle_since = True, perf_counter()

    def _may_retire(self, here: threading.Thread, bell: threading.Lock, *, lingers: bool) -> bool:
        """Return whether the thread may end, and if so remove it. False if somebody wakes it or mail came meanwhile.

        The idle thread that computed last stays while calls are not ended and, if it ``lingers``, until ``dismiss``.
        """
        with self._lock:
            try:
                is_last = self._idle[-1] is bell
                self._idle.remove(bell)
            except (IndexError, ValueError):  # somebody wakes it at this moment
                return False
            if is_last and (self._begun or self._line or (lingers and not self._is_dismissed)):
                return False
            self._threads.discard(here)
            if self._mail:  # it came in between
                self._threads.add(here)
                return False
            return True

    def _take_next(self, bell: threading.Lock) -> Job[Any] | None:
        """Return a job, now marked as driven, for the thread with this bell, or None. Wake another if work is left."""
        with self._lock:
            ready = self._take_ready()
            if not ready:
                return None
            with suppress(ValueError):
                self._idle.remove(bell)
            ready[0].is_driven = True
            if len(ready) > 1 or self._mail:
                self._wake_one()
            return ready[0]

    def _take_ready(self) -> list[Job[Any]]:
        """Read the mail, end jobs left in line, begin one, hire threads; return jobs to go on that have no thread."""
        new: list[Job[Any]] = []
        while self._mail:
            job = self._mail.popleft()
            if job.has_ended or job in self._begun:
                continue
            if not job.is_left:
                self._line[job] = None
                new.append(job)
            else:
                self._line.pop(job, None)
                self._end(job, JobEnd(CancelledError()))
        self._begin(new)
        ready = [job for job in self._begun if not job.is_driven and self._should_go_on(job)]
        self._employ(sum(job.is_driven for job in self._begun) + len(ready))
        return ready

    def _should_go_on(self, job: Job[Any]) -> bool:
        return bool(job.is_wanted or job.runs_ahead or job.is_left or self._line or not job.is_read)

    def _begin(self, new: list[Job[Any]]) -> None:
        """Count the first in line as begun, if there is room, all begun jobs have yielded and none is left."""
        if len(self._begun) >= self._most or any(not job.has_begun or job.is_left for job in self._begun):
            return
        for job in [*islice(self._line, 1)]:
            del self._line[job]
            job.waited_s = 0.0 if job in new else perf_counter() - job.asked_at
            self._begun[job] = None

    def _employ(self, driving: int) -> None:
        """Start threads until there is one for each call to drive and one more, within the bound and as Python can."""
        while len(self._threads) < min(self._most, 1 + driving):
            thread = threading.Thread(target=self._serve, args=([],), name="semsharekv")
            self._threads.add(thread)
            try:
                thread.start()
            except RuntimeError:  # there are no more threads: those that run do the work
                self._threads.discard(thread)
                return

    def _drive(self, job: Job[Any]) -> None:
        """Compute items, and deliver those shown, until no more are wanted for now. End a job that is over or left."""
        end = JobEnd()
        while not job.is_left and job.is_read:
            assert job.items is not None
            try:
                item = job.context.run(next, job.items, end)
            except BaseException as error:
                end.error = CancelledError() if isinstance(error, JobLeft) else error
                item = end
            if item is end:
                with self._lock:
                    self._end(job, end)
                return
            is_first, job.has_begun = not job.has_begun, True
            if job.shows(item):
                job.is_wanted = False
                job.deliver(item)
            del item
            with self._lock:
                if (self._mail or (is_first and self._line)) and self._take_ready():
                    self._wake_one()
                if not self._should_go_on(job):
                    job.is_driven = False
                    return
        self._let_go(job)

    def _let_go(self, job: Job[Any]) -> None:
        """Raise ``JobLeft`` in a job that nobody wants, so that it can save its work; end it. Logs other errors."""
        assert job.items is not None
        left = JobLeft()
        try:
            job.context.run(job.items.throw, left)
            job.items.close()
        except (JobLeft, StopIteration):
            pass
        except BaseException as error:  # whatever it is, the thread goes on to serve others
            log_trouble("failed_leaving", error=type(error).__name__)
        with self._lock:
            self._end(job, JobEnd(CancelledError()))

    def _end(self, job: Job[Any], end: JobEnd) -> None:
        """End the job, release what it holds, deliver ``end`` if it can be read. The caller holds the lock."""
        self._begun.pop(job, None)
        job.is_driven = False
        job.end()
        self._forget_leaving(job)
        if job.is_read:  # a thread that Python does not join must not wake up at its end
            job.deliver(end)

    def _forget_leaving(self, job: Job[Any]) -> None:
        with suppress(ValueError, IndexError):
            self._leaving.remove(job)
