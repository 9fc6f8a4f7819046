"""What a crash, a full disk or a flipped bit leaves on disk: the old state, the new one, or less; never a wrong one."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import UUID

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kept_prompts import Tokens, config_of, lookup, opened, reference
from semsharekv_integrations import StoreFileError
from semsharekv_integrations.errors import StoreWriteError
from semsharekv_integrations.store import KVStore, catalog, directory, files
from semsharekv_integrations.store.directory import COUNTS, KVDirectory
from semsharekv_integrations.store.records import FileRecord
from stored_kv import FINGERPRINT, Records, entry, fill, kv_files, node, records, tensors

NOTHING = dict.fromkeys(COUNTS, 0)
CALLS = {
    "open",
    "close",
    "fsync",
    "chmod",
    "replace",
    "unlink",
    "serialize_file",
    "execute",
    "executemany",
    "executescript",
}
CODE = {module.__file__ for module in (catalog, directory, files)}
Flips = list[tuple[float, int]]
Opening = Callable[[Path, str], Any]
PROMPTS: list[Tokens] = [(1, 2, 3, 4), (1, 2, 7)]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A filled directory, closed; not to be changed."""
    path = tmp_path_factory.mktemp("base")
    with closing(KVDirectory(path, FINGERPRINT)) as opened:
        fill(opened)
    return path


@pytest.fixture
def filled(base: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(base, tmp_path / "filled"))


@pytest.fixture(scope="module")
def written(base: Path) -> Records:
    return state_of(Path(shutil.copytree(base, base / "copy")))[0]


