"""Namespaces filter before any lookup: nothing of one is found, counted or worked on by a call in another.

What is left in common, by design: the byte bounds, so that one namespace can push another's entries out, and ``stats``.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import semsharekv_integrations
from indexed_passages import check_index
from semsharekv_integrations import SemShareEngine, StoreConfig, world
from semsharekv_integrations.config import ReuseConfig
from semsharekv_integrations.kv import LayerKV, Reference, Segment, TokenIds
from semsharekv_integrations.report import Stopwatch
from semsharekv_integrations.reuse.planner import Scope
from semsharekv_integrations.reuse.similarity import PooledEmbedder, SegmentIndex
from semsharekv_integrations.store import KVStore, radix
from semsharekv_integrations.store import namespace as space
from semsharekv_integrations.store.records import reference_id
from tiny_models import EngineMaker

PACKAGE = str(Path(semsharekv_integrations.__file__).parent)
MIN_RUN_TOKENS = 2
SECRET = (5, 6, 7, 8)
COMMONS = "commons"
STRANGERS = ("b", "A", "a ", " a", "a\0", "a\0s", "1 a", "", "á", "a/b", "%", "*")  # who is not "a"


def ids_of(tokens: tuple[int, ...]) -> TokenIds:
    return np.array(tokens, dtype=np.int64)


def reference(tokens: tuple[int, ...], namespace: str = "a", **labels: Any) -> Reference:
    """KV that tells tokens and positions; different tokens also differ by namespace."""
    ids = ids_of(tokens)
    salt = 1 + sum(namespace.encode()) % 89
    rows = torch.stack([torch.from_numpy(ids * salt), torch.arange(len(ids))], dim=-1).float()[None, None]
    layer = LayerKV(rows, rows + 0.5)
    return Reference(reference_id(namespace, ids), namespace, ids, (layer,), **labels)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def store_of(clock: Callable[[], float] | None = None, **config: Any) -> KVStore:
    return KVStore(StoreConfig(**config), clock or Clock(), min_run_tokens=MIN_RUN_TOKENS)


def kept(found: Reference | None) -> tuple[Any, ...] | None:
    """All that a reader sees of a reference."""
    if found is None:
        return None
    layers = tuple(tensor.numpy().tobytes() for layer in found.layers for tensor in layer)
    labels = replace(found, token_ids=found.token_ids.tolist(), layers=(), document_starts=dict(found.document_starts))
    return repr(labels), layers


def by_prefix(store: KVStore, namespace: str, tokens: tuple[int, ...] = SECRET, session: str | None = None) -> Any:
    match = store.find_prefix(ids_of(tokens), namespace, max_tokens=len(tokens), session=session)
    return match and (match.num_tokens, kept(match.reference))


def by_run(store: KVStore, namespace: str, tokens: tuple[int, ...] = SECRET) -> Any:
    found = store.find_runs(ids_of((0, *tokens)), namespace, start=0, stop=len(tokens) + 1)
    return [(run.start, run.source_start, run.num_tokens, kept(run.reference)) for run in found]


def ids_known_to(owner: str) -> Iterator[str]:
    """Ids that an attacker may hold: of entries, and whatever names a tainted one."""
    yield from (reference_id(owner, ids_of(SECRET)), reference_id(owner, ids_of((*SECRET, 9))))
    yield from (f"{owner}\0s", f"{owner}s", f"{len(owner)} {owner}s", "s", owner)


WAYS: dict[str, Callable[[KVStore, str], Any]] = {
    "prefix": by_prefix,
    "prefix by session": lambda store, name: by_prefix(store, name, session="s"),
    "longer prefix by session": lambda store, name: by_prefix(store, name, (*SECRET, 9, 9), session="s"),
    "run": by_run,
    "fetch": lambda store, name: [found for key in ids_known_to("a") if (found := store.fetch(key, name))],
    "references": lambda store, name: [kept(found) for found in store.references(name)],
    "fetch all": lambda store, name: [kept(found) for found in store.fetch_all(name)],
    "forget": lambda store, name: store.forget(name),
    "forget document": lambda store, name: store.forget(name, document_id="secret"),
    "forget session": lambda store, name: store.forget(name, session="s"),
}


def fill(store: KVStore, namespace: str = "a") -> None:
    """An ordinary entry and a tainted one of session "s"."""
    assert store.put(reference(SECRET, namespace, session="s", document_starts={"secret": 1}))
    assert store.put(reference((*SECRET, 9), namespace, session="s", exact_tokens=4, document_starts={"secret": 1}))


@pytest.fixture(params=["device", "host", "disk", "reopened"])
def filled(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KVStore]:
    """A store with something in namespace "a", by the tier in which it lies."""
    bounds: dict[str, Any] = {
        "device": {},
        "host": {"max_bytes": 0, "host_max_bytes": 9999},
        "disk": {"max_bytes": 0, "host_max_bytes": 200},
        "reopened": {},
    }[request.param]
    if request.param in ("disk", "reopened"):
        bounds["directory"] = tmp_path

    def opened() -> KVStore:
        store = store_of(**bounds)
        store.open("ab", torch.float32, torch.device("cpu"))
        return store

    store = opened()
    fill(store)
    if request.param == "reopened":
        store.close()
        store = opened()
        assert [len(found.token_ids) for found in store.references("a")] == [4]
        fill(store)
    yield store
    store.close()


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_strangers_find_nothing_in_any_way(filled: KVStore, way: Callable[[KVStore, str], Any]) -> None:
    before = [kept(found) for found in filled.fetch_all("a")]
    entries = filled.stats()["entries"]
    for stranger in STRANGERS:
        assert not way(filled, stranger), f"{stranger!r} reads 'a'"
        filled.check()
    assert [kept(found) for found in filled.fetch_all("a")] == before and filled.stats()["entries"] == entries == 2
    assert way(filled, "a"), "or there was nothing to find"


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_is_one_ones_own_is_the_same_beside_others(filled: KVStore, way: Callable[[KVStore, str], Any]) -> None:
    alone = store_of()
    fill(alone, "b")
    fill(filled, "b")
    assert way(filled, "b") == way(alone, "b")
    assert [len(found.token_ids) for found in filled.references("a")] == [4]
    filled.check()


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (("a", "b\0c"), ("a\0b", "c")),
        (("a", "bc"), ("ab", "c")),
        (("a", " b"), ("a ", "b")),
        (("1 a", "b"), ("a", "b")),
    ],
)
def test_no_spelling_of_names_makes_two_sessions_one(mine: tuple[str, str], theirs: tuple[str, str]) -> None:
    store = store_of()
    (namespace, session), (other, other_session) = mine, theirs
    store.put(reference(SECRET, other, session=other_session, exact_tokens=1, document_starts={"secret": 0}))
    store.put(reference((*SECRET, 9), namespace, session=session, exact_tokens=1))
    assert by_prefix(store, other, session=other_session)[0] == 4, "it is still there"
    assert store.forget(namespace, document_id="secret") == 0, "its labels went nowhere"
    assert store.stats()["tainted_entries"] == 2
    store.check()


def test_putting_in_one_namespace_changes_nothing_in_another(filled: KVStore) -> None:
    before = [kept(found) for found in filled.fetch_all("a")], by_prefix(filled, "a", (*SECRET, 9, 9), "s")
    for tokens in (SECRET, SECRET[:2], (*SECRET, 1), (*SECRET[:2], 9)):  # the same, contained, containing, branching
        filled.put(reference(tokens, "b", document_starts={"other": 0}, session="s", expires_after_s=3.0))
        filled.put(reference((*tokens, 3), "b", exact_tokens=1, document_starts={"other": 0}, session="s"))
    assert ([kept(found) for found in filled.fetch_all("a")], by_prefix(filled, "a", (*SECRET, 9, 9), "s")) == before
    assert filled.forget("a", document_id="other") == 0
    filled.check()


LOOKUPS = {name: way for name, way in WAYS.items() if not name.startswith("forget")}


def uses(store: KVStore, namespace: str = "a") -> list[tuple[Any, ...]]:
    """What is known of the use of each entry and node, and of how long it may live."""
    entries = sorted(store._entries.select(namespace), key=lambda entry: entry.key)
    deadlines = store._entries._deadlines._times
    return [
        (entry.hits, entry.last_used_s, deadlines.get(entry.key), [node.hits for node in entry.node.path()])
        for entry in entries
    ]


@pytest.mark.parametrize("tier", ["device", "host"])
@pytest.mark.parametrize("lookup", LOOKUPS.values(), ids=LOOKUPS)
def test_a_lookup_is_no_use_of_what_others_have(lookup: Callable[[KVStore, str], Any], tier: str) -> None:
    """Of neither its time nor its rank, whether the stranger has the same itself or not."""
    clock = Clock()
    room = {"max_bytes": 10**6} if tier == "device" else {"max_bytes": 0, "host_max_bytes": 10**6}
    store = store_of(clock, ttl_s=10.0, **room)
    fill(store, "a")
    fill(store, "b")
    clock.now_s += 1
    assert by_prefix(store, "a") and by_run(store, "a")
    before, theirs = uses(store), uses(store, "b")
    clock.now_s += 1
    for stranger in ("b", "c"):
        lookup(store, stranger)
    assert uses(store) == before
    assert by_prefix(store, "b") and uses(store, "b") != theirs, "a use is seen"
    clock.now_s += 9  # of which the stranger has used a part
    assert store.references("a") == [] and "a" not in store._entries.namespaces
    store.check()


@pytest.mark.parametrize("eviction", ["value", "lru"])
def test_a_lookup_does_not_change_which_of_anothers_entries_goes_first(eviction: str) -> None:
    """The stranger has the same prompt itself, and asks for that, or for another one."""
    left = []
    prompts = [tuple(range(first, first + 4)) for first in (10, 20, 30, 40, 50)]
    for asked in (prompts[0], prompts[3]):
        clock = Clock()
        store = store_of(clock, max_bytes=5 * 4 * 16, eviction=eviction)
        for namespace, tokens in [("b", prompts[0]), ("b", prompts[3]), *(("a", tokens) for tokens in prompts[:3])]:
            clock.now_s += 1
            assert store.put(reference(tokens, namespace))
        for tokens in (asked, asked, prompts[0], prompts[3]):
            clock.now_s += 1
            assert by_prefix(store, "b", tokens) and by_run(store, "b", tokens)
            assert not by_prefix(store, "c", tokens)
        clock.now_s += 1
        assert store.put(reference(prompts[4], "c"))
        left.append([int(found.token_ids[0]) for found in store.references("a")])
        store.check()
    assert left == [[20, 30]] * 2, "the oldest one has gone, as if nobody had asked for it"


class TestTheSharedNamespace:
    """The only way across, and one way."""

    @pytest.fixture
    def store(self) -> KVStore:
        store = store_of(shared_namespace=COMMONS)
        fill(store, COMMONS)
        return store

    def test_all_may_read_it(self, store: KVStore) -> None:
        for name in ("a", "b", COMMONS):
            num_tokens, found = by_prefix(store, name)
            assert num_tokens == 4 and "namespace='commons'" in found[0]
            assert [run[2] for run in by_run(store, name)] == [4]
            assert store.fetch(reference_id(COMMONS, ids_of(SECRET)), name)

    def test_what_is_approximate_in_it_stays_there(self, store: KVStore) -> None:
        for name in ("a", "b"):
            assert by_prefix(store, name, (*SECRET, 9), session="s")[0] == 4, "the ordinary entry"
            assert sum(store.fetch(key, name) is not None for key in ids_known_to(COMMONS)) == 1
        assert by_prefix(store, COMMONS, (*SECRET, 9), session="s")[0] == 5

    def test_it_reads_nobody(self, store: KVStore) -> None:
        store.clear()
        fill(store, "a")
        for stranger in (COMMONS, "b"):
            for name, way in WAYS.items():
                assert not way(store, stranger), f"{stranger} reads 'a' by {name}"

    def test_nothing_is_written_to_it_or_dropped_from_it_by_others(self, store: KVStore) -> None:
        before = [kept(found) for found in store.fetch_all(COMMONS)]
        for tokens in (SECRET, SECRET[:2], (*SECRET, 1)):
            assert store.put(reference(tokens, "b", document_starts={"other": 0}, session="s"))
        assert by_prefix(store, "b")[1] != by_prefix(store, "a")[1], "one's own first"
        assert store.forget("b") == 1 and store.forget("b", document_id="secret") == 0
        assert store.references("b") == [] and [kept(found) for found in store.fetch_all(COMMONS)] == before
        assert by_prefix(store, "b")[0] == 4
        store.check()


# Two stores are given the same in "b" and in the shared namespace; in one of them there is more going on in "a".
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)
SESSIONS = st.none() | st.sampled_from(["s", "t"])
LABELS = st.fixed_dictionaries(
    {
        "session": SESSIONS,
        "pinned": st.booleans(),
        "expires_after_s": st.sampled_from([None, 4.0]),
        "document_starts": st.dictionaries(st.sampled_from("de"), st.just(0), max_size=2),
    }
)


class Step(NamedTuple):
    """One call on a store, whose answer a caller in ``namespace`` sees."""

    namespace: str
    name: str
    call: Callable[[KVStore, str], Any]


def steps() -> st.SearchStrategy[list[Step]]:
    def of(name: str, call: Callable[..., Any], *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Step]:
        named = st.tuples(st.sampled_from(["a", "a", "b", COMMONS]), st.tuples(*arguments))
        return named.map(lambda drawn: Step(drawn[0], f"{name} {drawn[1]}", lambda s, n: call(s, n, *drawn[1])))

    return st.lists(
        st.one_of(
            of("put", lambda s, n, t, labels: s.put(reference(t, n, **labels)), TOKENS, LABELS),
            of("taint", lambda s, n, t, x: s.put(reference(t, n, session=x, exact_tokens=0)), TOKENS, SESSIONS),
            of("prefix", by_prefix, TOKENS, SESSIONS),
            of("run", by_run, TOKENS),
            of("fetch", lambda s, n, t, x: kept(s.fetch(reference_id(x, ids_of(t)), n)), TOKENS, st.sampled_from("ab")),
            of("forget", lambda s, n, d, x: s.forget(n, document_id=d, session=x), SESSIONS, SESSIONS),
            of("forget document", lambda s, n, d: s.forget(n, document_id=d), st.sampled_from("de")),
        ),
        max_size=16,
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(steps(), st.booleans(), st.sampled_from([None, 6.0]))
def test_what_others_do_cannot_be_told_from_any_answer(drawn: list[Step], shared: bool, ttl_s: float | None) -> None:
    clock = Clock()
    config: dict[str, Any] = {"shared_namespace": COMMONS if shared else None, "ttl_s": ttl_s}
    beside, alone = store_of(clock, **config), store_of(clock, **config)
    for step in drawn:
        clock.now_s += 0.0 if shared else 1.0  # whoever uses what is shared, by choice, prolongs its life for all
        answer = step.call(beside, step.namespace)
        if step.namespace != "a":
            assert step.call(alone, step.namespace) == answer, step.name
    for name in ("b", COMMONS):
        left, wanted = ([kept(found) for found in store.fetch_all(name)] for store in (beside, alone))
        assert left == wanted
    beside.check()


def instructions(call: Callable[[], Any]) -> int:
    """Bytecode instructions of this package that ``call`` takes: its work, whatever the machine is busy with."""
    count, before = 0, sys.gettrace()

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        count += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    assert count > 10, "nothing was counted"
    return count


COSTS: dict[str, Callable[[KVStore], Any]] = {
    "prefix": lambda store: by_prefix(store, "b", session="s"),
    "prefix miss": lambda store: by_prefix(store, "b", (3, 3)),
    "prefix in an empty namespace": lambda store: by_prefix(store, "c"),
    "run": lambda store: by_run(store, "b", SECRET[1:]),
    "run miss": lambda store: by_run(store, "b", (3, 4, 3, 4)),
    "fetch": lambda store: store.fetch(reference_id("b", ids_of(SECRET)), "b"),
    "fetch of a foreign id": lambda store: store.fetch(reference_id("a", ids_of(SECRET)), "b"),
    "references": lambda store: store.references("b"),
    "put": lambda store: store.put(reference((*SECRET, 1, 1), "b")),
    "put what is there": lambda store: store.put(reference(SECRET, "b")),
    "forget document": lambda store: store.forget("b", document_id="secret"),
    "forget": lambda store: store.forget("b"),
}


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
@pytest.mark.parametrize("tier", ["device", "host"])
def test_the_work_does_not_depend_on_what_others_have(cost: Callable[[KVStore], Any], tier: str) -> None:
    work = []
    for num_foreign in (0, 1, 60):
        store = store_of(max_bytes=10**8 if tier == "device" else 0, host_max_bytes=10**8)
        for number in range(num_foreign):
            labels: dict[str, Any] = {"document_starts": {"secret": 0}, "session": "s"}
            store.put(reference((*SECRET, number, 1), "a", **labels))
            store.put(reference((number, *SECRET), f"a{number % 7}", pinned=True, **labels))
        fill(store, "b")
        for way in ("prefix", "run", "fetch"):  # what is done once, such as the index of runs
            WAYS[way](store, "b")
        work.append(instructions(lambda store=store: cost(store)))  # type: ignore[misc]
    assert work[0] == work[1] == work[2], f"instructions beside 0, 1 and 120 foreign entries: {work}"


def test_nothing_of_others_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree or an index that is searched whole and filtered afterwards gives the right answers too."""
    store, compared = store_of(), []
    for number in range(50):
        store.put(reference((*SECRET, 10 + number), "a", session="s"))
        store.put(reference((5, 10 + number), "a", session="s", exact_tokens=1))
    fill(store, "b")
    for module in (radix, space):
        compare = module.count_common_tokens
        monkeypatch.setattr(
            module, "count_common_tokens", lambda x, y, compare=compare: compared.append(x.tolist()) or compare(x, y)
        )
    WAYS["prefix by session"](store, "b")
    assert compared == [list(SECRET), [*SECRET, 9]]


