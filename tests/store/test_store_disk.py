"""The store's disk tier: what comes back when it is opened again, and what damage, time and full disks do to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kept_prompts import (
    BYTES_PER_TOKEN,
    CPU,
    FINGERPRINT,
    Clock,
    Tokens,
    assert_whole,
    config_of,
    layers_of,
    lookup,
    opened,
    put_all,
    reference,
    runs_of,
    tainted,
)
from semsharekv_integrations import ReuseConfig, StoreConfig
from semsharekv_integrations.errors import StoreFileError, StoreLockedError, StoreWriteError
from semsharekv_integrations.kv import UNPLACED, Segment
from semsharekv_integrations.store import KVStore, files
from semsharekv_integrations.store.catalog import Catalog
from semsharekv_integrations.store.codec import PackedKV
from semsharekv_integrations.store.directory import MOST_REMOVED, KVDirectory
from semsharekv_integrations.store.placed import PlacedKV
from semsharekv_integrations.store.records import EntryRecord
from stored_kv import kv_files
from tiny_models import EngineMaker, make_model

FORKS = [(1, 2, 3, 4, 5), (1, 2, 3, 6), (1, 2, 7, 8), (9, 9)]


@pytest.fixture(autouse=True)
def _no_syncing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk takes most of the time, and nothing crashes here."""
    monkeypatch.setattr("semsharekv_integrations.store.files._sync", lambda path: None)


def opened_at(path: Path, clock: Clock, dtype: torch.dtype = torch.float32, **settings: Any) -> KVStore:
    return opened(config_of(directory=path, **settings), clock, dtype)


def reopened(store: KVStore, clock: Clock, dtype: torch.dtype = torch.float32, **settings: Any) -> KVStore:
    store.check()
    store.close()
    store.check()
    again = opened_at(Path(str(store.config.directory)), clock, dtype, **settings)
    again.check()
    return again


def files_of(path: Path) -> set[str]:
    return kv_files(path / FINGERPRINT)


def file_of(store: KVStore, tokens: Tokens) -> Path:
    """The file of the last piece of an entry."""
    place = store._entries.by_key[reference(tokens).id].node.on_disk
    assert place is not None
    return Path(str(store.config.directory)) / FINGERPRINT / f"{place.file}.safetensors"


def everything(store: KVStore) -> dict[str, Any]:
    """All references with their labels and the very bytes of their KV."""
    return {
        kept.id: (
            kept.namespace,
            kept.token_ids.tolist(),
            dict(kept.document_starts),
            kept.segments,
            kept.session,
            kept.pinned,
            kept.expires_after_s,
            [tensor.view(torch.uint8).numpy().tobytes() for layer in kept.layers for tensor in layer],
            {tensor.dtype for layer in kept.layers for tensor in layer},
        )
        for kept in store.fetch_all()
    }


# What comes back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [1000, 0], ids=["in memory as well", "on disk alone"])
@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float32, None), (torch.bfloat16, None), (torch.float32, 8), (torch.bfloat16, 8)]
)
def test_what_was_stored_comes_back_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, bits: int | None, memory: int
) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock, dtype, kv_bits=bits, max_tokens=memory)
    for n, tokens in enumerate(FORKS):
        clock.now_s += 1
        labels = {"document_starts": {f"d{n}": n % 2, "é": UNPLACED}, "segments": (Segment("", 0, 2),), "session": "s"}
        assert store.put(reference(tokens, "ab"[n % 2], dtype, pinned=n == 1, expires_after_s=99.0 + n, **labels))
    before = everything(store)
    store = reopened(store, clock, dtype, kv_bits=bits)
    assert len(before) == 4 and everything(store) == before
    store.check()
    other = everything(reopened(store, clock, dtype, max_tokens=memory))
    assert other == ({} if bits else before), "what is rounded is nothing to a store that keeps KV as it is"


def test_a_common_beginning_is_on_disk_once_and_comes_back_once(tmp_path: Path) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock)
    long = tuple(range(40))
    put_all(store, clock, [(*long, 1, 2)])
    one = store.stats()["disk_bytes"]
    put_all(store, clock, [(*long, 3)])
    assert store.stats()["disk_bytes"] - one < one, "the second has no tensors but its own"
    assert len(files_of(tmp_path)) == 2
    store = reopened(store, clock)
    assert store.stats()["bytes"] == 0, "nothing is read until it is wanted"
    assert [lookup(store, (*long, 1, 2)), lookup(store, (*long, 3))] == [42, 41]
    assert store.stats()["bytes"] == 43 * BYTES_PER_TOKEN
    store.check()


