"""Calls in flight: who waits, who computes, in which thread, and what becomes of a call that nobody reads any more.

Threads of a ``Calls`` compute, so many at once; callers only read what comes of it. A signal, such as Ctrl-C, and the
garbage collector can thus stop a caller at any point, but nothing half-way: what they do to a call is to put it into
a queue, without a lock. Calls beyond the bound wait in line without a thread, and nothing of them is computed.

An idle thread waits for a bell of its own, not for a queue that it has together with others: one that wakes up and
finds that another took what came goes on to wait, and ``SimpleQueue.get`` then forgets its timeout (Python 3.11).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from queue import SimpleQueue
from time import perf_counter
from typing import Any, TypeVar

from semsharekv_integrations.call import GROUP, Call, CallLeft, End
from semsharekv_integrations.forks import tell_of_forks
from semsharekv_integrations.logs import log_trouble
from semsharekv_integrations.threads import carried_out, start_thread

T = TypeVar("T")
LOOK_S = 0.1  # after which an idle thread looks about; so long may it hold up the interpreter's exit
LINGER_S = 30.0  # that the last one waits for more to do: what libraries keep for a thread takes long to make anew

_SERVED = threading.local()  # ``calls``: whose thread this is


class Calls:
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
        self._mail: deque[Call[Any]] = deque()  # calls that want something
        self._idle: deque[threading.Lock] = deque()  # the bells of idle threads, last that of who computed last
        self._line: dict[Call[Any], None] = {}
        self._begun: dict[Call[Any], None] = {}
        self._leaving: deque[Call[Any]] = deque()  # left between two items
        self._groups: set[int] = set()
        self._threads: set[threading.Thread] = set()
        self._starting: list[bool] = [True]  # empty until the first of them is there

    @property
    def serves_here(self) -> bool:
        """Whether the running thread is one of these: what it calls, it computes itself."""
        return getattr(_SERVED, "calls", None) is self

    @property
    def others_run(self) -> bool:
        """Whether one call is not the only one, or others are to come."""
        return bool(self._groups) or len(self._begun) + len(self._line) > 1

    @contextmanager
    def together(self) -> Iterator[None]:
        """Calls made inside belong together: each may count on others to come, and an interruption ends them all."""
        group: deque[Call[Any]] = deque()
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

    def ask(self, call: Call[Any]) -> None:
        """Say that a call is wanted."""
        self._mail.append(call)
        self._wake_one()
        if not self._threads and self._starting:
            starting: list[bool] = []
            start_thread(partial(self._serve, starting))
            self._starting = starting  # only now, as an interruption may come in between

    def leave(self, call: Call[Any]) -> None:
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

    def _next(self, bell: threading.Lock) -> Call[Any] | None:
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

    def _ready(self) -> list[Call[Any]]:
        """Read the mail and begin calls if there is room; those that go on and that no thread drives."""
        new: list[Call[Any]] = []
        while self._mail:
            call = self._mail.popleft()
            if call.has_ended or call in self._begun:
                continue
            if not call.is_left:
                self._line[call] = None
                new.append(call)
            else:
                self._line.pop(call, None)
                self._end(call, End(CancelledError()))
        self._begin(new)
        ready = [call for call in self._begun if not call.is_driven and self._goes_on(call)]
        self._employ(sum(call.is_driven for call in self._begun) + len(ready))
        return ready

    def _goes_on(self, call: Call[Any]) -> bool:
        return bool(call.is_wanted or call.runs_ahead or call.is_left or self._line or not call.is_read)

    def _begin(self, new: list[Call[Any]]) -> None:
        """Begin with the first in line, if one may."""
        if not threading.main_thread().is_alive():
            for call in [call for call in self._line if not call.is_read]:
                del self._line[call]
                self._end(call, End(CancelledError()))
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

    def _drive(self, call: Call[Any]) -> None:
        """Compute until nobody wants more for now."""
        end = End()
        while not call.is_left and call.is_read:
            assert call.items is not None
            try:
                item = call.context.run(next, call.items, end)
            except BaseException as error:
                end.error = CancelledError() if isinstance(error, CallLeft) else error
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

    def _let_go(self, call: Call[Any]) -> None:
        """End a call that nobody wants."""
        assert call.items is not None
        left = CallLeft()
        try:
            call.context.run(call.items.throw, left)
            call.items.close()
        except (CallLeft, StopIteration):
            pass
        except Exception as error:
            log_trouble("failed_leaving", error=type(error).__name__)
        with self._lock:
            self._end(call, End(CancelledError()))

    def _end(self, call: Call[Any], end: End) -> None:
        self._begun.pop(call, None)
        call.is_driven = False
        call.end()
        self._forget_leaving(call)
        if call.is_read:  # a thread that Python does not join must not wake up at its end
            call.deliver(end)

    def _forget_leaving(self, call: Call[Any]) -> None:
        with suppress(ValueError, IndexError):
            self._leaving.remove(call)