MATRIX = torch.randn(99, 12, generator=torch.Generator().manual_seed(3)) + 2


def passage(number: int, namespace: str) -> Reference:
    tokens = (1, number % 99, (7 * number + 3) % 99, (number * number) % 99)
    return replace(reference(tokens, namespace), segments=(Segment("d", 1, 4),))


class TestTheSegmentIndex:
    @pytest.fixture
    def stored(self) -> dict[str, list[Reference]]:
        numbers = {"a": range(1, 60), "b": range(30, 34)}
        return {name: [passage(number, name) for number in numbers[name]] for name in numbers}

    def test_the_nearest_is_ones_own_with_the_similarity_that_it_has_alone(self, stored) -> None:
        answers = []
        for names in ("b", "ab", "ba"):
            index = SegmentIndex(PooledEmbedder(MATRIX))
            for name in names:
                index.sync(stored[name], name)
            asked = [found.token_ids[1:4] for found in stored["a"]]
            found = index.find_nearest(asked, "b", k=9)
            assert all(len(matches) == 4 for matches in found)
            assert {match.reference.namespace for matches in found for match in matches} == {"b"}
            answers.append([[(m.reference.id, m.segment, m.similarity) for m in matches] for matches in found])
            check_index(index)
        assert answers[0] == answers[1] == answers[2]

    def test_strangers_find_nothing_and_forget_nothing(self, stored) -> None:
        index = SegmentIndex(PooledEmbedder(MATRIX))
        index.sync(stored["a"], "a")
        asked = [stored["a"][0].token_ids[1:4]]
        for stranger in STRANGERS:
            assert index.find_nearest(asked, stranger) == [[]]
            index.keep_only(stranger, ())
            index.sync([], stranger)
            with pytest.raises(ValueError, match="accepted is"):
                index.sync(stored["a"][:1], stranger)
            assert index.find_nearest(asked, stranger) == [[]]
        assert index.find_nearest(asked, "a")[0][0].reference is stored["a"][0]

    def test_the_work_does_not_depend_on_what_others_have(self, stored, monkeypatch: pytest.MonkeyPatch) -> None:
        import faiss

        searched: list[int] = []
        search = faiss.IndexIDMap2.search
        monkeypatch.setattr(
            faiss.IndexIDMap2, "search", lambda self, *args: searched.append(self.ntotal) or search(self, *args)
        )
        work = []
        for names in ("b", "ab"):
            index = SegmentIndex(PooledEmbedder(MATRIX))
            for name in names:
                index.sync(stored[name], name)
            asked = [stored["b"][0].token_ids[1:4]]
            work.append(instructions(lambda index=index, asked=asked: index.find_nearest(asked, "b")))  # type: ignore[misc]
            work.append(instructions(lambda index=index: index.sync(stored["b"][:3], "b")))  # type: ignore[misc]
        assert work[:2] == work[2:] and searched == [4, 4]