def restore(path: Path, source: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(source, path)


def kv_file(path: Path, node_id: str) -> Path:
    """The file that a node lies in, according to the catalog as it was written."""
    with closing(sqlite3.connect(path / FINGERPRINT / catalog.CATALOG)) as database:
        (file,) = database.execute("SELECT file FROM nodes WHERE id = ?", node_id).fetchone()
    return path / FINGERPRINT / f"{file}.safetensors"


def state_of(path: Path) -> tuple[Records, dict[str, int]]:
    """What is there when opened, and what was counted, after making sure that all of it holds together."""
    with closing(KVDirectory(path, FINGERPRINT)) as opened:
        found, counts = records(opened), opened.counts()
        check(opened)
    with closing(KVDirectory(path, FINGERPRINT)) as again:
        assert records(again) == found and again.counts() == NOTHING, "what was dropped is gone for good"
    return found, counts


def check(opened: KVDirectory) -> None:
    opened.check()
    used = {found.file for found in opened.contents().nodes}
    assert kv_files(opened.path) == used
    assert opened.num_bytes == sum((opened.path / f"{file}.safetensors").stat().st_size for file in used)
    nodes, needed = {found.id: found for found in opened.contents().nodes}, set()
    for found in opened.contents().entries:
        above: str | None = found.node
        while above is not None:
            needed.add(above)
            above = nodes[above].parent
    assert needed == nodes.keys()


def change(opened: KVDirectory) -> None:
    """A new file and node, a node that is split, one that goes with its entry and file."""
    shared = next(found.file for found in opened.contents().nodes if found.id == "r")
    file = opened.files.write(tensors(5), 5)
    nodes = [node("q", None, [1], shared), node("r", "q", [2, 3], shared, 1), node("v", "q", range(5), file)]
    opened.record(nodes=nodes, entries=[entry("ev", "v"), entry("es", "s", 9.0)], gone_nodes="u", gone_entries=["eu"])


@pytest.fixture
def same_ids(monkeypatch) -> None:
    monkeypatch.setattr(files.uuid, "uuid4", lambda: UUID(int=7))


def killed_at(step: int, path: Path, run: Callable[[Any], Any] | None, opening: Opening = KVDirectory) -> bool:
    """Open ``path`` in another process and run, or just open it; whether it came so far as to kill itself at a step.

    A step is before one of our calls to the system or to SQLite.
    """
    child = os.fork()
    if child == 0:
        steps = iter(range(step))

        def trace(frame: FrameType, event: str, called: Any) -> None:
            ours = frame.f_code.co_filename in CODE or getattr(called, "__name__", "") == "serialize_file"
            if event == "c_call" and ours and called.__name__ in CALLS and next(steps, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            if run is None:
                sys.setprofile(trace)
                opening(path, FINGERPRINT).close()
            else:
                opened = opening(path, FINGERPRINT)
                sys.setprofile(trace)
                run(opened)
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0, "what was to be killed failed by itself"
    return os.WIFSIGNALED(status)


@pytest.mark.usefixtures("same_ids")
def test_killed_at_every_step_of_a_change(filled: Path, base: Path, written: Records) -> None:
    seen = Counter[str]()
    assert not killed_at(10**6, filled, change)
    new = state_of(filled)[0]
    assert new != written
    for step in count():
        restore(filled, base)
        killed = killed_at(step, filled, change)
        found, counts = state_of(filled)
        assert found in (written, new), f"step {step}"
        assert counts == NOTHING | {"orphans": counts["orphans"]}
        seen["new" if found == new else "old"] += 1
        if not killed:
            break
    assert seen["old"] > 12 and seen["new"] > 1


DEEDS: dict[str, tuple[Callable[[KVStore], object], set[Tokens]]] = {
    "a longer prompt takes the place of one": (
        lambda store: store.put(reference((1, 2, 3, 4, 5, 6), document_starts={"e": 1})),
        {(1, 2, 3, 4, 5, 6), (1, 2, 7)},
    ),
    "one branches off": (lambda store: store.put(reference((1, 2, 3, 9))), {*PROMPTS, (1, 2, 3, 9)}),
    "one is forgotten whose file others need": (lambda store: store.forget("a", document_id="d0"), {(1, 2, 7)}),
    "all are forgotten": (lambda store: store.clear(), set()),
}


@pytest.mark.parametrize("deed", DEEDS)
def test_killed_at_every_step_of_what_a_store_does(tmp_path: Path, deed: str) -> None:
    """All that it changes is there afterwards, or nothing: a prompt never beside the one whose place it took."""
    with closing(opened(config_of(0, directory=tmp_path / "before"))) as store:
        for n, tokens in enumerate(PROMPTS):
            assert store.put(reference(tokens, document_starts={f"d{n}": 0}))
    run, left = DEEDS[deed]
    seen = Counter[bool]()
    for step in count():
        restore(tmp_path / "now", tmp_path / "before")
        killed = killed_at(step, tmp_path / "now", run, lambda path, _: opened(config_of(0, directory=path)))
        with closing(opened(config_of(0, directory=tmp_path / "now"))) as store:
            store.check()
            found = {tuple(kept.token_ids.tolist()) for kept in store.references()}
            assert found in (set(PROMPTS), left), f"step {step}"
            assert all(lookup(store, tokens) == len(tokens) for tokens in found)
        seen[found == left] += 1
        if not killed:
            break
    assert seen[False] > 2 and seen[True] > 0


@pytest.mark.parametrize(("harm", "left"), [("drop", 5), ("spoil", 0)])
def test_killed_at_every_step_of_an_opening(filled: Path, base: Path, written: Records, harm: str, left: int) -> None:
    """One that drops a vanished file and what hangs on it, and one that sets the catalog aside."""
    for step in count():
        restore(filled, base)
        if harm == "spoil":
            (filled / FINGERPRINT / catalog.CATALOG).write_bytes(b"spoiled" * 1000)
        else:
            kv_file(filled, "t").unlink()
        killed = killed_at(step, filled, None)
        found, _ = state_of(filled)
        assert found.items() <= written.items() and len(found) == left
        if not killed:
            break
    assert step > 5


def test_killed_at_any_moment(filled: Path, base: Path) -> None:
    """What ``record`` has returned from is there after a kill, and the next change as a whole or not at all."""
    for delay_s in (0.0, 0.003, 0.01, 0.02, 0.04):
        restore(filled, base)
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            opened = KVDirectory(filled, FINGERPRINT)
            for n in count():
                file = opened.files.write(tensors(3, seed=n), 3)
                gone = [f"v{n - 1}"] if n else []
                opened.record(
                    nodes=[node(f"v{n}", "r", [n] * 3, file)],
                    entries=[entry("ev", f"v{n}", hits=n)],
                    gone_nodes=gone,
                )
                os.write(send, b".")
        os.close(send)
        os.read(receive, 1)
        time.sleep(delay_s)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while os.read(receive, 1 << 16):
            pass
        os.close(receive)
        found, counts = state_of(filled)
        n = int(found["entry ev"][4])
        assert found[f"node v{n}"][3] == (n, n, n) and len(found) == 9 and counts["vanished"] == counts["damaged"] == 0
        with closing(KVDirectory(filled, FINGERPRINT)) as opened:
            read = opened.files.read(found[f"node v{n}"][4])
            assert torch.equal(read["0.keys"], tensors(3, seed=n)["0.keys"])


def test_files_that_are_not_as_written(filled: Path, base: Path) -> None:
    whole = kv_file(base, "t").read_bytes()
    for content, counted in (
        (None, "vanished"),
        (b"", "damaged"),
        (whole[:9], "damaged"),
        (whole[:-1], "damaged"),
        (whole + b"x", "damaged"),
    ):
        restore(filled, base)
        path = kv_file(filled, "t")
        with closing(KVDirectory(filled, FINGERPRINT)) as opened:
            path.unlink() if content is None else path.write_bytes(content)
            with pytest.raises(StoreFileError, match=path.name):
                opened.files.read(path.stem)
            assert opened.counts() == NOTHING | {counted: 1}
        found, counts = state_of(filled)
        assert "node t" not in found and "entry et" not in found and len(found) == 5
        assert counts == NOTHING | {counted: 1, "orphans": 2}


def test_files_of_another_model_or_in_anothers_place(filled: Path, tmp_path: Path) -> None:
    """They have the right size, and a right digest; what they say of themselves is what gives them away."""
    with closing(KVDirectory(tmp_path / "other", "cd34")) as opened:
        fill(opened)
        theirs = {found.id: opened.path / f"{found.file}.safetensors" for found in opened.contents().nodes}
    with closing(KVDirectory(filled, FINGERPRINT)) as opened:
        twin = opened.files.write(tensors(4, seed=9), 4)
        opened.record(nodes=[node("v", None, [5] * 4, twin)], entries=[entry("ev", "v")])
        shutil.copy(theirs["t"], kv_file(filled, "t"))
        with pytest.raises(StoreFileError, match="fingerprint 'cd34'; accepted is 'ab12'"):
            opened.files.read(kv_file(filled, "t").stem)
        shutil.copy(kv_file(filled, "v"), kv_file(filled, "t"))
        with pytest.raises(StoreFileError, match=f"file '{twin}'"):
            opened.files.read(kv_file(filled, "t").stem)
        assert opened.counts() == NOTHING | {"foreign": 2}


def test_a_whole_directory_of_another_model(filled: Path) -> None:
    (filled / FINGERPRINT).rename(filled / "cd34")
    with closing(KVDirectory(filled, "cd34")) as opened:
        assert records(opened) == {} and opened.counts()["damaged"] == 10
        assert kv_files(opened.path) == set()


def test_orphans_are_deleted_and_strangers_left_alone(filled: Path, written: Records) -> None:
    path = filled / FINGERPRINT
    for name in (f"{'0' * 32}.safetensors", ".tmpAbCdEf", f".tmp{'0' * 32}"):
        (path / name).write_bytes(b"x")
    for name in ("model.safetensors", "notes.txt"):
        (path / name).write_bytes(b"x")
    with closing(KVDirectory(filled, FINGERPRINT)) as opened:
        assert opened.counts() == NOTHING | {"orphans": 3} and records(opened) == written
    assert {"model.safetensors", "notes.txt"} <= {item.name for item in path.iterdir()}
    assert not list(path.glob("000*")) + list(path.glob(".tmp*"))


def test_rows_that_do_not_fit_together(filled: Path, written: Records) -> None:
    """Dangling parents, entries without a node, circles, and namespaces that mix: never written by a sane caller."""
    with closing(KVDirectory(filled, FINGERPRINT)) as opened:
        file = opened.contents().nodes[0].file
        opened.record(
            nodes=[
                node("v", "missing", [1], file),
                node("w", "x", [1], file),
                node("x", "w", [1], file),
                node("y", "r", [1], file, namespace="b"),
                node("z", "r", [1], file),
            ],
            entries=[
                entry("e1", "v"),
                entry("e2", "w"),
                entry("e3", "y", namespace="b"),
                entry("e4", "missing"),
                entry("e5", "r", namespace="b"),
            ],
        )
    found, counts = state_of(filled)
    assert found == written and counts == NOTHING | {"orphans": 10}


flips = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=3)


def flipped(content: bytes, places: Flips) -> bytes:
    changed = bytearray(content)
    for share, bit in places:
        changed[int(share * len(changed))] ^= 1 << bit
    return bytes(changed)


@settings(max_examples=300)
@given(places=st.one_of(flips, flips.map(lambda places: [(share / 4, bit) for share, bit in places])))
def test_flipped_bits_in_a_kv_file(base: Path, places: Flips) -> None:
    """Of two ranges: anywhere, and the first quarter, which is the header."""
    path, counts = base.parent / "flips", Counter[str]()
    path.mkdir(exist_ok=True)
    content = kv_file(base, "s").read_bytes()
    record = FileRecord(kv_file(base, "s").stem, 6, len(content))
    (path / f"{record.id}.safetensors").write_bytes(changed := flipped(content, places))
    try:
        kept = files.KVFiles(path, FINGERPRINT, counts)
        kept.records[record.id] = record
        found = kept.read(record.id)
    except StoreFileError:
        assert counts.total() == 1
    else:
        assert changed == content or not counts
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors(6, seed=6).items())


