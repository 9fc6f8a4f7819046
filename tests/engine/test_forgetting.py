"""A document is forgotten with every entry in which it stands, whoever named it, and with no other."""

from __future__ import annotations

import enum
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from semsharekv_integrations import ReuseConfig, SemShareEngine, StoreConfig
from semsharekv_integrations.errors import StoreWriteError
from semsharekv_integrations.kv import Reference
from semsharekv_integrations.store.runs import RunIndex
from tiny_models import EngineMaker

TOWNS = ("Velmar", "Osteck", "Karna", "Prorna", "Belsen", "Tolmark")
DOCUMENTS = {
    town: f"News from {town}. The mayor of {town} is Anna Kelsen. Shops in {town} stayed shut for {n} days"
    for n, town in enumerate(TOWNS, start=3)
} | {
    "part": "The mayor of Velmar is Anna Kelsen. Shops in Velmar stayed",
    "last word": "News from Velmar. The mayor of Velmar is Anna Kelsen. Shops in Velmar stayed shut for 4 days",
}
TOKENS = {"max_new_tokens": 2}
LENIENT = {"min_run_tokens": 8, "max_compute_ratio": 1.0, "max_deviation": 100.0}
REUSE = {"exact": ReuseConfig(mode="exact"), "identical": ReuseConfig(mode="identical", **LENIENT)}  # type: ignore[arg-type]


def entries_of(engine: SemShareEngine, namespace: str = "default") -> Iterator[Reference]:
    """All of a namespace, those of sessions included."""
    return (entry.reference for entry in engine.store._entries.select(namespace))


def texts_of(engine: SemShareEngine, namespace: str = "default") -> list[str]:
    return [engine.tokenizer.decode(reference.token_ids) for reference in entries_of(engine, namespace)]


def prompt_of(rng: Random, names: list[str]) -> str:
    start = rng.choice(["Read this.", "Use these documents:", "News of today."])
    return "\n\n".join([start, *(DOCUMENTS[name] for name in names), rng.choice(["Who?", "What happened?"])])


def fill(engine: SemShareEngine, rng: Random, count: int, namespace: str = "default") -> None:
    """Prompts with some documents each, of which some are named."""
    for turn in range(count):
        names = rng.sample(list(DOCUMENTS), rng.randint(1, 3))
        named = {name: DOCUMENTS[name] for name in names if rng.random() < 0.5}
        session = rng.choice([None, None, "s", "t"])
        text = prompt_of(rng, names)
        engine.generate(text, documents=named, session=session, namespace=namespace, seed=turn, **TOKENS)


@pytest.mark.parametrize("mode", REUSE)
@pytest.mark.parametrize("seed", range(4))
def test_what_stands_in_an_entry_is_forgotten_and_nothing_else(make_engine: EngineMaker, mode: str, seed: int) -> None:
    rng = Random(seed)
    engine = make_engine(reuse=REUSE[mode])
    fill(engine, rng, 14)
    fill(engine, rng, 3, namespace="other")
    others = texts_of(engine, "other")
    for name in rng.sample(list(DOCUMENTS), len(DOCUMENTS)):
        engine.generate(prompt_of(rng, [name]), documents={name: DOCUMENTS[name]}, **TOKENS)
        before = texts_of(engine)
        borrowed = [r for r in entries_of(engine) if r.is_tainted and name in r.document_starts]
        dropped = engine.forget(name)
        left = texts_of(engine)
        assert not [text for text in left if DOCUMENTS[name] in text], "too little"
        kept = [text for text in before if DOCUMENTS[name] not in text]
        assert len(kept) - len(left) <= len(borrowed), "too much"
        assert dropped == len(before) - len(left)
        engine.store.check()
    assert texts_of(engine, "other") == others


@pytest.mark.parametrize("mode", REUSE)
def test_an_entry_carries_the_documents_that_stand_in_it(make_engine: EngineMaker, mode: str) -> None:
    rng = Random(5)
    engine = make_engine(reuse=REUSE[mode])
    for _ in range(20):
        names = rng.sample(list(DOCUMENTS), rng.randint(1, 3))
        engine.generate(prompt_of(rng, names), documents={name: DOCUMENTS[name] for name in names}, **TOKENS)
    for reference in engine.store.references():
        text = engine.tokenizer.decode(reference.token_ids)
        assert all(DOCUMENTS[name] in text for name in reference.document_starts)