@pytest.mark.parametrize("first", [0, 1, 2])
def test_what_is_forgotten_is_gone_from_the_disk_and_the_rest_is_whole(tmp_path: Path, first: int) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock)
    for n, tokens in enumerate(FORKS):
        store.put(reference(tokens, document_starts={f"d{n}": 0}))
    assert store.forget("a", document_id=f"d{first}") == 1
    store = reopened(store, clock)
    left = [tokens for n, tokens in enumerate(FORKS) if n != first]
    assert [lookup(store, tokens) for tokens in left] == [len(tokens) for tokens in left]
    assert len(store.references()) == 3
    for n in range(4):
        store.forget("a", document_id=f"d{n}")
        store.check()
    assert files_of(tmp_path) == set() and store.stats()["disk_bytes"] == 0


@pytest.mark.parametrize("way", ["forget", "expire"])
@pytest.mark.parametrize("max_tokens", [1000, 0])
def test_what_is_gone_does_not_stay_in_a_file_that_others_need(tmp_path: Path, way: str, max_tokens: int) -> None:
    """The first prompt's file has what others begin with as well."""
    clock = Clock()
    store = opened_at(tmp_path, clock, max_tokens=max_tokens)
    secret = layers_of((*FORKS[0], 11, 12), "a")[0].keys[:, :, 5:]
    store.put(reference((*FORKS[0], 11, 12), document_starts={"d": 6}, expires_after_s=5.0))
    put_all(store, clock, FORKS[:3])
    needed = files_of(tmp_path)
    assert len(needed) == 3 and holds(tmp_path, secret)
    before = store.stats()["disk_bytes"]
    if way == "forget":
        assert store.forget("a", document_id="d") == 1
    clock.now_s += 5
    assert len(store.references()) == 2
    store.check()
    assert not holds(tmp_path, secret) and store.stats()["disk_bytes"] < before and len(files_of(tmp_path)) == 3
    store = reopened(store, clock)
    assert [lookup(store, tokens) for tokens in FORKS[:3]] == [3, 4, 4]


def holds(path: Path, tensor: torch.Tensor) -> bool:
    """Whether a KV file has these bytes."""
    wanted = tensor[0, 0, -1].numpy().tobytes()
    return any(wanted in file.read_bytes() for file in path.glob("*/*.safetensors"))


def test_hits_and_last_use_survive(tmp_path: Path) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock)
    put_all(store, clock, [(1,) * 4, (2,) * 4, (3,) * 4])
    clock.now_s += 5
    assert lookup(store, (1,) * 4) == lookup(store, (1,) * 4) == 4
    clock.now_s += 7
    store.close()
    clock.now_s += 1000 - clock.now_s  # another process, another clock
    clock.wall_offset_s -= 950
    store = opened_at(tmp_path, clock)
    assert [kept.token_ids[0] for kept in store.references()] == [2, 3, 1], "in the order of use"
    entries = {kept.token_ids[0]: store._entries.by_key[kept.id] for kept in store.references()}
    assert [entries[n].hits for n in (1, 2, 3)] == [2, 0, 0]
    ages = [clock.wall() - 1e9 - 8, clock.wall() - 1e9 - 2, clock.wall() - 1e9 - 3]
    assert [clock.now_s - entries[n].last_used_s for n in (1, 2, 3)] == pytest.approx(ages)
    disk = store._entries.tiers.disk.tier
    assert disk.choose_victim((), disk.max_bytes) is entries[2].node, (
        "what was never reused goes first, and the oldest of it"
    )
    assert entries[1].node.hits == 2 and entries[1].node not in disk._novel


def test_a_beginning_that_a_later_entry_proved_is_proven(tmp_path: Path) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock)
    put_all(store, clock, [(1, 2, 3), (1, 2, 4)])
    clock.now_s += 1
    assert lookup(store, (1, 2, 4)) == 3
    store = reopened(store, clock)
    beginning = store._entries.by_key[reference((1, 2, 4)).id].node.parent
    assert beginning is not None and beginning.hits == 1
    assert beginning not in store._entries.tiers.disk.tier._novel


