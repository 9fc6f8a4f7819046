"""A KV file is read once, checked on the way, and every bit of it counts; so do those of earlier versions."""

from __future__ import annotations

import os
import shutil
import stat
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kept_prompts import CPU, config_of, lookup, opened, put_all, store_of
from semsharekv_integrations import StoreFileError
from semsharekv_integrations.kv import LayerKV, Segment
from semsharekv_integrations.store import codec, files, reading
from semsharekv_integrations.store.checksums import view_bytes
from semsharekv_integrations.store.files import KVFiles
from semsharekv_integrations.store.homes import HOST
from semsharekv_integrations.store.reading import TensorFile
from semsharekv_integrations.store.records import FileRecord
from semsharekv_integrations.store.rooms import Landing
from stored_kv import FINGERPRINT, tensors

OLD = Path(__file__).parent / "stored_directory" / FINGERPRINT  # of the version with one digest
Tensors = dict[str, torch.Tensor]
Reader = Callable[[KVFiles, str], Tensors]


def load(kept: KVFiles, file: str, cut: dict[str, tuple[int, int]] | None = None) -> Tensors:
    forms = kept.describe(file)
    cut = cut or {}
    landing = Landing({n: f[:, :, slice(*cut[n])] if n in cut else f for n, f in forms.items()}, HOST, pinned=False)
    return {name: landing.move(name, tensor) for name, tensor in kept.load(file, landing.get, cut)}


READERS: dict[str, Reader] = {
    "into memory": load,
    "a part": lambda kept, file: load(kept, file, dict.fromkeys(kept.describe(file), (0, 1))),
    "mapped": KVFiles.read,
}


@pytest.fixture
def kept(tmp_path: Path) -> KVFiles:
    (tmp_path / "kv").mkdir()
    return KVFiles(tmp_path / "kv", FINGERPRINT, Counter())


def take_old(kept: KVFiles) -> str:
    """Copy a file that an earlier version wrote to where ``kept`` finds it."""
    source = min(OLD.glob(f"*{files.SUFFIX}"))
    shutil.copy(source, kept.path)
    with TensorFile(open(source, "rb", buffering=0), source.stat().st_size) as opened_file:
        assert not opened_file.is_sealed
        num_tokens = opened_file.header["num_tokens"]
    kept.records[source.stem] = FileRecord(source.stem, num_tokens, source.stat().st_size)
    return source.stem


@pytest.mark.parametrize("way", READERS)
@pytest.mark.parametrize("version", ["this", "earlier"])
def test_a_flipped_bit_in_any_byte_is_found(kept: KVFiles, version: str, way: str) -> None:
    file = take_old(kept) if version == "earlier" else kept.write(tensors(2), 2)
    path = kept.path / f"{file}{files.SUFFIX}"
    whole = path.read_bytes()
    wanted = READERS[way](kept, file)
    for at in range(0, len(whole), 1 if way == "into memory" else 13):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        again = KVFiles(kept.path, FINGERPRINT, Counter())
        again.records = kept.records
        with pytest.raises(StoreFileError):
            READERS[way](again, file)
    path.write_bytes(whole)
    again = KVFiles(kept.path, FINGERPRINT, Counter())
    again.records = kept.records
    assert all(torch.equal(found, wanted[name]) for name, found in READERS[way](again, file).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.float8_e4m3fn])
def test_parts_are_those_of_the_whole(kept: KVFiles, dtype: torch.dtype) -> None:
    made = {**tensors(7, dtype=dtype), "3@state": torch.arange(6.0).view(2, 3), "3@count": torch.tensor(5)}
    file = kept.write(made, 7)
    assert load(kept, file).keys() == made.keys() == kept.describe(file).keys()
    for first, stop in ((0, 7), (0, 3), (3, 7), (2, 5), (6, 7)):
        cut = dict.fromkeys(("0.keys", "0.values"), (first, stop))
        for name, found in load(kept, file, cut).items():
            part = made[name][:, :, first:stop] if name in cut else made[name]
            assert found.dtype == part.dtype and found.is_contiguous()
            assert view_bytes(found) == view_bytes(part.contiguous()) and found.shape == part.shape


