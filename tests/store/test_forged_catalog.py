"""Odd values under right digests, which need no key: whatever a catalog says, nothing crashes or answers wrongly."""

from __future__ import annotations

import json
import shutil
import sqlite3
from argparse import Namespace
from collections.abc import Callable
from contextlib import closing, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kept_prompts import FINGERPRINT, Clock, config_of, lookup, opened, put_all, runs_of
from semsharekv_integrations.cli import store as store_command
from semsharekv_integrations.kv import Segment
from semsharekv_integrations.store.catalog import _TABLES, CATALOG, _digest
from semsharekv_integrations.store.directory import KVDirectory, peek
from semsharekv_integrations.store.records import keep_rooted

PROMPTS = [(1, 2, 3, 4, 5), (1, 2, 3, 6), (9, 9, 9)]
COLUMNS = {table.name: [part.split()[0] for part in table.columns.split(", ")] for table in _TABLES}
LABELS = ("document_starts", "document_stops", "segments", "session", "pinned", "expires_after_s")
Forge = Callable[[Any], Any]

names = st.sampled_from(["", "x", "../../etc/passwd", "/etc/passwd", "\0", "\x1b[2J", "a/b", "\u202e"])
numbers = st.sampled_from([-1, -(2**62), 2**62, 0, 10**15, 1e308, -1e300, float("inf"), float("nan"), 0.5])
blobs = st.sampled_from([b"", b"x", b"\xff" * 8, b"\xff\xff\xff\x7f" * 11, b"\1\0\0\0" * 2])
values = st.one_of(st.none(), names, numbers, blobs)
leaves = st.one_of(st.none(), st.booleans(), names, numbers, st.just(10**400))
odd_json = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=2))
texts = st.sampled_from(["{", "[]", "null", "{}", '"x"', "[" * 50_000 + "]" * 50_000, '{"pinned": ' + "9" * 5000 + "}"])
labels = st.tuples(st.sampled_from(LABELS), odd_json)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("forged") / "base"
    clock = Clock()
    with closing(opened(config_of(directory=path), clock)) as store:
        put_all(store, clock, PROMPTS, document_starts={"d": 1}, segments=(Segment("d", 1, 3),), session="s")
    return path


def forge(path: Path, table: str, column: str, change: Forge, rows: int) -> None:
    """Change one column of some rows, and make the digests right again."""
    with closing(sqlite3.connect(path / FINGERPRINT / CATALOG, isolation_level=None)) as database:
        for row in database.execute(f"SELECT * FROM {table}").fetchall()[:rows]:
            found = dict(zip(COLUMNS[table], row, strict=False)) | {"digest": None}
            found[column] = change(found[column])
            try:
                places = ", ".join("?" * len(found))
                database.execute(f"DELETE FROM {table} WHERE id = ?", (row[0],))
                database.execute(f"INSERT INTO {table} VALUES ({places})", tuple(found.values()))
            except (sqlite3.Error, OverflowError, UnicodeEncodeError):
                continue  # SQLite itself takes no such value
            (*stored, _) = database.execute(f"SELECT * FROM {table} WHERE id IS ?", (found["id"],)).fetchone()
            digest = _digest(FINGERPRINT, table, stored)
            database.execute(f"UPDATE {table} SET digest = ? WHERE id IS ?", (digest, found["id"]))


def assert_harmless(path: Path) -> None:
    """Looked into, opened, asked, told to forget and closed: no error, and only KV that belongs to its tokens."""
    entries = peek(path / FINGERPRINT).entries
    for as_json in (False, True):
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            asked = Namespace(directory=path, namespace=None, document=None, json=as_json, last=False)
            store_command.run_inspect(asked)
    clock = Clock()
    store = opened(config_of(0, directory=path), clock)
    assert len(store.references()) <= len(entries)
    for tokens in PROMPTS:
        lookup(store, tokens)
        runs_of(store, (0, *tokens))
    store.check()
    put_all(store, clock, [(1, 2, 3, 4, 8)])
    assert lookup(store, (1, 2, 3, 4, 8)) == 5
    store.forget("a", document_id="d")
    store.check()
    store.close()
    again = opened(config_of(directory=path), clock)
    assert not any(again.stats()[f"disk_{name}"] for name in ("damaged", "orphans", "vanished"))
    again.check()
    again.close()


def harmed(base: Path, table: str, column: str, change: Forge, rows: int) -> None:
    path = base.parent / "harmed"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(base, path)
    forge(path, table, column, change, rows)
    assert_harmless(path)


@settings(max_examples=60)
@given(data=st.data(), rows=st.integers(1, 4))
def test_odd_values_in_any_column(base: Path, data: st.DataObject, rows: int) -> None:
    table = data.draw(st.sampled_from(sorted(COLUMNS)))
    column = data.draw(st.sampled_from(COLUMNS[table]))
    value = data.draw(texts if column == "labels" else values)
    harmed(base, table, column, lambda _: value, rows)


@settings(max_examples=60)
@given(label=labels, rows=st.integers(1, 4))
def test_odd_labels(base: Path, label: tuple[str, Any], rows: int) -> None:
    name, value = label
    harmed(base, "entries", "labels", lambda old: json.dumps({**json.loads(old), name: value}), rows)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_node_lies_in_a_file_behind_its_parent_and_nowhere_else(base: Path, first: int) -> None:
    """Else it would have the KV of other tokens."""
    with closing(KVDirectory(Path(shutil.copytree(base, base.parent / f"first {first}")), FINGERPRINT)) as directory:
        nodes = directory.contents().nodes
    for node in nodes:
        kept = keep_rooted([each._replace(first=first) if each is node else each for each in nodes])
        assert (len(kept) == len(nodes)) == (node.first == first), "with no change there is none"
        assert node.first == first or node.id not in {each.id for each in kept}
    assert any(node.first for node in nodes), "a file of several nodes"


@pytest.mark.parametrize(
    ("table", "column", "change"),
    [
        ("nodes", "parent", lambda _: "self"),
        ("nodes", "first", lambda first: str(first)),
        ("files", "id", lambda id: f"../{id}"),
        ("files", "num_tokens", lambda number: number + 2**40),
        ("entries", "labels", lambda old: old.replace("null", "NaN")),
    ],
)
def test_what_is_damaged_is_counted_and_gone(base: Path, table: str, column: str, change: Forge) -> None:
    path = base.parent / "counted"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(base, path)
    forge(path, table, column, change, 9)
    with closing(opened(config_of(directory=path))) as store:
        counts = store.stats()
        assert store.references() == [] or column == "first", "SQLite makes a number of it again"
        assert column == "first" or counts["disk_damaged"] + counts["disk_orphans"] > 0
