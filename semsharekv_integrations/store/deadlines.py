"""When entries may expire: keys with a time each, the earliest found first."""

from __future__ import annotations

import heapq


class Deadlines:
    """At most one deadline for each key."""

    def __init__(self) -> None:
        self._times: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []  # those that differ from ``_times`` are stale

    def set(self, key: str, time_s: float) -> None:
        """``key`` is due at ``time_s``, or when it was due before, if that is earlier."""
        if time_s < self._times.get(key, float("inf")):
            self._times[key] = time_s
            heapq.heappush(self._heap, (time_s, key))

    def drop(self, key: str) -> None:
        """``key`` is never due, until it is set again."""
        self._times.pop(key, None)
        if len(self._heap) > 64 + 2 * len(self._times):
            self._heap = [(time_s, kept) for kept, time_s in self._times.items()]
            heapq.heapify(self._heap)

    def due(self, now_s: float) -> list[str]:
        """The keys whose time has come; they have no deadline any more."""
        found = []
        while self._heap and self._heap[0][0] <= now_s:
            time_s, key = heapq.heappop(self._heap)
            if self._times.get(key) == time_s:
                del self._times[key]
                found.append(key)
        return found
