"""Measure the store: what its operations cost as it grows, what opening it takes, and what each eviction rule keeps.

    PYTHONPATH=. python examples/lab/measure_store.py --out examples/lab/results/store.md

Costs are those of one call in a store that is filled already; ratios are over the prefill that a lookup saves, on the
reference model in the same run. The trace drives two stores of equal bytes with the same traffic, one for each rule.
``--quick`` is small and takes under 30 s. With matplotlib the trace is also plotted, beside ``--out``.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress

from lengths import find_quartiles
from semsharekv_integrations import StoreConfig
from semsharekv_integrations.config import EVICTIONS, Eviction
from semsharekv_integrations.kv import LayerKV, Reference, TokenIds
from semsharekv_integrations.lab.figures import Estimate
from semsharekv_integrations.lab.report import describe_machine, describe_origin, write_whole
from semsharekv_integrations.model.adapter import ModelAdapter
from semsharekv_integrations.model.loading import REFERENCE_MODEL, NamedModel
from semsharekv_integrations.store import KVStore
from semsharekv_integrations.store.records import reference_id

NAMESPACE = "lab"
FINGERPRINT = "1ab0"
VOCABULARY = 32_000
MIN_RUN_TOKENS = 16
SHARED_RATIO = 1 / 8  # of its tokens that an entry begins with as nine others do
GIB = 1024**3
HELD_TOKENS = 30_000  # by each store of the trace
PHASES = ("mixed", "scan", "after", "shifted")


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    entries: tuple[int, ...] = (100, 1_000, 10_000)
    entry_tokens: int = 512
    tokens: tuple[int, ...] = (128, 512, 1024, 2048, 4096)
    saved_tokens: tuple[int, ...] = (128, 512, 2048)
    repeats: int = 30
    long_repeats: int = 12  # where entries are as large as a real model's
    prefills: int = 5
    opens: int = 3
    requests: int = 1_500  # of each phase
    held_bytes: int = GIB  # of KV in entries of each length

    @classmethod
    def quick(cls) -> Plan:
        """Enough to see that all of it works."""
        return cls((50, 200), 64, (64, 256), (64, 128), 5, 3, 2, 1, 100, GIB // 64)


class Shape(NamedTuple):
    """Of the KV of one token, in float32."""

    layers: int
    heads: int
    dim: int

    @property
    def token_bytes(self) -> int:
        """Of keys and values in all layers."""
        return self.layers * 2 * self.heads * self.dim * 4

    def kv(self, num_tokens: int) -> tuple[LayerKV, ...]:
        """Some KV of so many tokens."""
        size = (1, self.heads, num_tokens, self.dim)
        return tuple(LayerKV(torch.zeros(size), torch.zeros(size)) for _ in range(self.layers))


TINY = Shape(1, 1, 8)


def reference_of(ids: TokenIds, shape: Shape) -> Reference:
    return Reference(reference_id(NAMESPACE, ids), NAMESPACE, ids, shape.kv(len(ids)))


class Texts:
    """Token sequences: ten at a time begin alike, and go on at random."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._shared = self.random(0)
        self._num_made = 0

    def random(self, num_tokens: int) -> TokenIds:
        """Tokens that stand nowhere else."""
        return self._rng.integers(0, VOCABULARY, num_tokens, dtype=np.int64)

    def next(self, num_tokens: int) -> TokenIds:
        """A new sequence."""
        if self._num_made % 10 == 0:
            self._shared = self.random(int(SHARED_RATIO * num_tokens))
        self._num_made += 1
        return np.concatenate([self._shared, self.random(num_tokens - len(self._shared))])

    def pick(self, stored: Sequence[TokenIds]) -> TokenIds:
        """One of those given."""
        return stored[int(self._rng.integers(len(stored)))]

    def running_into(self, stored: Sequence[TokenIds], num_tokens: int) -> TokenIds:
        """A prompt none of which is a prefix, and nearly all of which stands behind the start of some entry."""
        pieces = [self.random(4)]
        while sum(map(len, pieces)) < num_tokens:
            pieces.append(self.pick(stored)[4:])
        return np.concatenate(pieces)[:num_tokens]


