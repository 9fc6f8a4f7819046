"""Where others may write, a name may be a link that somebody planted: none is followed, nothing behind it changes."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kept_prompts import config_of, lookup, opened, reference
from semsharekv_integrations import StoreConfig, StoreFileError
from semsharekv_integrations.store import ownership as private
from semsharekv_integrations.store.directory import KVDirectory, peek
from stored_kv import FINGERPRINT, fill, kv_files, records
from tiny_models import EngineMaker

NAMES = ("lock", "catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm", "catalog.sqlite-journal")
SOMEBODY = 65534


@pytest.fixture
def precious(tmp_path: Path) -> Iterator[Path]:
    """A folder of somebody's, which must be as it is afterwards, in every byte and mode."""
    path = tmp_path / "precious"
    path.mkdir(mode=0o755)
    for name in ("notes.txt", ".tmp_notes", f"{'a' * 32}.safetensors", "catalog.sqlite", "lock"):
        (path / name).write_text("mine")
        (path / name).chmod(0o644)
    (path / "empty").touch(mode=0o644)
    before = state(path)
    yield path
    assert state(path) == before


def state(path: Path) -> dict[str, tuple[int, int, bytes]]:
    files = {item.name: (item.stat().st_mode, item.stat().st_nlink, item.read_bytes()) for item in path.iterdir()}
    return files | {"": (path.stat().st_mode, 0, b"")}


def refused(path: Path, named: Path) -> None:
    """The store does not open, and names what it does not like; no lock is left behind."""
    for _ in range(2):
        with pytest.raises(StoreFileError, match=f"{named} (is|belongs)"):
            KVDirectory(path, FINGERPRINT)


@pytest.mark.parametrize("above", ["", "kept", "a/b"])
def test_a_link_in_place_of_a_directory(tmp_path: Path, precious: Path, above: str) -> None:
    """Of the model's directory, of the one configured, new or not."""
    link = tmp_path / "base" / above / FINGERPRINT
    link.parent.mkdir(parents=True)
    link.symlink_to(precious)
    refused(link.parent, link)
    refused(link, link)
    with pytest.raises(StoreFileError, match=f"{link} is a link"):
        peek(link)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", ["notes.txt", "empty", "not there"])
def test_a_link_in_place_of_a_file(tmp_path: Path, precious: Path, name: str, target: str) -> None:
    with closing(KVDirectory(tmp_path / "base", FINGERPRINT)) as directory:
        fill(directory)
    file = directory.path / name
    file.unlink(missing_ok=True)
    file.symlink_to(precious / target)
    refused(tmp_path / "base", file)
    if name != "lock":
        with pytest.raises(StoreFileError, match=f"{name} is a link"):
            peek(directory.path)
    file.unlink()
    KVDirectory(tmp_path / "base", FINGERPRINT).close()


@pytest.mark.parametrize("name", NAMES)
def test_a_link_where_nothing_was_yet(tmp_path: Path, precious: Path, name: str) -> None:
    """What belongs to a catalog that is not there is deleted, which deletes a link and not what it leads to."""
    model = tmp_path / "base" / FINGERPRINT
    model.mkdir(parents=True, mode=0o777)
    (model / name).symlink_to(precious / "empty")
    if name in ("lock", "catalog.sqlite"):
        refused(tmp_path / "base", model / name)
        return
    with closing(KVDirectory(tmp_path / "base", FINGERPRINT)) as directory:
        fill(directory)


def test_links_and_others_in_place_of_kv(tmp_path: Path, precious: Path) -> None:
    """They are damage: deleted themselves, never what they lead to; the same for what is left of writers."""
    with closing(KVDirectory(tmp_path / "base", FINGERPRINT)) as directory:
        fill(directory)
        paths = [directory.path / f"{found.file}.safetensors" for found in directory.contents().nodes]
    first, second, third = dict.fromkeys(paths)
    copy = precious.parent / "copy"
    first.rename(copy)
    first.symlink_to(copy)  # right bytes, and still a link
    second.unlink()
    os.mkfifo(second)  # reading it would never end
    third.unlink()
    os.link(precious / f"{'a' * 32}.safetensors", third)
    (directory.path / ".tmp1").symlink_to(precious / "notes.txt")
    (directory.path / f"{'b' * 32}.safetensors").symlink_to(precious / "notes.txt")
    with closing(KVDirectory(tmp_path / "base", FINGERPRINT)) as again:
        assert records(again) == {} and kv_files(again.path) == set() and copy.exists()
        assert again.counts()["damaged"] == 3 and again.counts()["orphans"] == 7 + 2


@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_what_takes_the_place_of_kv_while_open_is_not_read(tmp_path: Path, kind: str) -> None:
    with closing(KVDirectory(tmp_path, FINGERPRINT)) as directory:
        fill(directory)
        file = directory.contents().nodes[0].file
        path = directory.path / f"{file}.safetensors"
        path.rename(tmp_path / "kv")
        plant: dict[str, Callable[[], None]] = {
            "link": lambda: path.symlink_to(tmp_path / "kv"),
            "pipe": lambda: os.mkfifo(path),
            "directory": path.mkdir,
        }
        plant[kind]()
        with pytest.raises(StoreFileError, match="it is no file"):
            directory.files.read(file)


