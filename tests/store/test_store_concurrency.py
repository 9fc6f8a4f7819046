"""One store, all tiers, many threads and tasks: every hit is right, nothing waits for ever, nothing is left behind.

``SEMSHAREKV_SOAK_S=60`` runs each test for a minute in place of a few seconds; ``-s`` shows its figures.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from semsharekv_integrations import SemShareEngine, StoreConfig
from semsharekv_integrations.kv import LayerKV, Reference, TokenIds
from semsharekv_integrations.store import KVStore
from semsharekv_integrations.store.codec import PackedKV, read_references, write_references
from semsharekv_integrations.store.radix import Node
from semsharekv_integrations.store.records import reference_id
from tiny_models import EngineMaker

STORE_SECONDS, ENGINE_SECONDS = (float(os.environ.get("SEMSHAREKV_SOAK_S", default)) for default in (3.5, 1.5))
PATIENCE_S = 120.0  # after which a thread that has not ended is stuck
NAMESPACES = ("a", "b", "commons")
SESSIONS = ("s", "t")
DOCUMENTS = ("d", "e", "f")
MIN_RUN_TOKENS = 4
BYTES_PER_TOKEN = 2 * 4 * 4  # keys and values, four numbers each, four bytes
MOST_GROWTH_BYTES = 64 * 1024**2  # of the process, from the first third on


def kv_of(token_ids: TokenIds, namespace: str) -> LayerKV:
    """What a model would compute, in small: it tells the token, its position, all before it, and the namespace."""
    before = np.cumsum((token_ids + 1) * np.arange(1, len(token_ids) + 1)) % 65_521
    salt = np.full(len(token_ids), NAMESPACES.index(namespace))
    rows = torch.from_numpy(np.stack([token_ids, np.arange(len(token_ids)), before, salt], axis=-1))
    return LayerKV(rows.float()[None, None], -rows.float()[None, None])


def reference(token_ids: TokenIds, namespace: str, **labels: Any) -> Reference:
    layers = (kv_of(token_ids, namespace),)
    return Reference(reference_id(namespace, token_ids), namespace, token_ids, layers, **labels)


def drawn_ids(rng: Random) -> TokenIds:
    """Prompts that begin alike, part at different places, and have runs in common behind that."""
    start = [rng.randrange(3)] * rng.choice((4, 8, 16))
    parts = [[10 * rng.randrange(6) + n for n in range(rng.choice((6, 9)))] for _ in range(rng.randrange(1, 4))]
    return np.array([*start, *(token for part in parts for token in part)], dtype=np.int64)


def verify(found: Reference, namespace: str, session: str | None = None) -> None:
    """That what was found is what was put, and may be read here."""
    assert found.namespace in (namespace, "commons")
    assert not found.is_tainted or (found.session == session and found.namespace == namespace)
    (layer,) = found.layers
    for tensor, wanted in zip(layer, kv_of(found.token_ids, found.namespace), strict=True):
        assert torch.equal(tensor[:, :, : len(found.token_ids)], wanted), "KV of other tokens"


def verified(references: Sequence[Reference]) -> int:
    for found in references:
        verify(found, found.namespace)
    return len(references)


class Worker:
    """Does one thing to a store after another, and verifies what it finds, at once and again later."""

    def __init__(self, store: KVStore, seed: int, path: Path) -> None:
        self.store, self.rng, self.path = store, Random(seed), path / f"saved-{seed}"
        self.counts: Counter[str] = Counter()
        self.held: deque[tuple[Reference, str, str | None]] = deque(maxlen=4)
        self.chores: list[tuple[int, Callable[[], None]]] = [
            (30, self.look_up),
            (20, self.look_for_runs),
            (15, self.put),
            (6, self.put_tainted),
            (4, self.warm),
            (6, self.fetch),
            (6, self.look_again),
            (2, self.forget),
            (1, self.clear),
            (1, self.save),
            (1, self.check),
        ]

    def step(self) -> None:
        weights, chores = zip(*self.chores, strict=True)
        (chore,) = self.rng.choices(chores, weights)
        chore()
        self.counts[chore.__name__] += 1

    def see(self, found: Reference, namespace: str, session: str | None = None) -> None:
        verify(found, namespace, session)
        self.counts["hits"] += 1
        self.held.append((found, namespace, session))

    def look_up(self) -> None:
        ids, namespace = drawn_ids(self.rng), self.rng.choice(NAMESPACES)
        session = self.rng.choice((None, *SESSIONS))
        match = self.store.find_prefix(ids, namespace, max_tokens=len(ids) - 1, session=session)
        if match is not None:
            assert 0 < match.num_tokens < len(ids)
            assert (match.reference.token_ids[: match.num_tokens] == ids[: match.num_tokens]).all()
            self.see(match.reference, namespace, session)

    def look_for_runs(self) -> None:
        ids, namespace = drawn_ids(self.rng), self.rng.choice(NAMESPACES)
        for run in self.store.find_runs(ids, namespace, start=0, stop=len(ids)):
            source = run.reference.token_ids[run.source_start : run.source_start + run.num_tokens]
            assert (source == ids[run.start : run.start + run.num_tokens]).all() and not run.reference.is_tainted
            self.see(run.reference, namespace)

    def put(self) -> None:
        labels: dict[str, Any] = {"expires_after_s": self.rng.choice((None, None, None, 0.05))}
        labels |= {"document_starts": {self.rng.choice(DOCUMENTS): 0}, "session": self.rng.choice((None, *SESSIONS))}
        self.store.put(reference(drawn_ids(self.rng), self.rng.choice(NAMESPACES), **labels))

    def put_tainted(self) -> None:
        ids = drawn_ids(self.rng)
        labels: dict[str, Any] = {"session": self.rng.choice(SESSIONS), "exact_tokens": self.rng.randrange(len(ids))}
        self.store.put(reference(ids, self.rng.choice(NAMESPACES), **labels))

    def warm(self) -> None:
        namespace, document = self.rng.choice(NAMESPACES), self.rng.choice(DOCUMENTS)
        self.store.forget(namespace, document_id=f"warm {document}")
        ids = np.array([7, *range(20, 20 + 9)], dtype=np.int64)
        self.store.put(reference(ids, namespace, pinned=True, document_starts={f"warm {document}": 0}))

    def fetch(self) -> None:
        namespace = self.rng.choice(NAMESPACES)
        listed = self.store.references(namespace)
        found = self.store.fetch(self.rng.choice(listed).id, namespace) if listed else None
        if found is not None:
            self.see(found, namespace)

    def look_again(self) -> None:
        """What was found earlier is as it was, whatever has become of it in the store."""
        for found in self.held:
            verify(*found)

    def forget(self) -> None:
        namespace, kind = self.rng.choice(NAMESPACES), self.rng.randrange(3)
        document = self.rng.choice((*DOCUMENTS, "warm d")) if kind < 2 else None
        self.store.forget(namespace, document_id=document, session=self.rng.choice(SESSIONS) if kind == 2 else None)

    def clear(self) -> None:
        if self.rng.random() < 0.1:
            self.store.clear()
        else:
            self.store.forget(self.rng.choice(NAMESPACES))

    def save(self) -> None:
        write_references(self.path, self.store.fetch_all(), "ab")
        verified(read_references(self.path, "ab", torch.device("cpu")))

    def check(self) -> None:
        self.store.check()
        stats = self.store.stats()
        for tier in ("", "host_", "disk_"):
            assert 0 <= stats[f"{tier}bytes"] <= stats[f"{tier}max_bytes"]


class Crew:
    """Threads, one of them with an event loop, that work until they are told to stop or one of them fails."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self.errors: list[BaseException] = []
        self.threads: list[threading.Thread] = []

    def start(self, steps: Sequence[Callable[[], None]], tasks: Sequence[Callable[[], Any]]) -> None:
        self.threads = [threading.Thread(target=self._repeat, args=(step,), daemon=True) for step in steps]
        if tasks:
            self.threads.append(threading.Thread(target=self._run, args=(tasks,), daemon=True))
        for thread in self.threads:
            thread.start()

    def finish(self, seconds: float, enough: Callable[[], bool]) -> None:
        """Let them work for so long, and on a busy machine until it is ``enough``, then stop them."""
        began = time.monotonic()
        self.stopped.wait(seconds)
        while not self.stopped.wait(0.05) and not enough() and time.monotonic() < began + PATIENCE_S:
            pass
        self.stopped.set()
        until = time.monotonic() + PATIENCE_S
        for thread in self.threads:
            thread.join(max(0.0, until - time.monotonic()))
        if any(thread.is_alive() for thread in self.threads):
            faulthandler.dump_traceback(sys.__stderr__)
            pytest.fail("a thread is stuck; see the traces")
        if self.errors:
            raise self.errors[0]

    def _repeat(self, step: Callable[[], None]) -> None:
        try:
            while not self.stopped.is_set():
                step()
        except BaseException as error:
            self.errors.append(error)
            self.stopped.set()

    def _run(self, tasks: Sequence[Callable[[], Any]]) -> None:
        async def repeat(task: Callable[[], Any]) -> None:
            while not self.stopped.is_set():
                await task()

        async def all_of_them() -> None:
            await asyncio.gather(*map(repeat, tasks))

        try:
            asyncio.run(all_of_them())
        except BaseException as error:
            self.errors.append(error)
            self.stopped.set()