@pytest.fixture(scope="module")
def crashed(base: Path) -> tuple[Path, list[Records]]:
    """A copy of a directory that is open, and its states: all but the first are in the log alone."""
    source, path = base.parent / "source", base.parent / "crashed"
    shutil.copytree(base, source)
    with closing(KVDirectory(source, FINGERPRINT)) as opened:
        states = [records(opened)]
        change(opened)
        states.append(records(opened))
        shutil.copytree(source, path)
    return path, states


@settings(max_examples=100)
@given(places=flips, cut=st.none() | st.floats(0, 1), name=st.sampled_from(["closed", "crashed", "log"]))
@example(places=[], cut=None, name="log")
@example(places=[], cut=0.0, name="closed")
def test_damage_to_the_catalog(
    base: Path, written: Records, crashed: tuple[Path, list[Records]], places: Flips, cut: float | None, name: str
) -> None:
    source, states = (base, [written]) if name == "closed" else crashed
    path = base.parent / "harmed"
    restore(path, source)
    harmed = path / FINGERPRINT / (catalog.CATALOG + ("-wal" if name == "log" else ""))
    content = flipped(harmed.read_bytes(), places)
    harmed.write_bytes(content if cut is None else content[: int(cut * len(content))])
    found, counts = state_of(path)
    assert all(any(state.get(key) == record for state in states) for key, record in found.items())
    assert found == states[-1] or any(counts.values())


