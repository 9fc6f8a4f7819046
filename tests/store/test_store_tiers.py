"""Tiers in memory: what goes first when there is no room, where it goes, and that its KV stays what it was."""

from __future__ import annotations

import pytest
import torch

from kept_prompts import (
    BYTES_PER_TOKEN,
    Clock,
    Tokens,
    assert_whole,
    config_of,
    lookup,
    opened,
    put_all,
    reference,
    runs_of,
    store_of,
    tainted,
)
from semsharekv_integrations.kv import Segment
from semsharekv_integrations.store import KVStore
from semsharekv_integrations.store.codec import PackedKV
from semsharekv_integrations.store.eviction import COSTLY_POSITION, MOST_HITS, NOVEL_SHARE, Tier
from semsharekv_integrations.store.radix import Node

POPULAR = [(n, n, n, n) for n in range(1, 5)]


def prompts(first: int, count: int, num_tokens: int = 4) -> list[Tokens]:
    """Prompts that nothing else begins with."""
    return [(n,) * num_tokens for n in range(first, first + count)]


def found(store: KVStore, wanted: list[Tokens]) -> int:
    """How many are stored whole, without using them."""
    stored = {tuple(kept.token_ids.tolist()) for kept in store.references()}
    return len(stored & set(wanted))


def where(store: KVStore, tokens: Tokens) -> list[str | None]:
    """The memory tiers of the nodes of an entry."""
    tiers = [store._entries.tiers.find_tier(node) for node in store._entries.by_key[reference(tokens).id].node.path()]
    return [tier and tier.name for tier in tiers]


def use(store: KVStore, clock: Clock, wanted: list[Tokens], times: int = 1) -> None:
    for tokens in wanted * times:
        clock.now_s += 1
        assert lookup(store, tokens) == len(tokens)
        store.check()


# What goes first ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("eviction", "left"), [("value", 4), ("lru", 0)])
def test_novel_traffic_does_not_flush_what_was_reused(eviction: str, left: int) -> None:
    store, clock = store_of(max_tokens=24, eviction=eviction)
    put_all(store, clock, POPULAR)
    use(store, clock, POPULAR)
    put_all(store, clock, prompts(100, 30))
    assert found(store, POPULAR) == left
    assert found(store, prompts(128, 2)) == 2, "the latest ones are there in any case"


def test_what_is_no_longer_used_goes_at_last() -> None:
    store, clock = store_of(max_tokens=24)
    put_all(store, clock, POPULAR)
    use(store, clock, POPULAR, times=5)
    rounds = 0
    while found(store, POPULAR):
        rounds += 1
        later = prompts(100 + 10 * rounds, 6)
        for tokens in later:
            put_all(store, clock, [tokens])
            use(store, clock, [tokens])
        assert rounds < 20
    assert rounds > 1, "it outlives what is used less"


def test_hits_beyond_a_number_do_not_make_an_entry_immortal() -> None:
    tier = Tier("device", 10)
    node = Node(torch.arange(4).numpy())
    node.hits = 1e9
    tier.add(node, 4)
    assert tier._ranks[node].priority <= MOST_HITS * 2


def test_pinned_entries_outlive_all_traffic() -> None:
    for eviction in ("value", "lru"):
        store, clock = store_of(max_tokens=24, eviction=eviction)
        put_all(store, clock, [(7, 7, 7)], pinned=True)
        for tokens in prompts(100, 40):
            put_all(store, clock, [tokens])
            use(store, clock, [tokens], times=2)
        assert found(store, [(7, 7, 7)]) == 1


def test_later_tokens_are_worth_more() -> None:
    """As many bytes of a longer prompt save more compute, so of what was used as often the beginning goes first."""
    tier = Tier("device", 2)
    early, late = Node(torch.zeros(1).numpy(), start=0), Node(torch.zeros(1).numpy(), start=2 * COSTLY_POSITION)
    for node in (late, early):
        node.hits = 1
        tier.add(node, 1)
    assert tier.choose_victim((), 0) is early
    late.pins = 0
    assert tier.choose_victim([early], 0) is late


@pytest.mark.parametrize("eviction", ["value", "lru"])
def test_of_what_was_used_as_often_the_last_piece_goes_first(eviction: str) -> None:
    store, clock = store_of(max_tokens=8, eviction=eviction)
    put_all(store, clock, [(1, 2, 3, 4), (1, 2, 5, 6)])
    use(store, clock, [(1, 2, 3, 4), (1, 2, 5, 6)])
    put_all(store, clock, [(7, 7, 7)])
    assert [lookup(store, tokens) for tokens in ((1, 2, 3, 4), (1, 2, 5, 6))] == [2, 4]


