"""What a tenant leaves when its KV is gone, whatever took it: nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from semsharekv_integrations import AuditConfig, SemShareEngine, StoreConfig
from tiny_models import EngineMaker

SECRET = "tenant-4711"
TEXT = "The mayor of Velmar is Anna Kelsen, and the code of the day is 4711. Shops stayed shut. " * 2
LIKE = TEXT.replace("mayor", "head").replace("Shops", "Schools").strip()


def reachable(root: object) -> list[object]:
    """All objects that hang on ``root``, but for modules, classes and functions, which hold no engine's data."""
    seen: dict[int, object] = {}
    pending: list[Any] = [root]
    while pending:
        found = pending.pop()
        if id(found) in seen or isinstance(found, type) or type(found).__name__ in ("module", "function"):
            continue
        seen[id(found)] = found
        pending += gc.get_referents(found)
    return list(seen.values())


def traces(engine: SemShareEngine, name: str, text: str) -> list[object]:
    """What still tells of a tenant: its name, a part of its text, or some of its tokens in a row."""
    gc.collect()
    tokens = engine.tokenizer(text, add_special_tokens=False)["input_ids"][4:12]
    needle = np.array(tokens, dtype=np.int64).tobytes()
    roots = [part for key, part in vars(engine).items() if key != "_source"]
    found: list[object] = []
    for thing in (thing for root in roots for thing in reachable(root)):
        if isinstance(thing, str) and (name in thing or text[10:40] in thing):
            found.append(thing)
        if isinstance(thing, np.ndarray) and thing.dtype == np.int64 and needle in thing.tobytes():
            found.append(thing)
        numbers = [part for part in thing if isinstance(part, int)] if isinstance(thing, list) else []
        if tokens[0] in numbers and needle in np.array(numbers, dtype=np.int64).tobytes():
            found.append(thing)
    return found


def live(engine: SemShareEngine) -> None:
    """What a tenant does."""
    engine.warm({f"{SECRET}-warm": TEXT}, namespace=SECRET)
    engine.generate(f"{TEXT}\n\nWho?", documents={SECRET: TEXT}, namespace=SECRET, session=SECRET, max_new_tokens=3)
    engine.generate(f"Read: {LIKE}\n\nWho?", namespace=SECRET, session=SECRET, max_new_tokens=3)
    engine.arrange({f"{SECRET}-like": LIKE, SECRET: TEXT}, SECRET)
    engine.generate(f"Read. {TEXT}\n\nWho?", namespace=SECRET, session=f"{SECRET}-2", max_new_tokens=3)


def others(engine: SemShareEngine) -> None:
    for n in range(8):
        for again in range(2):
            text = f"Number {n} is of others. " + "Rain is expected in Osteck today. " * 3 + "Why? " * again
            engine.generate(text, namespace="other", max_new_tokens=1)


ENDS: dict[str, Callable[[SemShareEngine], object]] = {
    "cleared": lambda engine: engine.clear(SECRET),
    "all cleared": lambda engine: engine.clear(),
    "forgotten": lambda engine: (
        engine.forget(SECRET, SECRET),
        engine.clear(SECRET, session=f"{SECRET}-2"),
        engine.clear(SECRET, session=SECRET),
        engine.store.forget(SECRET),
        others(engine),
    ),
    "evicted": others,
    "expired": lambda engine: (engine.store._entries.__dict__.update(_clock=lambda: 1e12), others(engine)),
}


@pytest.mark.parametrize("mode", ["exact", "semantic"])
@pytest.mark.parametrize("end", ENDS)
def test_nothing_of_a_tenant_is_left_without_its_kv(make_engine: EngineMaker, mode: str, end: str) -> None:
    small = end == "evicted"
    store = StoreConfig(max_bytes=90_000 if small else 2**30, ttl_s=3600.0, eviction="lru")
    engine = make_engine(mode, store=store, audit=AuditConfig(sample_ratio=1.0))
    live(engine)
    if not small:
        assert traces(engine, SECRET, TEXT), "the test sees what there is"
    ENDS[end](engine)
    assert engine.store.references(SECRET) == []
    assert traces(engine, SECRET, TEXT) == []


def test_texts_of_documents_go_with_their_kv(make_engine: EngineMaker) -> None:
    engine = make_engine("identical")
    engine.warm({"v": TEXT, "o": LIKE})
    engine.store.forget("default", document_id="v")  # as eviction does, behind the engine's back
    engine.generate("Another.", max_new_tokens=1)
    assert set(engine._memory.known.of(["default"])) == {"o"}


@pytest.mark.parametrize("store", [StoreConfig(max_bytes=0), StoreConfig(max_bytes=2**20, ttl_s=1e-9)])
def test_texts_whose_kv_never_stays_are_not_kept(make_engine: EngineMaker, store: StoreConfig) -> None:
    engine = make_engine("identical", store=store)
    for n in range(3):
        engine.generate(f"{n} {TEXT}", documents={f"d{n}": TEXT}, namespace=f"n{n}", max_new_tokens=1)
    engine.generate("Another.", max_new_tokens=1)
    assert engine._memory.known._texts == {}
