"""A document is forgotten with every entry in which it stands, whoever named it, and with no other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest

from semsharekv_integrations import ReuseConfig, SemShareEngine, StoreConfig
from semsharekv_integrations.kv import Reference
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
    return (entry.reference for entry in engine.store._entries.of(namespace))


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
    (space,) = engine.store._entries.spaces.values()
    assert len(space.ordinary) > 1
    assert all(len(reference.document_starts) == 1 for reference in engine.store.references())
    assert sum(len(node.documents) for node in space.tree.nodes()) == len(space.ordinary)
    standing = sum("number 0." in text for text in texts_of(engine))
    assert engine.forget("d0") == standing <= 1
    directory = engine.store._entries.shelves.disk._directory
    assert directory is not None
    assert all(len(entry.labels["document_starts"]) <= 1 for entry in directory.entries())


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
    shelf = engine.store._entries.shelves.disk
    assert shelf._directory is not None
    (record,) = shelf._directory.entries()
    old = {name: value for name, value in record.labels.items() if name != "document_stops"}
    old["document_starts"] = {**old["document_starts"], "inherited": 1}
    shelf.record(entries=[record._replace(labels=old)])
    shelf._directory.close()
    again = make_engine(store=StoreConfig(directory=tmp_path))
    again.generate("Something else.", **TOKENS)
    (reference,) = (r for r in again.store.references() if r.document_starts)
    assert set(reference.document_starts) == {"v", "inherited"}
    assert reference.spans["v"].stop > 10 and np.array_equal(reference.token_ids, reference.token_ids)
    assert again.forget("inherited") == 1