def test_a_link_that_takes_the_directorys_place_while_open(tmp_path: Path, precious: Path) -> None:
    """Nothing is written or deleted there."""
    store = opened(config_of(directory=tmp_path / "base"))
    model = tmp_path / "base" / FINGERPRINT
    model.rename(tmp_path / "moved")
    model.symlink_to(precious)
    assert store.put(reference((1, 2, 3))) and store.stats()["disk_write_failed"] == 1
    assert lookup(store, (1, 2, 3)) == 3
    store.clear()
    store.close()


@pytest.mark.parametrize("name", ["lock", "catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-journal"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "directory", "hard link", "device"])
def test_other_things_in_place_of_a_file(tmp_path: Path, precious: Path, name: str, kind: str) -> None:
    model = tmp_path / "base" / FINGERPRINT
    with closing(KVDirectory(tmp_path / "base", FINGERPRINT)):
        pass
    file = model / name
    file.unlink(missing_ok=True)
    other = tmp_path / "other"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "socket":
        with closing(socket.socket(socket.AF_UNIX)) as made:
            made.bind(str(tmp_path / "s"))
        (tmp_path / "s").rename(file)
    elif kind == "directory":
        file.mkdir()
    elif kind == "hard link":
        other.write_text("mine")
        other.chmod(0o644)
        os.link(other, file)
    else:
        try:
            os.mknod(file, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only an administrator can make a device")
    refused(tmp_path / "base", file)
    if kind == "hard link":
        assert (other.read_text(), stat.S_IMODE(other.stat().st_mode)) == ("mine", 0o644)


@pytest.mark.skipif(os.geteuid() != 0, reason="only an administrator can give files away")
@pytest.mark.parametrize("name", [".", "lock", "catalog.sqlite", "catalog.sqlite-wal", ".."])
def test_what_belongs_to_another_user(tmp_path: Path, name: str) -> None:
    with closing(KVDirectory(tmp_path / "base", FINGERPRINT)) as directory:
        fill(directory)
    theirs = directory.path.parent if name == ".." else directory.path / name
    theirs.touch()
    os.chown(theirs, SOMEBODY, SOMEBODY)
    mode = theirs.stat().st_mode
    refused(tmp_path / "base", theirs)
    assert theirs.stat().st_mode == mode
    os.chown(theirs, 0, 0)
    KVDirectory(tmp_path / "base", FINGERPRINT).close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only an administrator can give links away")
def test_a_link_above_is_followed_only_if_it_is_ours(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    KVDirectory(tmp_path / "link" / "base", FINGERPRINT).close()
    os.chown(tmp_path / "link", SOMEBODY, SOMEBODY, follow_symlinks=False)
    with pytest.raises(StoreFileError, match=f"{tmp_path / 'link'} is a link that another user has made"):
        KVDirectory(tmp_path / "link" / "base", FINGERPRINT)


def test_a_directory_that_others_may_write_in_is_made_private(tmp_path: Path) -> None:
    model = tmp_path / FINGERPRINT
    model.mkdir()
    model.chmod(0o777)
    KVDirectory(tmp_path, FINGERPRINT).close()
    assert stat.S_IMODE(model.stat().st_mode) == 0o700


def test_one_who_is_not_the_owner_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As seen by another user who is no administrator."""
    (tmp_path / "x").touch()
    monkeypatch.setattr(private.os, "geteuid", lambda: os.stat(tmp_path).st_uid + 1)
    with pytest.raises(OSError, match="belongs to another user"):
        private.require_plain(tmp_path / "x")
    assert not private.is_own_directory(tmp_path)


def test_engines_and_stores_name_the_link(make_engine: EngineMaker, tmp_path: Path, precious: Path) -> None:
    (tmp_path / "kept").symlink_to(precious)
    with pytest.raises(StoreFileError, match=f"{tmp_path / 'kept'} is a link"):
        make_engine(store=StoreConfig(directory=tmp_path / "kept")).generate("News.", max_new_tokens=1)


def test_a_saved_file_replaces_a_link_and_not_what_it_leads_to(
    make_engine: EngineMaker, tmp_path: Path, precious: Path
) -> None:
    engine = make_engine()
    engine.generate("News from Velmar.", max_new_tokens=1)
    for target in ("notes.txt", "empty", "not there"):
        path = tmp_path / target
        path.symlink_to(precious / target)
        assert engine.save(path) == 1 and not path.is_symlink()
        assert make_engine().load(path) == 1


def test_a_system_without_owners_of_files_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.geteuid")
    with pytest.raises(StoreFileError, match="needs a system on which files have owners"):
        KVDirectory(tmp_path / "kv", "ab")
    assert not list(tmp_path.iterdir())
