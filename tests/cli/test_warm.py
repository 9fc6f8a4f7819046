"""``semsharekv warm``: what it computes, what it leaves alone, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from libraries import (
    DOCUMENTS,
    FLOOD,
    answer,
    open_engine,
    photograph,
    save_model,
    warm,
    write_documents,
)
from semsharekv_integrations import StoreConfig
from semsharekv_integrations.cli.main import main
from semsharekv_integrations.errors import StoreFileError, StoreLockedError, StoreWriteError
from semsharekv_integrations.model.loading import REFERENCE_MODEL, resolve
from semsharekv_integrations.store import KVStore
from semsharekv_integrations.store.directory import DirectoryLock
from semsharekv_integrations.store.files import KVFiles
from semsharekv_integrations.store.library import read_manifest
from semsharekv_integrations.warming import computing
from tiny_models import make_model

Captured = pytest.CaptureFixture[str]
CHANGED = {**DOCUMENTS, "flood.txt": f"{FLOOD} So much for today.", "new.md": "A new bridge was opened in Orvel today."}
del CHANGED["fire.md"]


@pytest.fixture(scope="module")
def tokens() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(resolve(REFERENCE_MODEL))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokens: PreTrainedTokenizerBase) -> str:
    return save_model(tmp_path_factory.mktemp("model"), make_model("llama", len(tokens)), tokens)


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "documents")


def run(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def run_json(capsys: Captured, *arguments: object) -> tuple[int, dict[str, Any], str]:
    code = run("warm", *arguments, "--json")
    told = capsys.readouterr()
    return code, json.loads(told.out), told.err


def say(model: str, library: Path) -> list[tuple[Any, ...]]:
    return answer(open_engine(model, "identical", libraries=[library]))


def test_it_says_what_it_did(model: str, documents: Path, tmp_path: Path, capsys: Captured) -> None:
    code, told, errors = run_json(capsys, documents, "--model", model, "--to", tmp_path / "kv")
    assert (code, errors) == (0, "")
    assert {name: told[name] for name in ("documents", "computed", "kept", "dropped", "blank", "skipped")} == {
        "documents": 3,
        "computed": 3,
        "kept": 0,
        "dropped": 0,
        "blank": 0,
        "skipped": {},
    }
    files = list((tmp_path / "kv").glob("*/*.safetensors"))
    assert told["bytes"] == sum(file.stat().st_size for file in files) > told["tokens"] > 60
    assert set(read_manifest(tmp_path / "kv").documents) == set(DOCUMENTS)
    assert run("warm", documents, "--model", model, "--to", tmp_path / "kv") == 0
    assert "0 computed, 3 kept, 0 dropped" in capsys.readouterr().out


def test_a_second_run_changes_nothing(model: str, documents: Path, tmp_path: Path) -> None:
    warm(model, documents, tmp_path / "kv")
    before = photograph(tmp_path / "kv")
    summary = warm(model, documents, tmp_path / "kv")
    assert (summary.documents, summary.computed, summary.kept) == (3, 0, 3)
    assert photograph(tmp_path / "kv") == before


def test_changed_documents_alone_are_computed_again(model: str, documents: Path, tmp_path: Path) -> None:
    warm(model, documents, tmp_path / "kv")
    summary = warm(model, write_documents(documents, CHANGED), tmp_path / "kv")
    assert (summary.computed, summary.kept, summary.dropped, summary.documents) == (2, 1, 1, 3)
    warm(model, documents, tmp_path / "fresh")
    assert say(model, tmp_path / "kv") == say(model, tmp_path / "fresh")
    engine = open_engine(model, "identical", libraries=[tmp_path / "kv"])
    _ = engine.model
    held = [reference for name in engine.store.list_libraries() for reference in engine.store.references(name)]
    assert {key for reference in held for key in reference.document_starts} == set(CHANGED)


def test_documents_that_are_or_begin_with_each_other_stay_when_one_goes(
    model: str, documents: Path, tmp_path: Path
) -> None:
    texts = {"a.txt": FLOOD, "b.txt": FLOOD, "c.txt": f"{FLOOD}\n\nAnd then the sun came out over Velmar again."}
    warm(model, write_documents(documents, texts), tmp_path / "kv")
    for gone in ("a.txt", "c.txt"):
        del texts[gone]
        summary = warm(model, write_documents(documents, texts), tmp_path / "kv")
        assert (summary.documents, summary.dropped) == (len(texts), 1)
        warm(model, documents, tmp_path / f"fresh {gone}")
        assert say(model, tmp_path / "kv") == say(model, tmp_path / f"fresh {gone}")


class _Stopped(BaseException):
    pass


def test_what_was_computed_before_a_stop_is_kept_and_not_mounted(
    model: str, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = computing.Computer.compute_one
    begun: list[str] = []

    def stop_at_the_third(self: computing.Computer, key: str, path: Path) -> computing.Computed:
        begun.append(key)
        if len(begun) == 3:
            raise _Stopped
        return whole(self, key, path)

    with monkeypatch.context() as patch:
        patch.setattr(computing.Computer, "compute_one", stop_at_the_third)
        with pytest.raises(_Stopped):
            warm(model, documents, tmp_path / "kv")
    with pytest.raises(StoreFileError, match="not finished"):
        say(model, tmp_path / "kv")
    assert run("inspect", tmp_path / "kv") == 0
    summary = warm(model, documents, tmp_path / "kv")
    assert (summary.computed, summary.kept) == (1, 2)
    warm(model, documents, tmp_path / "fresh")
    assert say(model, tmp_path / "kv") == say(model, tmp_path / "fresh")


def test_a_full_disk_is_an_error_and_nothing_half_written_is_mounted(
    model: str, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise StoreWriteError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(KVFiles, "write_apart", fail)
        with pytest.raises(StoreWriteError, match="could not be written"):
            warm(model, documents, tmp_path / "kv")
    with pytest.raises(StoreFileError, match="not finished"):
        say(model, tmp_path / "kv")
    assert warm(model, documents, tmp_path / "kv").computed == 3


def test_files_that_are_no_documents_are_named_and_left_out(
    model: str, documents: Path, tmp_path: Path, capsys: Captured
) -> None:
    (documents / "binary.txt").write_bytes(b"a\0b")
    (documents / "latin.md").write_bytes("Größe".encode("latin-1"))
    (documents / "leads nowhere.txt").symlink_to(tmp_path / "nothing")
    os.mkfifo(documents / "pipe.txt")
    (documents / "long.txt").write_text("No end of it. " * 500)
    (documents / "blank.txt").write_text(" \n")
    (documents / "picture.png").write_bytes(b"\0")
    code, told, errors = run_json(capsys, documents, "--model", model, "--to", tmp_path / "kv")
    named = {"binary.txt", "latin.md", "leads nowhere.txt", "pipe.txt", "long.txt"}
    assert code == 1 and set(told["skipped"]) == named and all(name in errors for name in named)
    assert (told["documents"], told["blank"]) == (3, 1)
    say(model, tmp_path / "kv")


def test_names_and_texts_come_out_as_they_are(model: str, tmp_path: Path) -> None:
    texts = {
        "ä/Ö.TXT": "\ufeffThe mayor of Velmar opened the fair with a speech.",
        "z.Md": "The fair goes on for days.",
    }
    warm(model, write_documents(tmp_path / "documents", texts), tmp_path / "kv")
    assert set(read_manifest(tmp_path / "kv").documents) == set(texts)


def test_a_library_within_its_folder_is_no_part_of_it(model: str, documents: Path) -> None:
    for _ in range(2):
        summary = warm(model, documents, documents / "kv")
        (documents / "kv" / "note.txt").write_text("A note that somebody left in the library.")
        assert summary.documents == 3


@pytest.mark.parametrize("kind", ["folder", "file", "store"])
def test_what_is_no_library_is_not_written_to(
    model: str, documents: Path, tmp_path: Path, kind: str, capsys: Captured
) -> None:
    to = tmp_path / "there"
    if kind == "folder":
        write_documents(to)
    elif kind == "file":
        to.write_text("text")
    else:
        engine = open_engine(model, directory=to)
        engine.generate(FLOOD, max_new_tokens=1)
        engine.close()
    before = photograph(to)
    assert run("warm", documents, "--model", model, "--to", to) == 2
    assert "holds something else" in " ".join(capsys.readouterr().err.split())
    assert photograph(to) == before


def test_another_models_library_is_not_written_to(
    model: str, documents: Path, tmp_path: Path, tokens: PreTrainedTokenizerBase
) -> None:
    warm(model, documents, tmp_path / "kv")
    before = photograph(tmp_path / "kv")
    other = save_model(tmp_path / "other", make_model("qwen2", len(tokens)), tokens)
    with pytest.raises(StoreFileError, match="is another model's: its architecture is"):
        warm(other, write_documents(documents, CHANGED), tmp_path / "kv")
    assert photograph(tmp_path / "kv") == before


def test_one_process_writes_at_a_time(model: str, documents: Path, tmp_path: Path) -> None:
    warm(model, documents, tmp_path / "kv")
    lock = DirectoryLock(tmp_path / "kv")
    with pytest.raises(StoreLockedError):
        warm(model, documents, tmp_path / "kv")
    lock.release()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "folder is"),
        (("empty",), "files that end in .md or .txt"),
        (("documents", "--workers", "0"), "workers is 0; accepted is 1 or more"),
    ],
)
def test_bad_arguments_are_named(
    model: str, documents: Path, tmp_path: Path, arguments: tuple[str, ...], said: str, capsys: Captured
) -> None:
    (tmp_path / "empty").mkdir()
    folder, *rest = arguments
    assert run("warm", tmp_path / folder, *rest, "--model", model, "--to", tmp_path / "kv") == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "kv").exists()


def test_clear_leaves_a_library_alone(model: str, documents: Path, tmp_path: Path, capsys: Captured) -> None:
    warm(model, documents, tmp_path / "kv")
    before = photograph(tmp_path / "kv")
    assert run("clear", tmp_path / "kv") == 2
    assert "is a library" in " ".join(capsys.readouterr().err.split())
    assert photograph(tmp_path / "kv") == before


def test_inspect_lists_a_library(
    model: str, documents: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm(model, documents, tmp_path / "kv")
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "400")
    assert run("inspect", tmp_path / "kv") == 0
    told = capsys.readouterr().out
    assert f"A library of {model}: 3 documents" in " ".join(told.split())
    assert all(key in told for key in DOCUMENTS)
    assert run("inspect", tmp_path / "kv", "--json", "--document", "fire.md") == 0
    ((_, entries),) = json.loads(capsys.readouterr().out).items()
    assert [entry["documents"] for entry in entries] == [["fire.md"]]


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """A library that two processes computed."""
    folder = tmp_path_factory.mktemp("by two")
    documents = write_documents(folder / "documents", {**DOCUMENTS, "long.txt": "No end of it. " * 500})
    summary = warm(model, documents, folder / "kv", workers=2)
    assert summary.computed == 3 and set(summary.skipped) == {"long.txt"}
    return folder / "kv"


def test_several_processes_compute_what_one_does(model: str, by_two: Path, documents: Path, tmp_path: Path) -> None:
    warm(model, documents, tmp_path / "kv")
    assert say(model, by_two) == say(model, tmp_path / "kv")
    left = {path.name for path in by_two.iterdir()}
    assert left == {"lock", "library.json", read_manifest(by_two).facts.fingerprint}


def test_a_store_of_a_library_fits_together(model: str, by_two: Path) -> None:
    manifest = read_manifest(by_two)

    store = KVStore(StoreConfig(max_bytes=0, directory=by_two))
    store.open(manifest.facts.fingerprint, torch.float32, torch.device("cpu"))
    store.check()
    assert len(store.references("library")) == 3
    store.close()