@dataclass
class Bench:
    """Samples in milliseconds by operation: of processor time, and of time on the wall under `` wall``."""

    plan: Plan
    progress: Progress
    samples: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Take the time of what is inside."""
        wall, processor = time.perf_counter(), time.process_time()
        yield
        for label, took in ((name, time.process_time() - processor), (f"{name} wall", time.perf_counter() - wall)):
            self.samples.setdefault(label, []).append(1e3 * took)

    def time(self, name: str, call: Callable[[], Any], *, prepare: Callable[[], Any] | None = None) -> None:
        """Time ``call`` several times, and ``prepare`` it each time without timing that; once before for nothing."""
        for turn in range(self.plan.repeats + 1):
            if prepare is not None:
                prepare()
            with self.timed(name if turn else "once before"):
                call()

    def spread(self, name: str) -> Estimate:
        """Of the samples of one operation."""
        return find_quartiles(self.samples[name])


def store_of(tokens: int, shape: Shape, **config: Any) -> KVStore:
    """A store with room for so many tokens in memory."""
    return KVStore(StoreConfig(max_bytes=tokens * shape.token_bytes, **config), min_run_tokens=MIN_RUN_TOKENS)


def opened(store: KVStore) -> KVStore:
    store.open(FINGERPRINT, torch.float32, torch.device("cpu"))
    return store


@contextmanager
def unsynced() -> Iterator[None]:
    """Fill a directory without waiting for the disk at every entry; what is timed does wait."""
    with patch("os.fsync"):
        yield


def fill(bench: Bench, store: KVStore, texts: Texts, count: int, num_tokens: int, shape: Shape) -> list[TokenIds]:
    """Put ``count`` entries; their token ids."""
    task = bench.progress.add_task(f"filling {count} entries of {num_tokens} tokens", total=count)
    stored = []
    for _ in range(count):
        stored.append(texts.next(num_tokens))
        assert store.put(reference_of(stored[-1], shape))
        bench.progress.advance(task)
    bench.progress.remove_task(task)
    return stored


def lookups(bench: Bench, store: KVStore, texts: Texts, stored: list[TokenIds], key: str, num_tokens: int) -> None:
    """Prefixes and runs, found and not found, of prompts of ``num_tokens`` tokens."""
    prompts = [np.concatenate([texts.pick(stored), texts.random(num_tokens)])[:num_tokens] for _ in range(50)]
    runs = [texts.running_into(stored, num_tokens) for _ in range(50)]
    novel = [texts.random(num_tokens) for _ in range(50)]

    def prefix(among: list[TokenIds]) -> Callable[[], Any]:
        return lambda: store.find_prefix(texts.pick(among), NAMESPACE, max_tokens=num_tokens - 1)

    def run(among: list[TokenIds]) -> Callable[[], Any]:
        return lambda: store.find_runs(texts.pick(among), NAMESPACE, start=0, stop=num_tokens - 1)

    assert prefix(prompts)() and run(runs)() and not run(novel)()
    bench.time(f"prefix {key}", prefix(prompts))
    bench.time(f"prefix miss {key}", prefix(novel))
    bench.time(f"runs {key}", run(runs))
    bench.time(f"runs miss {key}", run(novel))


def puts(bench: Bench, store: KVStore, texts: Texts, num_tokens: int, shape: Shape, key: str) -> None:
    made: list[Reference] = []
    bench.time(
        f"put {key}",
        lambda: store.put(made.pop()),
        prepare=lambda: made.append(reference_of(texts.next(num_tokens), shape)),
    )


def promotions(bench: Bench, store: KVStore, stored: list[TokenIds], num_tokens: int, key: str) -> None:
    """The first lookup of entries that lie low: each is found once."""
    left = iter(stored[:: max(1, len(stored) // (bench.plan.repeats + 1))])
    bench.time(f"promotion {key}", lambda: store.find_prefix(next(left), NAMESPACE, max_tokens=num_tokens - 1))
    assert store.stats()["promoted"] > bench.plan.repeats


def costs(bench: Bench, seed: int, count: int, num_tokens: int, shape: Shape, key: str, path: Path) -> None:
    """All operations on ``count`` entries of ``num_tokens`` tokens."""
    texts, total = Texts(seed), count * num_tokens
    store = store_of(total + (bench.plan.repeats + 1) * num_tokens, shape)
    stored = fill(bench, store, texts, count, num_tokens, shape)
    lookups(bench, store, texts, stored, key, num_tokens)
    if key == str(max(bench.plan.entries)):
        for length in bench.plan.saved_tokens:
            lookups(bench, store, texts, stored, f"saving {length}", length)
    puts(bench, store, texts, num_tokens, shape, key)
    while not store.stats()["evicted"]:
        store.put(reference_of(texts.next(num_tokens), shape))
    puts(bench, store, texts, num_tokens, shape, f"full {key}")

    store = store_of(max(total // 10, 2 * num_tokens), shape, host_max_bytes=total * shape.token_bytes)
    stored = fill(bench, store, Texts(seed), count, num_tokens, shape)
    promotions(bench, store, stored[: count * 2 // 3], num_tokens, f"host {key}")

    written = opened(store_of(0, shape, directory=path / key, disk_max_bytes=64 * GIB))
    with unsynced():
        stored = fill(bench, written, Texts(seed), count, num_tokens, shape)
    puts(bench, written, Texts(seed + 1), num_tokens, shape, f"disk {key}")
    written.close()
    for _ in range(bench.plan.opens):
        store = store_of(total, shape, directory=path / key, disk_max_bytes=64 * GIB)
        with bench.timed(f"open {key}"):
            opened(store)
        assert store.stats()["entries"] >= count
        store.close()
    promotions(bench, opened(store), stored, num_tokens, f"disk {key}")
    store.close()


def prefills(bench: Bench, adapter: ModelAdapter, seed: int) -> None:
    """Full prefills of the reference model, of as many tokens as lookups save."""
    rng, size = np.random.default_rng(seed), adapter.config.vocab_size
    for length in bench.plan.saved_tokens:
        task = bench.progress.add_task(f"prefilling {length} tokens", total=bench.plan.prefills + 1)
        for turn in range(bench.plan.prefills + 1):
            ids = rng.integers(3, size, length, dtype=np.int64)
            with bench.timed(f"prefill {length}" if turn else "once before"):
                adapter.prefill(ids)
            bench.progress.advance(task)
        bench.progress.remove_task(task)


class Request(NamedTuple):
    """One prompt of the trace, with the answer behind it."""

    phase: str
    token_ids: TokenIds
    prompt_tokens: int


def trace(seed: int, requests: int) -> Iterator[Request]:
    """Traffic in four phases.

    A working set of 100 prompts is asked for by Zipf's law, conversations grow by a turn at a time and end after eight,
    and prompts that never return come between. ``scan`` is nine tenths of the latter; ``after`` is as before it; in
    ``shifted`` another working set takes over, so that what was popular is of no use any more.
    """
    texts, rng = Texts(seed), np.random.default_rng(seed + 1)
    mixes = {"mixed": (5, 3, 2), "scan": (1, 0, 9), "after": (5, 3, 2), "shifted": (5, 3, 2)}
    working = [texts.next(int(rng.integers(200, 1000))) for _ in range(100)]
    weights = 1 / np.arange(1, len(working) + 1)
    turns: list[list[TokenIds]] = [[] for _ in range(12)]
    for phase in PHASES:
        if phase == "shifted":
            working = [texts.next(int(rng.integers(200, 1000))) for _ in working]
        shares = np.array(mixes[phase]) / 10
        for _ in range(requests):
            kind = rng.choice(3, p=shares)
            if kind == 0:
                prompt = working[rng.choice(len(working), p=weights / weights.sum())]
            elif kind == 1:
                turn = turns[rng.integers(len(turns))]
                if len(turn) == 8:
                    turn.clear()
                turn.append(texts.random(int(rng.integers(40, 160))))
                prompt = np.concatenate(turn)
            else:
                prompt = texts.random(int(rng.integers(200, 1000)))
            answer = texts.random(20) if kind != 1 else texts.random(0)
            yield Request(phase, np.concatenate([prompt, answer]), len(prompt))


class Outcome(NamedTuple):
    """What one request of the trace asked for, and what of it was there."""

    phase: str
    tokens: int
    found_tokens: int
    compute: float
    saved_compute: float


Outcomes = dict[Eviction, list[Outcome]]


def traced(plan: Plan, seed: int, progress: Progress, half_cost_tokens: float) -> Outcomes:
    """The trace on one store for each rule, which has room for half of the working set.

    Args:
        plan: how many requests.
        seed: of the trace.
        progress: shown meanwhile.
        half_cost_tokens: position at which attending costs as much as all else of a layer.
    """
    outcomes: Outcomes = {rule: [] for rule in EVICTIONS}
    stores = {rule: store_of(HELD_TOKENS, TINY, eviction=rule) for rule in EVICTIONS}
    task = progress.add_task("trace", total=len(PHASES) * plan.requests)
    for request in trace(seed, plan.requests):
        for rule, store in stores.items():
            length = request.prompt_tokens
            match = store.find_prefix(request.token_ids, NAMESPACE, max_tokens=length - 1)
            found = match.num_tokens if match else 0
            whole, saved = (n + n * n / 2 / half_cost_tokens for n in (length, found))
            outcomes[rule].append(Outcome(request.phase, length, found, whole, saved))
            store.put(reference_of(request.token_ids, TINY))
        progress.advance(task)
    for store in stores.values():
        store.check()
    progress.remove_task(task)
    return outcomes


def rates(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """Shares of tokens and of compute that were there."""
    tokens, found, compute, saved = (sum(column) for column in list(zip(*outcomes, strict=True))[1:])
    return found / tokens, saved / compute


def half_cost_tokens(model: Any) -> float:
    """Where one token's attention takes as many multiplications in a layer as its projections do."""
    config = model.config
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    head = getattr(config, "head_dim", None) or head
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    projections = 2 * width * queries + 2 * width * keys + 3 * width * config.intermediate_size
    return projections / (2 * queries)