def test_other_namespaces_stay_apart(tmp_path: Path) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock)
    for name in ("a", "b"):
        store.put(reference((1, 2, 3), name))
    store = reopened(store, clock)
    assert lookup(store, (1, 2, 3)) == lookup(store, (1, 2, 3), "b") == 3  # whose KV it is, is compared
    assert lookup(store, (1, 2, 3), "c") == 0 and runs_of(store, (1, 2), "c") == []
    assert store.forget("a") == 1
    store = reopened(store, clock)
    assert lookup(store, (1, 2, 3)) == 0 and lookup(store, (1, 2, 3), "b") == 3


def test_tainted_kv_is_never_written(tmp_path: Path) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock)
    assert store.put(tainted((1, 2, 3))) and files_of(tmp_path) == set()
    store = reopened(store, clock)
    assert lookup(store, (1, 2, 3), session="s") == 0 and store.stats()["entries"] == 0


def test_another_model_finds_nothing_and_harms_nothing(tmp_path: Path) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock)
    put_all(store, clock, FORKS)
    store.close()
    other = KVStore(store.config, clock, clock.wall)
    assert other.open("cd34", torch.float32, CPU) == 0 and other.references() == []
    other.put(reference((1, 2)))
    other.close()
    assert len(opened_at(tmp_path, clock).references()) == 4


def test_what_is_closed_goes_on_in_memory(tmp_path: Path) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock, max_tokens=6)
    put_all(store, clock, [(1,) * 4, (2,) * 4])
    store.close()
    store.check()
    assert lookup(store, (1,) * 4) == 0 and lookup(store, (2,) * 4) == 4, "the first was on disk alone"
    assert store.put(reference((3, 3)))
    store.close()
    assert len(opened_at(tmp_path, clock).references()) == 2


def test_a_directory_is_taken_by_one_store_at_a_time(tmp_path: Path) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock)
    put_all(store, clock, FORKS)
    with pytest.raises(StoreLockedError, match=str(tmp_path)):
        opened_at(tmp_path, clock)
    assert lookup(store, FORKS[0]) == 5
    assert len(reopened(store, clock).references()) == 4


# Room -----------------------------------------------------------------------------------------------------------------


def test_without_room_in_memory_what_is_on_disk_is_served_from_there(tmp_path: Path) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock, max_tokens=0)
    put_all(store, clock, FORKS)
    assert [lookup(store, tokens) for tokens in FORKS] == [5, 4, 4, 2]
    assert runs_of(store, (0, 7, 8))[0].num_tokens == 2
    store.check()
    stats = store.stats()
    assert (stats["bytes"], stats["promoted"], stats["entries"]) == (0, 0, 4)


def test_what_memory_gives_up_is_on_disk_and_returns(tmp_path: Path) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock, max_tokens=8, host_tokens=4)
    prompts = [(n,) * 4 for n in range(1, 7)]
    put_all(store, clock, prompts)
    assert store.stats()["bytes"] + store.stats()["host_bytes"] == 12 * BYTES_PER_TOKEN
    for _ in range(2):
        for tokens in prompts:
            clock.now_s += 1
            assert lookup(store, tokens) == 4
            store.check()
    stats = store.stats()
    assert stats["evicted"] == 0 and stats["promoted"] > 4 and stats["demoted"] > 4


def disk_bytes_for(tmp_path: Path, count: int, *, writing: bool = True) -> int:
    """What files of so many prompts of four tokens take; with the room that is asked for before one is written."""
    store = opened_at(tmp_path / "probe", Clock())
    store.put(reference((1,) * 4))
    used = store.stats()["disk_bytes"]
    store.close()
    return count * used + (4 * BYTES_PER_TOKEN + 512 * 5 - used) * writing


@pytest.mark.parametrize("eviction", ["value", "lru"])
def test_a_full_disk_tier_gives_up_what_is_worth_least(tmp_path: Path, eviction: str) -> None:
    clock = Clock()
    bound = disk_bytes_for(tmp_path, 4)
    store = opened_at(tmp_path, clock, max_tokens=0, disk_max_bytes=bound, eviction=eviction)
    put_all(store, clock, [(1,) * 4, (2,) * 4])
    clock.now_s += 1
    assert lookup(store, (1,) * 4) == 4
    put_all(store, clock, [(n,) * 4 for n in range(3, 9)])
    left = {int(kept.token_ids[0]) for kept in store.references()}
    assert left == ({1, 6, 7, 8} if eviction == "value" else {5, 6, 7, 8})
    assert store.stats()["disk_bytes"] <= bound and len(files_of(tmp_path)) == 4
    assert len(reopened(store, clock, disk_max_bytes=bound).references()) == 4