# Methods that look for nothing, and those that administrators use on all namespaces at once.
NO_QUERIES = {
    "open",
    "close",
    "abandon",
    "put",
    "stats",
    "check",
    "clear",
    "view_state",
    "go_on_in_child",
    "collect_left",
}
NO_QUERIES |= {"require_gone", "between_writes", "free_device", "write_waiting", "mount", "list_libraries"}
ADMINISTRATIVE = {"references", "fetch_all"}
HOUSEKEEPING = {"collect_left"}  # tells the engine, and nobody else, which names, texts and vectors are still needed
QUERIES = {
    KVStore: {"list_readable", "find_prefix", "count_prefix_tokens", "find_runs", "fetch", "forget", "find_forms"}
    | {"find_tainted"},
    SegmentIndex: {"sync", "find_nearest", "measure", "keep_only"},
}


@pytest.mark.parametrize("kind", QUERIES)
def test_every_query_names_its_namespace(kind: type) -> None:
    methods = {name: method for name, method in inspect.getmembers(kind, inspect.isfunction) if name[0] != "_"}
    assert set(methods) - NO_QUERIES - ADMINISTRATIVE - HOUSEKEEPING == QUERIES[kind], "a new method: is it a query?"
    for name in QUERIES[kind]:
        parameter = inspect.signature(methods[name]).parameters["namespace"]
        assert parameter.default is inspect.Parameter.empty, f"{name} has a default namespace"
        assert parameter.annotation == "str", f"{name} may be called without a namespace"
    for name in methods.keys() & ADMINISTRATIVE:
        assert inspect.signature(methods[name]).parameters["namespace"].default is None
    for name in methods.keys() & NO_QUERIES - {"put"}:
        assert not inspect.signature(methods[name]).parameters.keys() & {"namespace", "token_ids", "session"}


