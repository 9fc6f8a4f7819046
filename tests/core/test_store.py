"""The store against a simple model of it: bounds, lifetimes, namespaces, and its law after every step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from semsharekv_integrations import StoreConfig
from semsharekv_integrations.kv import LayerKV, Reference
from semsharekv_integrations.store import KVStore
from semsharekv_integrations.store.memory import reference_id

BYTES_PER_TOKEN = 2 * 2 * 4  # keys and values, two numbers each, four bytes
NAMESPACES = st.sampled_from(["a", "b"])
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
    return KVStore(StoreConfig(max_bytes=max_tokens * BYTES_PER_TOKEN, ttl_s=ttl_s), clock), clock


def lookup(store: KVStore, tokens: tuple[int, ...], namespace: str = "a") -> int:
    match = store.longest_prefix(np.array(tokens, dtype=np.int64), namespace, max_tokens=len(tokens))
    if match is None:
        return 0
    assert match.reference.namespace == namespace
    assert tuple(match.reference.token_ids[: match.num_tokens]) == tokens[: match.num_tokens]
    return match.num_tokens


@dataclass
class Kept:
    namespace: str
    tokens: tuple[int, ...]
    pinned: bool
    ttl_s: float | None
    documents: set[str]
    used_s: float


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
        mine = [k for k in self.kept if k.namespace == namespace]
        containers = [k for k in mine if k.tokens[: len(tokens)] == tokens and (k.pinned or not pinned)]
        if containers:
            assert stored
            labelled = [k for k in containers if self.labels_of(k) >= k.documents | {document}]
            assert labelled, "one entry that contains it carries its labels"
            labelled[0].documents |= {document}
            labelled[0].used_s = self.clock.now_s
            labelled[0].ttl_s = min(filter(None, (labelled[0].ttl_s, ttl_s)), default=None)
            return
        room = self.MAX_TOKENS - sum(len(k.tokens) for k in self.kept if k.pinned)
        assert stored == (len(tokens) <= room)
        if not stored:
            return
        for k in [k for k in mine if not k.pinned and tokens[: len(k.tokens)] == k.tokens]:
            self.kept.remove(k)
            new.documents |= k.documents
            new.ttl_s = min(filter(None, (new.ttl_s, k.ttl_s)), default=None)
        for k in sorted((k for k in self.kept if not k.pinned), key=lambda k: k.used_s):
            if sum(len(k.tokens) for k in self.kept) + len(tokens) <= self.MAX_TOKENS:
                break
            self.kept.remove(k)
        self.kept.append(new)

    def labels_of(self, kept: Kept) -> set[str]:
        for found in self.store.references(kept.namespace):
            if tuple(found.token_ids) == kept.tokens:
                return set(found.document_starts)
        return set()

    @rule(tokens=TOKENS, namespace=NAMESPACES)
    def look_up(self, tokens: tuple[int, ...], namespace: str) -> None:
        self.clock.now_s += 0.01
        self.expire()
        ids = np.array(tokens, dtype=np.int64)
        match = self.store.longest_prefix(ids, namespace, max_tokens=len(tokens) - 1)
        shared = [
            next((n for n, (x, y) in enumerate(zip(k.tokens, tokens, strict=False)) if x != y), len(k.tokens))
            for k in self.kept
            if k.namespace == namespace
        ]
        longest = min(max(shared, default=0), len(tokens) - 1)
        assert (match.num_tokens if match else 0) == longest
        if match:
            assert match.reference.namespace == namespace
            assert tuple(match.reference.token_ids[:longest]) == tokens[:longest]
            assert tuple(match.reference.layers[0].keys[0, 0, :longest, 0].int().tolist()) == tokens[:longest]
            used = next(
                k for k in self.kept if (k.namespace, k.tokens) == (namespace, tuple(match.reference.token_ids))
            )
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
        assert sorted(found) == sorted((k.namespace, k.tokens, k.pinned) for k in self.kept)
        assert self.store.stats()["bytes"] == sum(len(k.tokens) for k in self.kept) * BYTES_PER_TOKEN
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


@pytest.mark.parametrize(
    "damage", [lambda store: store._entries.clear(), lambda store: setattr(store, "_num_bytes", store._num_bytes + 1)]
)
def test_check_sees_damage(damage) -> None:
    store, _ = store_of()
    store.put(reference((1, 2)))
    damage(store)
    with pytest.raises(AssertionError):
        store.check()


def test_check_sees_an_entry_in_a_foreign_namespace() -> None:
    store, _ = store_of()
    store.put(reference((1, 2)))
    (entry,) = store._entries["a"].values()
    entry.reference = replace(entry.reference, namespace="b")
    with pytest.raises(AssertionError):
        store.check()