class Footprint:
    """What a process holds, beside what it must hold."""

    def __init__(self) -> None:
        gc.collect()
        self.handles = len(os.listdir("/proc/self/fd"))
        self.maps = Path("/proc/self/maps").read_text().count(".safetensors")
        self.objects = Counter(type(thing) for thing in gc.get_objects() if type(thing) in (Node, PackedKV))
        self.threads = threading.active_count()
        self.resident_bytes = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def __str__(self) -> str:
        counts = f"{self.handles} handles, {self.maps} maps, {sum(self.objects.values())} objects"
        return f"{counts}, {self.threads} threads, {self.resident_bytes / 1024**2:.1f} MiB"


def opened(path: Path) -> KVStore:
    config = StoreConfig(
        max_bytes=150 * BYTES_PER_TOKEN,
        host_max_bytes=150 * BYTES_PER_TOKEN,
        directory=path,
        disk_max_bytes=20_000,
        shared_namespace="commons",
        ttl_s=2.0,
    )
    store = KVStore(config, min_run_tokens=MIN_RUN_TOKENS)
    store.open("ab", torch.float32, torch.device("cpu"))
    return store


def crew_on(store: KVStore, path: Path, workers: list[Worker]) -> Crew:
    """Four threads, and three tasks of which one calls the store in threads of the loop's own."""
    crew = Crew()
    workers += [Worker(store, seed, path) for seed in range(len(workers), len(workers) + 7)]
    threaded, (*direct, elsewhere) = workers[-7:-3], workers[-3:]

    async def call(worker: Worker) -> None:
        worker.step()
        await asyncio.sleep(0)

    tasks: list[Callable[[], Any]] = [lambda worker=worker: call(worker) for worker in direct]  # type: ignore[misc]
    tasks.append(lambda: asyncio.to_thread(elsewhere.step))
    crew.start([worker.step for worker in threaded], tasks)
    return crew