DOCUMENTS = {
    "flood": "A flood hit the old town of Prorna in May , and the mayor said that many people were affected .",
    "fire": "The report from Velmar names a fire at the bridge , which was closed on Monday for repairs .",
    "vote": "Reporters said that the council will vote on a new school , as the costs have risen since June .",
}
REWORDED = DOCUMENTS["flood"].replace("said that many people", "told us that some people").replace("hit", "took")
SAME = [DOCUMENTS[name].replace(" ,", "").replace("said that", "said") for name in ("flood", "vote")]
EAGER: dict[str, Any] = {"max_compute_ratio": 1.0, "max_deviation": 100.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {},
    "identical": {**EAGER, "min_run_tokens": 8, "relevance_ratio": 0.0},
    "semantic": {**EAGER, "min_run_tokens": 20, "attention_ratio": 0.0, "min_similarity": 0.3},
    "paper": {**EAGER, "retention_ratio": 1.0, "min_similarity": 0.01, "min_token_similarity": 0.0},
}
MODES = tuple(SETTINGS)


def chat(start: str, *contents: str) -> list[dict[str, str]]:
    turns = [{"role": role, "content": content} for role, content in zip(("user", "assistant") * 4, contents)]  # noqa: B905
    return [{"role": "system", "content": start}, *turns]