def test_a_beginning_that_was_reused_outlives_the_prompts_that_had_it() -> None:
    """As that of a system prompt, whose requests are all different."""
    store, clock = store_of(max_tokens=16)
    system = (1, 2, 3, 4)
    store.put(reference(system))
    for n in range(50, 56):
        clock.now_s += 1
        lookup(store, (*system, n, n))
        labels = {"document_starts": {"system": 0, f"d{n}": 4}, "session": "s", "expires_after_s": 500.0}
        store.put(reference((*system, n, n), segments=(Segment("system", 0, 4), Segment("", 4, 6)), **labels))
    put_all(store, clock, prompts(100, 30))
    (kept,) = (found for found in store.fetch_all() if found.token_ids[0] == 1)
    assert tuple(kept.token_ids.tolist()) == system and kept.segments == (Segment("system", 0, 4),)
    assert (dict(kept.document_starts), kept.session, kept.expires_after_s) == ({"system": 0}, "s", 500.0)
    assert_whole(kept)
    store.check()
    assert store.forget("a", document_id="system") == 1 and lookup(store, system) == 0


@pytest.mark.parametrize("eviction", ["value", "lru"])
def test_a_tier_knows_its_bytes_and_its_victims(eviction) -> None:
    tier = Tier("device", 20, eviction)
    nodes = [Node(torch.zeros(2).numpy(), start=n) for n in range(5)]
    for n, node in enumerate(nodes):
        node.hits = n % 2
        tier.add(node, 4)
        tier.check()
    nodes[0].pins = 1
    assert tier.can_hold(16, ()) and not tier.can_hold(17, ()) and not tier.can_hold(16, nodes[1:2])
    tier.resize(nodes[2], 1)
    tier.check()
    assert tier.num_bytes == 17
    gone = []
    while (victim := tier.choose_victim(nodes[4:], 20)) is not None:
        assert victim not in (nodes[0], nodes[4])
        gone.append(victim)
        tier.remove(victim)
        tier.check()
    assert len(gone) == 3 and tier.num_bytes == 8 and tier.choose_victim((), 0) is nodes[4]
    assert gone[0] is (nodes[1] if eviction == "lru" else nodes[2]), "novel ones go first, or old ones"


def test_novel_entries_have_their_share_beside_proven_ones() -> None:
    tier = Tier("device", 100)
    proven, old, new = (Node(torch.zeros(1).numpy()) for _ in range(3))
    proven.hits = 1
    tier.add(proven, 70)
    tier.add(old, 10)
    share = int(NOVEL_SHARE * 100)
    assert tier.choose_victim((), share - 10) is proven, "the others have less than their share"
    assert tier.choose_victim((), share - 9) is old
    tier.add(new, 20)
    assert tier.choose_victim((), 0) is old


# Two tiers ------------------------------------------------------------------------------------------------------------


def test_what_the_device_has_no_room_for_goes_to_the_host_and_returns() -> None:
    store, clock = store_of(max_tokens=8, host_tokens=12)
    put_all(store, clock, prompts(1, 4))
    assert [where(store, tokens) for tokens in prompts(1, 4)] == [["host"], ["host"], ["device"], ["device"]]
    assert store.stats()["demoted"] == 2
    assert lookup(store, (1,) * 4) == 4
    assert where(store, (1,) * 4) == ["device"] and store.stats()["promoted"] == 1
    store.check()
    assert found(store, prompts(1, 4)) == 4


def test_a_full_host_does_not_lose_what_changes_places() -> None:
    store, clock = store_of(max_tokens=4, host_tokens=4)
    put_all(store, clock, prompts(1, 2))
    for n in (1, 2, 1, 2):
        clock.now_s += 1
        assert lookup(store, (n,) * 4) == 4
        store.check()
        assert where(store, (n,) * 4) == ["device"] and found(store, prompts(1, 2)) == 2
    assert store.stats()["evicted"] == 0


def test_raising_a_beginning_does_not_lose_what_follows_it() -> None:
    """The end of the very entry that is being served would be the next to go."""
    store, clock = store_of(max_tokens=6, host_tokens=4)
    put_all(store, clock, [(1, 1, 1, 1), (2, 2, 2, 2), (1, 1, 1, 1, 5, 5)])
    assert where(store, (1, 1, 1, 1, 5, 5)) == ["host", "device"]
    assert lookup(store, (1, 1, 1, 1)) == 4
    store.check()
    assert found(store, [(1, 1, 1, 1, 5, 5)]) == 1