def test_what_the_disk_gives_up_stays_in_memory_and_the_other_way_round(tmp_path: Path) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock, disk_max_bytes=disk_bytes_for(tmp_path, 2), host_tokens=4)
    prompts = [(n,) * 4 for n in range(1, 6)]
    put_all(store, clock, prompts)
    assert [lookup(store, tokens) for tokens in prompts] == [4] * 5 and store.stats()["evicted"] == 0
    assert len(reopened(store, clock).references()) == 2


def test_what_is_too_large_for_the_disk_costs_nothing_that_is_there(tmp_path: Path) -> None:
    clock = Clock()
    bound = disk_bytes_for(tmp_path, 3)
    store = opened_at(tmp_path, clock, max_tokens=0, disk_max_bytes=bound)
    put_all(store, clock, [(1,) * 4, (2,) * 4])
    assert not store.put(reference(tuple(range(500))))
    assert len(store.references()) == 2 and store.stats()["disk_refused"] == 1
    store.check()


def test_a_small_piece_of_a_large_file_does_not_flush_the_rest(tmp_path: Path) -> None:
    """A pinned beginning keeps the whole file that it lies in: what does not fit beside that is refused at once."""
    clock = Clock()
    store = opened_at(tmp_path, clock, max_tokens=0, disk_max_bytes=16_000)
    store.put(reference((1, *range(2, 152))))
    put_all(store, clock, [(1, 1)], pinned=True)
    put_all(store, clock, [(5, 5)])
    store.check()
    assert store.stats()["disk_bytes"] > 150 * BYTES_PER_TOKEN
    assert not store.put(reference(tuple(range(200, 350)))) and len(store.references()) == 3


@pytest.mark.parametrize(
    "failing", ["files.KVFiles.write_apart", "directory.KVDirectory.record", "files.KVFiles.read", "torch.cat"]
)
def test_a_file_that_cannot_be_written_anew_serves_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock, max_tokens=0)
    store.put(reference((1, 2, 3, 4), document_starts={"d": 3}))
    put_all(store, clock, [(1, 2, 5)])
    whole = KVDirectory.record
    errors = {"read": StoreFileError("bad"), "cat": MemoryError()}
    error = errors.get(failing.split(".")[-1], StoreWriteError("full"))

    def fail(self: Any, *args: Any, **changes: Any) -> None:
        if changes.get("gone_entries"):
            whole(self, *args, **changes)
            return
        raise error

    target = failing if failing == "torch.cat" else f"semsharekv_integrations.store.{failing}"
    with monkeypatch.context() as patch:
        patch.setattr(target, fail)
        assert store.forget("a", document_id="d") == 1
    store.check()
    assert store.stats()["write_failed"] == 1 and lookup(store, (1, 2, 5)) == 3
    assert store.forget("a", document_id="none") == 0
    store = reopened(store, clock)
    assert lookup(store, (1, 2, 5)) == 3
    store.put(reference((1, 2, 6), document_starts={"d": 2}))
    assert store.forget("a", document_id="d") == 1, "and what could not be written is written the next time"
    store.check()
    assert not holds(tmp_path, layers_of((1, 2, 3, 4), "a")[0].keys[:, :, 3:])


def test_a_smaller_bound_is_kept_from_the_opening_on(tmp_path: Path) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock)
    put_all(store, clock, [(1,) * 4], pinned=True)
    put_all(store, clock, [(n,) * 4 for n in range(2, 7)])
    clock.now_s += 1
    assert lookup(store, (2,) * 4) == 4
    bound = disk_bytes_for(tmp_path, 2, writing=False)
    store = reopened(store, clock, disk_max_bytes=bound)
    assert sorted(int(kept.token_ids[0]) for kept in store.references()) == [1, 2], "pinned ones and proven ones"
    assert store.stats()["disk_bytes"] <= bound
    store = reopened(store, clock, disk_max_bytes=100)
    assert store.references() == [] and files_of(tmp_path) == set(), "what is pinned goes last, but it goes"


def test_opening_tells_how_many_entries_there_are(tmp_path: Path) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock)
    put_all(store, clock, FORKS)
    store.close()
    again = KVStore(store.config, clock, clock.wall)
    assert again.open(FINGERPRINT, torch.float32, CPU) == 4
    again.close()
    clock.now_s += 100
    again = KVStore(config_of(directory=tmp_path, ttl_s=50), clock, clock.wall)
    assert again.open(FINGERPRINT, torch.float32, CPU) == 0


