"""``semsharekv inspect`` and ``semsharekv clear``: what they show, what they delete, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kept_prompts import FINGERPRINT, Clock, Tokens, config_of, lookup, opened, reference, tainted
from semsharekv_integrations.cli.main import main
from semsharekv_integrations.store import KVStore, files
from semsharekv_integrations.store.catalog import CATALOG, DAMAGED
from stored_kv import kv_files

NOW_S = 2e9  # of the wall clock
OTHER = "cd34" * 8
STORED: dict[str, tuple[Tokens, dict[str, Any]]] = {  # as they are put
    "flood": ((11111, 22222, 33333, 44444), {"document_starts": {"flood": 1, "vote": 2}, "session": "s"}),
    "fire": ((11111, 22222, 55555), {"document_starts": {"fire": 0}, "pinned": True, "expires_after_s": 9e9}),
    "theirs": ((11111, 22222, 33333, 66666), {"namespace": "b", "document_starts": {"theirs": 0, "flood": 0}}),
}
TOKENS = {token for tokens, _ in STORED.values() for token in tokens}
IDS = {name: reference(tokens, labels.get("namespace", "a")).id for name, (tokens, labels) in STORED.items()}
NAMES = {id: name for name, id in IDS.items()}


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_sync", lambda path: None)
    monkeypatch.setattr("time.time", lambda: NOW_S)
    monkeypatch.setenv("COLUMNS", "200")


def opened_at(path: Path, age_s: float = 0.0) -> tuple[KVStore, Clock]:
    clock = Clock()
    clock.wall_offset_s = NOW_S - age_s
    return opened(config_of(directory=path), clock), clock


def fill(store: KVStore, clock: Clock) -> None:
    """What is in ``STORED``, a minute each; the first is used twice, then something approximate comes."""
    for tokens, labels in STORED.values():
        assert store.put(reference(tokens, **labels))
        clock.now_s += 60
    for _ in range(2):
        assert lookup(store, STORED["fire"][0]) == 3
    clock.now_s += 60
    assert store.put(tainted((7, 7, 7)))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """All in ``STORED``, used up to four hours ago: ``theirs`` 4 h 1 min, ``flood`` 4 h 3 min, ``fire`` 4 h ago."""
    path = tmp_path / "kv"
    store, clock = opened_at(path, 4 * 3600 + 180)
    fill(store, clock)
    store.close()
    return path


def run(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


Captured = pytest.CaptureFixture[str]


def listed(capsys: Captured, directory: Path, *options: str) -> list[dict[str, Any]]:
    """What ``inspect --json`` tells of the one model."""
    assert run("inspect", directory, "--json", *options) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    ((model, entries),) = json.loads(captured.out).items()
    assert model == FINGERPRINT
    return entries


def names(entries: list[dict[str, Any]]) -> list[str]:
    return [NAMES.get(entry["id"], "another") for entry in entries]


def served(directory: Path) -> set[str]:
    """What a store finds when it opens the directory, its KV compared."""
    store, _ = opened_at(directory)
    store.check()
    found = {NAMES[kept.id] for kept in store.references()}
    for name in found:
        tokens, labels = STORED[name]
        assert lookup(store, tokens, labels.get("namespace", "a")) == len(tokens)
    store.close()
    return found


class TestInspect:
    def test_json_tells_what_is_stored_the_latest_use_first(self, capsys: Captured, directory: Path) -> None:
        entries = listed(capsys, directory)
        assert names(entries) == ["fire", "theirs", "flood"]
        fire, theirs, flood = entries
        assert [entry["namespace"] for entry in entries] == ["a", "b", "a"]
        assert [entry["tier"] for entry in entries] == ["disk"] * 3
        assert flood["documents"] == ["flood", "vote"] and (flood["session"], fire["session"]) == ("s", None)
        assert [entry["pinned"] for entry in entries] == [True, False, False]
        assert [entry["expires_after_s"] for entry in entries] == [9e9, None, None]
        assert [entry["uses"] for entry in entries] == [2, 0, 0]
        assert [NOW_S - entry["last_used_s"] for entry in entries] == [4 * 3600, 4 * 3600 + 60, 4 * 3600 + 180]
        assert [entry["tokens"] for entry in entries] == [3, 4, 4]
        sizes = [path.stat().st_size for path in (directory / FINGERPRINT).glob("*.safetensors")]
        assert all(min(sizes) < entry["kv_bytes"] < sum(sizes) for entry in (flood, fire))
        assert theirs["kv_bytes"] in sizes, "it shares with no other"

    def test_the_table_tells_the_same(self, capsys: Captured, directory: Path) -> None:
        assert run("inspect", directory) == 0
        title, _, header, _, *rows, _ = capsys.readouterr().out.splitlines()
        assert FINGERPRINT in title and "tier disk" in title
        columns = ("namespace", "entry", "tokens", "KV", "documents", "session", "pinned", "uses", "last used")
        assert tuple(cell.strip() for cell in header.strip("┃").split("┃")) == columns
        cells = [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]
        assert cells == [
            ["a", IDS["fire"], "3", "0.0 MiB", "fire", "", "yes", "2", "4 h ago"],
            ["b", IDS["theirs"], "4", "0.0 MiB", "flood, theirs", "", "", "0", "4 h ago"],
            ["a", IDS["flood"], "4", "0.0 MiB", "flood, vote", "s", "", "0", "4 h ago"],
        ]

    @pytest.mark.parametrize(
        ("options", "left"),
        [
            (("--namespace", "a"), ["fire", "flood"]),
            (("--namespace", "b"), ["theirs"]),
            (("--namespace", ""), []),
            (("--document", "flood"), ["theirs", "flood"]),
            (("--document", "vote"), ["flood"]),
            (("--document", "vot"), []),
            (("--namespace", "a", "--document", "flood"), ["flood"]),
            (("--namespace", "b", "--document", "fire"), []),
        ],
    )
    def test_filters(self, capsys: Captured, directory: Path, options: tuple[str, ...], left: list[str]) -> None:
        assert names(listed(capsys, directory, *options)) == left
        assert run("inspect", directory, *options) == 0
        assert ("No entry fits." in capsys.readouterr().out) == (not left)

    def test_neither_text_nor_tokens_are_shown(self, capsys: Captured, directory: Path) -> None:
        for options in ((), ("--json",)):
            assert run("inspect", directory, *options) == 0
            shown = capsys.readouterr().out
            assert not any(str(token) in shown for token in TOKENS)

    def test_names_are_shown_as_they_are_and_tell_the_terminal_nothing(self, capsys: Captured, tmp_path: Path) -> None:
        store, _ = opened_at(tmp_path)
        named = {"document_starts": {"[bold]d[/]": 0, "é\n\x1b[2J": 0}, "session": "[red]"}
        store.put(reference((1, 2), "[/]:smile:\x9b", **named))
        store.close()
        assert run("inspect", tmp_path) == 0
        shown = capsys.readouterr().out
        for name in ("[bold]d[/]", "é\\n\\x1b[2J", "[red]", "[/]:smile:\\x9b"):
            assert name in shown
        assert "\x1b[2J" not in shown and "\x9b" not in shown
        assert run("inspect", tmp_path, "--json") == 0
        ((entry,),) = json.loads(capsys.readouterr().out).values()
        assert (entry["namespace"], entry["session"]) == ("[/]:smile:\x9b", "[red]")

    @pytest.mark.parametrize(
        ("age_s", "shown"), [(-5, "0 s"), (59, "59 s"), (60, "1 min"), (7200, "2 h"), (86400 * 3, "3 d")]
    )
    def test_ages(self, capsys: Captured, tmp_path: Path, age_s: float, shown: str) -> None:
        store, _ = opened_at(tmp_path, age_s)
        store.put(reference((1, 2)))
        store.close()
        assert run("inspect", tmp_path) == 0
        assert f" {shown} ago " in capsys.readouterr().out

    def test_an_empty_directory_is_told_from_a_missing_one(self, capsys: Captured, tmp_path: Path) -> None:
        tmp_path.joinpath("stray [file]").touch()
        assert run("inspect", tmp_path) == 0
        assert capsys.readouterr().out == f"Nothing is stored in {tmp_path}.\n"
        assert run("inspect", tmp_path, "--json") == 0
        assert capsys.readouterr().out == "{}\n"

    @pytest.mark.parametrize("command", ["inspect", "clear"])
    def test_a_path_that_is_no_directory_is_an_error(self, capsys: Captured, tmp_path: Path, command: str) -> None:
        tmp_path.joinpath("file").touch()
        for missing in ("none", "file"):
            assert run(command, tmp_path / missing) == 2
            captured = capsys.readouterr()
            assert captured.out == "" and f"{tmp_path / missing} cannot be read" in " ".join(captured.err.split())
            assert captured.err.startswith("error:") and "Traceback" not in captured.err

    def test_a_directory_in_use_is_listed_as_it_is(self, capsys: Captured, directory: Path) -> None:
        store, _ = opened_at(directory)
        assert names(listed(capsys, directory)) == ["fire", "theirs", "flood"]
        store.forget("b")
        assert names(listed(capsys, directory)) == ["fire", "flood"]
        store.put(reference((1, 2, 3)))
        store.check()
        store.close()
        assert len(listed(capsys, directory)) == 3

    def test_a_damaged_catalog_hides_no_other_model(self, capsys: Captured, directory: Path) -> None:
        directory.joinpath(OTHER).mkdir()
        directory.joinpath(OTHER, CATALOG).write_bytes(b"x" * 5000)
        for options in (("--json",), ()):
            assert run("inspect", directory, *options) == 2
            captured = capsys.readouterr()
            assert all(name in captured.out for name in STORED) and OTHER[:12] not in captured.out
            assert f"{directory / OTHER} cannot be read" in " ".join(captured.err.split())
        assert "Nothing" not in captured.out

    def test_damaged_records_are_left_out_and_counted(self, capsys: Captured, directory: Path) -> None:
        catalog = directory / FINGERPRINT / CATALOG
        catalog.write_bytes(catalog.read_bytes().replace(b'"session": "s"', b'"session": "t"'))
        assert run("inspect", directory, "--json") == 0
        captured = capsys.readouterr()
        assert names(json.loads(captured.out)[FINGERPRINT]) == ["fire", "theirs"]
        said = " ".join(captured.err.split())
        assert str(directory / FINGERPRINT) in said and "2 records that are damaged" in said


class TestClear:
    @pytest.mark.parametrize(
        ("options", "left"),
        [
            ((), set()),
            (("--namespace", "a"), {"theirs"}),
            (("--namespace", "b"), {"flood", "fire"}),
            (("--namespace", "c"), {"flood", "fire", "theirs"}),
            (("--namespace", "a", "--document", "flood"), {"fire", "theirs"}),
            (("--namespace", "b", "--document", "flood"), {"flood", "fire"}),
            (("--namespace", "a", "--document", "theirs"), {"flood", "fire", "theirs"}),
            (("--namespace", "a", "--session", "s"), {"fire", "theirs"}),
            (("--namespace", "b", "--session", "s"), {"flood", "fire", "theirs"}),
            (("--namespace", "a", "--session", "s", "--document", "fire"), {"flood", "fire", "theirs"}),
        ],
    )
    def test_what_is_chosen_is_gone_and_the_rest_is_served(
        self, capsys: Captured, directory: Path, options: tuple[str, ...], left: set[str]
    ) -> None:
        files_before = kv_files(directory / FINGERPRINT)
        assert run("clear", directory, *options) == 0
        assert capsys.readouterr().out == f"{len(STORED) - len(left)} entries deleted from {directory}.\n"
        assert set(names(listed(capsys, directory))) == left
        assert served(directory) == left
        assert len(files_before) == 3, "one has what two begin with, and the rest of the first of these"
        assert len(kv_files(directory / FINGERPRINT)) == (
            len(left) if "flood" in left or not left else len(left) + ("fire" in left)
        )

    def test_nothing_of_what_is_gone_is_left_on_disk(self, directory: Path) -> None:
        """Neither its KV, nor its tokens, nor its names."""
        assert run("clear", directory, "--namespace", "a", "--document", "flood") == 0
        assert found_in(directory, STORED["flood"][0][3], "vote") == set()
        assert found_in(directory, STORED["fire"][0][2], "fire") == {CATALOG}
        assert run("clear", directory) == 0
        for tokens, labels in STORED.values():
            for token in tokens:
                assert found_in(directory, token, next(iter(labels["document_starts"]))) == set()

    def test_every_model_is_cleared(self, capsys: Captured, directory: Path) -> None:
        store = KVStore(config_of(directory=directory))
        store.open(OTHER, reference((1,)).layers[0].keys.dtype, reference((1,)).layers[0].keys.device)
        store.put(reference((1, 2, 3)))
        store.close()
        assert run("clear", directory, "--namespace", "a") == 0
        assert capsys.readouterr().out.startswith("3 entries deleted")
        assert kv_files(directory / OTHER) == set() != kv_files(directory / FINGERPRINT)

    @pytest.mark.parametrize("first", [True, False])
    def test_a_directory_in_use_is_refused_as_a_whole(
        self, capsys: Captured, directory: Path, tmp_path: Path, first: bool
    ) -> None:
        """Whichever of its models it is that is in use."""
        other = "00" if first else "ff"
        store = KVStore(config_of(directory=directory))
        store.open(other, reference((1,)).layers[0].keys.dtype, reference((1,)).layers[0].keys.device)
        store.put(reference((1, 2, 3)))
        assert run("clear", directory) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and f"{directory / other} is in use by another process" in " ".join(
            captured.err.split()
        )
        store.check()
        assert len(store.references()) == 1
        store.close()
        assert served(directory) == set(STORED)

    @pytest.mark.parametrize("option", ["document", "session"])
    def test_a_document_or_session_needs_its_namespace(self, capsys: Captured, directory: Path, option: str) -> None:
        assert run("clear", directory, f"--{option}", "s") == 2
        captured = capsys.readouterr()
        said = " ".join(captured.err.split())
        assert captured.out == "" and "namespace is None; accepted is" in said and option in said
        assert served(directory) == set(STORED)

    def test_an_empty_directory_is_cleared_of_nothing(self, capsys: Captured, tmp_path: Path) -> None:
        tmp_path.joinpath("notes").mkdir()
        tmp_path.joinpath("notes", CATALOG).touch()
        assert run("clear", tmp_path) == 0
        assert capsys.readouterr().out == f"0 entries deleted from {tmp_path}.\n"
        assert [path.name for path in tmp_path.rglob("*")] == ["notes", CATALOG], "what is not ours is left alone"

    @pytest.mark.parametrize("harm", ["spoil", "remove"])
    def test_a_damaged_catalog_goes_with_all_that_it_named(self, capsys: Captured, directory: Path, harm: str) -> None:
        """And the command says so: whatever was chosen, nothing else can be told apart any more."""
        catalog, kept = directory / FINGERPRINT / CATALOG, kv_files(directory / FINGERPRINT)
        HARM[harm](catalog)
        assert run("clear", directory, "--namespace", "b") == 0
        removed, as_well = capsys.readouterr().out.splitlines()
        assert removed == f"0 entries deleted from {directory}."
        assert as_well.startswith(f"{len(kept) + (harm == 'spoil')} files and records that were damaged")
        assert kv_files(directory / FINGERPRINT) == set() and not catalog.with_name(DAMAGED).exists()
        assert found_in(directory, STORED["flood"][0][3], "vote") == set()


HARM: dict[str, Callable[[Path], object]] = {
    "spoil": lambda path: path.write_bytes(path.read_bytes()[:64] + b"x" * 36 + path.read_bytes()[100:]),
    "remove": lambda path: path.unlink(),
}


def found_in(directory: Path, token: int, name: str) -> set[str]:
    """The names of the files that have a token as the catalog writes it, or a name."""
    wanted = np.array([token], "<i4").tobytes(), name.encode()
    return {
        path.name for path in directory.rglob("*") if path.is_file() and any(w in path.read_bytes() for w in wanted)
    }


def test_an_engine_forgets_a_catalog_that_was_set_aside(tmp_path: Path) -> None:
    """It cannot be told whose it was."""
    forget: Callable[[KVStore], object]
    for forget in (lambda store: store.forget("a", document_id="x"), KVStore.clear):
        store, clock = opened_at(tmp_path)
        fill(store, clock)
        store.close()
        HARM["spoil"](tmp_path / FINGERPRINT / CATALOG)
        store, _ = opened_at(tmp_path)
        aside = tmp_path / FINGERPRINT / DAMAGED
        assert aside.exists() and found_in(tmp_path, STORED["flood"][0][3], "vote") == {DAMAGED}
        forget(store)
        assert not aside.exists()
        store.check()
        store.close()


@pytest.mark.parametrize("way", ["forget", "clear", "expire"])
def test_what_a_running_store_has_dropped_is_on_disk_no_more(tmp_path: Path, way: str) -> None:
    """Nor in the log of the catalog, which is emptied for it."""
    store, clock = opened_at(tmp_path)
    store.put(reference((1, 77777, 3), document_starts={"vote": 0}, expires_after_s=5.0))
    store.put(reference((1, 5, 6)))
    assert found_in(tmp_path, 77777, "vote")
    drop: dict[str, Callable[[], object]] = {
        "forget": lambda: store.forget("a", document_id="vote"),
        "clear": store.clear,
        "expire": lambda: setattr(clock, "now_s", 5.0),
    }
    drop[way]()
    assert len(store.references()) == (way != "clear")
    assert found_in(tmp_path, 77777, "vote") == set()
    store.check()
    store.close()


def test_a_catalog_that_stays_set_aside_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = opened_at(tmp_path)
    store.close()
    HARM["spoil"](tmp_path / FINGERPRINT / CATALOG)
    store, _ = opened_at(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError("busy")))
        assert store.clear() == 0
    assert store.stats()["write_failed"] == store.stats()["disk_write_failed"] == 1
    store.close()