def test_documents_that_begin_alike_leave_their_names_nowhere_else(make_engine: EngineMaker, tmp_path: Path) -> None:
    """However many there were: not on what they share, not in later entries, not in the catalog."""
    store = StoreConfig(max_bytes=400_000, directory=tmp_path, disk_max_bytes=400_000)
    engine = make_engine(store=store)
    for n in range(60):
        text = f"News from Velmar, number {n}. " + "Shops stayed shut. " * 5
        engine.generate(f"Use this:\n\n{text}\n\nWho?", documents={f"d{n}": text}, max_new_tokens=1)
    (space,) = engine.store._entries.namespaces.values()
    assert len(space.ordinary) > 1
    assert all(len(reference.document_starts) == 1 for reference in engine.store.references())
    assert sum(len(node.documents) for node in space.tree.nodes()) == len(space.ordinary)
    standing = sum("number 0." in text for text in texts_of(engine))
    assert engine.forget("d0") == standing <= 1
    directory = engine.store._entries.tiers.disk._directory
    assert directory is not None
    assert all(len(entry.labels["document_starts"]) <= 1 for entry in directory.contents().entries)


def test_documents_are_found_after_reopening_wherever_they_stand(make_engine: EngineMaker, tmp_path: Path) -> None:
    text, alike = DOCUMENTS["Osteck"], DOCUMENTS["Karna"]
    first = make_engine(store=StoreConfig(directory=tmp_path))
    first.generate(f"{text}\n\nWho?", **TOKENS)  # before anybody named it
    first.generate(f"Read this. {text}\n\nWho?", documents={"o": text}, **TOKENS)
    first.generate(f"Read this. {alike}\n\nWho?", documents={"k": alike}, **TOKENS)
    first.close()
    second = make_engine(store=StoreConfig(directory=tmp_path))
    second.generate(f"Something else, then: {text}\n\nWhat?", **TOKENS)  # named by nobody in this process
    assert second.forget("o") == 3
    assert [alike in text for text in texts_of(second)] == [True]


def test_kv_that_comes_from_a_document_goes_with_it_but_not_for_what_stands_behind(make_engine: EngineMaker) -> None:
    engine = make_engine(reuse=REUSE["identical"])
    velmar, osteck, karna = (DOCUMENTS[name] for name in ("Velmar", "Osteck", "Karna"))
    for name in ("Karna", "Velmar"):
        engine.clear()
        engine.generate(
            f"{velmar}\n\n{osteck}\n\n{karna}\n\nWho?",
            documents={"Velmar": velmar, "Osteck": osteck, "Karna": karna},
            **TOKENS,
        )
        engine.generate(f"Of all news this: {osteck}\n\nWhat happened?", session="s", **TOKENS)
        assert engine.stats()["store_tainted_entries"] == 1
        engine.forget(name)
        assert engine.stats()["store_tainted_entries"] == (name == "Karna"), "KV depends on what stands before it"


def test_labels_of_earlier_versions_are_read(make_engine: EngineMaker, tmp_path: Path) -> None:
    """They said where documents begin, and the end of those that were also segments."""
    engine = make_engine(store=StoreConfig(directory=tmp_path))
    engine.generate(DOCUMENTS["Velmar"] + " Who?", documents={"v": DOCUMENTS["Velmar"]}, **TOKENS)
    directory = engine.store._entries.tiers.disk._directory
    assert directory is not None
    (record,) = directory.contents().entries
    old = {name: value for name, value in record.labels.items() if name != "document_stops"}
    old["document_starts"] = {**old["document_starts"], "inherited": 1}
    directory.record(entries=[record._replace(labels=old)])
    directory.close()
    again = make_engine(store=StoreConfig(directory=tmp_path))
    again.generate("Something else.", **TOKENS)
    (reference,) = (r for r in again.store.references() if r.document_starts)
    assert set(reference.document_starts) == {"v", "inherited"}
    assert reference.spans["v"].stop > 10 and np.array_equal(reference.token_ids, reference.token_ids)
    assert again.forget("inherited") == 1


TEXT = "The mayor of Velmar is Anna Kelsen, and shops in Velmar stay shut for 12 days."
HOT = {"max_new_tokens": 30, "temperature": 3.0, "seed": 3}
WAYS: dict[str, Callable[[SemShareEngine], object]] = {
    "document": lambda engine: engine.forget("a"),
    "new text of the document": lambda engine: engine.warm({"a": "There is no news."}),
    "session": lambda engine: engine.clear("default", session="s"),
    "namespace": lambda engine: engine.clear("default"),
    "everything": lambda engine: engine.clear(),
}


@pytest.mark.parametrize("is_named", [True, False])
@pytest.mark.parametrize("mode", REUSE)
@pytest.mark.parametrize("way", WAYS)
def test_no_call_brings_back_what_was_forgotten_while_it_ran(
    make_engine: EngineMaker, way: str, mode: str, is_named: bool
) -> None:
    """Whether it began to compute or not; what it has nothing of is kept."""
    engine = make_engine(reuse=REUSE[mode])
    engine.warm({"a": TEXT})
    asked: dict[str, Any] = {"documents": {"a": TEXT} if is_named else None, "session": "s"}
    running = engine.stream(f"{TEXT}\n\nWho?", **asked, **HOT)
    next(running)
    left = engine.stream(f"{TEXT}\n\nWhen?", **asked, **HOT)
    next(left)
    waiting = engine.stream(f"Read. {TEXT}\n\nWhy?", **asked, **HOT)
    other = engine.stream("Of other things.", namespace="other", **HOT)
    WAYS[way](engine)
    assert list(running)[-1].generation is not None
    left.close()
    assert list(waiting)[-1].generation is not None
    if way != "everything":
        list(other)
        assert len(texts_of(engine, "other")) == 1
    found = [reference for reference in entries_of(engine) if way != "session" or reference.session == "s"]
    assert not [reference for reference in found if TEXT in engine.tokenizer.decode(reference.token_ids)]
    assert way == "session" or TEXT not in engine._memory.known.of(["default"]).values()
    engine.generate(f"{TEXT}\n\nWho?", **asked, **TOKENS)
    assert [text for text in texts_of(engine) if TEXT in text], "a later call is another matter"
    engine.store.check()