# Time -----------------------------------------------------------------------------------------------------------------


def test_what_has_expired_does_not_come_back(tmp_path: Path) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock, ttl_s=50)
    store.put(reference((1, 2, 3)))
    store.put(reference((4, 5, 6), expires_after_s=500))
    store.close()
    clock.now_s += 49
    store = opened_at(tmp_path, clock, ttl_s=50)
    assert lookup(store, (1, 2)) == 2, "which is a use"
    store.close()
    clock.now_s += 50
    store = opened_at(tmp_path, clock, ttl_s=50)
    assert lookup(store, (1, 2, 3)) == 0 and lookup(store, (4, 5, 6)) == 3 and len(files_of(tmp_path)) == 1


@pytest.mark.parametrize("jump_s", [-1e12, -1e9, -60, -20, 0, 20, 1e9])
def test_a_wall_clock_that_jumps_gives_one_lifetime_more_at_most(tmp_path: Path, jump_s: float) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock, ttl_s=50)
    store.put(reference((1, 2, 3)))
    clock.now_s += 40
    store.close()
    clock.wall_offset_s += jump_s
    store = opened_at(tmp_path, clock, ttl_s=50)
    store.check()
    left_s = min(50.0, 50 - 40 - jump_s)
    if left_s <= 0:
        assert store.references() == []
        return
    clock.now_s += left_s - 1
    assert len(store.references()) == 1
    clock.now_s += 1
    assert store.references() == [] and lookup(store, (1, 2, 3)) == 0
    store.check()


def test_what_expires_together_costs_one_change_and_a_bounded_number_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many entries: none is served, all are gone from the catalog, and their files go with calls to come."""
    clock = Clock()
    store = opened_at(tmp_path, clock)
    for n in range(3 * MOST_REMOVED):
        store.put(reference((n, 1), document_starts={"d": 0}, expires_after_s=5.0))
    store.put(reference((1000, 7, 7), document_starts={"d": 0}))
    clock.now_s += 10
    changes, deleted = count_calls(monkeypatch, Catalog, "change"), count_calls(monkeypatch, files.KVFiles, "_remove")
    assert lookup(store, (5, 1)) == 0
    assert len(changes) == 1 and len(deleted) <= 2 * MOST_REMOVED
    store.check()
    assert len(store.references()) == store.stats()["entries"] == 1 and store.stats()["expired"] == 3 * MOST_REMOVED
    for _ in range(3):
        lookup(store, (5, 1))
    assert len(files_of(tmp_path)) == 1
    store.check()
    assert store.forget("a", document_id="d") == 1 and files_of(tmp_path) == set()


def test_all_that_a_call_changes_is_one_change_of_the_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever new KV lies in a file is one change more, before what needs it."""
    clock = Clock()
    store = opened_at(tmp_path, clock)
    changes = count_calls(monkeypatch, Catalog, "change")
    calls: list[tuple[Callable[[], object], int]] = [
        (lambda: store.put(reference((1, 2, 3, 4), document_starts={"d": 1})), 2),
        (lambda: store.put(reference((1, 2, 3, 4), document_starts={"e": 1})), 1),  # labels alone
        (lambda: store.put(reference((1, 2, 3, 4, 5, 6))), 2),  # in place of the one before
        (lambda: store.put(reference((1, 2, 7))), 2),  # splits what the other begins with
        (lambda: store.put(reference((1, 2))), 1),  # stands in both: labels of one of them
        (lambda: lookup(store, (1, 2, 3)), 0),
        (lambda: runs_of(store, (0, 1, 2, 7)), 0),
        (lambda: store.references(), 0),
        (lambda: store.clear(), 1),
    ]
    for call, wanted in calls:
        changes.clear()
        call()
        assert len(changes) == wanted
        store.check()


@pytest.mark.parametrize("way", ["forget", "clear", "close"])
def test_what_is_forgotten_or_left_is_gone_from_the_disk_at_once(tmp_path: Path, way: str) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock)
    for n in range(2 * MOST_REMOVED + 5):
        store.put(reference((n, 1), expires_after_s=5.0 if way == "close" else None))
    clock.now_s += 10
    if way == "forget":
        assert store.forget("a") == 2 * MOST_REMOVED + 5
    elif way == "clear":
        assert store.clear() == 2 * MOST_REMOVED + 5
    else:
        assert store.references() == []
        store.close()
    assert files_of(tmp_path) == set()
    store.check()


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[object]:
    calls: list[object] = []
    whole = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(args) or whole(*args, **kwargs))
    return calls


