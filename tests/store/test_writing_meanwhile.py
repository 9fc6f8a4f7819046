"""Files are written while the store goes on: nobody waits for them who only reads, and nothing forgotten comes back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kept_prompts import FINGERPRINT, config_of, lookup, opened, reference
from semsharekv_integrations import StoreConfig
from semsharekv_integrations.store import KVStore
from semsharekv_integrations.store.files import KVFiles
from stored_kv import kv_files
from tiny_models import EngineMaker

PROMPT = "News from Velmar: the mayor opened a school in Prorna on Monday ."
WAIT_S = 30


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KVStore]:
    store = opened(config_of(directory=tmp_path))
    yield store
    store.close()


@contextmanager
def held_up(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> Iterator[None]:
    """Inside, ``work`` runs in a thread and stands before the first file that it writes; behind, it has ended."""
    writes, goes_on, write = threading.Event(), threading.Event(), KVFiles.write_apart

    def hold(self: KVFiles, *args: Any) -> Any:
        writes.set()
        assert goes_on.wait(WAIT_S)
        return write(self, *args)

    thread = threading.Thread(target=work)
    with monkeypatch.context() as patch:
        patch.setattr(KVFiles, "write_apart", hold)
        thread.start()
        assert writes.wait(WAIT_S)
        try:
            yield
        finally:
            goes_on.set()
            thread.join(WAIT_S)
    assert not thread.is_alive()


def found_again(store: KVStore, *prompts: tuple[int, ...]) -> list[int]:
    """How much of each prompt the next process finds, after a look at this one."""
    store.check()
    store.close()
    again = opened(store.config)
    again.check()
    found = [lookup(again, tokens) for tokens in prompts]
    again.close()
    return found


def test_reading_and_storing_go_on_meanwhile(store: KVStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(reference((7, 7, 7)))
    with held_up(monkeypatch, lambda: store.put(reference((1, 2, 3, 4)))):
        assert lookup(store, (1, 2, 3, 4)) == 4, "also what is being written"
        assert lookup(store, (7, 7, 7)) == 3 and store.put(reference((5, 5)), writes=False)
        store.check()
    assert found_again(store, (1, 2, 3, 4), (7, 7, 7), (5, 5)) == [4, 3, 2]


def test_what_is_divided_meanwhile_is_written_in_parts(store: KVStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with held_up(monkeypatch, lambda: store.put(reference((1, 2, 3, 4)))):
        assert store.put(reference((1, 2, 9)), writes=False)
    assert found_again(store, (1, 2, 3, 4), (1, 2, 9)) == [4, 3]


def test_what_is_pushed_out_meanwhile_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(config_of(4, directory=tmp_path))
    with held_up(monkeypatch, lambda: store.put(reference((1, 2, 3, 4)))):
        assert store.put(reference((5, 6, 7, 8)), writes=False)
        store.check()
    assert found_again(store, (1, 2, 3, 4), (5, 6, 7, 8)) == [0, 4]
    assert len(kv_files(tmp_path / FINGERPRINT)) == 1


def test_a_beginning_that_is_left_meanwhile_is_written_with_its_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(config_of(6, directory=tmp_path))
    assert store.put(reference((1, 2)), writes=False) and lookup(store, (1, 2)) == 2
    with held_up(monkeypatch, lambda: store.put(reference((1, 2, 3, 4)))):  # its first file is that of (1, 2)
        assert store.put(reference((5, 6, 7)), writes=False), "for which (3, 4) has to go"
    assert found_again(store, (1, 2, 3, 4), (5, 6, 7)) == [2, 3]


def test_a_beginning_that_is_left_before_it_is_written_waits_in_its_place(tmp_path: Path) -> None:
    store = opened(config_of(6, directory=tmp_path))
    assert store.put(reference((1, 2, 9), session="s"), writes=False)
    assert store.put(reference((1, 2, 3, 4)), writes=False) and lookup(store, (1, 2, 3, 4)) == 4
    assert store.forget("a", session="s") == 1 and store.put(reference((5, 6, 7)), writes=False), "(3, 4) has to go"
    assert found_again(store, (1, 2, 3, 4), (5, 6, 7)) == [2, 3]


@pytest.mark.parametrize("num_more", [2, 100])
@pytest.mark.parametrize("pinned", [False, True])
def test_what_is_written_for_a_longer_one_is_written_with_its_entry(
    tmp_path: Path, pinned: bool, num_more: int
) -> None:
    """Memory has no room for the longer one; nor has the disk, where it is much longer."""
    store = opened(config_of(3, directory=tmp_path, disk_max_bytes=6000))
    assert store.put(reference((1, 2), pinned=pinned), writes=False)
    longer = (1, 2, *range(5, 5 + num_more))
    assert store.put(reference(longer)) == (num_more == 2)
    assert found_again(store, (1, 2), longer) == [2, 4 if num_more == 2 else 2]


def test_what_is_forgotten_and_stored_anew_meanwhile_is_written(
    store: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_up(monkeypatch, lambda: store.put(reference((1, 2, 3, 4)))):
        assert store.forget("a") == 1 and store.put(reference((1, 2, 3, 4)), writes=False)
    assert found_again(store, (1, 2, 3, 4)) == [4]


def test_closing_meanwhile_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(config_of(directory=tmp_path))
    with held_up(monkeypatch, lambda: store.put(reference((1, 2, 3, 4)))):
        closing = threading.Thread(target=store.close)
        closing.start()
    closing.join(WAIT_S)
    again = opened(store.config)
    assert lookup(again, (1, 2, 3, 4)) in (0, 4) and len(kv_files(tmp_path / FINGERPRINT)) <= 1
    again.check()
    again.close()


def test_what_waits_is_written_when_the_store_is_closed(store: KVStore) -> None:
    assert store.put(reference((1, 2, 3)), writes=False) and store.put(reference((1, 2, 3, 4)), writes=False)
    assert store.stats()["disk_bytes"] == 0
    assert found_again(store, (1, 2, 3, 4)) == [4]


def test_what_is_forgotten_while_it_is_written_leaves_nothing(
    make_engine: EngineMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(store=StoreConfig(directory=tmp_path))
    engine.generate("Something else entirely .", max_new_tokens=1, namespace="other")
    dropped: list[int] = []
    with held_up(monkeypatch, lambda: engine.generate(PROMPT, max_new_tokens=2, documents={"d": PROMPT})):
        forgetting = threading.Thread(target=lambda: dropped.append(engine.forget("d")))
        forgetting.start()
        forgetting.join(0.05)
        assert forgetting.is_alive() and not dropped, "it waits, so that nothing is on disk when it is done"
    forgetting.join(WAIT_S)
    assert dropped == [1] and engine.store.references("default") == []
    engine.store.check()
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert len(kv_files(folder)) == 1
    engine.close()


def test_calls_answer_while_another_one_is_written(
    make_engine: EngineMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(store=StoreConfig(directory=tmp_path))
    engine.generate(PROMPT, max_new_tokens=2)
    with held_up(monkeypatch, lambda: engine.generate("Nothing of this is known in Karna .", max_new_tokens=1)):
        first = next(iter(engine.stream(PROMPT + " Who opened it ?", max_new_tokens=4)))
        assert first.generation is None
    engine.store.check()
    engine.close()


def test_no_file_is_written_before_the_first_token_of_calls_together(
    make_engine: EngineMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(store=StoreConfig(directory=tmp_path))
    said: list[int] = []
    write, written = KVFiles.write_apart, list[int]()
    monkeypatch.setattr(KVFiles, "write_apart", lambda *args: written.append(len(said)) or write(*args))
    with engine.sharing():
        said.extend(1 for _ in engine.stream(PROMPT, max_new_tokens=3))
    assert written and min(written) >= 1, "and then it is"
    engine.store.check()
    engine.close()
    again = make_engine(store=StoreConfig(directory=tmp_path))
    assert again.generate(PROMPT, max_new_tokens=1).report.prefix_tokens > 5
    again.close()