def joined(*names: str, question: str = "Who was affected ?") -> str:
    return "\n\n".join([*(DOCUMENTS[name] for name in names), question])


FIRST = chat("Answer in one line .", joined("flood", "fire", "vote"))
OTHERS: dict[str, Any] = {  # what each mode can reuse behind FIRST, and no stricter one
    "exact": chat("Answer in one line .", joined("flood", "fire", "vote", question="When ?")),
    "identical": chat("You read the news for us and reply .", joined("vote", "flood", "fire")),
    "semantic": "\n\n".join(["Look at it .", *SAME, "Why so ?"]),
    "paper": f"Look at it .\n\n{REWORDED}\n\nWho was affected ?",
}


def seen(engine: SemShareEngine, namespace: str, prompt: Any, **options: Any) -> tuple[Any, ...]:
    """All that the caller sees of a call, but for the time."""
    documents = {key: text for key, text in DOCUMENTS.items() if text in str(prompt)}
    options = {"max_new_tokens": 5, "documents": documents, "session": "s", **options}
    generation = engine.generate(prompt, namespace=namespace, **options)
    report = replace(generation.report, phases_s={}, ttft_s=0.0, decode_s=0.0)
    return generation.text, tuple(generation.token_ids), generation.finish_reason, report


def engine_of(make_engine: EngineMaker, mode: str, **store: Any) -> SemShareEngine:
    reuse = ReuseConfig(mode=mode, **SETTINGS[mode])  # type: ignore[arg-type]
    return make_engine(reuse=reuse, store=StoreConfig(**store))