# Damage ---------------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


RUIN: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "vanished": lambda path: path.unlink(),
}


@pytest.mark.parametrize("ruin", RUIN)
@pytest.mark.parametrize("way", ["prefix", "runs", "fetch"])
def test_a_damaged_file_is_a_counted_miss_and_takes_what_needs_it(tmp_path: Path, ruin: str, way: str) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock, max_tokens=0)
    prompts = [(1, 2, 3, 4, 5), (1, 2, 3, 6), (9, 9, 9)]
    put_all(store, clock, prompts)
    RUIN[ruin](file_of(store, prompts[0]))  # which has the beginning of the second one, too
    if way == "prefix":
        assert lookup(store, prompts[1]) == 0 and store.stats()["misses"] == 1
    elif way == "runs":
        assert runs_of(store, (0, 1, 2, 3)) == []
    else:
        assert store.fetch(reference(prompts[1]).id, "a") is None
    store.check()
    stats = store.stats()
    assert stats["unreadable"] == 1 and stats["disk_vanished" if ruin == "vanished" else "disk_damaged"] == 1
    assert lookup(store, prompts[2]) == 3 and len(store.references()) == 1
    assert store.put(reference(prompts[0])) and lookup(store, prompts[0]) == 5, "it may be stored again"
    store.check()


@pytest.mark.parametrize("ruin", RUIN)
def test_a_damaged_end_leaves_the_beginning(tmp_path: Path, ruin: str) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock, max_tokens=0)
    put_all(store, clock, [(1, 2, 3, 4, 5), (1, 2, 3, 6)])
    RUIN[ruin](file_of(store, (1, 2, 3, 6)))
    assert lookup(store, (1, 2, 3, 6)) == 3, "what the other entry still has"
    store.check()
    assert [len(kept.token_ids) for kept in store.references()] == [5]


@pytest.mark.parametrize("ruin", RUIN)
def test_damage_while_nobody_looked_is_found_when_opened_or_read(tmp_path: Path, ruin: str) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock)
    put_all(store, clock, [(1, 2, 3, 4, 5), (1, 2, 3, 6), (9, 9, 9)])
    path = file_of(store, (1, 2, 3, 4, 5))
    store.close()
    RUIN[ruin](path)
    store = opened_at(tmp_path, clock)
    store.check()
    assert [lookup(store, tokens) for tokens in ((1, 2, 3, 4, 5), (1, 2, 3, 6), (9, 9, 9))] == [0, 0, 3]
    store.check()
    assert store.stats()["disk_damaged"] + store.stats()["disk_vanished"] == 1


def test_memory_serves_on_when_its_file_is_gone(tmp_path: Path) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock)
    put_all(store, clock, [(1, 2, 3)])
    file_of(store, (1, 2, 3)).unlink()
    assert lookup(store, (1, 2, 3)) == 3 and store.stats()["unreadable"] == 0


def test_records_that_do_not_fit_together_are_left_out_and_deleted(tmp_path: Path) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock)
    put_all(store, clock, [(1, 2, 3, 4), (1, 2, 5), (8, 8)])
    store.close()
    directory = KVDirectory(tmp_path, FINGERPRINT)
    entries = {entry.id: entry for entry in directory.contents().entries}
    kept = reference((1, 2, 3, 4)).id
    wrong = [
        EntryRecord("0" * 16, "a", entries.pop(reference((1, 2, 5)).id).node, entries[kept].labels, 0.0, 0.0),
        entries[reference((8, 8)).id]._replace(labels={"pinned": 3}),
    ]
    twin = next(node for node in directory.contents().nodes if node.token_ids[0] == 1)
    nodes = [twin._replace(id="twin"), twin._replace(id="child", parent="twin")]
    twin_entry = entries[kept]._replace(id="x", node="child")
    directory.record(nodes=nodes, entries=[*wrong, twin_entry], gone_entries=[reference((1, 2, 5)).id])
    directory.close()
    store = opened_at(tmp_path, clock)
    store.check()
    assert [found.id for found in store.references()] == [kept] and lookup(store, (1, 2, 3, 4)) == 4
    assert len(files_of(tmp_path)) == 1
    assert len(reopened(store, clock).references()) == 1


