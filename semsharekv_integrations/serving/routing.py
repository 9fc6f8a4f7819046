"""Which replica a request goes to: the one that holds most of its content, unless others would begin so much sooner.

A replica tells what it holds by a sketch of bounded size. Texts are cut into all windows of ``WINDOW`` characters, and
each has two hashes: its order, which decides whether it is looked at, and its mark, by which it is known. A sketch has
the marks of the windows that come first in order, as many as fit, and says how far it goes. So a router that hashes a
prompt looks at the same windows, wherever they stand in it, and needs no tokenizer. Hashes are keyed by tenant: what
one stores draws no requests of another.

Knows nothing about Ray, HTTP or models.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from semsharekv_integrations.store.runs import window_hashes

WINDOW = 48  # characters
SPACING = 32  # one window of so many is looked at, at most: further ones would tell little more
SKETCH_BYTES = 64 * 1024
MOST_REMEMBERED = 64  # requests sent to a replica that its sketch may not show yet
FULLNESS_COST = 0.25  # of what is computed: what it costs besides that it takes room, at a replica as full as others
QUEUE_COST = 0.25  # of a full prefill: what a request that is ahead costs, so four of them outweigh a whole prompt
_HEAD_BYTES = 8
_MARK_BYTES = 4
_FIRST = np.uint64(0xBF58476D1CE4E5B9)  # of splitmix64, which spreads every bit
_SECOND = np.uint64(0x94D049BB133111EB)

Hashes = NDArray[np.uint32]


class Marks(NamedTuple):
    """The windows of a text that are looked at, each once: orders [N], which grow, and marks [N]."""

    orders: Hashes
    marks: Hashes

    def take_first(self, stop: int) -> Hashes:
        """Return the marks of windows whose order is below ``stop``."""
        return self.marks[: self.orders.searchsorted(stop)]


class Sketch(NamedTuple):
    """What a replica holds: the marks [N], sorted, of all its windows whose order is below ``stop``."""

    stop: int
    marks: Hashes

    def to_bytes(self) -> bytes:
        """Return at most ``SKETCH_BYTES``, or the bound that it was made with."""
        return self.stop.to_bytes(_HEAD_BYTES, "little") + self.marks.astype("<u4").tobytes()

    @classmethod
    def from_bytes(cls, told: bytes) -> Sketch:
        """Return what ``to_bytes`` was called on; ``ValueError`` for what it did not make."""
        if len(told) < _HEAD_BYTES or (len(told) - _HEAD_BYTES) % _MARK_BYTES:
            raise ValueError(f"a sketch has {len(told)} bytes; accepted are 8, and 4 for each mark")
        stop = int.from_bytes(told[:_HEAD_BYTES], "little")
        return cls(stop, np.frombuffer(told[_HEAD_BYTES:], "<u4").astype(np.uint32))

    def estimate_size(self) -> float:
        """Return about how many windows the replica holds, those that found no place in the sketch included."""
        return len(self.marks) * NOTHING.stop / max(1, self.stop)

    def score(self, marks: Marks) -> float:
        """Return the share of a text, 0 to 1, that the replica holds, as far as can be told; 0 for a short one."""
        asked = marks.take_first(self.stop)
        return float(_contains(self.marks, asked).mean()) if len(asked) else 0.0


NOTHING = Sketch(2**32 // SPACING, np.empty(0, np.uint32))


def mark_text(text: str, tenant: str) -> Marks:
    """Return the marks of a text for one tenant. Blanks count as one space, however many and of whatever kind."""
    plain = " ".join(text.split())
    points = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64)
    key = int.from_bytes(hashlib.blake2b(tenant.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
    mixed = _mix(window_hashes(points, WINDOW) ^ np.uint64(key))
    orders, marks = (mixed >> np.uint64(32)).astype(np.uint32), mixed.astype(np.uint32)
    chosen = orders < NOTHING.stop
    return _arrange(orders[chosen], marks[chosen])


def join_marks(parts: Iterable[Marks]) -> Marks:
    """Return the marks of several texts."""
    found = list(parts)
    if not found:
        return Marks(np.empty(0, np.uint32), np.empty(0, np.uint32))
    return _arrange(np.concatenate([part.orders for part in found]), np.concatenate([part.marks for part in found]))


def sketch_marks(marks: Marks, most_bytes: int = SKETCH_BYTES) -> Sketch:
    """Return a sketch of what a replica holds, of at most so many bytes: the more it holds, the fewer windows count."""
    most = max(0, (most_bytes - _HEAD_BYTES) // _MARK_BYTES)
    stop = int(marks.orders[most]) if len(marks.orders) > most else NOTHING.stop
    return Sketch(stop, np.sort(marks.take_first(stop)))


class Holdings:
    """What a replica holds, by the keys of its entries. Not thread-safe."""

    def __init__(self) -> None:
        self._entries: dict[str, Marks] = {}

    def put(self, key: str, marks: Marks) -> None:
        """Note an entry, in place of the one with this key."""
        self._entries[key] = marks

    def keep_only(self, keys: Iterable[str]) -> None:
        """Forget all other entries."""
        kept = set(keys)
        self._entries = {key: marks for key, marks in self._entries.items() if key in kept}

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def sketch(self) -> Sketch:
        """Return a sketch of everything."""
        return sketch_marks(join_marks(self._entries.values()))


class Candidate(NamedTuple):
    """A replica that a request may go to."""

    id: str
    queue: int  # requests that it works on, or that wait for it
    sketch: Sketch = NOTHING


class Router:
    """Chooses among replicas, and remembers what it sent where until their sketches show it. Not thread-safe.

    Args:
        queue_cost: what a request ahead of another costs, in full prefills.
        seed: of the choice among equals.
    """

    def __init__(self, queue_cost: float = QUEUE_COST, seed: int | None = None) -> None:
        self._queue_cost = queue_cost
        self._random = random.Random(seed)
        self._sent: dict[str, _Sent] = {}

    def rank(self, candidates: Sequence[Candidate], marks: Marks) -> list[str]:
        """Return the ids of the replicas worth asking, best first: the best holder, and two others drawn by chance.

        A replica costs what it must compute of the prompt, the more the fuller it is beside others, and its queue. So
        an overloaded holder loses to the better of the two, which holds the content from then on as well; and prompts
        that only begin alike do not all end up at the replica that had the first of them.
        """
        mixed = self._random.sample(list(candidates), len(candidates))  # so that no equal is preferred
        scores = {one.id: self._score(one, marks) for one in mixed}
        sizes = {one.id: one.sketch.estimate_size() + self._count_sent(one.id) for one in mixed}
        mean = max(1.0, sum(sizes.values()) / max(1, len(sizes)))
        costs = {
            one.id: (1 - scores[one.id]) * (1 + FULLNESS_COST * min(2.0, sizes[one.id] / mean))
            + self._queue_cost * one.queue
            for one in mixed
        }
        holders = (one.id for one in mixed if scores[one.id] > 0)
        chosen = [one.id for one in mixed[:2]]
        holder = min(holders, key=costs.__getitem__, default=None)
        if holder is not None and holder not in chosen:
            chosen.append(holder)
        return sorted(chosen, key=lambda id: (costs[id], -scores[id]))

    def note(self, replica: str, marks: Marks) -> None:
        """Remember that a request was sent to a replica, which holds its content soon, if it has any."""
        if len(marks.marks):
            self._sent.setdefault(replica, _Sent()).add(marks)

    def refresh(self, replica: str) -> None:
        """Note that a new sketch of a replica has come. What was sent before the last one is forgotten: it shows."""
        if replica in self._sent:
            self._sent[replica].age()

    def keep_only(self, replicas: Iterable[str]) -> None:
        """Forget the replicas that are not among these."""
        kept = set(replicas)
        self._sent = {id: sent for id, sent in self._sent.items() if id in kept}

    def _count_sent(self, replica: str) -> int:
        """Return how many windows a replica was sent that its sketch may not show."""
        return len(self._sent[replica].marks) if replica in self._sent else 0

    def _score(self, candidate: Candidate, marks: Marks) -> float:
        """Return the larger share of the text: that of the sketch, or of what the replica was sent since."""
        known, sent = candidate.sketch.score(marks), self._sent.get(candidate.id)
        if sent is None or not len(marks.marks):
            return known
        return max(known, float(_contains(sent.marks, marks.marks).mean()))


class _Sent:
    """What a replica was sent since the sketch before its last one, the latest requests only."""

    def __init__(self) -> None:
        self._latest: deque[tuple[int, Hashes]] = deque(maxlen=MOST_REMEMBERED)
        self._age = 0
        self._sorted: Hashes | None = None

    def add(self, marks: Marks) -> None:
        self._latest.append((self._age, marks.marks))
        self._sorted = None

    def age(self) -> None:
        """Forget what was sent before the last sketch: when it was made, some of that may have been under way."""
        self._age += 1
        while self._latest and self._latest[0][0] < self._age - 1:
            self._latest.popleft()
        self._sorted = None

    @property
    def marks(self) -> Hashes:
        """All of it, sorted."""
        if self._sorted is None:
            parts = [marks for _, marks in self._latest]
            self._sorted = np.unique(np.concatenate(parts)) if parts else NOTHING.marks
        return self._sorted


def _contains(held: Hashes, asked: Hashes) -> NDArray[np.bool_]:
    """Return for each hash [N] whether it is in ``held`` [M], which is sorted."""
    if not len(held):
        return np.zeros(len(asked), dtype=bool)
    at = np.minimum(held.searchsorted(asked), len(held) - 1)
    return np.asarray(held[at] == asked)


def _arrange(orders: Hashes, marks: Hashes) -> Marks:
    """Return windows by order, each once."""
    both = np.unique(orders.astype(np.uint64) << np.uint64(32) | marks)
    return Marks((both >> np.uint64(32)).astype(np.uint32), both.astype(np.uint32))


def _mix(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return hashes whose bits all depend on all bits."""
    mixed = (hashes ^ (hashes >> np.uint64(30))) * _FIRST
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
    return mixed ^ (mixed >> np.uint64(31))
