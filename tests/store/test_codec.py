"""KV in a file: the same answers after a round trip, and an error instead of anything that is not what was written."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from semsharekv_integrations import StoreConfig, StoreFileError
from semsharekv_integrations.errors import StoreWriteError
from semsharekv_integrations.kv import LayerKV, Reference, Segment
from semsharekv_integrations.store import KVStore, codec
from semsharekv_integrations.store.records import reference_id
from tiny_models import EngineMaker, make_model

PROMPTS = ["Report on Prorna in the Daily Courier.", "What happened in Velmar?"]


@pytest.fixture
def saved(make_engine: EngineMaker, tmp_path: Path) -> Path:
    engine, path = make_engine(), tmp_path / "folder" / "kv.safetensors"
    for prompt in PROMPTS:
        engine.generate(prompt, max_new_tokens=5, namespace=prompt[:4], session="s", documents={"d": prompt})
    engine.warm({"pinned": "A pinned text."}, pinned=True, ttl_s=60.0)
    assert engine.save(path) == 3
    return path


def test_round_trip(make_engine: EngineMaker, saved: Path) -> None:
    engine, fresh = make_engine(), make_engine()
    assert engine.load(saved) == 3
    engine.store.check()
    for prompt in PROMPTS:
        wanted = fresh.generate(prompt, max_new_tokens=5)
        found = engine.generate(prompt, max_new_tokens=5, namespace=prompt[:4])
        assert found.token_ids == wanted.token_ids and found.report.recomputed_tokens == 1
    assert engine.generate(PROMPTS[0], max_new_tokens=1).report.prefix_tokens <= 2  # another namespace: the warm text's
    pinned = next(r for r in engine.store.fetch_all() if r.pinned)
    assert (dict(pinned.document_starts), pinned.expires_after_s) == ({"pinned": 1}, 60.0)
    assert engine.forget("d", namespace=PROMPTS[0][:4]) == engine.clear(PROMPTS[1][:4], session="s") == 1


def test_round_trip_in_half_precision(make_engine: EngineMaker, tokenizer, tmp_path: Path) -> None:
    model = make_model("qwen3", len(tokenizer)).bfloat16()
    engine, again = make_engine(model=model), make_engine(model=model)
    engine.generate(PROMPTS[0], max_new_tokens=3)
    engine.save(tmp_path / "kv")
    again.load(tmp_path / "kv")
    for kept, read in zip(engine.store.fetch_all(), again.store.fetch_all(), strict=True):
        assert kept.id == read.id
        for one, other in zip(kept.layers, read.layers, strict=True):
            assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


def made(**labels: object) -> Reference:
    token_ids = np.arange(5)
    layer = LayerKV(torch.rand(1, 2, 5, 3), torch.rand(1, 2, 5, 3))
    return Reference(reference_id("a", token_ids), "a", token_ids, (layer,), **labels)  # type: ignore[arg-type]


def test_labels_survive(tmp_path: Path) -> None:
    labels = {
        "document_starts": {"d": 1},
        "segments": (Segment("d", 1, 3), Segment("", 3, 5)),
        "session": "s",
        "pinned": True,
        "expires_after_s": 3.0,
    }
    kept = made(**labels)
    codec.write_references(tmp_path / "kv", [kept, made()], "model")
    read, bare = codec.read_references(tmp_path / "kv", "model", torch.device("cpu"))
    assert {name: getattr(read, name) for name in labels} == labels and read.id == kept.id
    assert all(isinstance(segment, Segment) for segment in read.segments)
    assert bare.segments == () and not bare.is_tainted


def test_approximate_kv_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="approximate"):
        codec.write_references(tmp_path / "kv", [made(), made(exact_tokens=4, session="s")], "model")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_store(make_engine: EngineMaker, tmp_path: Path) -> None:
    assert make_engine().save(tmp_path / "kv") == make_engine().load(tmp_path / "kv") == 0


def test_only_the_owner_can_read_it(saved: Path) -> None:
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_the_same_weights_loaded_again_fit(make_engine: EngineMaker, llama, saved: Path, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "model")
    again = type(llama).from_pretrained(tmp_path / "model")
    assert make_engine(model=again).load(saved) == 3


@pytest.mark.parametrize("other", ["weights", "rope", "dtype"])
def test_another_model_is_refused(make_engine: EngineMaker, tokenizer, saved: Path, other: str) -> None:
    rope = {"rope_type": "default", "rope_theta": 77.0}
    model = make_model("llama", len(tokenizer), **({"rope_parameters": rope} if other == "rope" else {}))
    if other == "weights":
        torch.nn.init.normal_(model.model.layers[1].self_attn.k_proj.weight)
    engine = make_engine(model=model.bfloat16() if other == "dtype" else model)
    with pytest.raises(StoreFileError, match="fingerprint"):
        engine.load(saved)
    assert engine.stats()["store_entries"] == 0


def test_damage_is_found_wherever_it_is(make_engine: EngineMaker, saved: Path) -> None:
    engine, whole, rng = make_engine(), saved.read_bytes(), Random(5)
    header_bytes = int.from_bytes(whole[:8], "little")
    places = [0, 7, 8, *rng.sample(range(8, header_bytes), 60), *rng.sample(range(header_bytes, len(whole)), 20)]
    for at in [*places, len(whole) - 1]:
        saved.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
        with pytest.raises(StoreFileError):
            engine.load(saved)
    for size in (0, 5, header_bytes // 2, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:size])
        with pytest.raises(StoreFileError, match=saved.name):
            engine.load(saved)
    assert engine.stats()["store_entries"] == 0
    saved.write_bytes(whole)
    assert engine.load(saved) == 3


def test_what_is_no_file_of_ours(make_engine: EngineMaker, tmp_path: Path) -> None:
    engine = make_engine()
    (tmp_path / "text").write_text("hello")
    codec.save_file({"x": torch.zeros(2)}, tmp_path / "foreign")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "text", tmp_path / "foreign"):
        with pytest.raises(StoreFileError):
            engine.load(path)


def test_another_format_version_is_named(make_engine: EngineMaker, saved: Path, monkeypatch) -> None:
    monkeypatch.setattr(codec, "_READABLE", (98, 99))
    with pytest.raises(StoreFileError, match="version 3; accepted is 99 or 98"):
        make_engine().load(saved)


def test_a_failed_write_leaves_the_old_file(make_engine: EngineMaker, saved: Path, monkeypatch) -> None:
    before = saved.read_bytes()

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(codec, "save_file", fail)
    with pytest.raises(StoreWriteError, match=rf"{saved} could not be written: disk full"):
        make_engine().save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_where_nothing_can_be_written_it_is_said_and_nothing_is_left(make_engine: EngineMaker, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for path in (tmp_path / "file" / "kv", tmp_path / "folder", tmp_path / ("x" * 300)):
        with pytest.raises(StoreWriteError, match="could not be written"):
            make_engine().save(path)
        assert sorted(tmp_path.rglob("*")) == before
    assert make_engine().save(tmp_path / ("x" * 250)) == 0, "any name that the disk takes"


def test_a_pipe_is_not_waited_for(make_engine: EngineMaker, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreFileError, match="pipe is not a readable KV file"):
        make_engine().load(tmp_path / "pipe")


ODD = [None, -5, 0.5, 10**30, 10**400, "x", [], {}, [[]], True, [["d", 0, 99]], [["d", 3, 1]], {"d": "x"}, {"d": -7}]
FIELDS = ("namespace", "layers", "session", "document_starts", "document_stops", "segments", "pinned")


@pytest.mark.parametrize("field", [*FIELDS, "expires_after_s"])
def test_odd_values_in_a_saved_file_with_a_right_digest(
    make_engine: EngineMaker, tmp_path: Path, monkeypatch, field: str
) -> None:
    """They are refused, or could have been written: then they do no harm."""
    header = codec._make_header
    for number, odd in enumerate(ODD):
        path = tmp_path / str(number)
        with monkeypatch.context() as patched:
            patched.setattr(codec, "_make_header", lambda reference, odd=odd: header(reference) | {field: odd})
            codec.write_references(path, [made()], "model")
        try:
            (read,) = codec.read_references(path, "model", torch.device("cpu"))
        except StoreFileError:
            continue
        store = KVStore(StoreConfig())
        assert store.put(read) and store.forget(read.namespace, document_id="d") in (0, 1)
        store.check()