@pytest.mark.parametrize("lacks", ["nothing", "threads", "reads at a place", "long reads"])
def test_several_threads_read_the_same(kept: KVFiles, monkeypatch: pytest.MonkeyPatch, lacks: str) -> None:
    made = {f"{n}.{kind}": tensors(40, seed=n)["0.keys"] for n in range(30) for kind in ("keys", "values")}
    monkeypatch.setattr(reading, "_WORTH_THREADS_BYTES", 0)
    monkeypatch.setattr(reading, "_AT_ONCE_BYTES", 100)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    if lacks == "threads":
        monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda *_: (_ for _ in ()).throw(RuntimeError("no threads")))
    if lacks == "reads at a place":
        monkeypatch.delattr(os, "preadv")
    if lacks == "long reads":  # the system may always read less than it was asked for
        preadv = os.preadv
        monkeypatch.setattr(os, "preadv", lambda handle, rooms, at: preadv(handle, [rooms[0][:33]], at))
    file = kept.write(made, 40)
    found = load(kept, file)
    assert list(found) == sorted(made) and all(torch.equal(found[name], tensor) for name, tensor in made.items())
    path = kept.path / f"{file}{files.SUFFIX}"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    for reader in READERS.values():
        again = KVFiles(kept.path, FINGERPRINT, Counter())
        again.records = kept.records
        with pytest.raises(StoreFileError, match="other bytes than were written"):
            reader(again, file)


def test_the_first_read_takes_each_byte_once_and_later_ones_check_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that comes up from the disk is not read again to be checked, nor mapped to be copied."""
    store, clock = store_of(directory=tmp_path)
    prompt = tuple(range(1, 400))
    put_all(store, clock, [prompt])
    store.close()
    store = opened(config_of(directory=tmp_path), clock)
    sizes, read_into = [], TensorFile._read_into
    monkeypatch.setattr(files, "safe_open", None)
    monkeypatch.setattr(
        TensorFile, "_read_into", lambda self, room, at: sizes.append(len(room)) or read_into(self, room, at)
    )
    assert lookup(store, prompt) == 399
    form = store._entries.by_key[store.references()[0].id].node.held
    assert form is not None and form.num_bytes <= sum(sizes) < 1.5 * form.num_bytes
    store.close()
    store = opened(config_of(400, directory=tmp_path), clock)
    assert lookup(store, prompt) == 399
    put_all(store, clock, [tuple(range(1000, 1400))])
    assert store._entries.by_key[store.references()[0].id].node.held is None, "pushed out, and on disk"
    monkeypatch.setattr(reading, "make_sum", lambda: pytest.fail("checked twice"))
    monkeypatch.setattr(TensorFile, "verify", lambda self: pytest.fail("checked twice"))
    monkeypatch.setattr(TensorFile, "_fill", _fill_without_sum)
    assert lookup(store, prompt) == 399 and store.stats()["promoted"] == 2
    store.close()


def _fill_without_sum(self: TensorFile, name: str, place: reading._Place, *rest: object) -> tuple[str, torch.Tensor]:
    part, room, wanted = rest
    assert part is None and wanted is None and isinstance(room, torch.Tensor)
    self._read_into(view_bytes(room), place.start)
    return name, room


def test_a_saved_file_of_an_earlier_version_is_read_and_checked(tmp_path: Path) -> None:
    path = Path(__file__).parent / "saved_version_2.safetensors"
    (found,) = codec.read_references(path, "model", CPU)
    made = torch.rand(2, 1, 2, 5, 3, generator=torch.Generator().manual_seed(0))
    assert (found.namespace, found.token_ids.tolist(), found.session) == ("a", [0, 1, 2, 3, 4], "s")
    assert found.segments == (Segment("d", 1, 3),) and found.checkpoints[4]["0.s"].tolist() == [[7.0, 7.0]]
    assert all(map(torch.equal, found.layers[0], LayerKV(*made)))
    whole = path.read_bytes()
    for at in range(len(whole)):
        (tmp_path / "kv").write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(StoreFileError):
            codec.read_references(tmp_path / "kv", "model", CPU)


@pytest.mark.parametrize("way", READERS)
def test_a_file_of_another_user_is_not_read(kept: KVFiles, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """With right checksums and in its place: whoever can write there can make those."""
    file, me = kept.write(tensors(2), 2), os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(StoreFileError, match=f"belongs to another user \\(number {me}\\)"):
        READERS[way](kept, file)


def test_a_file_that_others_may_write_is_made_private(kept: KVFiles) -> None:
    file = kept.write(tensors(2), 2)
    path = kept.path / f"{file}{files.SUFFIX}"
    path.chmod(0o666)
    load(kept, file)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
