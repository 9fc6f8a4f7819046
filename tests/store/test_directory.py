"""KV on disk: what was written is there again, for one process at a time, and for nobody but the owner."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from semsharekv_integrations import StoreFileError
from semsharekv_integrations.errors import StoreLockedError, StoreWriteError
from semsharekv_integrations.store import catalog, files
from semsharekv_integrations.store.directory import COUNTS, KVDirectory, find_directories, peek
from stored_kv import FINGERPRINT, entry, fill, kv_files, node, records, tensors

NOTHING = dict.fromkeys(COUNTS, 0)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[KVDirectory]:
    opened = KVDirectory(tmp_path, FINGERPRINT)
    fill(opened)
    yield opened
    opened.close()


def reopened(directory: KVDirectory) -> KVDirectory:
    directory.close()
    return KVDirectory(directory.path.parent, FINGERPRINT)


def test_records_are_there_again(directory: KVDirectory) -> None:
    before = records(directory)
    again = reopened(directory)
    assert records(again) == before and len(before) == 7 and again.counts() == NOTHING
    assert again.contents().entries[0].labels["document_starts"] == {"é": 1}
    again.check()
    again.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
def test_tensors_are_there_again(directory: KVDirectory, dtype: torch.dtype) -> None:
    wanted = tensors(7, dtype=dtype) | {"scale": torch.rand(1, 2, 7, 1), "strided": torch.rand(1, 7, 3, 2).mT[:, :2].mT}
    wanted["strided"] = wanted["scale"].expand(1, 2, 7, 3)
    file = directory.files.write(wanted, 7)
    directory.record(nodes=[node("v", None, range(7), file)], entries=[entry("ev", "v")])
    again = reopened(directory)
    for _ in range(2):
        found = again.files.read(file)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    again.close()


def test_what_is_read_is_a_private_map(directory: KVDirectory) -> None:
    file = directory.contents().nodes[0].file
    directory.files.read(file)["0.keys"].zero_()
    kept = directory.files.read(file)
    assert kept["0.keys"].any()
    directory.record(gone_nodes="rstu", gone_entries=["es", "et", "eu"])
    assert directory.num_bytes == 0 and torch.equal(kept["0.keys"], tensors(6, seed=6)["0.keys"])


def test_parents_stand_before_children(directory: KVDirectory) -> None:
    file = directory.contents().nodes[0].file
    # the first node is split: what was "r" has a new parent, which is recorded after it
    directory.record(nodes=[node("r", "q", [2, 3], file, 1), node("q", None, [1], file)])

    def assert_in_order(opened: KVDirectory) -> None:
        seen: set[str | None] = {None}
        for found in opened.contents().nodes:
            assert found.parent in seen
            seen.add(found.id)
        assert len(seen) == 6

    assert_in_order(directory)
    assert_in_order(again := reopened(directory))
    again.close()


def test_bytes_are_those_of_the_files_in_use(directory: KVDirectory) -> None:
    def on_disk() -> int:
        return sum(path.stat().st_size for path in directory.path.glob("*.safetensors"))

    assert (
        directory.num_bytes
        == on_disk()
        == sum(directory.files.records[file].num_bytes for file in kv_files(directory.path))
    )
    file = directory.files.write(tensors(2), 2)
    assert directory.num_bytes == on_disk() - directory.files.records[file].num_bytes
    directory.record(nodes=[node("v", None, [1], file), node("w", "v", [2], file, 1)], entries=[entry("e", "w")])
    assert directory.num_bytes == on_disk()
    directory.record(gone_nodes=["w", "not there"], gone_entries=["e"])
    assert file in kv_files(directory.path)  # "v" still lies in it
    directory.record(gone_nodes=["v"])
    assert file not in kv_files(directory.path) and directory.num_bytes == on_disk()
    with pytest.raises(StoreFileError, match=file):
        directory.files.read(file)
    directory.check()


def test_a_node_may_move_to_another_file(directory: KVDirectory) -> None:
    old, new = directory.contents().nodes[-1].file, directory.files.write(tensors(3), 3)
    moved = next(found for found in directory.contents().nodes if found.file == old)
    directory.record(nodes=[moved._replace(file=new, token_ids=moved.token_ids[:3], first=0)])
    assert old not in kv_files(directory.path) and new in kv_files(directory.path)
    directory.check()


def test_what_was_written_and_not_recorded_goes(directory: KVDirectory) -> None:
    one, other = directory.files.write(tensors(2), 2), directory.files.write(tensors(2), 2)
    directory.discard(one)
    directory.discard(directory.contents().nodes[0].file)  # in use: stays
    assert one not in kv_files(directory.path) and other in kv_files(directory.path)
    directory.check()
    again = reopened(directory)
    assert other not in kv_files(again.path) and again.counts() == NOTHING
    again.close()


def test_bad_arguments(directory: KVDirectory) -> None:
    for bad in (tensors(3), {"x": torch.zeros(1, 2)}):
        with pytest.raises(ValueError, match="4 at dim 2"):
            directory.files.write(bad, 4)
    file = directory.files.write(tensors(4), 4)
    for first, num_tokens, name in ((1, 4, file), (-1, 2, file), (0, 0, file), (0, 1, "../x")):
        with pytest.raises(ValueError, match="does not have"):
            directory.record(nodes=[node("v", None, range(num_tokens), name, first)])
    for bad_print in ("", "../ab", "AB", "ab/c", "ab\n"):
        with pytest.raises(ValueError, match="fingerprint"):
            KVDirectory(directory.path.parent, bad_print)
    assert len(records(directory)) == 7


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        directory = KVDirectory(tmp_path / "new" / "er", FINGERPRINT)
        fill(directory)
        for path in (tmp_path / "new", tmp_path / "new" / "er", directory.path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert {item.name for item in directory.path.iterdir()} >= {"lock", "catalog.sqlite", "catalog.sqlite-wal"}
        for path in directory.path.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name
        directory.close()
        directory.path.chmod(0o777)
        (directory.path / "catalog.sqlite").chmod(0o666)
        KVDirectory(tmp_path / "new" / "er", FINGERPRINT).close()
        assert [stat.S_IMODE(directory.path.stat().st_mode)] == [0o700]
        assert stat.S_IMODE((directory.path / "catalog.sqlite").stat().st_mode) == 0o600
    finally:
        os.umask(before)


OTHER_PROCESS = """
import sys
from pathlib import Path
from semsharekv_integrations.errors import StoreLockedError
from semsharekv_integrations.store.directory import KVDirectory
try:
    KVDirectory(Path(sys.argv[1]), sys.argv[2])
