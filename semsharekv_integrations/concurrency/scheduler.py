"""One call: what it yields, who reads it, and whether anybody still does.

Calls in flight: who waits, who computes, in which thread, and what becomes of a call that nobody reads any more.

Threads of a ``Calls`` compute, so many at once; callers only read what comes of it. A signal, such as Ctrl-C, and the
garbage collector can thus stop a caller at any point, but nothing half-way: what they do to a call is to put it into
a queue, without a lock. Calls beyond the bound wait in line without a thread, and nothing of them is computed.

An idle thread waits for a bell of its own, not for a queue that it has together with others: one that wakes up and
finds that another took what came goes on to wait, and ``SimpleQueue.get`` then forgets its timeout (Python 3.11).
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

from semsharekv_integrations.concurrency.threads import carried_out, start_thread, tell_of_forks
from semsharekv_integrations.logs import log_trouble

T = TypeVar("T")
GROUP: ContextVar[deque[Job[Any]] | None] = ContextVar("group", default=None)  # those that belong together
_CURRENT: ContextVar[Job[Any] | None] = ContextVar("call", default=None)


class JobLeft(BaseException):
    """Is raised where a call stands when nobody wants more of it; it may take care of what it has."""


class JobEnd:
    """Marks the end of what a call yields, with the error that ended it, if any."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class Job(Generic[T]):
    """One call.

    Args:
        items: what it yields, computed on the way.
        shows: which of them its reader is told of.
        deliver: takes these, and the ``End``, in the thread that computes.
        loop: in which it is read, if in one.

    Attributes:
        runs_ahead: whether it goes on unasked.
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
        """Whether somebody is there to read it.

        Once the main thread has ended, that is a thread which Python joins, or what runs at exit and waits for it. Not
        for the main thread to ask, where an interruption of ``is_alive`` would leave it taken for ended.
        """
        main = threading.main_thread()
        if main.is_alive():
            return True
        if self.reader is not main:
            return self.reader.is_alive() and not self.reader.daemon
        return self.is_wanted or self.runs_ahead if self.loop is None else self.loop.is_running()

    def end(self) -> None:
        """Let go of what it held, and tell those who wait for that."""
        self.items = None
        self.context = contextvars.Context()
        self.has_ended = True
        while self.listeners:  # more may come meanwhile
            self.listeners.popleft().put(None)


def get_current_job() -> Job[Any] | None:
    """The call that the running code belongs to."""
    return _CURRENT.get()


def check_wanted() -> None:
    """Raise ``CallLeft`` if nobody wants the call that the running code belongs to."""
    call = _CURRENT.get()
    if call is not None and call.is_left:
        raise JobLeft


LOOK_S = 0.1  # after which an idle thread looks about; so long may it hold up the interpreter's exit
LINGER_S = 30.0  # that the last one waits for more to do: what libraries keep for a thread takes long to make anew

_SERVED = threading.local()  # ``calls``: whose thread this is


class Scheduler:
    """The calls of one engine, served first in, first out; one at a time takes its first step.

    A call that was begun goes from item to item as its reader asks for them, unless it runs ahead. While others stand
    in line, all that were begun run ahead to their end, so that a reader who is busy elsewhere holds up nobody.

    Args:
        most: so many at once are begun and not ended.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._is_dismissed = False
        self.go_on_in_child()
        tell_of_forks(self)

    def go_on_in_child(self) -> None:
        """Begin without calls or threads; those of a parent stay with it."""
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
        """Whether the running thread is one of these: what it calls, it computes itself."""
        return getattr(_SERVED, "calls", None) is self

    @property
    def has_concurrent_calls(self) -> bool:
        """Whether more than one call is in progress, or others are to come."""
        return bool(self._groups) or len(self._begun) + len(self._line) > 1

    @contextmanager
    def together(self) -> Iterator[None]:
        """Calls made inside belong together: each may count on others to come, and an interruption ends them all."""
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

    def ask(self, call: Job[Any]) -> None:
        """Say that a call is wanted."""
        self._mail.append(call)
        self._wake_one()
        if not self._threads and self._starting:
            starting: list[bool] = []
            start_thread(partial(self._serve, starting))
            self._starting = starting  # only now, as an interruption may come in between

    def leave(self, call: Job[Any]) -> None:
        """Say that nobody wants more of a call. Takes no lock and waits for nothing, so may be called anywhere."""
        if call.has_ended or call.is_left:
            return
        call.is_left = True
        is_computed = call.is_driven and (call.is_wanted or call.runs_ahead)
        if call.has_begun and not is_computed:  # also while its thread has yet to see that its reader wants no more
            self._leaving.append(call)
        self._mail.append(call)
        self._wake_one()

    def settle(self) -> None:
        """Wait until calls that were left between two items are gone; what they leave behind is in place then."""
        while self._leaving and not self.serves_here:
            call, heard = self._leaving[0], SimpleQueue[None]()
            call.listeners.append(heard)
            if call.has_ended:
                self._forget_leaving(call)
                continue
            self.ask(call)
            heard.get()

    def carry_out(self, work: Callable[[], T]) -> T:
        """What ``work`` returns. It is carried out whole, even if a signal's handler raises in the caller."""
        return work() if self.serves_here else carried_out(work)

    def dismiss(self) -> None:
        """No thread waits any longer for more to do than it has to. Takes no lock, so may be called anywhere."""
        self._is_dismissed = True

    def _wake_one(self) -> None:
        """Wake the thread that computed last, if one is idle; those that are not look about when they are done."""
        with suppress(IndexError):
            self._idle.pop().release()

    def _serve(self, starting: list[bool]) -> None:
        here = threading.current_thread()
        self._threads.add(here)
        starting.append(True)
        _SERVED.calls = self
        has_computed, idle_since = False, perf_counter()
        while True:
            bell = threading.Lock()
            bell.acquire()
            (self._idle.append if has_computed else self._idle.appendleft)(bell)
            call = self._next(bell)  # only now: whatever comes later finds the bell
            if call is None:
                alive = threading.main_thread().is_alive()
                lingers = alive and perf_counter() - idle_since < LINGER_S
                is_rung = bell.acquire(timeout=LOOK_S if alive else LOOK_S / 10)
                if not is_rung and self._retires(here, bell, lingers=lingers):
                    return
                continue
            while call is not None:
                self._drive(call)
                call = self._next(bell)
            has_computed, idle_since = True, perf_counter()

    def _retires(self, here: threading.Thread, bell: threading.Lock, *, lingers: bool) -> bool:
        """Whether a thread that nobody woke is not needed, which then counts no more.

        Of several that are idle, the one that computed last stays: for calls that are not ended, and for those to come
        as well, if it ``lingers``.
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

    def _next(self, bell: threading.Lock) -> Job[Any] | None:
        """The call that the thread with this bell is to drive, if there is one; others are woken for what is left."""
        with self._lock:
            ready = self._ready()
            if not ready:
                return None
            with suppress(ValueError):
                self._idle.remove(bell)
            ready[0].is_driven = True
            if len(ready) > 1 or self._mail:
                self._wake_one()
            return ready[0]

    def _ready(self) -> list[Job[Any]]:
        """Read the mail and begin calls if there is room; those that go on and that no thread drives."""
        new: list[Job[Any]] = []
        while self._mail:
            call = self._mail.popleft()
            if call.has_ended or call in self._begun:
                continue
            if not call.is_left:
                self._line[call] = None
                new.append(call)
            else:
                self._line.pop(call, None)
                self._end(call, JobEnd(CancelledError()))
        self._begin(new)
        ready = [call for call in self._begun if not call.is_driven and self._goes_on(call)]
        self._employ(sum(call.is_driven for call in self._begun) + len(ready))
        return ready

    def _goes_on(self, call: Job[Any]) -> bool:
        return bool(call.is_wanted or call.runs_ahead or call.is_left or self._line or not call.is_read)

    def _begin(self, new: list[Job[Any]]) -> None:
        """Begin with the first in line, if one may."""
        if not threading.main_thread().is_alive():
            for call in [call for call in self._line if not call.is_read]:
                del self._line[call]
                self._end(call, JobEnd(CancelledError()))
        if len(self._begun) >= self._most or any(not call.has_begun or call.is_left for call in self._begun):
            return
        for call in [*islice(self._line, 1)]:
            del self._line[call]
            call.waited_s = 0.0 if call in new else perf_counter() - call.asked_at
            self._begun[call] = None

    def _employ(self, driving: int) -> None:
        """As many threads as calls to drive, and one to look at the mail, within the bound."""
        while len(self._threads) < min(self._most, 1 + driving):
            thread = threading.Thread(target=self._serve, args=([],), name="semsharekv")
            self._threads.add(thread)
            try:
                thread.start()
            except RuntimeError:  # there are no more threads: those that run do the work
                self._threads.discard(thread)
                return

    def _drive(self, call: Job[Any]) -> None:
        """Compute until nobody wants more for now."""
        end = JobEnd()
        while not call.is_left and call.is_read:
            assert call.items is not None
            try:
                item = call.context.run(next, call.items, end)
            except BaseException as error:
                end.error = CancelledError() if isinstance(error, JobLeft) else error
                item = end
            if item is end:
                with self._lock:
                    self._end(call, end)
                return
            is_first, call.has_begun = not call.has_begun, True
            if call.shows(item):
                call.is_wanted = False
                call.deliver(item)
            del item
            with self._lock:
                if (self._mail or (is_first and self._line)) and self._ready():
                    self._wake_one()
                if not self._goes_on(call):
                    call.is_driven = False
                    return
        self._let_go(call)

    def _let_go(self, call: Job[Any]) -> None:
        """End a call that nobody wants."""
        assert call.items is not None
        left = JobLeft()
        try:
            call.context.run(call.items.throw, left)
            call.items.close()
        except (JobLeft, StopIteration):
            pass
        except Exception as error:
            log_trouble("failed_leaving", error=type(error).__name__)
        with self._lock:
            self._end(call, JobEnd(CancelledError()))

    def _end(self, call: Job[Any], end: JobEnd) -> None:
        self._begun.pop(call, None)
        call.is_driven = False
        call.end()
        self._forget_leaving(call)
        if call.is_read:  # a thread that Python does not join must not wake up at its end
            call.deliver(end)

    def _forget_leaving(self, call: Job[Any]) -> None:
        with suppress(ValueError, IndexError):
            self._leaving.remove(call)