@pytest.mark.parametrize(
    ("at", "harm"),
    [
        (b"first INTEGER", b"\xe6irst INTEGER"),  # no text
        (b"CREATE TABLE nodes", b"\xc3REATE TABLE nodes"),
        (b"num_tokens INTEGER, ", b"num_tokens INTEGER  "),  # one column less
        (b"\x10\x00\x02\x02", b"\x10\x00\x03\x02"),  # a version of SQLite's that may be read and not written
    ],
)
def test_a_damaged_head_of_the_catalog(filled: Path, at: bytes, harm: bytes) -> None:
    file = filled / FINGERPRINT / catalog.CATALOG
    whole = file.read_bytes()
    assert at in whole
    file.write_bytes(whole.replace(at, harm, 1))
    assert state_of(filled) == ({}, NOTHING | {"damaged": 1, "orphans": 3})


def test_a_damaged_row_costs_no_other(filled: Path, written: Records) -> None:
    """Not even if its text is none any more; the entry goes, and the node and the file that nobody else needs."""
    file = filled / FINGERPRINT / catalog.CATALOG
    file.write_bytes(file.read_bytes().replace(b'"session"', b'\xa2session"', 1))
    found, counts = state_of(filled)
    assert found.items() <= written.items() and len(found) == 5
    assert counts == NOTHING | {"damaged": 1, "orphans": 2}