CALLS: tuple[Callable[[SemShareEngine, str, str], Any], ...] = (
    lambda engine, name, mode: seen(engine, name, FIRST),
    lambda engine, name, mode: seen(engine, name, OTHERS[mode]),
    lambda engine, name, mode: seen(engine, name, OTHERS["identical"], temperature=3.0, seed=4),
    lambda engine, name, mode: seen(engine, name, chat("Go on .", "Who ?", "The mayor .", "And when ?")),
    lambda engine, name, mode: engine.warm(DOCUMENTS, namespace=name, pinned=True),
    lambda engine, name, mode: engine.warm({"more": REWORDED}, namespace=name, ttl_s=1000.0),
    lambda engine, name, mode: seen(engine, name, OTHERS[mode], session="t"),
    lambda engine, name, mode: engine.forget("fire", namespace=name),
    lambda engine, name, mode: seen(engine, name, FIRST),
    lambda engine, name, mode: engine.clear(name, session="s"),
    lambda engine, name, mode: seen(engine, name, OTHERS[mode]),
    lambda engine, name, mode: engine.clear(name),
    lambda engine, name, mode: seen(engine, name, OTHERS[mode]),
    lambda engine, name, mode: [kept(found) for found in engine.store.fetch_all(name)],
)


@pytest.mark.parametrize("mode", MODES)
def test_a_caller_sees_the_same_whatever_others_do(make_engine: EngineMaker, mode: str) -> None:
    """Every call is made in "a" just before: the same texts, sessions, documents and ids, and then more of each."""
    beside, alone = (engine_of(make_engine, mode) for _ in range(2))
    reused = 0
    for call in CALLS:
        call(beside, "a", mode)
        seen(beside, "a", OTHERS[mode])
        answer = call(beside, "b", mode)
        assert answer == call(alone, "b", mode)
        beside.store.check()
        if isinstance(answer, tuple):
            reused += answer[-1].reused_tokens
    assert reused > 0, "or there was nothing to see"
    assert beside.store.references("a"), "or there was nothing beside it"