def test_demotion_and_promotion_move_bytes_exactly() -> None:
    for bits, tolerance in ((None, 0.0), (8, 0.005)):
        store, clock = store_of(max_tokens=5, host_tokens=20, kv_bits=bits)
        forks = [(1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 6, 7), (8, 8, 8)]
        put_all(store, clock, forks)
        once = {kept.id: kept for kept in store.fetch_all()}
        for _ in range(3):
            for kept in store.fetch_all():
                store.check()
                assert_whole(kept, tolerance)
                for layer, former in zip(kept.layers, once[kept.id].layers, strict=True):
                    assert torch.equal(layer.keys, former.keys) and torch.equal(layer.values, former.values)
        assert store.stats()["promoted"] > 6 and store.stats()["demoted"] > 6


def test_what_neither_tier_holds_is_lost_or_refused() -> None:
    store, clock = store_of(max_tokens=4, host_tokens=6)
    put_all(store, clock, [(1,) * 6])
    assert where(store, (1,) * 6) == ["host"]
    assert not store.put(reference((2,) * 7)) and not store.put(tainted((2,) * 7))
    assert lookup(store, (1,) * 6) == 6, "served from where it is"
    put_all(store, clock, [(3,) * 6])
    assert found(store, [(1,) * 6, (3,) * 6]) == 1 and store.stats()["evicted"] == 1


def test_a_host_that_holds_more_is_not_dead() -> None:
    kept = [store_of(max_tokens=8, host_tokens=tokens)[0] for tokens in (0, 8)]
    for store in kept:
        put_all(store, Clock(), prompts(1, 4))
    assert [found(store, prompts(1, 4)) for store in kept] == [2, 4]
    assert [store.stats()["host_bytes"] for store in kept] == [0, 8 * BYTES_PER_TOKEN]


# Out of memory --------------------------------------------------------------------------------------------------------


def failing(*_: object) -> PackedKV:
    raise torch.OutOfMemoryError


def without_memory() -> tuple[KVStore, Clock]:
    """The first of two prompts lies on the host, and the device has room for it."""
    store, clock = store_of(max_tokens=8, host_tokens=12)
    put_all(store, clock, prompts(1, 2))
    put_all(store, clock, prompts(3, 1), document_starts={"d": 0})
    store.forget("a", document_id="d")
    return store, clock


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_no_memory_to_raise_it_costs_nothing_that_is_stored(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """A device that is full for a moment must not take away what many prompts begin with."""
    store, clock = without_memory()
    put_all(store, clock, [(1, 1, 1, 1, 5)])

    def fail(*_: object) -> PackedKV:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(PackedKV, "move_to", fail)
        assert lookup(store, (1,) * 4) == 4, "served from the host"
        store.check()
        assert where(store, (1, 1, 1, 1, 5)) == ["host", "device"]
    assert [store.stats()[name] for name in ("promotion_failed", "unreadable", "misses")] == [1, 0, 0]
    assert lookup(store, (1, 1, 1, 1, 5)) == 5 and where(store, (1, 1, 1, 1, 5)) == ["device", "device"]
    store.check()


def test_no_memory_to_raise_it_and_no_way_back_is_a_counted_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = without_memory()
    with monkeypatch.context() as patch:
        patch.setattr(PackedKV, "move_to", failing)
        patch.setattr(store._entries.tiers.memory[1], "max_bytes", 0)
        assert lookup(store, (1,) * 4) == 0
        store.check()
    stats = store.stats()
    assert (stats["promotion_failed"], stats["unreadable"], stats["misses"]) == (1, 1, 1)
    assert lookup(store, (2,) * 4) == 4 and runs_of(store, (2, 2, 2)) and store.put(reference((9,) * 4))
    store.check()


def test_no_memory_to_lower_it_is_an_eviction(monkeypatch: pytest.MonkeyPatch) -> None:
    store, clock = store_of(max_tokens=8, host_tokens=12)
    put_all(store, clock, prompts(1, 2))
    monkeypatch.setattr(PackedKV, "move_to", failing)
    put_all(store, clock, prompts(3, 2))
    assert found(store, prompts(3, 2)) == 2 and store.stats()["host_bytes"] == 0
    assert not store.put(reference((5,) * 9)), "the host alone has room for it"
    store.check()
    assert [lookup(store, tokens) for tokens in prompts(3, 2)] == [4, 4]


def test_the_first_store_opened_without_a_directory_has_nothing() -> None:
    store = opened(config_of())
    assert store.references() == [] and store.stats()["disk_bytes"] == 0
    store.close()
    assert store.put(reference((1, 2)))


def test_eight_bits_are_not_dead() -> None:
    kept = [store_of(kv_bits=bits)[0] for bits in (None, 8)]
    for store in kept:
        assert store.put(reference((1, 2, 3)))
    plain, rounded = (store.stats()["bytes"] for store in kept)
    assert rounded == plain * 7 / 12  # of three numbers in four bytes each: one byte each, and a scale
