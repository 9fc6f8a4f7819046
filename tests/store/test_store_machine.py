"""The store against a simple model of it, in every combination of tiers: what is delivered is right, nothing is lost.

The model is a list of what was put. It does not know what goes first when there is no room, only when something may go.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kept_prompts import (
    BYTES_PER_TOKEN,
    MIN_RUN_TOKENS,
    Clock,
    Tokens,
    assert_whole,
    config_of,
    distinct_tokens,
    opened,
    reference,
    tainted,
)
from semsharekv_integrations.kv import Reference

NAMESPACES = st.sampled_from(["a", "a", "b", "all"])
SESSIONS = st.sampled_from(["s", "t"])
LONGEST = 6
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=LONGEST).map(tuple)
NEAR = st.none() | st.integers(0, 7)
STEP_S = 1 / 64  # no two uses at the same time; exact, so that deadlines are


@dataclass(eq=False)
class Kept:
    namespace: str
    tokens: Tokens
    pinned: bool
    ttl_s: float | None
    documents: set[str]
    used_s: float
    session: str | None = None
    tainted: bool = False

    def shared_with(self, tokens: Tokens) -> int:
        pairs = zip(self.tokens, tokens, strict=False)
        return next((n for n, (x, y) in enumerate(pairs) if x != y), min(len(self.tokens), len(tokens)))

    def is_found_as(self, found: Reference) -> bool:
        mine = (self.namespace, self.tainted, self.session if self.tainted else None)
        session = found.session if found.is_tainted else None
        same = mine == (found.namespace, found.is_tainted, session)
        return same and self.tokens[: len(found.token_ids)] == tuple(found.token_ids.tolist())

    def has_labels_of(self, found: Reference) -> bool:
        """Of several that began alike and went, the one whose beginning is left."""
        return (self.ttl_s, self.session) == (found.expires_after_s, found.session)


def room_taken(kept: list[Kept]) -> int:
    """Tokens that have KV."""
    ordinary = {k.namespace: [o.tokens for o in kept if o.namespace == k.namespace and not o.tainted] for k in kept}
    return sum(map(distinct_tokens, ordinary.values())) + sum(len(k.tokens) for k in kept if k.tainted)


class StoreMachine(RuleBasedStateMachine):
    """Everything in one tier, whose bound is exact."""

    MAX_TOKENS, HOST_TOKENS, TTL_S = 18, 0, 40.0
    ON_DISK = False
    SETTINGS: dict[str, Any] = {}
    TOLERANCE = 0.0
    SHARED: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp()) if self.ON_DISK else None
        self.clock = Clock()
        self.kept: list[Kept] = []
        self.store = opened(self.config(), self.clock)

    def config(self) -> Any:
        shared = {"ttl_s": self.TTL_S, "shared_namespace": self.SHARED}
        return config_of(self.MAX_TOKENS, self.HOST_TOKENS, self.folder, **shared, **self.SETTINGS)

    def teardown(self) -> None:
        self.store.close()
        if self.folder is not None:
            shutil.rmtree(self.folder)

    # What may be missing ------------------------------------------------------------------------------------------

    def may_lose(self, wanted: list[Kept]) -> bool:
        """Whether there need not be room for all that is ``wanted``: in a single tier exactly when there is none."""
        return room_taken(wanted) > self.MAX_TOKENS

    def may_refuse(self, wanted: list[Kept]) -> bool:
        return room_taken(wanted) > self.MAX_TOKENS

    def losable(self, kept: Kept) -> bool:
        return not kept.pinned

    def settle(self, before: list[Kept] | None = None) -> None:
        """Drop from the model what had to go; nothing else may be missing."""
        self.store.check()
        wanted = self.kept if before is None else before
        stored = self.store.references()
        alive = [k for k in self.kept if k.tainted or any(self.is_entry(k, found) for found in stored)]
        gone = [k for k in self.kept if k not in alive]
        for found in stored:  # of what went, a beginning that was reused may have been left
            if not any(self.is_entry(k, found) for k in alive):
                whole = next(k for k in gone if k.is_found_as(found) and k.has_labels_of(found))
                alive.append(replace(whole, tokens=tuple(found.token_ids.tolist()), documents=set(whole.documents)))
        tainted_now = self.store.stats()["tainted_entries"]
        lost_tainted = sum(k.tainted for k in alive) - tainted_now
        assert lost_tainted >= 0, "a tainted entry that should not be there"
        if lost_tainted:
            alive_tainted = [k for k in alive if k.tainted]
            gone_tainted = [k for k in alive_tainted if not self.tainted_is_there(k)]
            assert len(gone_tainted) == lost_tainted
            gone += gone_tainted
            alive = [k for k in alive if k not in gone_tainted]
        if gone:
            assert self.may_lose(wanted), f"{gone} went although there is room"
            assert all(self.losable(k) for k in gone), "a pinned entry went"
        assert len(stored) == len(alive) - sum(k.tainted for k in alive), "an entry that should not be there"
        self.kept = alive

    def is_entry(self, kept: Kept, found: Reference) -> bool:
        return kept.is_found_as(found) and len(found.token_ids) == len(kept.tokens)

    def tainted_is_there(self, kept: Kept) -> bool:
        space = self.store._entries.namespaces.get(kept.namespace)
        return space is not None and kept.session in space.tainted

    def held_bytes(self) -> int:
        return sum(tier.num_bytes for tier in self.store._entries.tiers.memory)

    def begin(self) -> None:
        self.clock.now_s += STEP_S
        self.expire()

    def expire(self) -> None:
        self.kept = [k for k in self.kept if self.clock.now_s - k.used_s < (k.ttl_s or self.TTL_S)]

    def readable(self, namespace: str) -> list[Kept]:
        return [k for k in self.kept if k.namespace in (namespace, self.SHARED or namespace)]

    def near(self, tokens: Tokens, number: int | None) -> Tokens:
        """``tokens``, or what begins as one that is stored and may go on with them."""
        if number is None or not self.kept:
            return tokens
        known = self.kept[number % len(self.kept)].tokens
        return (known[: len(known) - (number > 3)] + tokens[: number % 3])[:LONGEST] or tokens

    # Rules --------------------------------------------------------------------------------------------------------

    @initialize(prompts=st.lists(TOKENS, max_size=4))
    def fill(self, prompts: list[Tokens]) -> None:
        for tokens in prompts:
            self.put(tokens, None, "a", False, None, "d", None)

    @rule(
        tokens=TOKENS,
        near=NEAR,
        namespace=NAMESPACES,
        pinned=st.sampled_from([False, False, True]),
        ttl_s=st.sampled_from([None, 15.0]),
        document=st.sampled_from("defg"),
        session=st.none() | SESSIONS,
    )
    def put(
        self,
        tokens: Tokens,
        near: int | None,
        namespace: str,
        pinned: bool,
        ttl_s: float | None,
        document: str,
        session: str | None,
    ) -> None:
        self.begin()
        tokens = self.near(tokens, near)
        starts = {document: 0}
        given = reference(
            tokens, namespace, pinned=pinned, expires_after_s=ttl_s, document_starts=starts, session=session
        )
        stored = self.store.put(given)
        new = Kept(namespace, tokens, pinned, ttl_s, {document}, self.clock.now_s, session)
        mine = [k for k in self.kept if k.namespace == namespace and not k.tainted]
        containers = [k for k in mine if k.tokens[: len(tokens)] == tokens]
        if any(k.tokens == tokens or k.pinned or not pinned for k in containers):
            assert stored
            same = [k for k in containers if k.tokens == tokens]
            if same and pinned:
                same[0].pinned = True
            self.label_one(same or [k for k in containers if k.pinned or not pinned], new)
            self.settle()
            return
        before = [*self.kept, new]
        if not stored:
            assert self.may_refuse([*[k for k in self.kept if k.pinned], new])
            self.settle()
            return
        for k in [k for k in mine if not k.pinned and tokens[: len(k.tokens)] == k.tokens]:
            self.join(new, k)
            self.kept.remove(k)
        self.kept.append(new)
        self.settle(before)
        assert new in self.kept, "what was just stored is there"

    def join(self, kept: Kept, other: Kept) -> None:
        kept.documents |= other.documents
        kept.ttl_s = min(filter(None, (kept.ttl_s, other.ttl_s)), default=None)
        kept.session = kept.session or other.session

    def label_one(self, containers: list[Kept], new: Kept) -> None:
        """Of several entries that contain what was put, the store chooses one."""
        chosen = [k for k in containers if self.used_s(k) == self.clock.now_s]
        assert len(chosen) == 1, "one entry that contains it carries its labels"
        chosen[0].used_s = self.clock.now_s
        self.join(chosen[0], new)

    def used_s(self, kept: Kept) -> float:
        space = self.store._entries.namespaces[kept.namespace]
        return next(e.last_used_s for e in space.ordinary.values() if self.is_entry(kept, e.reference))

    @rule(tokens=TOKENS, near=NEAR, namespace=NAMESPACES, session=SESSIONS, exact=st.integers(0, 5))
    def put_tainted(self, tokens: Tokens, near: int | None, namespace: str, session: str, exact: int) -> None:
        self.begin()
        tokens = self.near(tokens, near)
        labels = {"exact_tokens": min(exact, len(tokens) - 1), "document_starts": {"d": 0}, "pinned": bool(exact % 2)}
        stored = self.store.put(tainted(tokens, session, namespace, **labels))
        new = Kept(namespace, tokens, False, None, {"d"}, self.clock.now_s, session, tainted=True)
        before = [*self.kept, new]
        if not stored:
            assert self.may_refuse([*[k for k in self.kept if k.pinned], new])
            self.settle()
            return
        self.kept = [k for k in self.kept if (k.namespace, k.session, k.tainted) != (namespace, session, True)]
        self.kept.append(new)
        self.settle(before)
        assert new in self.kept

    @rule(
        tokens=TOKENS,
        near=NEAR,
        namespace=NAMESPACES,
        session=st.none() | SESSIONS,
        cut=st.tuples(st.integers(0, 2), st.integers(0, 2)),
        which=st.integers(0, 7),
    )
    def look(
        self, tokens: Tokens, near: int | None, namespace: str, session: str | None, cut: tuple[int, int], which: int
    ) -> None:
        """In every way there is."""
        self.look_up(self.near(tokens, near), namespace, session, cut[0])
        tokens = self.near(tokens, near)
        self.look_for_runs(tokens, namespace, min(cut[0], len(tokens)), max(len(tokens) - cut[1], min(cut)))
        self.fetch(namespace, which)

    def look_up(self, tokens: Tokens, namespace: str, session: str | None, short: int) -> None:
        self.begin()
        most = max(0, len(tokens) - short)
        match = self.store.find_prefix(np.array(tokens), namespace, max_tokens=most, session=session)
        own_session = (namespace, session)
        mine = [k for k in self.readable(namespace) if not k.tainted or (k.namespace, k.session) == own_session]
        longest = min(max((k.shared_with(tokens) for k in mine), default=0), most)
        assert (match.num_tokens if match else 0) == longest
        if match:
            found = match.reference
            assert found.namespace in (namespace, self.SHARED)
            assert tuple(found.token_ids[:longest].tolist()) == tokens[:longest]
            assert_whole(found, self.TOLERANCE)
            exact = [k for k in mine if not k.tainted and k.shared_with(tokens) >= longest]
            assert found.is_tainted == (not exact), "of equal ones the exact entry is taken"
            own = any(k.namespace == namespace for k in exact)
            assert not exact or (found.namespace == namespace) == own, "of equal ones the own entry is taken"
            assert any(k.is_found_as(found) for k in mine)
            self.note_use()
        self.settle()

    def look_for_runs(self, tokens: Tokens, namespace: str, start: int, stop: int) -> None:
        self.begin()
        exact = [k for k in self.readable(namespace) if not k.tainted]
        known = {k.tokens[at : at + MIN_RUN_TOKENS] for k in exact for at in range(len(k.tokens) - MIN_RUN_TOKENS + 1)}
        own = [k.tokens for k in exact if k.namespace == namespace]
        covered: set[int] = set()
        by_own: set[int] = set()
        for run in self.store.find_runs(np.array(tokens), namespace, start=start, stop=stop):
            found = tuple(run.reference.token_ids[run.source_start : run.source_start + run.num_tokens].tolist())
            assert found == tokens[run.start : run.start + run.num_tokens]
            assert any(self.is_entry(k, run.reference) for k in exact)
            assert_whole(run.reference, self.TOLERANCE)
            assert start <= min({run.start} - covered) and run.start + run.num_tokens <= stop
            covered |= set(range(run.start, run.start + run.num_tokens))
            by_own |= covered if run.reference.namespace == namespace else set()
        self.note_use()
        self.settle()
        for at in range(start, stop - MIN_RUN_TOKENS + 1):
            window = tokens[at : at + MIN_RUN_TOKENS]
            assert at in by_own or not any(window == o[n : n + MIN_RUN_TOKENS] for o in own for n in range(len(o)))
            # in the shared namespace only what lies between the runs of the own one is looked for
            hidden = bool(set(range(at, at + MIN_RUN_TOKENS)) & by_own)
            assert at in covered or hidden or window not in known

    def fetch(self, namespace: str, which: int) -> None:
        self.begin()
        entries = [k for k in self.kept if not k.tainted]
        if not entries:
            return
        one = entries[which % len(entries)]
        found = self.store.fetch(reference(one.tokens, one.namespace).id, namespace)
        assert (found is not None) == (one in self.readable(namespace))
        if found is not None:
            assert self.is_entry(one, found) and found.pinned == one.pinned
            assert_whole(found, self.TOLERANCE)
            self.note_use()
        self.settle()

    def note_use(self) -> None:
        """Of several entries that begin as the prompt does the store chooses one; it was used now."""
        for k in self.kept:
            space = self.store._entries.namespaces.get(k.namespace)
            entries = list(space) if space is not None else []
            for entry in entries:
                if self.is_entry(k, entry.reference) and entry.last_used_s == self.clock.now_s:
                    k.used_s = self.clock.now_s

    @rule(seconds=st.integers(1, 9))
    def wait(self, seconds: int) -> None:
        self.clock.now_s += seconds

    @precondition(lambda self: len(self.kept) > 1)
    @rule(data=st.data(), by=st.sampled_from(["document", "session"]))
    def forget(self, data: st.DataObject, by: str) -> None:
        self.begin()
        self.store.references()  # what has expired is not counted
        if not self.kept:  # they have expired
            return
        one = data.draw(st.sampled_from(self.kept))
        if by == "session" and one.session is None:
            return
        document = min(one.documents)
        mine = [k for k in self.kept if k.namespace == one.namespace]
        gone = [k for k in mine if (document in k.documents if by == "document" else k.session == one.session)]
        chosen = {"document_id": document} if by == "document" else {"session": one.session}
        assert self.store.forget(one.namespace, **chosen) == len(gone)
        self.kept = [k for k in self.kept if k not in gone]
        self.settle()

    @precondition(lambda self: len(self.kept) > 3)
    @rule()
    def clear(self) -> None:
        self.store.clear()
        self.kept = []
        stats = self.store.stats()
        assert [stats[n] for n in ("entries", "bytes", "host_bytes", "disk_bytes", "index_bytes")] == [0] * 5

    @precondition(lambda self: self.ON_DISK)
    @rule(jump_s=st.sampled_from([0, 0, -1000, -2, 2, 1000]))
    def reopen(self, jump_s: int) -> None:
        self.begin()
        hits = {reference.id: self.hits_of(reference.id) for reference in self.store.references()}
        self.store.close()
        self.clock.wall_offset_s += jump_s
        self.clock.now_s += STEP_S
        self.store = opened(self.config(), self.clock)
        assert all(self.hits_of(r.id) == hits[r.id] for r in self.store.references()), "hits survive"
        self.kept = [k for k in self.kept if not k.tainted]
        for k in self.kept:
            k.used_s = min(k.used_s - jump_s, self.clock.now_s)
        self.expire()
        self.settle()

    def hits_of(self, reference_id: str) -> float:
        return self.store._entries.by_key[reference_id].hits

    @invariant()
    def same_entries(self) -> None:
        self.expire()
        self.settle()
        found = sorted((r.namespace, tuple(r.token_ids.tolist()), r.pinned) for r in self.store.references())
        ordinary = [k for k in self.kept if not k.tainted]
        assert found == sorted((k.namespace, k.tokens, k.pinned) for k in ordinary)
        labels = {(r.namespace, tuple(r.token_ids.tolist())): r for r in self.store.references()}
        for k in ordinary:
            label = labels[k.namespace, k.tokens]
            found_labels = set(label.document_starts), label.session, label.expires_after_s
            assert found_labels == (k.documents, k.session, k.ttl_s)
        self.check_bytes()
        if (directory := self.store._entries.tiers.disk._directory) is not None:
            directory.check()

    def check_bytes(self) -> None:
        assert self.store.stats()["bytes"] == room_taken(self.kept) * BYTES_PER_TOKEN


class LeastRecent(StoreMachine):
    """With a namespace that all may read."""

    SETTINGS = {"eviction": "lru"}
    SHARED = "all"
    MAX_TOKENS = 22


class TwoTiers(StoreMachine):
    """What is in one piece must lie in one tier: some room may stay empty in each."""

    MAX_TOKENS, HOST_TOKENS = 10, 12

    def may_lose(self, wanted: list[Kept]) -> bool:
        return room_taken(wanted) > self.MAX_TOKENS + self.HOST_TOKENS - 2 * (LONGEST - 1)

    may_refuse = may_lose

    def check_bytes(self) -> None:
        assert self.held_bytes() == room_taken(self.kept) * BYTES_PER_TOKEN


class OnDisk(StoreMachine):
    """What memory gives up is on disk: nothing goes but tainted entries, which are never written."""

    ON_DISK, MAX_TOKENS = True, 8

    def may_lose(self, wanted: list[Kept]) -> bool:
        return any(k.tainted for k in wanted)

    def may_refuse(self, wanted: list[Kept]) -> bool:
        return wanted[-1].tainted

    def losable(self, kept: Kept) -> bool:
        return kept.tainted

    def check_bytes(self) -> None:
        assert self.held_bytes() + self.store.stats()["disk_bytes"] >= room_taken(self.kept) * BYTES_PER_TOKEN


class AllTiers(OnDisk):
    HOST_TOKENS = 6
    SHARED = "all"


class AllTiersEightBits(AllTiers):
    SETTINGS = {"kv_bits": 8, "eviction": "lru"}
    TOLERANCE = 0.005

    def check_bytes(self) -> None:
        return


class SmallDisk(OnDisk):
    """Room for few files beside a little memory: anything unpinned may go, what stays is right."""

    SETTINGS = {"disk_max_bytes": 6000}

    def may_lose(self, wanted: list[Kept]) -> bool:
        return True

    may_refuse = may_lose

    def losable(self, kept: Kept) -> bool:
        return not kept.pinned


@pytest.fixture(autouse=True)
def _no_syncing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk takes most of the time, and nothing crashes here."""
    monkeypatch.setattr("semsharekv_integrations.store.files._sync", lambda path: None)


MACHINES = {
    StoreMachine: 40,
    LeastRecent: 40,
    TwoTiers: 40,
    OnDisk: 18,
    AllTiers: 18,
    AllTiersEightBits: 18,
    SmallDisk: 18,
}


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.__name__)
def test_the_store_does_as_its_model(machine: type[StoreMachine]) -> None:
    run = machine.TestCase
    slow = [HealthCheck.too_slow]  # a busy machine is no failure
    run.settings = settings(max_examples=MACHINES[machine], stateful_step_count=25, suppress_health_check=slow)
    run("runTest").debug()
