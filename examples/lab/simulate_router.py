"""Simulate the request router: hit rates and loads of 4, 16 and 64 replicas, by how a request's replica is chosen.

    PYTHONPATH=. python examples/lab/simulate_router.py --out examples/lab/results/router.md

Traces are synthetic. A request takes one of many document sets, by Zipf's law or each as often, and asks about its
documents in random order. A replica keeps the documents that it used last, and reuses what it keeps wherever it stands.
The router is the package's own, with real sketches of real texts, which come late; so are its memory and its bounds.

``random``: any replica. ``shortest``: the shorter queue of two drawn (power of two choices). ``prefix``: the replica
that was sent the longest common beginning, as routers for prefix caches choose, else the shorter queue of two.
``content``: the package's router. ``one``: a single machine with the room and the speed of all.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from semsharekv_integrations.lab.report import describe_origin, write_whole
from semsharekv_integrations.serving.routing import (
    NOTHING,
    SKETCH_BYTES,
    Candidate,
    Marks,
    Router,
    Sketch,
    join_marks,
    mark_text,
    sketch_marks,
)

POLICIES = ("random", "shortest", "prefix", "content")
SYLLABLES = ("ba", "dek", "fo", "gri", "ka", "lun", "mo", "nat", "pe", "ros", "sim", "tur", "vel", "wan", "yo", "zin")
EXCESS = 4  # requests by which the queue of a prefix's holder may exceed the shorter of two


@dataclass(frozen=True)
class Plan:
    """One trace, and the replicas that serve it."""

    name: str
    replicas: int
    sets: int
    zipf: float  # exponent of popularity; 0 for sets that are asked for alike
    documents: int = 5  # of a set, each in no other
    document_chars: int = 4_000
    begin_chars: int = 2_000  # of what all requests begin with
    room: int = 40  # documents that a replica keeps
    load: float = 0.7  # of what the replicas could serve if everything were reused as on one machine
    requests: int = 8_000
    period_s: float = 2.0  # between two sketches of a replica
    prefill_s: float = 1.0  # of a whole prompt
    decode_s: float = 0.5  # and what cannot be reused


class Request(NamedTuple):
    """Documents in their order, at a time."""

    time_s: float
    documents: tuple[int, ...]


@dataclass
class Replica:
    """Serves requests one after another."""

    room: int
    speed: float = 1.0
    kept: OrderedDict[int, None] = field(default_factory=OrderedDict)
    free_s: float = 0.0  # when it will have served all that waits
    ends: list[float] = field(default_factory=list)  # of what it works on or waits for it, as a heap
    busy_s: float = 0.0
    served: int = 0
    sent: list[tuple[int, ...]] = field(default_factory=list)  # the latest orders, for the prefix's router
    sketch: Sketch = NOTHING
    sketched_s: float = float("-inf")

    def count_queue(self, now_s: float) -> int:
        """Return how many requests it works on, or wait for it."""
        while self.ends and self.ends[0] <= now_s:
            heapq.heappop(self.ends)
        return len(self.ends)

    def serve(self, request: Request, plan: Plan) -> tuple[float, float]:
        """Return which share of the request is reused, and when its first token comes."""
        hits = sum(document in self.kept for document in request.documents)
        for document in request.documents:
            self.kept[document] = None
            self.kept.move_to_end(document)
        while len(self.kept) > self.room:
            self.kept.popitem(last=False)
        share = hits / len(request.documents)
        prefill_s, decode_s = (1 - share) * plan.prefill_s / self.speed, plan.decode_s / self.speed
        begins = max(self.free_s, request.time_s)
        self.free_s = begins + prefill_s + decode_s
        heapq.heappush(self.ends, self.free_s)
        self.busy_s += prefill_s + decode_s
        self.served += 1
        self.sent = [*self.sent[-63:], request.documents]
        return share, begins + prefill_s - request.time_s


class Outcome(NamedTuple):
    """Of one policy on one trace."""

    hit_rate: float
    spread: float  # the busiest replica over the mean
    wait_s: tuple[float, float]  # to the first token: median, and 95 of 100
    sketch_bytes: int  # the largest


Choose = Callable[[Sequence[Replica], Request], int]


def write_documents(plan: Plan, seed: int) -> list[Marks]:
    """Return the marks of a text for each document, and last those of what all requests begin with."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(SYLLABLES, k=2)) for _ in range(2_000)]
    texts = (" ".join(rng.choices(words, k=plan.document_chars // 6)) for _ in range(plan.sets * plan.documents))
    begin = " ".join(rng.choices(words, k=plan.begin_chars // 6))
    return [mark_text(text, "lab") for text in (*texts, begin)]


def draw_requests(plan: Plan, seed: int, rate: float) -> list[Request]:
    """Return requests that come by chance, so many a second on average."""
    rng = random.Random(seed)
    weights = list(accumulate(1 / rank**plan.zipf for rank in range(1, plan.sets + 1)))
    found, time_s = [], 0.0
    for number in rng.choices(range(plan.sets), cum_weights=weights, k=plan.requests):
        time_s += rng.expovariate(rate)
        order = rng.sample(range(number * plan.documents, (number + 1) * plan.documents), plan.documents)
        found.append(Request(time_s, tuple(order)))
    return found


def count_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many documents both begin with."""
    return next((n for n, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1]), len(first))


def make_chooser(policy: str, plan: Plan, marks: Sequence[Marks], seed: int) -> Choose:
    """Return a function that chooses a replica by number."""
    rng, router = random.Random(seed), Router(seed=seed)

    @cache
    def mark_set(first: int) -> Marks:
        return join_marks([*marks[first : first + plan.documents], marks[-1]])

    def draw_shorter(replicas: Sequence[Replica], request: Request) -> int:
        drawn = rng.sample(range(len(replicas)), min(2, len(replicas)))
        return min(drawn, key=lambda one: replicas[one].count_queue(request.time_s))

    def follow_prefix(replicas: Sequence[Replica], request: Request) -> int:
        shorter = draw_shorter(replicas, request)
        common = [max((count_common(order, request.documents) for order in one.sent), default=0) for one in replicas]
        best = max(range(len(replicas)), key=common.__getitem__)
        queues = [replicas[one].count_queue(request.time_s) for one in (best, shorter)]
        return best if common[best] and queues[0] - queues[1] <= EXCESS else shorter

    def follow_content(replicas: Sequence[Replica], request: Request) -> int:
        for number, one in enumerate(replicas):
            if request.time_s - one.sketched_s >= plan.period_s:
                held = [marks[kept] for kept in one.kept] + ([marks[-1]] if one.kept else [])
                one.sketch, one.sketched_s = sketch_marks(join_marks(held)), request.time_s
                router.refresh(str(number))
        asked = mark_set(min(request.documents))
        queues = [one.count_queue(request.time_s) for one in replicas]
        told = [Candidate(str(number), queues[number], one.sketch) for number, one in enumerate(replicas)]
        chosen = router.rank(told, asked)[0]
        router.note(chosen, asked)
        return int(chosen)

    ways: dict[str, Choose] = {
        "random": lambda replicas, _: rng.randrange(len(replicas)),
        "shortest": draw_shorter,
        "prefix": follow_prefix,
        "content": follow_content,
        "one": lambda *_: 0,
    }
    return ways[policy]


def run(plan: Plan, policy: str, marks: Sequence[Marks], requests: Sequence[Request], seed: int) -> Outcome:
    """Serve all requests. The first fifth, while stores fill, is not counted."""
    alone = policy == "one"
    size = 1 if alone else plan.replicas
    replicas = [Replica(plan.room * plan.replicas // size, plan.replicas / size) for _ in range(size)]
    choose = make_chooser(policy, plan, marks, seed)
    shares, waits, largest = [], [], 0
    for number, request in enumerate(requests):
        chosen = replicas[choose(replicas, request)]
        share, wait_s = chosen.serve(request, plan)
        if number == len(requests) // 5:
            for one in replicas:
                one.busy_s = 0.0
        if number >= len(requests) // 5:
            shares.append(share)
            waits.append(wait_s)
        largest = max(largest, len(chosen.sketch.to_bytes()))
    loads, waits = [one.busy_s for one in replicas], sorted(waits)
    at = [waits[int(len(waits) * part)] for part in (0.5, 0.95)]
    return Outcome(sum(shares) / len(shares), max(loads) * size / sum(loads), (at[0], at[1]), largest)


def list_plans(requests: int) -> Iterator[Plan]:
    """Yield the traces: a dozen sets, and many more than one replica has room for."""
    yield Plan("12 sets, alike", 2, 12, 0.0, requests=requests)
    for replicas in (4, 16, 64):
        yield Plan("12 sets, alike", replicas, 12, 0.0, requests=requests)
        yield Plan("8 sets a replica, Zipf 1", replicas, 8 * replicas, 1.0, requests=requests)
        yield Plan("20 sets a replica, Zipf 1", replicas, 20 * replicas, 1.0, requests=requests)


def simulate(plan: Plan, seed: int) -> dict[str, Outcome]:
    """Return what each policy, and a single machine, makes of a trace."""
    marks = write_documents(plan, seed)
    trial = draw_requests(plan, seed, rate=1.0)
    hit_rate = run(plan, "one", marks, trial, seed).hit_rate  # which the rate of requests does not change
    rate = plan.load * plan.replicas / ((1 - hit_rate) * plan.prefill_s + plan.decode_s)
    requests = draw_requests(plan, seed, rate)
    return {policy: run(plan, policy, marks, requests, seed) for policy in ("one", *POLICIES)}


def make_table(found: Sequence[tuple[Plan, dict[str, Outcome]]]) -> Iterator[str]:
    """Yield the lines of a table."""
    titles = ("replicas", "trace", "router", "hit rate", "of one machine's", "busiest : mean", "first token, s", "95%")
    yield f"| {' | '.join(titles)} |"
    yield "| --- " * len(titles) + "|"
    for plan, outcomes in found:
        whole = outcomes["one"].hit_rate
        for policy, outcome in outcomes.items():
            told = (f"{outcome.hit_rate:.3f}", f"{outcome.hit_rate / whole:.1%}", f"{outcome.spread:.2f}")
            waits = [f"{seconds:.2f}" for seconds in outcome.wait_s]
            yield f"| {plan.replicas} | {plan.name} | {policy} | {' | '.join((*told, *waits))} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, and print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=8_000, help="of each trace")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="Markdown file")
    args = parser.parse_args(arguments)
    found = [(plan, simulate(plan, args.seed)) for plan in list_plans(args.requests)]
    command = f"python examples/lab/simulate_router.py --requests {args.requests} --seed {args.seed}"
    commit = str(describe_origin(command)["commit"])[:12]
    largest = max(outcome.sketch_bytes for _, outcomes in found for outcome in outcomes.values())
    text = LEGEND.format(
        command=command, commit=commit, requests=args.requests, largest=largest, bound=SKETCH_BYTES, plan=found[0][0]
    )
    text += "\n".join(make_table(found))
    if args.out is None:
        print(text)
    else:
        write_whole(args.out, text + "\n")


LEGEND = """# The request router, simulated

`{command}` at commit {commit}: {requests:,} requests of each trace, of which the last four fifths count, n = 1 trace.

Nothing here was measured on machines. A request has {plan.documents} documents of {plan.document_chars:,} characters,
all of one set, in random order, behind {plan.begin_chars:,} that are always the same. A replica keeps the {plan.room}
documents that it used last, reuses them wherever they stood, and serves one request at a time: {plan.prefill_s:g} s for
a whole prefill, less what is reused, and {plan.decode_s:g} s for the rest. Requests come by chance, so that one machine
with the room and speed of all replicas would be busy {plan.load:.0%} of the time: who reuses less cannot keep up, and
waits grow. Sketches come every {plan.period_s:g} s. The largest had {largest:,} bytes; the bound is {bound:,}.

`one` is that one machine. `random`: any replica. `shortest`: the shorter queue of two that are drawn. `prefix`: the
replica that was sent the longest common beginning, else `shortest`. `content`: the package's router.

"""

if __name__ == "__main__":
    main()
