"""The store in memory: what is found, replaced, kept, refused and forgotten, and its law.

For the rest see ``test_store_machine`` (everything against a model), ``test_store_tiers`` and ``test_store_disk``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from kept_prompts import (
    BYTES_PER_TOKEN,
    MIN_RUN_TOKENS,
    Tokens,
    assert_whole,
    distinct_tokens,
    layers_of,
    lookup,
    put_all,
    reference,
    runs_of,
    store_of,
    tainted,
)
from semsharekv_integrations import StoreConfig
from semsharekv_integrations.kv import UNPLACED, Run, Segment
from semsharekv_integrations.store import KVStore
from semsharekv_integrations.store.codec import PackedKV


def test_tensors_are_shaped_as_the_legend_says() -> None:
    kept = reference((1, 0, 1))
    assert kept.layers[0].keys.shape == (1, 1, 3, 3) and kept.num_bytes == 3 * BYTES_PER_TOKEN


def test_kv_made_for_tests_tells_tokens_places_and_owners() -> None:
    one = layers_of((1, 2, 3), "a")
    assert all(torch.equal(x.keys, y.keys[:, :, :3]) for x, y in zip(one, layers_of((1, 2, 3, 4), "a"), strict=True))
    for other in (layers_of((2, 2, 3), "a"), layers_of((1, 2, 4), "a"), layers_of((1, 2, 3), "b")):
        assert not torch.equal(one[0].keys[:, :, 2], other[0].keys[:, :, 2])
    assert len({tuple(t[0, 0, 2].tolist()) for layer in one for t in layer}) == 4


@pytest.mark.parametrize("eviction", ["value", "lru"])
def test_least_recently_used_goes_first(eviction: str) -> None:
    store, clock = store_of(max_tokens=6, eviction=eviction)
    put_all(store, clock, [(1, 1), (2, 2), (3, 3)])
    clock.now_s += 1
    assert lookup(store, (1, 1)) == 2
    store.put(reference((4, 4)))
    assert [lookup(store, (n, n)) for n in (1, 2, 3, 4)] == [2, 0, 2, 2]
    assert store.stats()["evicted"] == 1


def test_putting_what_is_there_counts_as_a_use() -> None:
    store, clock = store_of(max_tokens=6)
    put_all(store, clock, [(1, 1), (2, 2), (3, 3), (1, 1), (4, 4)])
    assert [r.token_ids[0] for r in store.references()] == [3, 1, 4]


def test_what_is_put_behind_a_stored_beginning_does_not_go_before_older_entries() -> None:
    store, clock = store_of(max_tokens=8)
    put_all(store, clock, [(1, 1, 1, 2), (3, 3), (1, 1, 1, 4), (5, 5)])  # the first one's tail is the oldest
    assert [lookup(store, t) for t in ((1, 1, 1, 2), (3, 3), (1, 1, 1, 4), (5, 5))] == [3, 2, 4, 2]


def test_pinned_entries_are_never_evicted() -> None:
    store, clock = store_of(max_tokens=5)
    put_all(store, clock, [(1, 1, 1)], pinned=True)
    put_all(store, clock, [(n, n) for n in range(2, 9)])
    assert lookup(store, (1, 1, 1)) == 3
    assert not store.put(reference((9, 9, 9)))
    assert lookup(store, (8, 8)) == 2, "a refusal evicts nothing"


def test_a_refused_entry_changes_nothing() -> None:
    store, clock = store_of(max_tokens=4)
    put_all(store, clock, [(1, 2, 5)])
    before = store.stats()
    assert not store.put(reference((1, 2, 3, 4, 5, 6), document_starts={"d": 0}))
    store.check()
    assert store.stats() == {**before, "refused": 1}
    assert lookup(store, (1, 2, 5)) == 3 and lookup(store, (1, 2, 3)) == 2
    assert store.put(reference((1, 2, 5, 6))), "what goes on from it is as before"


def test_pinning_what_is_there_keeps_the_bytes_exact() -> None:
    store, _ = store_of(max_tokens=3)
    store.put(reference((1, 2), document_starts={"d": 0}))
    store.put(reference((1, 2), pinned=True))
    store.check()
    (kept,) = store.references()
    assert kept.pinned and set(kept.document_starts) == {"d"}
    assert not store.put(reference((3, 4)))


def test_a_pinned_beginning_stays_when_what_follows_goes() -> None:
    store, clock = store_of(max_tokens=6)
    put_all(store, clock, [(1, 2, 3, 4)])
    put_all(store, clock, [(1, 2)], pinned=True)
    assert store.stats()["bytes"] == 4 * BYTES_PER_TOKEN, "it lies within the other"
    put_all(store, clock, [(7, 7, 7, 7)])
    assert lookup(store, (1, 2, 3, 4)) == 2
    assert store.forget("a") == 2 and store.stats()["bytes"] == 0


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


# Common beginnings ----------------------------------------------------------------------------------------------------

FORKS = [(1, 2, 3, 4, 5), (1, 2, 3, 6), (1, 2, 7, 8), (1, 2, 3, 4, 9, 9)]


def test_a_common_beginning_takes_its_bytes_once() -> None:
    store, clock = store_of()
    put_all(store, clock, FORKS)
    assert store.stats()["bytes"] == distinct_tokens(FORKS) * BYTES_PER_TOKEN < sum(map(len, FORKS)) * BYTES_PER_TOKEN
    put_all(store, clock, FORKS[:1], namespace="b")
    assert store.stats()["bytes"] == (distinct_tokens(FORKS) + 5) * BYTES_PER_TOKEN, "not across namespaces"


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)])
def test_what_several_share_stays_while_one_needs_it(order: tuple[int, ...]) -> None:
    store, _ = store_of()
    for n, tokens in enumerate(FORKS):
        store.put(reference(tokens, document_starts={f"d{n}": 0}))
    left = list(FORKS)
    for n in order:
        assert store.forget("a", document_id=f"d{n}") == 1
        left.remove(FORKS[n])
        store.check()
        assert store.stats()["bytes"] == distinct_tokens(left) * BYTES_PER_TOKEN
        assert [lookup(store, tokens) for tokens in left] == [len(tokens) for tokens in left]
        assert all(map(assert_whole_or_fail, store.fetch_all()))


def assert_whole_or_fail(found: object) -> bool:
    assert_whole(found)  # type: ignore[arg-type]
    return True


def test_a_beginning_brings_only_its_own_pieces() -> None:
    store, clock = store_of()
    put_all(store, clock, FORKS)
    match = store.find_prefix(np.array((1, 2, 3, 9)), "a", max_tokens=4)
    assert match is not None and match.num_tokens == 3
    assert len(match.reference.token_ids) == match.reference.layers[0].keys.shape[2] == 3


def test_documents_that_begin_in_what_is_found_are_told_whoever_named_them() -> None:
    store, _ = store_of()
    store.put(reference((1, 2, 3, 4), document_starts={"d": 1, "e": 3, "f": UNPLACED}))
    store.put(reference((1, 2, 3, 5)))
    found = store.find_prefix(np.array((1, 2, 3, 5, 6)), "a", max_tokens=4)
    assert found is not None and found.num_tokens == 4
    assert found.reference.document_starts["d"] == 1 and "e" not in found.reference.document_starts


def test_what_a_fork_splits_keeps_its_order_of_use() -> None:
    """The tail of an old entry is no younger because another one shares its beginning."""
    store, clock = store_of(max_tokens=8, eviction="lru")
    put_all(store, clock, [(1, 1, 2, 2), (3, 3), (1, 1, 4, 4)][:3])
    put_all(store, clock, [(5, 5)])
    assert [lookup(store, t) for t in ((1, 1, 2, 2), (3, 3), (1, 1, 4, 4))] == [2, 2, 4]


# Sessions -------------------------------------------------------------------------------------------------------------


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
    put_all(store, clock, [(2, 2)])
    clock.now_s += 1
    assert store.put(tainted((3, 3), session="t"))
    assert [lookup(store, (n, n), session=s) for n, s in ((1, "s"), (2, None), (3, "t"))] == [0, 2, 2]


# Runs -----------------------------------------------------------------------------------------------------------------


def test_runs_are_found_at_any_offset_from_any_entry_and_count_as_a_use() -> None:
    store, clock = store_of(max_tokens=9)
    put_all(store, clock, [(9, 1, 2, 3), (8, 8, 4, 5), (7,)])
    ids = np.array((4, 5, 0, 1, 2, 3, 4, 5), dtype=np.int64)
    found = store.find_runs(ids, "a", start=2, stop=8)
    assert [(run.start, run.source_start, run.num_tokens) for run in found] == [(3, 1, 3), (6, 2, 2)]
    for run in found:
        assert_whole(run.reference)
    clock.now_s += 1
    runs_of(store, (1, 2))
    put_all(store, clock, [(6, 6, 6, 6)])
    assert len(runs_of(store, (1, 2))) == 1 and runs_of(store, (4, 5)) == [], "what was found more often stays"
    assert store.find_runs(ids, "b", start=0, stop=8) == []


def test_runs_end_with_their_entry() -> None:
    store, clock = store_of(max_tokens=6, ttl_s=10)
    leaves: list[Callable[[], object]] = [
        lambda: store.forget("a"),
        store.clear,
        lambda: setattr(clock, "now_s", clock.now_s + 10),
        lambda: store.put(reference((5,) * 6)),
        lambda: store.put(reference((6,) * 6, "b")),
    ]
    for leave in leaves:
        store.put(reference((1, 2, 3)))
        (run,) = runs_of(store, (0, 2, 3))
        assert (run.start, run.source_start, run.num_tokens) == (1, 1, 2)
        leave()
        assert runs_of(store, (0, 2, 3)) == []
        store.check()


def same(run: Run, tokens: Tokens) -> bool:
    return tuple(run.reference.token_ids.tolist()) == tokens


def test_runs_follow_an_entry_that_is_replaced() -> None:
    store, _ = store_of()
    store.put(reference((1, 2, 3)))
    assert same(runs_of(store, (2, 3, 4))[0], (1, 2, 3))
    store.put(reference((1, 2, 3, 4)))
    (run,) = runs_of(store, (2, 3, 4))
    assert run.num_tokens == 3 and same(run, (1, 2, 3, 4))
    store.put(reference((1, 2), document_starts={"d": 0}))  # what it is joined to has other labels from now on
    (run,) = runs_of(store, (2, 3, 4))
    assert same(run, (1, 2, 3, 4)) and "d" in run.reference.document_starts


def test_a_store_without_an_index_of_runs_says_so() -> None:
    store = KVStore(StoreConfig())
    assert store.put(reference((1, 2, 3)))
    store.check()
    with pytest.raises(AssertionError, match="min_run_tokens"):
        runs_of(store, (1, 2, 3))


# The shared namespace -------------------------------------------------------------------------------------------------


def test_a_shared_namespace_is_read_by_others_only_if_configured() -> None:
    for shared, found in (("all", 3), (None, 0), ("other", 0)):
        store, _ = store_of(shared_namespace=shared)
        store.put(reference((1, 2, 3), "all"))
        assert lookup(store, (1, 2, 3)) == found
        assert len(runs_of(store, (0, 1, 2))) == bool(found)
        assert (store.fetch(reference((1, 2, 3), "all").id, "a") is not None) == bool(found)
        assert lookup(store, (1, 2, 3), "all") == 3


def test_a_shared_namespace_reads_no_other() -> None:
    store, _ = store_of(shared_namespace="all")
    store.put(reference((1, 2, 3)))
    store.put(tainted((4, 5, 6)))
    assert lookup(store, (1, 2, 3), "all") == lookup(store, (1, 2, 3), "b") == lookup(store, (4, 5, 6), "all", "s") == 0
    assert runs_of(store, (1, 2, 3), "all") == [] and store.fetch(reference((1, 2, 3)).id, "all") is None


def test_a_shared_namespace_is_never_written_by_others() -> None:
    store, clock = store_of(shared_namespace="all")
    store.put(reference((1, 2, 3, 4), "all"))
    (before,) = store.references("all")
    put_all(store, clock, [(1, 2), (1, 2, 3, 4), (1, 2, 9)], document_starts={"d": 0})
    assert lookup(store, (1, 2, 3, 4, 5)) == 4
    (after,) = store.references("all")
    assert (after.id, dict(after.document_starts)) == (before.id, {}) and len(store.references("a")) == 2
    assert store.forget("a") == 2 and lookup(store, (1, 2, 3, 4)) == 4, "its own entries are forgotten alone"


def test_own_entries_win_ties_and_exact_ones_win_against_tainted_ones() -> None:
    store, _ = store_of(shared_namespace="all")
    store.put(reference((1, 2, 3, 4), "all"))

    def found(session: str | None = None) -> tuple[str, bool, int]:
        match = store.find_prefix(np.array((1, 2, 3, 4, 5)), "a", max_tokens=5, session=session)
        assert match is not None
        assert_whole(match.reference)
        return match.reference.namespace, match.reference.is_tainted, match.num_tokens

    store.put(tainted((1, 2, 3, 4)))
    assert found("s") == ("all", False, 4), "exact KV of all is better than approximate KV of one's own"
    store.put(reference((1, 2, 3)))
    assert found() == ("all", False, 4), "the longer one is taken"
    store.put(reference((1, 2, 3, 4)))
    assert found() == found("s") == ("a", False, 4)


def test_own_runs_come_before_shared_ones() -> None:
    store, _ = store_of(shared_namespace="all")
    store.put(reference((9, 1, 2, 3, 4, 5, 6), "all"))
    store.put(reference((8, 3, 4)))
    found = runs_of(store, (0, 1, 2, 3, 4, 5, 6))
    assert [(run.start, run.num_tokens, run.reference.namespace) for run in found] == [
        (1, 2, "all"),
        (3, 2, "a"),
        (5, 2, "all"),
    ]


# Trouble --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_without_memory_for_it_an_entry_is_refused(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    store, clock = store_of()
    put_all(store, clock, [(1, 2, 3)])

    def fail(*_: object) -> PackedKV:
        raise error

    for name in ("pack", "copy_part"):
        with monkeypatch.context() as patch:
            patch.setattr(PackedKV, name, fail)
            stored = [store.put(reference((1, 2, 4))), store.put(tainted((5, 6)))]
            assert stored == ([False, False] if name == "pack" else [True, True])
        store.check()
        assert lookup(store, (1, 2, 3)) == 3
    assert store.stats()["refused"] == 2


DAMAGES: dict[str, Callable[[KVStore], object]] = {
    "entries gone": lambda store: store._entries.namespaces.clear(),
    "an entry gone": lambda store: store._entries.by_key.popitem(),
    "bytes": lambda store: setattr(store._entries.tiers.device, "num_bytes", 1),
    "bound": lambda store: setattr(store._entries.tiers.device, "max_bytes", 1),
    "KV gone": lambda store: setattr(node_of(store), "held", None),
    "KV of fewer tokens": lambda store: setattr(node_of(store), "held", node_of(store).held.copy_part(0, 1)),
    "other tokens": lambda store: node_of(store).token_ids.__setitem__(0, 9),
    "pins": lambda store: setattr(node_of(store), "pins", 1),
    "documents": lambda store: node_of(store).documents.clear(),
    "a node that nothing needs": lambda store: node_of(store).entries.clear(),
    "unranked": lambda store: store._entries.tiers.device._novel.popitem(),
    "not indexed": lambda store: space_of(store)._runs.remove(reference((1, 2)).id),
    "windows gone": lambda store: space_of(store)._runs._blocks.clear(),
    "indexed twice": lambda store: space_of(store)._runs._blocks.append(space_of(store)._runs._blocks[0]),
    "tainted among ordinary": lambda store: space_of(store).ordinary.update(x=space_of(store).tainted.pop("s")),
    "foreign session": lambda store: space_of(store).tainted.update(t=space_of(store).tainted.pop("s")),
}


def space_of(store: KVStore):
    return store._entries.namespaces["a"]


def node_of(store: KVStore):
    return space_of(store).ordinary[reference((1, 2)).id].node


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_check_sees_damage(damage: Callable[[KVStore], object]) -> None:
    store, _ = store_of()
    store.put(reference((1, 2), document_starts={"d": 0}))
    store.put(tainted((1, 3)))
    runs_of(store, (1,) * MIN_RUN_TOKENS)  # makes the index
    store.check()
    damage(store)
    with pytest.raises(AssertionError):
        store.check()


def test_check_sees_an_entry_in_a_foreign_namespace() -> None:
    store, _ = store_of()
    store.put(reference((1, 2)))
    (entry,) = space_of(store).ordinary.values()
    entry.reference = replace(entry.reference, namespace="b")
    with pytest.raises(AssertionError):
        store.check()
