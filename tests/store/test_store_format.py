"""A directory that an earlier version wrote opens with all that is in it: the stored format is a promise.

``tests/stored_directory`` was written at the commit 55f4f23, before the store kept its records in SQLite alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kept_prompts import FINGERPRINT, Clock, assert_whole, config_of, lookup, opened, put_all, reference
from semsharekv_integrations.kv import UNPLACED, Reference, Segment
from semsharekv_integrations.store import KVStore
from semsharekv_integrations.store.directory import COUNTS, peek

LABELS = {"document_starts": {"d": 1, "é": UNPLACED}, "document_stops": {"d": 3, "é": 0}}
WRITTEN = {
    kept.id: kept
    for kept in (
        reference((1, 2, 3, 4, 5), "a", **LABELS, segments=(Segment("d", 1, 3),), session="s"),
        reference((1, 2, 3, 6), "a", document_starts={"d": 1}, document_stops={"d": 3}),
        reference((9, 9), "a", pinned=True, expires_after_s=99.0),
        reference((1, 2, 3, 4), "b", document_starts={"e": 0}, document_stops={"e": 2}),
    )
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return Path(shutil.copytree(Path(__file__).parent / "stored_directory", tmp_path / "kv"))


@pytest.fixture(params=[1000, 0], ids=["with room in memory", "on disk alone"])
def store(path: Path, request: pytest.FixtureRequest) -> Iterator[KVStore]:
    clock = Clock()
    clock.now_s = 10.0
    with closing(opened(config_of(request.param, directory=path), clock)) as store:
        yield store


def labels(kept: Reference) -> tuple[object, ...]:
    named = (dict(kept.document_starts), dict(kept.document_stops), kept.segments, kept.session)
    return (kept.namespace, kept.token_ids.tolist(), *named, kept.pinned, kept.expires_after_s)


def test_every_entry_is_there_with_its_labels_and_its_kv(store: KVStore) -> None:
    store.check()
    found = {kept.id: kept for kept in store.fetch_all()}
    assert {key: labels(kept) for key, kept in found.items()} == {key: labels(kept) for key, kept in WRITTEN.items()}
    for kept in found.values():
        assert_whole(kept)
    assert not any(store.stats()[f"disk_{name}"] for name in COUNTS)
    store.check()


def test_uses_are_remembered_and_deadlines_hold(store: KVStore) -> None:
    assert [tuple(kept.token_ids.tolist()) for kept in store.references("a")] == [(1, 2, 3, 4, 5), (9, 9), (1, 2, 3, 6)]
    assert [store._entries.by_key[kept.id].hits for kept in store.references("a")] == [0, 0, 1]
    store._clock.now_s += 98  # type: ignore[attr-defined]
    assert len(store.references()) == 3, "one had 99 seconds"


def test_it_is_told_new_things_and_forgets(store: KVStore, path: Path) -> None:
    put_all(store, store._clock, [(1, 2, 8)])  # type: ignore[arg-type]
    assert store.forget("a", document_id="d") == 1
    assert lookup(store, (1, 2, 3, 6)) == 4 and lookup(store, (1, 2, 8)) == 3
    store.close()
    left = {(peeked.entry.namespace, peeked.num_tokens) for peeked in peek(path / FINGERPRINT).entries}
    assert left == {("a", 4), ("a", 2), ("a", 3), ("b", 4)}
    with closing(opened(config_of(directory=path))) as again:
        assert len(again.references()) == 4 and not any(again.stats()[f"disk_{name}"] for name in COUNTS)
        assert [lookup(again, tokens) for tokens in ((1, 2, 8), (1, 2, 3, 6), (9, 9))] == [3, 4, 2]
