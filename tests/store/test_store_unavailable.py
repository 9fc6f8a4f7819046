"""What cannot be read for reasons that pass is a counted miss: nothing is dropped, and it is found again later."""

from __future__ import annotations

import errno
import os
import resource
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from kept_prompts import FINGERPRINT, Clock, config_of, lookup, opened, put_all, reference, runs_of
from semsharekv_integrations import StoreConfig, StoreFileError
from semsharekv_integrations.errors import StoreWriteError
from semsharekv_integrations.store import KVStore, catalog, codec, files
from semsharekv_integrations.store.directory import COUNTS, KVDirectory, peek
from semsharekv_integrations.store.reading import TensorFile
from stored_kv import kv_files, tensors
from tiny_models import EngineMaker

PROMPTS = [(1, 2, 3, 4, 5), (1, 2, 3, 6), (9, 9, 9)]
Trouble = Callable[[pytest.MonkeyPatch], None]
_really_open = os.open


def system_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def no_kv_file(error: OSError) -> Trouble:
    """No KV file can be opened by plain reads."""

    def fail(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith(files.SUFFIX):
            raise error
        return _really_open(path, *args, **kwargs)

    return lambda patch: patch.setattr(os, "open", fail)


def no_map(error: Exception) -> Trouble:
    """No KV file can be mapped."""
    return lambda patch: patch.setattr(files, "safe_open", raising(error))


# What mapping a file raises where handles or memory are short was seen in runs: it says something else, or nothing.
TROUBLES: dict[str, Trouble] = {
    **{
        f"open {errno.errorcode[number]}": no_kv_file(system_error(number))
        for number in (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
    },
    **{
        f"{name} {type(error).__name__}": lambda patch, name=name, error=error: patch.setattr(
            TensorFile, name, raising(error)
        )
        for name in ("_read_into", "_yield_parts")  # all that is read, and what is checked
        for error in (system_error(errno.EIO), MemoryError())
    },
    "map: missing": no_map(FileNotFoundError("No such file or directory")),
    "map: runtime": no_map(RuntimeError("unable to mmap 128 bytes: Cannot allocate memory (12)")),
    "map: memory": no_map(MemoryError("Cannot allocate memory")),
    "map: safetensors": no_map(files.SafetensorError("Error while deserializing")),
}


def filled(path: Path) -> KVStore:
    """A store whose prompts lie on disk alone, none of them read yet."""
    clock = Clock()
    with closing(opened(config_of(directory=path), clock)) as store:
        put_all(store, clock, PROMPTS)
    return opened(config_of(0, directory=path), clock)


def assert_all_there(store: KVStore, path: Path) -> None:
    store.check()
    assert [lookup(store, tokens) for tokens in PROMPTS] == [5, 4, 3] and len(kv_files(path / FINGERPRINT)) == 3
    counts = {name: store.stats()[f"disk_{name}"] for name in COUNTS if name != "unavailable"}
    assert not any(counts.values()) and store.stats()["unreadable"] == 0
    store.close()
    again = opened(config_of(directory=path))
    assert len(again.references()) == 3 and not any(again.stats()[f"disk_{name}"] for name in COUNTS)
    again.close()


@pytest.mark.parametrize("way", ["prefix", "runs", "fetch", "all"])
@pytest.mark.parametrize("trouble", TROUBLES)
def test_what_cannot_be_read_now_is_a_counted_miss_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str, way: str
) -> None:
    store = filled(tmp_path)
    with monkeypatch.context() as patch:
        TROUBLES[trouble](patch)
        if way == "prefix":
            assert lookup(store, PROMPTS[1]) == 0 and store.stats()["misses"] == 1
        elif way == "runs":
            assert runs_of(store, (0, *PROMPTS[1])) == []
        elif way == "fetch":
            assert store.fetch(reference(PROMPTS[1]).id, "a") is None
        else:  # which must not be taken for all that there is
            with pytest.raises(StoreFileError, match=r"safetensors cannot be read now"):
                store.fetch_all()
        store.check()
        assert store.stats()["disk_unavailable"] == 1 and len(store.references()) == 3
    assert_all_there(store, tmp_path)


def test_what_was_verified_before_stays_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, trouble in TROUBLES.items():
        store = filled(tmp_path / name)
        assert lookup(store, PROMPTS[0]) == 5
        with monkeypatch.context() as patch:
            trouble(patch)
            no_map(RuntimeError("unable to open file in read-only mode: Too many open files (24)"))(patch)
            assert lookup(store, PROMPTS[0]) == 0 and len(store.references()) == 3
        assert_all_there(store, tmp_path / name)


def test_a_disk_that_is_away_for_a_moment(tmp_path: Path) -> None:
    """What was its directory is missing, or the place that it is mounted at is empty."""
    store = filled(tmp_path / "disk")
    (tmp_path / "disk").rename(tmp_path / "away")
    assert lookup(store, PROMPTS[0]) == 0 and store.forget("a", document_id="none") == 0
    (tmp_path / "disk").mkdir()
    assert lookup(store, PROMPTS[0]) == 0 and store.stats()["disk_unavailable"] == 2
    assert not store.put(reference((4, 4))) and list((tmp_path / "disk").iterdir()) == []
    (tmp_path / "disk").rmdir()
    (tmp_path / "away").rename(tmp_path / "disk")
    store.check()
    assert [lookup(store, tokens) for tokens in PROMPTS] == [5, 4, 3]
    store.close()


def test_what_the_shared_namespace_has_in_memory_serves_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    config = config_of(directory=tmp_path, shared_namespace="all")
    with closing(opened(config, clock)) as store:
        store.put(reference((1, 2, 3, 4)))
    store = opened(config, clock)
    store.put(reference((1, 2, 3), "all"))
    with monkeypatch.context() as patch:
        TROUBLES["open EMFILE"](patch)
        assert lookup(store, (1, 2, 3, 4)) == 3
    assert lookup(store, (1, 2, 3, 4)) == 4
    store.close()


@contextmanager
def out_of_handles(spare: int) -> Iterator[None]:
    """With so many handles left to this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        while True:
            held.append(_really_open(os.devnull, os.O_RDONLY))
    except OSError:
        for handle in held[:spare]:
            os.close(handle)
        yield
    finally:
        for handle in held[spare:]:
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("spare", range(4))
def test_a_process_without_handles_loses_nothing(tmp_path: Path, spare: int) -> None:
    """However far a read comes; the same while it opens the directory, looks into it, forgets and writes."""
    store = filled(tmp_path / "one")
    filled(tmp_path / "two").close()
    with out_of_handles(spare):
        found = [lookup(store, tokens) for tokens in PROMPTS]
        assert found in ([0, 0, 0], [5, 4, 3])
        store.put(reference((1, 2, 7, 7)))
        store.forget("a", document_id="none")
        with suppress(StoreFileError):  # and no other error
            opened(config_of(directory=tmp_path / "two")).close()
        with suppress(StoreFileError):
            peek(tmp_path / "two" / FINGERPRINT)
    store.forget("a", document_id="none")
    store.check()
    assert [lookup(store, tokens) for tokens in PROMPTS] == [5, 4, 3]
    store.close()
    assert_all_there(opened(config_of(0, directory=tmp_path / "two")), tmp_path / "two")


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENOSPC, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("max_tokens", [0, 3, 1000])
def test_what_lies_on_disk_stays_when_what_goes_on_from_it_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_tokens: int, error: int
) -> None:
    """However long the longer prompt stays in memory: a restart finds the shorter one, with its own labels."""
    clock = Clock()
    with closing(opened(config_of(directory=tmp_path), clock)) as store:
        put_all(store, clock, PROMPTS, document_starts={"d": 0})
    store = opened(config_of(max_tokens, directory=tmp_path), clock)
    with monkeypatch.context() as patch:
        patch.setattr(files.KVFiles, "write_apart", raising(StoreWriteError(os.strerror(error))))
        for tokens in PROMPTS:
            store.put(reference((*tokens, 7), document_starts={"e": 1}))
            store.check()
        longer = [lookup(store, (*tokens, 7)) for tokens in PROMPTS]
        assert all(len(tokens) <= found for found, tokens in zip(longer, PROMPTS, strict=True))
        assert max_tokens < 1000 or longer == [6, 5, 4]
    store.close()
    again = opened(config_of(0, directory=tmp_path), clock)
    assert_all_there(again, tmp_path)
    again = opened(config_of(0, directory=tmp_path), clock)
    assert again.forget("a", document_id="d") == 3 and not again.references()
    again.close()


def test_forgetting_reaches_both_where_the_longer_one_is_in_memory_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    store = opened(config_of(directory=tmp_path), clock)
    put_all(store, clock, PROMPTS, document_starts={"d": 0})
    with monkeypatch.context() as patch:
        patch.setattr(files.KVFiles, "write_apart", raising(StoreWriteError("no room")))
        assert store.put(reference((*PROMPTS[0], 7)))
    assert store.forget("a", document_id="d") == 4 and not store.references()
    store.check()
    store.close()
    assert not opened(config_of(directory=tmp_path), clock).references()


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "seed": 3}], ids=str)
def test_calls_go_on_in_a_process_without_handles(
    make_engine: EngineMaker, tmp_path: Path, options: dict[str, Any]
) -> None:
    engine = make_engine(store=StoreConfig(directory=tmp_path))
    prompts = [f"News {n} from Velmar. " * 3 for n in range(3)]
    before = [engine.generate(prompt, max_new_tokens=3, **options).token_ids for prompt in prompts]
    with out_of_handles(0):
        meanwhile = [engine.generate(prompt, max_new_tokens=4, **options).token_ids for prompt in prompts]
    is_random = options.get("temperature") and "seed" not in options
    assert is_random or [found[:3] for found in meanwhile] == before
    engine.store.check()
    engine.close()
    again = make_engine(store=StoreConfig(directory=tmp_path))
    assert all(again.generate(prompt, max_new_tokens=1).report.prefix_tokens > 9 for prompt in prompts)
    again.close()


def sqlite_error(code: int, text: str) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize("step", ["_create_tables", "_check", "_read"])
@pytest.mark.parametrize(
    "error",
    [
        sqlite_error(sqlite3.SQLITE_CANTOPEN, "unable to open database file"),
        sqlite_error(sqlite3.SQLITE_IOERR | 1 << 8, "disk I/O error"),
        sqlite_error(sqlite3.SQLITE_BUSY, "database is locked"),
        sqlite_error(sqlite3.SQLITE_NOMEM, "out of memory"),
        sqlite_error(sqlite3.SQLITE_PROTOCOL, "locking protocol"),
        sqlite_error(sqlite3.SQLITE_INTERRUPT, "interrupted"),
        sqlite_error(sqlite3.SQLITE_READONLY | 5 << 8, "attempt to write a readonly database"),
        system_error(errno.EIO),
        MemoryError(),
    ],
    ids=str,
)
def test_a_catalog_that_cannot_be_read_now_is_not_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: Exception
) -> None:
    filled(tmp_path).close()
    with monkeypatch.context() as patch:
        patch.setattr(catalog, step, raising(error))
        with pytest.raises((StoreFileError, MemoryError)):
            KVDirectory(tmp_path, FINGERPRINT)
    assert_all_there(opened(config_of(0, directory=tmp_path)), tmp_path)


class UnreadPage:
    """A connection that cannot read a page, which SQLite's check reports as if it were a finding."""

    def execute(self, _: str) -> UnreadPage:
        return self

    def fetchone(self) -> tuple[str]:
        return (f"Tree 3 page 5: unable to get the page. error code={sqlite3.SQLITE_IOERR}",)


def test_a_page_that_cannot_be_read_is_no_damage() -> None:
    with pytest.raises(OSError, match="cannot be read"):
        catalog._check(UnreadPage())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["listdir", "scandir"])