@pytest.mark.parametrize("is_gone_before", [True, False])
def test_no_hash_of_forgotten_tokens_stays(make_engine: EngineMaker, is_gone_before: bool) -> None:
    engine = make_engine(reuse=REUSE["identical"])
    for name in ("Velmar", "Osteck", "Karna"):
        engine.generate(f"{DOCUMENTS[name]}\n\nWho?", documents={name: DOCUMENTS[name]}, **TOKENS)
    engine.generate(f"Read. {DOCUMENTS['Osteck']}\n\nWho?", **TOKENS)
    (space,) = engine.store._entries.namespaces.values()
    if is_gone_before:  # as eviction does
        key = next(key for key, entry in space.ordinary.items() if "Velmar" in entry.reference.document_starts)
        engine.store._entries.remove(space.ordinary[key])
    engine.forget("Velmar")
    left = [reference.token_ids for reference in engine.store.references()]
    assert space._runs is not None and len(left) == 3
    afresh = RunIndex(space._runs.min_run_tokens)
    afresh.add_all((str(number), ids) for number, ids in enumerate(left))
    assert space._runs.num_windows == afresh.num_windows
    engine.store.check()


def test_what_the_disk_keeps_is_not_said_to_be_forgotten(
    make_engine: EngineMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StoreConfig(directory=tmp_path)
    engine = make_engine(store=store)
    for name in ("Velmar", "Osteck"):
        engine.warm({name: DOCUMENTS[name]})

    def fail(*arguments: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    for act in (lambda: engine.forget("Velmar"), lambda: engine.clear("other"), lambda: engine.forget("Velmar")):
        with monkeypatch.context() as patch:
            patch.setattr("semsharekv_integrations.store.catalog.Catalog.change", fail)
            with pytest.raises(StoreWriteError, match="some of it still lies there"):
                act()
        assert not [text for text in texts_of(engine) if DOCUMENTS["Velmar"] in text], "in memory it is gone"
    assert engine.forget("Velmar") == 0
    assert not any(b"Velmar" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    engine.close()
    again = make_engine(store=store)
    assert list(again.store.references()[0].document_starts) == ["Osteck"]
    again.close()


def test_a_kv_file_that_cannot_be_deleted_is_not_said_to_be_forgotten(
    make_engine: EngineMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(store=StoreConfig(directory=tmp_path))
    engine.warm({"Velmar": DOCUMENTS["Velmar"]})

    def refuse(*arguments: object) -> None:
        raise PermissionError("busy")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        with pytest.raises(StoreWriteError, match="some of it still lies there"):
            engine.forget("Velmar")
        assert [*tmp_path.rglob("*.safetensors")], "it is still there"
    assert engine.forget("Velmar") == 0 and not [*tmp_path.rglob("*.safetensors")], "asked again, it is gone"
    engine.close()


def test_names_may_be_members_of_enumerations(make_engine: EngineMaker) -> None:
    """Which are texts that print and hash as something else."""

    class Name(str, enum.Enum):  # noqa: UP042 - a StrEnum prints as its value
        TENANT = "tenant"
        DOCUMENT = "document"
        SESSION = "session"

    engine = make_engine("exact", store=StoreConfig(shared_namespace=Name.TENANT))
    scope: dict[str, Any] = {"namespace": Name.TENANT, "session": Name.SESSION}
    for _ in range(3):
        engine.generate(f"{TEXT} Who?", documents={Name.DOCUMENT: TEXT}, **scope, **TOKENS)
        assert [reference.namespace for reference in engine.store.references("tenant")] == ["tenant"]
        assert engine.generate(f"{TEXT} Who?", namespace="other", **TOKENS).report.prefix_tokens > 0
        for drop in (
            lambda: engine.forget(Name.DOCUMENT, Name.TENANT),
            lambda: engine.clear(Name.TENANT),
            lambda: engine.clear(**scope),
            lambda: engine.forget("document", "tenant"),
        ):
            engine.generate(f"{TEXT} Who?", documents={Name.DOCUMENT: TEXT}, **scope, **TOKENS)
            assert drop() == 1