def cell(spread: Estimate) -> str:
    digits = 3 if spread.value < 1 else 1
    return f"{spread.value:.{digits}f} [{spread.low:.{digits}f}, {spread.high:.{digits}f}]"


COLUMNS = {  # titles, and of which samples of an operation on so many entries
    "prefix, found": "prefix {}",
    "prefix, not found": "prefix miss {}",
    "runs, found": "runs {}",
    "runs, not found": "runs miss {}",
    "put, room": "put {}",
    "put, full": "put full {}",
    "put, disk": "put disk {}",
    "put, disk, wall": "put disk {} wall",
    "host to device": "promotion host {}",
    "disk to device": "promotion disk {}",
    "open": "open {}",
    "open, wall": "open {} wall",
}


def cost_table(bench: Bench, first: str, keys: Sequence[str], labels: Sequence[str]) -> Iterator[str]:
    yield f"| {first} | {' | '.join(COLUMNS)} |"
    yield "| --- " * (len(COLUMNS) + 1) + "|"
    for key, label in zip(keys, labels, strict=True):
        yield f"| {label} | {' | '.join(cell(bench.spread(name.format(key))) for name in COLUMNS.values())} |"


def share_table(bench: Bench) -> Iterator[str]:
    yield "| tokens | prefill, ms | prefix, ms | share | runs, ms | share | nothing found, ms | share |"
    yield "| --- " * 8 + "|"
    for length in bench.plan.saved_tokens:
        prefill = bench.spread(f"prefill {length}")
        prefix, runs = (bench.spread(f"{name} saving {length}") for name in ("prefix", "runs"))
        misses = [bench.samples[f"{name} miss saving {length}"] for name in ("prefix", "runs")]
        nothing = find_quartiles([sum(times) for times in zip(*misses, strict=True)])
        cells = [part for took in (prefix, runs, nothing) for part in (cell(took), f"{took.value / prefill.value:.2%}")]
        yield f"| {length} | {cell(prefill)} | {' | '.join(cells)} |"