def test_a_directory_that_cannot_be_listed_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    filled(tmp_path).close()
    with monkeypatch.context() as patch:
        patch.setattr(os, name, raising(system_error(errno.EIO)))
        with pytest.raises(StoreFileError, match="Input/output error"):
            KVDirectory(tmp_path, FINGERPRINT)
    assert_all_there(opened(config_of(0, directory=tmp_path)), tmp_path)


def test_a_file_that_is_no_longer_whole_when_mapping_fails_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(tmp_path)
    assert lookup(store, PROMPTS[2]) == 3
    place = store._entries.by_key[reference(PROMPTS[2]).id].node.on_disk
    assert place is not None
    path = tmp_path / FINGERPRINT / f"{place.file}{files.SUFFIX}"
    path.write_bytes(b"x" * path.stat().st_size)
    assert lookup(store, PROMPTS[2]) == 0
    assert store.stats()["disk_damaged"] == 1 and store.stats()["disk_unavailable"] == 0
    store.check()
    store.close()


@pytest.mark.parametrize(
    "error",
    [
        system_error(errno.EMFILE),
        RuntimeError("unable to open file <x> in read-only mode: Too many open files (24)"),
        MemoryError("Cannot allocate memory"),
    ],
    ids=repr,
)
def test_a_saved_file_that_cannot_be_read_now(
    make_engine: EngineMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    engine, again = make_engine(), make_engine()
    engine.generate("News from Velmar.", max_new_tokens=1)
    assert engine.save(tmp_path / "kv") == 1
    with monkeypatch.context() as patch:
        patch.setattr(codec, "TensorFile", raising(error))
        with pytest.raises(StoreFileError, match=r"kv cannot be read"):
            again.load(tmp_path / "kv")
    assert again.load(tmp_path / "kv") == 1


def test_saving_leaves_the_old_file_when_kv_cannot_be_read(
    make_engine: EngineMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A smaller file in its place would be a loss that nobody is told of."""
    engine = make_engine(store=StoreConfig(directory=tmp_path / "kept", max_bytes=0))
    engine.generate("News from Velmar.", max_new_tokens=1)
    assert engine.save(tmp_path / "kv") == 1
    before = (tmp_path / "kv").read_bytes()
    with monkeypatch.context() as patch:
        no_map(MemoryError())(patch)
        with pytest.raises(StoreFileError, match="cannot be read now"):
            engine.save(tmp_path / "kv")
    assert (tmp_path / "kv").read_bytes() == before and engine.save(tmp_path / "kv") == 1
    engine.close()


def test_bytes_are_verified_without_mapping_them(tmp_path: Path) -> None:
    """For every type of tensor that KV may have: the digest of plain reads is that of the tensors."""
    (tmp_path / "kv").mkdir()
    kept = files.KVFiles(tmp_path / "kv", FINGERPRINT, Counter())
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.float8_e4m3fn):
        file = kept.write(tensors(3, dtype=dtype), 3)
        assert kept.read(file).keys() == {"0.keys", "0.values"}