@pytest.mark.parametrize("mode", MODES)
def test_texts_of_others_are_of_no_use(make_engine: EngineMaker, mode: str) -> None:
    engine = engine_of(make_engine, mode)
    seen(engine, "a", FIRST)
    engine.warm(DOCUMENTS, namespace="a", pinned=True)
    foreign = {found.id for found in engine.store.references("a")}
    for namespace, session in (("b", "s"), ("a ", None), ("A", "t")):
        *_, report = seen(engine, namespace, OTHERS[mode], session=session)
        assert report.reused_tokens == 0 and report.compute_ratio == 1 and not report.sources and report.declined
        assert not any(document.reused_tokens for document in report.documents)
        assert engine.forget("flood", namespace=namespace) <= 1, "its own prompt at most"
        engine.clear(namespace)
        assert engine.clear(namespace, session="s") == 0
    assert {found.id for found in engine.store.references("a")} == foreign
    *_, report = seen(engine, "a", OTHERS[mode])
    assert report.reused_tokens > 0 and report.compute_ratio < 1, "they are of use to their owner"
    assert {source.reference_id for source in report.sources} <= foreign


@pytest.mark.parametrize("mode", MODES)
def test_shared_texts_are_of_use_to_all_and_their_own_to_none(make_engine: EngineMaker, mode: str) -> None:
    engine = engine_of(make_engine, mode, shared_namespace=COMMONS)
    seen(engine, COMMONS, FIRST, session=None)
    shared = {found.id for found in engine.store.references(COMMONS)}
    for namespace in ("a", "b"):
        *_, report = seen(engine, namespace, OTHERS[mode], session=None)
        assert report.reused_tokens > 1 and {source.reference_id for source in report.sources} == shared
    assert {found.id for found in engine.store.references(COMMONS)} == shared, "nothing was written to it"
    private = chat("A letter to one .", world_text())
    seen(engine, "a", private)
    mine = {found.id for found in engine.store.references("a")}
    for namespace in ("b", COMMONS):
        *_, report = seen(engine, namespace, private)
        assert not mine & {source.reference_id for source in report.sources}
        assert report.prefix_tokens <= 3, "how every chat begins"
    engine.clear("a")
    assert {found.id for found in engine.store.references(COMMONS)} >= shared