except StoreLockedError as error:
    print(f"refused: {error}", flush=True)
sys.stdin.readline()
held = KVDirectory(Path(sys.argv[1]), sys.argv[2])
print("held", flush=True)
sys.stdin.readline()
"""


def test_one_process_at_a_time(directory: KVDirectory) -> None:
    path = directory.path.parent
    with pytest.raises(StoreLockedError, match=rf"{directory.path} is in use"):
        KVDirectory(path, FINGERPRINT)
    KVDirectory(path, "cd34").close()  # another model's is free
    command = [sys.executable, "-c", OTHER_PROCESS, str(path), FINGERPRINT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline().startswith(f"refused: {directory.path} is in use")
        directory.record(gone_entries=["eu"])  # not disturbed by it
        directory.close()
        other.stdin.write("go on\n")
        other.stdin.flush()
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StoreLockedError):
            KVDirectory(path, FINGERPRINT)
        other.send_signal(signal.SIGKILL)
    KVDirectory(path, FINGERPRINT).close()


def test_closed_twice_and_from_another_thread(directory: KVDirectory) -> None:
    used: list[int] = []
    thread = threading.Thread(target=lambda: (directory.record(gone_entries=["eu"]), used.append(1), directory.close()))
    thread.start()
    thread.join()
    directory.close()
    assert used == [1]
    KVDirectory(directory.path.parent, FINGERPRINT).close()
    with pytest.raises(StoreWriteError):
        directory.record(gone_entries=["et"])


def test_a_path_that_cannot_be_used(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "nul\0"):
        with pytest.raises(StoreFileError, match="cannot be used"):
            KVDirectory(path, FINGERPRINT)
    (tmp_path / "a" / FINGERPRINT / "catalog.sqlite").mkdir(parents=True)
    with pytest.raises(StoreFileError, match="directory"):
        KVDirectory(tmp_path / "a", FINGERPRINT)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StoreFileError, match=rf"{tmp_path / 'b'}.*Permission denied"):
        KVDirectory(tmp_path / "b", FINGERPRINT)


def test_a_failed_opening_lets_go_of_the_lock(directory: KVDirectory, monkeypatch) -> None:
    directory.close()
    for module, name in ((catalog, "_read"), (files.KVFiles, "measure")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, lambda *_: (_ for _ in ()).throw(OSError("broken disk")))
            with pytest.raises(StoreFileError, match="broken disk"):
                KVDirectory(directory.path.parent, FINGERPRINT)
    again = KVDirectory(directory.path.parent, FINGERPRINT)
    assert len(again.contents().nodes) == 4
    again.close()


def test_opening_reads_no_kv(directory: KVDirectory, monkeypatch) -> None:
    shared = directory.contents().nodes[0].file
    many = [node(f"n{i}", f"n{i - 1}" if i % 6 else None, [i], shared, i % 6) for i in range(1000)]
    bare = {**entry("e", "n").labels, "segments": []}
    directory.record(nodes=many, entries=[entry(f"e{i}", f"n{i}")._replace(labels=bare) for i in range(1000)])
    directory.close()
    opened: list[str] = []
    really_open = os.open
    monkeypatch.setattr(os, "open", lambda path, *args: opened.append(str(path)) or really_open(path, *args))
    monkeypatch.setattr(files, "safe_open", None)
    again = KVDirectory(directory.path.parent, FINGERPRINT)
    assert len(again.contents().nodes) == len(again.contents().entries) + 1 == 1004
    assert opened and not any(path.endswith(".safetensors") for path in opened)
    again.close()


def test_a_look_from_outside(directory: KVDirectory) -> None:
    (directory.path.parent / "stray").mkdir()
    shutil.copytree(directory.path, directory.path.parent / "a copy")
    assert find_directories(directory.path.parent) == [directory.path]
    for missing in (directory.path / "none", directory.path / "lock"):
        with pytest.raises(StoreFileError, match=f"{missing.name} cannot be read"):
            find_directories(missing)
    size = {found.id: directory.files.records[found.file].num_bytes for found in directory.contents().nodes}

    def look() -> dict[str, tuple[int, int]]:
        before = {path: path.stat().st_mtime_ns for path in directory.path.iterdir() if path.suffix != ".sqlite-shm"}
        found = {peeked.entry.id: (peeked.num_tokens, peeked.num_bytes) for peeked in peek(directory.path).entries}
        after = {path: path.stat().st_mtime_ns for path in directory.path.iterdir() if path.suffix != ".sqlite-shm"}
        assert before == after
        return found

    while_open = look()
    assert while_open == {
        "es": (6, size["r"] // 2 * 2),
        "et": (7, size["r"] // 2 + size["t"]),
        "eu": (3, size["u"]),
    }
    directory.record(gone_entries=["eu"])
    assert look().keys() == {"es", "et"}
    directory.close()
    assert look().keys() == {"es", "et"}
    with pytest.raises(StoreFileError, match="none"):
        peek(directory.path / "none")
    (directory.path / "catalog.sqlite").write_bytes(b"x" * 5000)
    with pytest.raises(StoreFileError):
        peek(directory.path)


def test_a_look_sees_one_moment(directory: KVDirectory, monkeypatch) -> None:
    """A change of the catalog in the middle of a look is seen as a whole or not at all."""
    whole = catalog._digest

    def change_meanwhile(*args: object) -> bytes:
        monkeypatch.setattr(catalog, "_digest", whole)
        directory.record(gone_entries=["es", "et", "eu"])
        return whole(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(catalog, "_digest", change_meanwhile)
    assert {peeked.entry.id for peeked in peek(directory.path).entries} == {"es", "et", "eu"}
    assert peek(directory.path).entries == []


def test_another_version_is_set_aside(directory: KVDirectory) -> None:
    directory.close()
    for _ in range(2):
        with sqlite3.connect(directory.path / "catalog.sqlite") as database:
            database.execute("PRAGMA user_version = 99")
        database.close()
        with pytest.raises(StoreFileError, match="version 99; accepted is 1"):
            peek(directory.path)
        again = KVDirectory(directory.path.parent, FINGERPRINT)
        assert again.counts()["foreign"] == 1 and records(again) == {} and kv_files(again.path) == set()
        fill(again)
        again.close()
    assert (directory.path / "catalog.damaged").exists()