EVENTS = ("evicted", "promoted", "demoted", "expired", "hits", "misses")


def seen_in(store: KVStore, events: Sequence[str]) -> bool:
    stats = store.stats()
    return all(stats[event] > 0 for event in events)


def all_done(workers: Sequence[Worker]) -> bool:
    done = {name for worker in workers for name in list(worker.counts)}
    return {chore.__name__ for _, chore in workers[0].chores} <= done


def test_threads_and_tasks_on_one_store_with_all_tiers(tmp_path: Path) -> None:
    before, workers = Footprint(), list[Worker]()
    store = opened(tmp_path / "kv")
    marks = []
    for share in (1 / 3, 2 / 3):
        crew = crew_on(store, tmp_path, workers)
        crew.finish(share * STORE_SECONDS, lambda: all_done(workers[-7:]) and seen_in(store, EVENTS))
        store.check()
        left = [(kept.id, kept.namespace, kept.token_ids.tolist()) for kept in store.fetch_all()]
        stats = store.stats()
        for worker in workers:
            worker.look_again()
            worker.held.clear()
        store.close()  # and what lies on the disk alone is still there
        store.open("ab", torch.float32, torch.device("cpu"))
        store.check()
        assert verified(store.fetch_all())
        store.clear()
        assert [store.stats()[f"{tier}bytes"] for tier in ("", "host_", "disk_", "index_")] == [0] * 4
        marks.append(Footprint())
    store.close()
    after = Footprint()
    counts = sum((worker.counts for worker in workers), Counter())
    told = f"{STORE_SECONDS} s: {dict(counts)}", stats, f"before: {before}", *map(str, marks), f"after: {after}"
    print("", *told, sep="\n")  # noqa: T201
    assert left and counts["hits"] > 10 and all_done(workers)
    assert seen_in(store, EVENTS), stats
    for trouble in ("unreadable", "promotion_failed", "write_failed"):
        assert stats[trouble] == 0, trouble
    for trouble in ("damaged", "foreign", "vanished", "write_failed"):
        assert stats[f"disk_{trouble}"] == 0, trouble
    assert not list((tmp_path / "kv").glob("*/*.safetensors"))
    assert (after.handles, after.objects) == (before.handles, before.objects) and after.maps <= before.maps
    assert marks[1].handles == marks[0].handles and marks[1].threads <= before.threads
    assert after.resident_bytes - marks[0].resident_bytes < MOST_GROWTH_BYTES


