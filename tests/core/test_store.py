"""The store against a simple model of it: bounds, lifetimes, namespaces, sessions, and its law after every step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from semsharekv_integrations import StoreConfig
from semsharekv_integrations.kv import LayerKV, Reference, Run, Segment
from semsharekv_integrations.store import KVStore
from semsharekv_integrations.store.memory import reference_id

BYTES_PER_TOKEN = 2 * 2 * 4  # keys and values, two numbers each, four bytes
MIN_RUN_TOKENS = 2
NAMESPACES = st.sampled_from(["a", "b"])
SESSIONS = st.sampled_from(["s", "t"])
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=6).map(tuple)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def reference(tokens: tuple[int, ...], namespace: str = "a", **labels: object) -> Reference:
    ids = np.array(tokens, dtype=np.int64)
    layer = LayerKV(*(torch.from_numpy(ids).float()[None, None, :, None].repeat(1, 1, 1, 2) for _ in range(2)))
    return Reference(reference_id(namespace, ids), namespace, ids, (layer,), **labels)  # type: ignore[arg-type]


def store_of(max_tokens: int = 1000, ttl_s: float | None = None) -> tuple[KVStore, Clock]:
    clock = Clock()
    config = StoreConfig(max_bytes=max_tokens * BYTES_PER_TOKEN, ttl_s=ttl_s)
    return KVStore(config, clock, min_run_tokens=MIN_RUN_TOKENS), clock


def lookup(store: KVStore, tokens: tuple[int, ...], namespace: str = "a", session: str | None = None) -> int:
    ids = np.array(tokens, dtype=np.int64)
    match = store.longest_prefix(ids, namespace, max_tokens=len(tokens), session=session)
    if match is None:
        return 0
    assert match.reference.namespace == namespace
    assert tuple(match.reference.token_ids[: match.num_tokens]) == tokens[: match.num_tokens]
    return match.num_tokens


def runs_of(store: KVStore, tokens: tuple[int, ...], namespace: str = "a") -> list[Run]:
    return store.identical_runs(np.array(tokens, dtype=np.int64), namespace, start=0, stop=len(tokens))


@dataclass
class Kept:
    namespace: str
    tokens: tuple[int, ...]
    pinned: bool
    ttl_s: float | None
    documents: set[str]
    used_s: float
    tainted_session: str | None = None

    def shared_with(self, tokens: tuple[int, ...]) -> int:
        pairs = zip(self.tokens, tokens, strict=False)
        return next((n for n, (x, y) in enumerate(pairs) if x != y), min(len(self.tokens), len(tokens)))


class StoreMachine(RuleBasedStateMachine):
    """Every entry is a plain record here; what the store does is done to a list of them."""

    MAX_TOKENS, TTL_S = 14, 9.0

    def __init__(self) -> None:
        super().__init__()
        self.store, self.clock = store_of(self.MAX_TOKENS, self.TTL_S)
        self.kept: list[Kept] = []

    def expire(self) -> None:
        self.kept = [k for k in self.kept if self.clock.now_s - k.used_s < (k.ttl_s or self.TTL_S)]

    @rule(
        tokens=TOKENS,
        namespace=NAMESPACES,
        pinned=st.booleans(),
        ttl_s=st.sampled_from([None, 4.0]),
        document=st.text(),
    )
    def put(self, tokens: tuple[int, ...], namespace: str, pinned: bool, ttl_s: float | None, document: str) -> None:
        self.clock.now_s += 0.01  # no two uses at the same time, so that the order of eviction is certain
        self.expire()
        labels = {"pinned": pinned, "expires_after_s": ttl_s, "document_starts": {document: 0}}
        stored = self.store.put(reference(tokens, namespace, **labels))
        new = Kept(namespace, tokens, pinned, ttl_s, {document}, self.clock.now_s)
        mine = [k for k in self.kept if k.namespace == namespace and not k.tainted_session]
        containers = [k for k in mine if k.tokens[: len(tokens)] == tokens and (k.pinned or not pinned)]
        if containers:
            assert stored
            labelled = [k for k in containers if self.labels_of(k) >= k.documents | {document}]
            assert labelled, "one entry that contains it carries its labels"
            labelled[0].documents |= {document}
            labelled[0].used_s = self.clock.now_s
            labelled[0].ttl_s = min(filter(None, (labelled[0].ttl_s, ttl_s)), default=None)
            return
        absorbed = [k for k in mine if not k.pinned and tokens[: len(k.tokens)] == k.tokens]
        self.settle(new, stored, absorbed, absorbed)

    @rule(tokens=TOKENS, namespace=NAMESPACES, session=SESSIONS, exact=st.integers(0, 5), pinned=st.booleans())
    def put_tainted(self, tokens: tuple[int, ...], namespace: str, session: str, exact: int, pinned: bool) -> None:
        self.clock.now_s += 0.01
        self.expire()
        labels = {"exact_tokens": min(exact, len(tokens) - 1), "document_starts": {session: 0}, "pinned": pinned}
        stored = self.store.put(reference(tokens, namespace, session=session, **labels))
        new = Kept(namespace, tokens, False, None, {session}, self.clock.now_s, tainted_session=session)
        former = [k for k in self.kept if (k.namespace, k.tainted_session) == (namespace, session)]
        self.settle(new, stored, former, [k for k in former if tokens[: len(k.tokens)] == k.tokens])

    def settle(self, new: Kept, stored: bool, replaced: list[Kept], absorbed: list[Kept]) -> None:
        """Whether it had to be stored; if so, what goes for it, with labels joined and the oldest evicted."""
        num_tokens = len(new.tokens)
        room = self.MAX_TOKENS - sum(len(k.tokens) for k in self.kept if k.pinned)
        assert stored == (num_tokens <= room)
        if not stored:
            return
        for k in absorbed:
            new.documents |= k.documents
            new.ttl_s = min(filter(None, (new.ttl_s, k.ttl_s)), default=None)
        for k in replaced:
            self.kept.remove(k)
        for k in sorted((k for k in self.kept if not k.pinned), key=lambda k: k.used_s):
            if sum(len(k.tokens) for k in self.kept) + num_tokens <= self.MAX_TOKENS:
                break
            self.kept.remove(k)
        self.kept.append(new)

    def labels_of(self, kept: Kept) -> set[str]:
        for found in self.store.references(kept.namespace):
            if tuple(found.token_ids) == kept.tokens:
                return set(found.document_starts)
        return set()

    @rule(tokens=TOKENS, namespace=NAMESPACES, session=st.none() | SESSIONS)
    def look_up(self, tokens: tuple[int, ...], namespace: str, session: str | None) -> None:
        self.clock.now_s += 0.01
        self.expire()
        ids = np.array(tokens, dtype=np.int64)
        match = self.store.longest_prefix(ids, namespace, max_tokens=len(tokens) - 1, session=session)
        readable = [k for k in self.kept if k.namespace == namespace and k.tainted_session in (None, session)]
        longest = min(max((k.shared_with(tokens) for k in readable), default=0), len(tokens) - 1)
        assert (match.num_tokens if match else 0) == longest
        if match:
            found = match.reference
            assert found.namespace == namespace
            assert tuple(found.token_ids[:longest]) == tokens[:longest]
            assert tuple(found.layers[0].keys[0, 0, :longest, 0].int().tolist()) == tokens[:longest]
            exact = max((k.shared_with(tokens) for k in readable if not k.tainted_session), default=0)
            assert found.is_tainted == (exact < longest), "of equal ones the ordinary entry is taken"
            self.use(found)

    @rule(tokens=TOKENS, namespace=NAMESPACES, data=st.data())
    def look_for_runs(self, tokens: tuple[int, ...], namespace: str, data: st.DataObject) -> None:
        self.clock.now_s += 0.01
        self.expire()
        start = data.draw(st.integers(0, len(tokens)))
        stop = data.draw(st.integers(start, len(tokens)))
        exact = [k.tokens for k in self.kept if k.namespace == namespace and not k.tainted_session]
        known = {t[at : at + MIN_RUN_TOKENS] for t in exact for at in range(len(t) - MIN_RUN_TOKENS + 1)}
        ids = np.array(tokens, dtype=np.int64)
        covered: set[int] = set()
        for run in self.store.identical_runs(ids, namespace, start=start, stop=stop):
            found = tuple(run.reference.token_ids[run.source_start : run.source_start + run.num_tokens])
            assert found == tokens[run.start : run.start + run.num_tokens] and tuple(run.reference.token_ids) in exact
            assert not run.reference.is_tainted and run.reference.namespace == namespace
            assert start <= min({run.start} - covered) and run.start + run.num_tokens <= stop
            covered |= set(range(run.start, run.start + run.num_tokens))
            self.use(run.reference)
        for at in range(start, stop - MIN_RUN_TOKENS + 1):
            assert at in covered or tokens[at : at + MIN_RUN_TOKENS] not in known

    def use(self, found: Reference) -> None:
        session = found.session if found.is_tainted else None
        key = (found.namespace, tuple(found.token_ids), session)
        used = next(k for k in self.kept if (k.namespace, k.tokens, k.tainted_session) == key)
        used.used_s = self.clock.now_s

    @rule(seconds=st.floats(0.5, 6))
    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.kept))
        document = sorted(one.documents)[0]
        gone = [k for k in self.kept if k.namespace == one.namespace and document in k.documents]
        expired = [k for k in gone if self.clock.now_s - k.used_s >= (k.ttl_s or self.TTL_S)]
        found = self.store.forget(one.namespace, document_id=document)
        assert len(gone) - len(expired) <= found <= len(gone)
        self.kept = [k for k in self.kept if k not in gone]

    @rule()
    def clear(self) -> None:
        self.store.clear()
        self.kept = []
        assert self.store.stats()["entries"] == self.store.stats()["bytes"] == 0

    @invariant()
    def same_entries(self) -> None:
        self.store.check()
        self.expire()
        found = [(r.namespace, tuple(r.token_ids), r.pinned) for r in self.store.references()]
        ordinary = [k for k in self.kept if not k.tainted_session]
        assert sorted(found) == sorted((k.namespace, k.tokens, k.pinned) for k in ordinary)
        stats = self.store.stats()
        assert (stats["entries"], stats["tainted_entries"]) == (len(self.kept), len(self.kept) - len(ordinary))
        assert stats["bytes"] == sum(len(k.tokens) for k in self.kept) * BYTES_PER_TOKEN
        self.store.check()


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=60, stateful_step_count=25)


def test_tensors_are_shaped_as_the_legend_says() -> None:
    kept = reference((1, 0, 1))
    assert kept.layers[0].keys.shape == (1, 1, 3, 2) and kept.num_bytes == 3 * BYTES_PER_TOKEN


def test_least_recently_used_goes_first() -> None:
    store, clock = store_of(max_tokens=6)
    for tokens in ((1, 1), (2, 2), (3, 3)):
        clock.now_s += 1
        store.put(reference(tokens))
    clock.now_s += 1
    assert lookup(store, (1, 1)) == 2
    store.put(reference((4, 4)))
    assert [lookup(store, (n, n)) for n in (1, 2, 3, 4)] == [2, 0, 2, 2]
    assert store.stats()["evicted"] == 1


def test_pinned_entries_are_never_evicted() -> None:
    store, clock = store_of(max_tokens=5)
    store.put(reference((1, 1, 1), pinned=True))
    for n in range(2, 9):
        clock.now_s += 1
        assert store.put(reference((n, n)))
    assert lookup(store, (1, 1, 1)) == 3
    assert not store.put(reference((9, 9, 9)))
    assert lookup(store, (8, 8)) == 2, "a refusal evicts nothing"


def test_a_refused_entry_leaves_its_prefix() -> None:
    store, _ = store_of(max_tokens=3)
    store.put(reference((1, 2)))
    assert not store.put(reference((1, 2, 3, 4)))
    assert lookup(store, (1, 2, 3, 4)) == 2 and store.stats()["refused"] == 1


def test_pinning_what_is_there_keeps_the_bytes_exact() -> None:
    store, _ = store_of()
    store.put(reference((1, 2), document_starts={"d": 0}))
    store.put(reference((1, 2), pinned=True))
    store.check()
    (kept,) = store.references()
    assert kept.pinned and set(kept.document_starts) == {"d"}


def test_an_absorbed_entry_leaves_its_labels() -> None:
    store, clock = store_of()
    store.put(reference((1, 2), document_starts={"d": 1}, session="s", expires_after_s=5.0))
    store.put(reference((1, 2, 3)))
    (kept,) = store.references()
    assert (dict(kept.document_starts), kept.session, kept.expires_after_s) == ({"d": 1}, "s", 5.0)
    clock.now_s += 5
    assert lookup(store, (1, 2, 3)) == 0 and store.stats()["expired"] == 1


def test_a_use_renews_the_lifetime() -> None:
    store, clock = store_of(ttl_s=10)
    store.put(reference((1, 2)))
    for _ in range(3):
        clock.now_s += 9
        assert lookup(store, (1, 2)) == 2
    clock.now_s += 10
    assert lookup(store, (1, 2)) == 0


def test_segments_of_an_absorbed_entry_are_kept_where_there_are_none() -> None:
    store, _ = store_of()
    mine, other = (Segment("d", 0, 2),), (Segment("e", 1, 2),)
    for tokens, kept in (((1, 2), other), ((1, 2, 3), ()), ((1,), mine), ((1, 2, 3, 4), mine)):
        store.put(reference(tokens, segments=kept))
        (found,) = store.references()
        assert found.segments == (kept if len(tokens) == 4 else other)


def tainted(tokens: tuple[int, ...], session: str | None = "s", namespace: str = "a", **labels: object) -> Reference:
    return reference(tokens, namespace, session=session, exact_tokens=len(tokens) - 1, **labels)


def test_tainted_kv_serves_its_own_session_alone() -> None:
    store, _ = store_of()
    prompt = (1, 2, 3, 4)
    assert store.put(tainted(prompt))
    assert lookup(store, (*prompt, 5), session="s") == 4
    assert lookup(store, prompt, session="t") == lookup(store, prompt) == lookup(store, prompt, "b", "s") == 0
    assert runs_of(store, prompt) == store.references() == [], "not even its exact part is found"
    assert store.put(reference(prompt[:3]))
    assert lookup(store, prompt, session="s") == 4 and lookup(store, prompt, session="t") == 3
    assert [run.num_tokens for run in runs_of(store, prompt)] == [3]
    assert store.stats()["tainted_entries"] == 1 and store.stats()["entries"] == 2


def test_tainted_kv_leaves_no_trace_on_an_ordinary_entry_that_contains_it() -> None:
    store, _ = store_of()
    store.put(reference((1, 2, 3)))
    assert store.put(tainted((1, 2), document_starts={"d": 0}))
    (ordinary,) = store.references()
    assert ordinary.session is None and not ordinary.document_starts and store.stats()["tainted_entries"] == 1


def test_tainted_kv_without_a_session_is_refused() -> None:
    store, _ = store_of()
    assert not store.put(tainted((1, 2), session=None))
    assert (store.stats()["refused"], store.stats()["entries"]) == (1, 0)


def test_the_latest_tainted_entry_of_a_session_replaces_the_one_before() -> None:
    store, clock = store_of(max_tokens=5)
    store.put(tainted((1, 2), document_starts={"d": 0}, expires_after_s=5.0))
    assert not store.put(tainted((3,) * 6)) and lookup(store, (1, 2), session="s") == 2, "a refusal changes nothing"
    assert store.put(tainted((1, 2, 3))) and store.stats()["bytes"] == 3 * BYTES_PER_TOKEN
    assert store.forget("a", document_id="d") == 1, "what begins with the former entry carries its documents"
    store.put(tainted((1, 2), document_starts={"d": 0}))
    store.put(tainted((5, 6)))
    assert store.forget("a", document_id="d") == 0 and lookup(store, (1, 2), session="s") == 0
    assert store.forget("a", session="t") == 0 and store.forget("a", session="s") == 1
    store.put(tainted((5, 6), expires_after_s=1.0))
    clock.now_s += 1
    assert lookup(store, (5, 6), session="s") == 0 and store.stats()["expired"] == 1


def test_tainted_entries_are_evicted_like_others() -> None:
    store, clock = store_of(max_tokens=4)
    store.put(tainted((1, 1), pinned=True))
    clock.now_s += 1
    store.put(reference((2, 2)))
    clock.now_s += 1
    assert store.put(tainted((3, 3), session="t"))
    assert [lookup(store, (n, n), session=s) for n, s in ((1, "s"), (2, None), (3, "t"))] == [0, 2, 2]


def test_runs_are_found_at_any_offset_from_any_entry_and_count_as_a_use() -> None:
    store, clock = store_of(max_tokens=9)
    for tokens in ((9, 1, 2, 3), (8, 8, 4, 5), (7,)):
        clock.now_s += 1
        store.put(reference(tokens))
    ids = np.array((4, 5, 0, 1, 2, 3, 4, 5), dtype=np.int64)
    found = store.identical_runs(ids, "a", start=2, stop=8)
    assert [(run.start, run.source_start, run.num_tokens) for run in found] == [(3, 1, 3), (6, 2, 2)]
    clock.now_s += 1
    runs_of(store, (1, 2))
    store.put(reference((6, 6, 6, 6)))
    assert runs_of(store, (4, 5)) == [] and len(runs_of(store, (1, 2))) == 1, "the least recently used goes first"
    assert store.identical_runs(ids, "b", start=0, stop=8) == []


def test_runs_end_with_their_entry() -> None:
    store, clock = store_of(max_tokens=6, ttl_s=10)
    for leave in (
        lambda: store.forget("a"),
        store.clear,
        lambda: setattr(clock, "now_s", clock.now_s + 10),
        lambda: store.put(reference((5,) * 6)),
        lambda: store.put(reference((6,) * 6, "b")),
    ):
        store.put(reference((1, 2, 3)))
        (run,) = runs_of(store, (0, 2, 3))
        assert run == Run(1, run.reference, 1, 2)
        leave()
        assert runs_of(store, (0, 2, 3)) == []
        store.check()


def test_runs_follow_an_entry_that_is_replaced() -> None:
    store, _ = store_of()
    store.put(reference((1, 2, 3)))
    store.put(reference((1, 2, 3, 4)))
    (run,) = runs_of(store, (2, 3, 4))
    assert run.num_tokens == 3 and run.reference is store.references()[0]
    store.put(reference((1, 2), document_starts={"d": 0}))  # what it is joined to is another object from now on
    (run,) = runs_of(store, (2, 3, 4))
    assert run.reference is store.references()[0] and "d" in run.reference.document_starts


def test_a_store_without_an_index_of_runs_says_so() -> None:
    store = KVStore(StoreConfig())
    assert store.put(reference((1, 2, 3)))
    store.check()
    with pytest.raises(AssertionError, match="min_run_tokens"):
        runs_of(store, (1, 2, 3))


DAMAGES = {
    "entries gone": lambda store: store._spaces.clear(),
    "bytes": lambda store: setattr(store, "_num_bytes", store._num_bytes + 1),
    "not indexed": lambda store: store._spaces["a"].runs.remove(reference_id("a", np.array((1, 2)))),
    "windows gone": lambda store: store._spaces["a"].runs._blocks.clear(),
    "indexed twice": lambda store: store._spaces["a"].runs._blocks.append(store._spaces["a"].runs._blocks[0]),
    "tainted among ordinary": lambda store: store._spaces["a"].ordinary.update(x=store._spaces["a"].tainted.pop("s")),
    "foreign session": lambda store: store._spaces["a"].tainted.update(t=store._spaces["a"].tainted.pop("s")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_check_sees_damage(damage) -> None:
    store, _ = store_of()
    store.put(reference((1, 2)))
    store.put(tainted((1, 3)))
    store.check()
    damage(store)
    with pytest.raises(AssertionError):
        store.check()


def test_check_sees_an_entry_in_a_foreign_namespace() -> None:
    store, _ = store_of()
    store.put(reference((1, 2)))
    (entry,) = store._spaces["a"].ordinary.values()
    entry.reference = replace(entry.reference, namespace="b")
    with pytest.raises(AssertionError):
        store.check()