def world_text() -> str:
    from random import Random

    return world.make_documents(Random(3), 1)[0].text


@pytest.mark.parametrize("mode", MODES)
def test_the_work_of_a_plan_does_not_depend_on_what_others_have(make_engine: EngineMaker, mode: str) -> None:
    work = []
    for num_foreign in (0, 1, 4):
        engine = engine_of(make_engine, mode)
        parts = engine._load()
        parts.renderer.split_pieces(np.arange(len(engine.tokenizer)))  # texts of tokens are kept once for all
        for name in [f"a{number}" for number in range(num_foreign)]:
            seen(engine, name, FIRST)
            seen(engine, name, OTHERS[mode])
        seen(engine, "b", FIRST)
        rendered = parts.renderer.render(OTHERS[mode], DOCUMENTS)
        found = []

        def plan(parts=parts, rendered=rendered, found=found) -> None:
            found.append(parts.planner.plan(rendered, Scope("b", "s"), False, Stopwatch()))

        plan()  # what is done once, such as embedding what is stored
        work.append(instructions(plan))
        assert found[-1].prefix is not None or found[-1].borrowings, "nothing was found"
    assert work[0] == work[1] == work[2], f"instructions beside 0, 1 and 4 namespaces: {work}"


def test_a_prompt_has_the_same_tokens_whoever_was_given_its_reply(make_engine: EngineMaker) -> None:
    """Those that a reply was sampled in may be others than its text has: they would tell that somebody was given it."""
    engine = engine_of(make_engine, "exact")
    text, *_ = seen(engine, "a", FIRST, temperature=3.0, seed=4, max_new_tokens=30)
    prompt = [*FIRST, {"role": "assistant", "content": text}, {"role": "user", "content": "And ?"}]
    mine = engine._load().renderer.render(prompt, {}).token_ids.tolist()
    assert mine == make_engine("exact")._load().renderer.render(prompt, {}).token_ids.tolist()