TEXTS = {
    "flood": "A flood hit the old town of Prorna in May , and the mayor said that many people were affected .",
    "fire": "The report from Velmar names a fire at the bridge , which was closed on Monday for repairs .",
}


def standing_in(prompt: str) -> dict[str, str]:
    return {name: text for name, text in TEXTS.items() if text in prompt}


PROMPTS = [f"{text} {question}" for text in TEXTS.values() for question in ("Who?", "When was it?", "Why?")]


class Customer:
    """Calls an engine in all ways, and compares every answer with what a full prefill gives."""

    def __init__(self, engine: SemShareEngine, wanted: dict[str, list[int]], seed: int, path: Path) -> None:
        self.engine, self.wanted, self.rng, self.path = engine, wanted, Random(seed), path / f"engine-{seed}"
        self.counts: Counter[str] = Counter()

    def options(self) -> dict[str, Any]:
        return {"namespace": self.rng.choice("ab"), "session": self.rng.choice((None, "s")), "max_new_tokens": 3}

    def step(self) -> None:
        chore = self.rng.choices(("ask", "warm", "forget", "clear", "save", "load"), (20, 4, 3, 1, 1, 1))[0]
        namespace = self.rng.choice("ab")
        if chore == "ask":
            prompt = self.rng.choice(PROMPTS)
            self.see(prompt, self.engine.generate(prompt, documents=standing_in(prompt), **self.options()))
        elif chore == "warm":
            self.engine.warm(TEXTS, namespace=namespace, pinned=self.rng.random() < 0.3)
        elif chore == "forget":
            self.engine.forget(self.rng.choice(list(TEXTS)), namespace=namespace)
        elif chore == "clear":
            self.engine.clear(self.rng.choice((None, namespace)))
        elif chore == "save":
            self.engine.save(self.path)
        elif self.path.exists():
            self.engine.load(self.path)
        self.counts[chore] += 1

    async def ask(self) -> None:
        prompt = self.rng.choice(PROMPTS)
        self.see(prompt, await self.engine.agenerate(prompt, documents=standing_in(prompt), **self.options()))
        self.counts["ask as a task"] += 1

    def see(self, prompt: str, generation: Any) -> None:
        assert generation.token_ids == self.wanted[prompt]
        self.counts["reused_tokens"] += generation.report.reused_tokens


def test_threads_and_tasks_on_one_engine_with_all_tiers(make_engine: EngineMaker, tmp_path: Path) -> None:
    off = make_engine("off")
    wanted = {prompt: off.generate(prompt, max_new_tokens=3).token_ids for prompt in PROMPTS}
    before = Footprint()
    engine = make_engine(
        store=StoreConfig(max_bytes=30_000, host_max_bytes=30_000, directory=tmp_path / "kv", disk_max_bytes=90_000)
    )
    engine.generate(PROMPTS[0], max_new_tokens=3)
    customers = [Customer(engine, wanted, seed, tmp_path) for seed in range(5)]
    crew = Crew()
    crew.start([customer.step for customer in customers[:3]], [customer.ask for customer in customers[3:]])

    def counted() -> Counter[str]:
        return sum((Counter(dict(customer.counts)) for customer in customers), Counter())

    def enough() -> bool:
        counts = counted()
        return all(counts[done] for done in ("ask", "ask as a task", "warm", "save", "load", "reused_tokens"))

    crew.finish(ENGINE_SECONDS, enough)
    engine.store.check()
    counts = counted()
    told = [f"{ENGINE_SECONDS} s: {dict(counts)}", engine.stats(), f"before: {before}"]
    assert enough(), counts
    assert engine.stats()["store_unreadable"] == engine.stats()["store_write_failed"] == 0
    assert engine.stats()["requests"] == counts["ask"] + counts["ask as a task"] + 1
    engine.clear()
    engine.close()
    assert not list((tmp_path / "kv").glob("*/*.safetensors"))
    after = Footprint()
    print("", *told, f"after: {after}", sep="\n")  # noqa: T201
    assert (after.handles, after.objects) == (before.handles, before.objects) and after.maps <= before.maps