def test_a_full_disk(filled: Path, written: Records, monkeypatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*args: object, **_: object) -> None:
        raise full

    def half(tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise files.SafetensorError("No space left on device")

    with closing(KVDirectory(filled, FINGERPRINT)) as opened:
        before = opened.num_bytes
        faults = [(files, "save_file", half), (files, "save_file", fail), (os, "fsync", fail), (os, "replace", fail)]
        for n, (module, name, fault) in enumerate([*faults, (os, "chmod", fail)], 1):
            with monkeypatch.context() as patched:
                patched.setattr(module, name, fault)
                with pytest.raises(StoreWriteError, match=r"safetensors could not be written: .*No space left"):
                    opened.files.write(tensors(3), 3)
            assert opened.counts()["write_failed"] == n
            check(opened)
        assert opened.num_bytes == before and records(opened) == written
        with monkeypatch.context() as patched:
            patched.setattr(files, "_sync", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                opened.files.write(tensors(3), 3)
        check(opened)
    assert state_of(filled) == (written, NOTHING)


def test_a_catalog_that_cannot_be_written(filled: Path, written: Records, monkeypatch) -> None:
    with closing(KVDirectory(filled, FINGERPRINT)) as opened:
        before = opened.num_bytes
        with closing(sqlite3.connect(filled / FINGERPRINT / catalog.CATALOG)) as other:
            other.execute("BEGIN IMMEDIATE")
            opened._catalog._db.execute("PRAGMA busy_timeout = 1")
            with pytest.raises(StoreWriteError, match=r"catalog.sqlite could not be written: .*locked"):
                opened.record(gone_nodes="u", gone_entries=["eu"])
        opened._catalog._db.execute("PRAGMA max_page_count = 1")
        with pytest.raises(StoreWriteError, match="full"):
            opened.record(entries=[entry(f"e{n}", "r") for n in range(500)], gone_nodes="u", gone_entries=["eu"])
        with pytest.raises(StoreWriteError):
            opened.record(entries=[entry("e", "r", namespace="\ud800")], gone_nodes="u", gone_entries=["eu"])
        assert opened.counts() == NOTHING | {"write_failed": 3}
        assert opened.num_bytes == before and records(opened) == written
        check(opened)
        opened._catalog._db.execute("PRAGMA max_page_count = 100000")
        opened.record(gone_nodes="u", gone_entries=["eu"])
        check(opened)
    assert len(state_of(filled)[0]) == 5


def test_a_full_disk_is_no_damage(filled: Path, written: Records, monkeypatch) -> None:
    """Nothing is thrown away because it could not be read for reasons that pass."""

    def fail(*_: object) -> None:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(catalog, "_create_tables", fail)
        with pytest.raises(StoreFileError, match="disk is full"):
            KVDirectory(filled, FINGERPRINT)
    assert state_of(filled) == (written, NOTHING)


def test_a_file_that_cannot_be_deleted_is_an_orphan(filled: Path, monkeypatch) -> None:
    opened = KVDirectory(filled, FINGERPRINT)
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", lambda *_: (_ for _ in ()).throw(PermissionError("busy")))
        opened.record(gone_nodes="u", gone_entries=["eu"])
        opened.check()
        opened.close()
    assert state_of(filled)[1] == NOTHING | {"orphans": 1}