def trace_table(outcomes: Outcomes) -> Iterator[str]:
    yield "| phase | requests | tokens, value | tokens, lru | compute, value | compute, lru |"
    yield "| --- " * 6 + "|"
    for phase in (*PHASES, "all"):
        of_phase = [[o for o in outcomes[rule] if phase in (o.phase, "all")] for rule in ("value", "lru")]
        (value, value_compute), (lru, lru_compute) = map(rates, of_phase)
        shares = " | ".join(f"{share:.3f}" for share in (value, lru, value_compute, lru_compute))
        yield f"| {phase} | {len(of_phase[0])} | {shares} |"


def plot(outcomes: Outcomes, path: Path) -> None:
    """Hit rates in tokens over time, in windows of a fifteenth of a phase."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True, layout="constrained")
    num_requests = len(outcomes["lru"])
    window = max(1, num_requests // len(PHASES) // 15)
    for panel, which, title in zip(panels, (0, 1), ("tokens", "compute"), strict=True):
        for rule, done in outcomes.items():
            starts = range(0, num_requests, window)
            hits = [rates(done[start : start + window])[which] for start in starts]
            panel.plot([start + window / 2 for start in starts], hits, label=rule, marker=".")
        for number, phase in enumerate(PHASES):
            at = number * num_requests // len(PHASES)
            panel.axvline(at, color="0.8", zorder=0)
            panel.text(at + num_requests / 100, 0.97, phase, va="top")
        panel.set(xlabel="requests", title=f"share of {title} found", ylim=(0, 1), xlim=(0, num_requests))
    panels[0].legend(loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(bench: Bench, outcomes: Outcomes, about: dict[str, Any]) -> str:
    """The results as Markdown."""
    plan, shape = bench.plan, about["shape"]
    commit = about["commit"][:12] + " with uncommitted changes" * about["uncommitted_changes"]
    threads = f"{about['threads']} thread{'s' * (about['threads'] > 1)}"
    came = f"`{about['command']}` at commit {commit}: {about['dtype']} on {about['device']}, {threads}."
    calls = f"{plan.opens} of opening"
    counts, lengths = [str(count) for count in plan.entries], [f"{length} tokens" for length in plan.tokens]
    held = ", ".join(str(num_entries(plan, shape, length)) for length in plan.tokens)
    axis = cost_table(bench, "tokens", lengths, [str(length) for length in plan.tokens])
    sections = {
        f"By number of entries\n\nEntries of {plan.entry_tokens} tokens, KV of {TINY.token_bytes} bytes a token, "
        f"n = {plan.repeats}, {calls}.": cost_table(bench, "entries", counts, counts),
        f"By tokens of an entry\n\nKV as the reference model's, {shape.token_bytes} bytes a token, in {held} entries, "
        f"n = {plan.long_repeats}, {calls}.": axis,
        f"As a share of the prefill that they save\n\nLookups among {max(plan.entries)} entries of {plan.entry_tokens} "
        f"tokens, n = {plan.repeats}, and full prefills of as many tokens on {REFERENCE_MODEL}, n = {plan.prefills}. "
        "Aim: under 2%.": share_table(bench),
        f"What each rule keeps\n\nHit rates of the same {len(outcomes['lru'])} requests on two stores of {HELD_TOKENS} "
        "tokens each, n = 1 trace.": trace_table(outcomes),
    }
    parts = [f"## {above}\n\n{came}\n\n" + "\n".join(table) for above, table in sections.items()]
    return "\n\n".join(["# The store: what it costs, and what it keeps", LEGEND, *parts])


LEGEND = (
    "Milliseconds of processor time, as other work ran on the machine, or on the wall where a column says so; median "
    "and quartiles over n calls behind one that is not counted. Prompts are as long as entries, of which ten at a "
    "time begin alike. Found: all of the prompt but its last token, or most of it in runs of several entries. A put "
    "comes while there is room, or when something must go for it (full), or in a directory, where it waits for the "
    "disk. Host to device, as others go down, is without a GPU: bookkeeping, no copy. Disk to device reads a file and "
    "checks its digest. The KV of a hit is handed over in pieces: a lookup copies none."
)


def num_entries(plan: Plan, shape: Shape, length: int) -> int:
    """As many entries of one length as memory is set aside for, 100 at most, and more than are found once each."""
    return max(2 * (plan.long_repeats + 1), min(100, plan.held_bytes // (length * shape.token_bytes)))


def measured(plan: Plan, seed: int, progress: Progress) -> tuple[Bench, Outcomes, dict[str, Any]]:
    """All of it."""
    bench = Bench(plan, progress)
    longer = Bench(replace(plan, repeats=plan.long_repeats), progress, bench.samples)
    model = NamedModel(REFERENCE_MODEL, device="cpu", dtype="float32", options={}).load()
    config = model.config
    shape = Shape(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    with tempfile.TemporaryDirectory(prefix="semsharekv-store-") as path:
        for count in plan.entries:
            costs(bench, seed, count, plan.entry_tokens, TINY, str(count), Path(path))
        for length in plan.tokens:
            count = num_entries(plan, shape, length)
            costs(longer, seed, count, length, shape, f"{length} tokens", Path(path))
    prefills(bench, ModelAdapter(model, "off"), seed)
    outcomes = traced(plan, seed, progress, half_cost_tokens(model))
    return bench, outcomes, {**describe_machine(model), "shape": shape, "seed": seed}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print or write the tables and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file; the plot goes beside it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--quick", action="store_true", help="a small run, under 30 s")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        bench, outcomes, about = measured(Plan.quick() if args.quick else Plan(), args.seed, progress)
    given = [f"--seed {args.seed}", f"--threads {args.threads}", *(["--quick"] if args.quick else [])]
    about |= describe_origin(f"python {shlex.quote('examples/lab/measure_store.py')} {' '.join(given)}")
    text = report(bench, outcomes, about)
    if args.out is None:
        Console(file=sys.stdout).print(Markdown(text))
        return
    if find_spec("matplotlib"):
        image = args.out.with_name(f"{args.out.stem}-hits.png")
        plot(outcomes, image)
        text += f"\n\n![hit rates over time]({image.name})"
    write_whole(args.out, text + "\n")
    console.print(f"written: {args.out}")


if __name__ == "__main__":
    main()
