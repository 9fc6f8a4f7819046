"""When entries may expire: keys with a time each, the earliest found first."""

from __future__ import annotations

import heapq
from itertools import count


class Deadlines:
    """At most one deadline for each key. Nothing keeps a key that was dropped."""

    def __init__(self) -> None:
        self._times: dict[str, tuple[float, int]] = {}  # with the number of the time
        self._keys: dict[int, str] = {}  # by number
        self._heap: list[tuple[float, int]] = []  # those that no key has are stale
        self._numbers = count()

    def set(self, key: str, time_s: float) -> None:
        """``key`` is due at ``time_s``, or when it was due before, if that is earlier."""
        before_s, former = self._times.get(key, (float("inf"), -1))
        if time_s < before_s:
            self._keys.pop(former, None)
            number = next(self._numbers)
            self._times[key], self._keys[number] = (time_s, number), key
            heapq.heappush(self._heap, (time_s, number))

    def drop(self, key: str) -> None:
        """``key`` is never due, until it is set again."""
        _, number = self._times.pop(key, (0.0, -1))
        self._keys.pop(number, None)
        if len(self._heap) > 64 + 2 * len(self._times):
            self._heap = list(self._times.values())
            heapq.heapify(self._heap)

    def due(self, now_s: float) -> list[str]:
        """The keys whose time has come; they have no deadline any more."""
        found = []
        while self._heap and self._heap[0][0] <= now_s:
            _, number = heapq.heappop(self._heap)
            key = self._keys.pop(number, None)
            if key is not None:
                del self._times[key]
                found.append(key)
        return found
