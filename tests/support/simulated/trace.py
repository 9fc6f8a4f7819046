"""What a simulated accelerator did: launches, waits, copies and allocations, by the line that caused them."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

WATCHED = "semsharekv_integrations"  # lines of this package are named
_LIBRARY = "transformers"  # whose lines are named where none of the package's is on the stack
_lock = threading.Lock()
_traces: list[Trace] = []


@dataclass
class Trace:
    """What happened while it was kept, by the line of the watched package that caused it.

    Attributes:
        launches: kernels started.
        waits: times that the host waited for the device, with the reason.
        copies: bytes, by direction and line.
        calls: operations, by name.
        wait_ops: waits by reason alone.
        allocated: bytes.
        largest: the largest allocation of a line, in bytes, and what it was.
        attention: calls of ``scaled_dot_product_attention`` by line, shapes and mask.
    """

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    wait_ops: Counter[str] = field(default_factory=Counter)
    allocated: Counter[str] = field(default_factory=Counter)
    largest: dict[str, tuple[int, str]] = field(default_factory=lambda: defaultdict(lambda: (0, "")))
    attention: Counter[str] = field(default_factory=Counter)

    @property
    def num_waits(self) -> int:
        """How often the host waited for the device."""
        return self.waits.total()

    @property
    def num_launches(self) -> int:
        """How many kernels were started."""
        return self.launches.total()

    def table(self, most: int = 40) -> str:
        """Totals, and the lines that cause most of each."""
        copied, allocated = self.copies.total() / 1e6, self.allocated.total() / 1e6
        lines = [
            f"launches {self.num_launches}, waits {self.num_waits}, "
            f"copied {copied:.2f} MB, allocated {allocated:.1f} MB"
        ]
        lines += [f"  wait   {n:6d} {place}" for place, n in self.waits.most_common(most)]
        lines += [f"  launch {n:6d} {place}" for place, n in self.launches.most_common(most)]
        lines += [f"  copy   {n / 1e6:9.3f} MB {place}" for place, n in self.copies.most_common(most)]
        for place, n in self.allocated.most_common(12):
            size, what = self.largest[place]
            lines.append(f"  alloc  {n / 1e6:9.2f} MB {place} (largest {size / 1e6:.2f} MB {what})")
        lines += [f"  sdpa   {n:6d} {what}" for what, n in self.attention.most_common(12)]
        return "\n".join(lines)


@contextlib.contextmanager
def traced() -> Iterator[Trace]:
    """Keep a trace of what any thread does on a pretended device."""
    trace = Trace()
    with _lock:
        _traces.append(trace)
    try:
        yield trace
    finally:
        with _lock:
            _traces.remove(trace)


def is_traced() -> bool:
    """Whether any trace is kept now."""
    return bool(_traces)


def find_line() -> str:
    """The innermost line of the watched package on the stack, else of transformers."""
    frame, fallback = sys._getframe(2), None
    while frame is not None:
        name = frame.f_code.co_filename
        if f"/{WATCHED}/" in name:
            return f"{name.split(f'/{WATCHED}/')[-1]}:{frame.f_lineno}"
        if fallback is None and f"/{_LIBRARY}/" in name:
            fallback = f"{_LIBRARY}/{name.split(f'/{_LIBRARY}/')[-1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return fallback or "elsewhere"


def note(kind: str, place: str, amount: int = 1, what: str = "") -> None:
    """Add to one of the counters of every trace."""
    for trace in _traces:
        getattr(trace, kind)[place] += amount
        if kind == "allocated" and amount > trace.largest[place][0]:
            trace.largest[place] = amount, what


def note_wait(why: str, place: str) -> None:
    """The host waits for the device."""
    note("waits", f"{place} [{why}]")
    note("wait_ops", why)