# Full disk ------------------------------------------------------------------------------------------------------------


def fail(*_: object, **__: object) -> None:
    raise StoreWriteError("no space left on device")


def test_with_a_full_disk_everything_goes_on_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock)
    put_all(store, clock, [(1, 2, 3)])
    with monkeypatch.context() as patch:
        patch.setattr(files.KVFiles, "write_apart", fail)
        put_all(store, clock, [(1, 2, 4), (5, 6), (5, 7)])
        assert [lookup(store, t) for t in ((1, 2, 3), (1, 2, 4), (5, 6), (5, 7))] == [3, 3, 2, 2]
    assert store.stats()["write_failed"] == 3, "what (5, 7) goes on from is not on disk: that is tried again, alone"
    put_all(store, clock, [(8, 8)])
    assert sorted(int(kept.token_ids[-1]) for kept in reopened(store, clock).references()) == [3, 8]


def test_with_a_full_disk_and_no_memory_an_entry_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock, max_tokens=0)
    put_all(store, clock, [(1, 2, 3)])
    for owner, name in ((files.KVFiles, "write_apart"), (KVDirectory, "record")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            assert not store.put(reference((5, 6)))
        store.check()
    assert len(files_of(tmp_path)) == 1 and store.stats()["refused"] == 2
    assert store.put(reference((5, 6))) and len(reopened(store, clock).references()) == 2


def test_what_the_catalog_could_not_be_told_it_is_told_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was forgotten above all: it must not come back."""
    clock = Clock()
    store = opened_at(tmp_path, clock)
    put_all(store, clock, [(1, 2, 3), (7, 7)], document_starts={"d": 0})
    with monkeypatch.context() as patch:
        patch.setattr(KVDirectory, "record", fail)
        store.put(reference((1, 2, 4)))  # splits the first
        store.put(reference((7, 7), pinned=True))
        assert store.forget("a", document_id="d") == 2
        store.check()
    assert lookup(store, (1, 2, 4)) == 3
    put_all(store, clock, [(1, 2, 9, 9)])
    store.check()
    store = reopened(store, clock)
    assert {tuple(kept.token_ids.tolist()) for kept in store.references()} <= {(1, 2, 4), (1, 2, 9, 9)}
    assert lookup(store, (1, 2, 9, 9)) == 4 and lookup(store, (7, 7)) == 0


def test_a_catalog_that_cannot_be_written_costs_no_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock, max_tokens=0, disk_max_bytes=disk_bytes_for(tmp_path, 3))
    prompts = [(n,) * 4 for n in (1, 2, 3)]
    put_all(store, clock, prompts)
    with monkeypatch.context() as patch:
        patch.setattr(KVDirectory, "record", fail)
        for n in range(10, 20):
            assert not store.put(reference((n,) * 4))
            store.check()
    assert len(store.references()) >= 2, "what goes makes no room, so no more than one goes"
    put_all(store, clock, [(5,) * 4])
    assert store.stats()["disk_bytes"] <= store.config.disk_max_bytes


def test_check_sees_damage(tmp_path: Path) -> None:
    damages: list[Callable[[KVStore], object]] = [
        lambda store: store._entries.tiers.disk.tier.remove(node_of(store)),
        lambda store: setattr(node_of(store), "on_disk", None),
        lambda store: setattr(node_of(store), "on_disk", node_of(store).on_disk._replace(first=1)),
        lambda store: setattr(node_of(store).parent, "on_disk", None),
        lambda store: setattr(store._entries.tiers.disk.tier, "max_bytes", 1),
        lambda store: lose_row(store, "entries"),
        lambda store: lose_row(store, "nodes"),
        lambda store: lose_row(store, "files"),
    ]
    for number, damage in enumerate(damages):
        store = opened_at(tmp_path / str(number), Clock())
        put_all(store, Clock(), [(1, 2, 3), (1, 2, 4)])
        damage(store)
        with pytest.raises(AssertionError):
            store.check()


def lose_row(store: KVStore, table: str) -> None:
    catalog = store._entries.tiers.disk._directory._catalog  # type: ignore[union-attr]
    catalog._db.execute(f"DELETE FROM {table} WHERE id = (SELECT max(id) FROM {table})")


def node_of(store: KVStore) -> Any:
    return store._entries.by_key[reference((1, 2, 4)).id].node


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_without_memory_what_is_on_disk_is_served_from_there_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def no_memory(*_: object) -> PackedKV:
        raise error

    clock = Clock()
    store = reopened(opened_at(tmp_path, clock), clock)
    put_all(store, clock, [(1, 2, 3), (4, 5)])
    store = reopened(store, clock)
    with monkeypatch.context() as patch:
        patch.setattr(PlacedKV, "load", no_memory)
        assert lookup(store, (1, 2, 3)) == 3
        store.check()
    assert store.stats()["promotion_failed"] == 1 and store.stats()["unreadable"] == store.stats()["misses"] == 0
    assert lookup(store, (4, 5)) == 2 and store.stats()["promoted"] == 1 and len(files_of(tmp_path)) == 2


# Engines --------------------------------------------------------------------------------------------------------------

PROMPT = "The report from Velmar names a fire at the bridge , which was closed on Monday for repairs ."


@pytest.mark.parametrize("mode", ["exact", "identical"])
@pytest.mark.parametrize("max_bytes", [2**30, 0])
def test_an_engine_made_again_answers_as_before_from_disk(
    make_engine: EngineMaker, tmp_path: Path, mode: str, max_bytes: int
) -> None:
    def again() -> Any:
        return make_engine(mode, store=StoreConfig(directory=tmp_path, max_bytes=max_bytes))

    engine = again()
    first = engine.generate(PROMPT, max_new_tokens=8, namespace="n", session="s")
    second = engine.generate(PROMPT, max_new_tokens=8, namespace="n")
    engine.store.check()
    engine.close()
    engine = again()
    third = engine.generate(PROMPT, max_new_tokens=8, namespace="n")
    engine.store.check()
    assert first.token_ids == second.token_ids == third.token_ids
    assert third.report.prefix_tokens == second.report.prefix_tokens > 0 == first.report.prefix_tokens
    other = engine.generate(PROMPT, max_new_tokens=8, namespace="m")
    assert other.report.reused_tokens == 0 and other.token_ids == first.token_ids
    engine.close()


def test_an_engine_with_another_model_finds_nothing(make_engine: EngineMaker, tmp_path: Path) -> None:
    store = StoreConfig(directory=tmp_path)
    engine = make_engine(store=store)
    engine.generate(PROMPT, max_new_tokens=4)
    engine.close()
    model = make_model("llama", len(engine.tokenizer))
    with torch.no_grad():
        model.lm_head.weight.add_(0.01)
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    other = make_engine(model=model, store=store)
    report = other.generate(PROMPT, max_new_tokens=4).report
    assert report.reused_tokens == 0
    other.close()
    again = make_engine(store=store)
    assert again.generate(PROMPT, max_new_tokens=4).report.reused_tokens > 0
    again.close()


def test_engines_with_a_directory_save_and_load(make_engine: EngineMaker, tmp_path: Path) -> None:
    engine = make_engine(store=StoreConfig(directory=tmp_path / "one", max_bytes=0))
    first = engine.generate(PROMPT, max_new_tokens=4)
    assert engine.save(tmp_path / "saved") == 1
    other = make_engine(store=StoreConfig(directory=tmp_path / "two", kv_bits=8), reuse=ReuseConfig(mode="identical"))
    assert other.load(tmp_path / "saved") == 1
    assert other.generate(PROMPT, max_new_tokens=4).report.prefix_tokens > 0
    third = make_engine(store=StoreConfig(directory=tmp_path / "three"))
    assert third.load(tmp_path / "saved") == 1
    found = third.generate(PROMPT, max_new_tokens=4)
    assert found.report.prefix_tokens > 0 and found.token_ids == first.token_ids
    for one in (engine, other, third):
        one.store.check()
        one.close()


def test_a_second_engine_on_a_directory_is_refused(make_engine: EngineMaker, tmp_path: Path) -> None:
    engine = make_engine(store=StoreConfig(directory=tmp_path))
    with pytest.raises(StoreLockedError):
        make_engine(store=StoreConfig(directory=tmp_path))
    engine.close()
    make_engine(store=StoreConfig(directory=tmp_path)).close()


def test_a_reference_read_from_disk_outlives_its_entry(tmp_path: Path) -> None:
    clock = Clock()
    store = opened_at(tmp_path, clock, max_tokens=0)
    put_all(store, clock, [(1, 2, 3)])
    match = store.find_prefix(np.array((1, 2, 3)), "a", max_tokens=3)
    assert match is not None
    store.clear()
    store.close()
    assert files_of(tmp_path) == set()
    assert_whole(match.reference)
