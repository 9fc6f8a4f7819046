"""An engine answers over a mounted library as over a store that it warmed itself, and leaves the library as it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from libraries import DOCUMENTS, FLOOD, PROMPTS, answer, open_engine, photograph, save_model, warm, write_documents
from semsharekv_integrations import SemShareEngine, SemShareError, StoreConfig
from semsharekv_integrations.errors import StoreFileError
from semsharekv_integrations.model.loading import REFERENCE_MODEL, resolve
from semsharekv_integrations.store.library import MANIFEST
from tiny_models import STATEFUL, make_model

MAPS = Path("/proc/self/maps")
ANYWHERE = {"llama", "qwen3", "gpt_neox"}  # of the architectures tried here, those that borrow off the prefix


@pytest.fixture(scope="module")
def tokens() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(resolve(REFERENCE_MODEL))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokens: PreTrainedTokenizerBase) -> str:
    return save_model(tmp_path_factory.mktemp("model"), make_model("llama", len(tokens)), tokens)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """A library that no test may change."""
    folder = tmp_path_factory.mktemp("made")
    summary = warm(model, write_documents(folder / "documents"), folder / "kv")
    assert (summary.documents, summary.computed, summary.skipped) == (3, 3, {})
    return folder / "kv"


@pytest.fixture
def library(made: Path, tmp_path: Path) -> Path:
    """A copy of the library, for this test alone."""
    return shutil.copytree(made, tmp_path / "kv")


def find_files(library: Path) -> list[Path]:
    return sorted(library.glob("*/*.safetensors"))


def answer_over_own(model: str, mode: str, **options: Any) -> list[tuple[Any, ...]]:
    """What an engine says that computed the documents itself, in the namespace that asks."""
    engine = open_engine(model, mode)
    engine.warm(DOCUMENTS)
    return answer(engine, **options)


def answer_over(model: str, mode: str, **store: Any) -> list[tuple[Any, ...]]:
    return answer(open_engine(model, mode, **store))


@pytest.mark.parametrize("architecture", [*sorted(ANYWHERE), "gemma2", "lfm2", "mamba2"])
def test_it_answers_as_over_kv_that_it_computed_itself(
    architecture: str, tmp_path: Path, tokens: PreTrainedTokenizerBase
) -> None:
    made = make_model(architecture, len(tokens), **STATEFUL.get(architecture, {}))
    model = save_model(tmp_path / "model", made, tokens)
    warm(model, write_documents(tmp_path / "documents"), tmp_path / "kv")
    for mode in ("exact", "identical", "semantic", "paper") if architecture in ANYWHERE else ("exact",):
        mounted = answer_over(model, mode, libraries=[tmp_path / "kv"])
        assert mounted == answer_over_own(model, mode)
        assert mounted[0][1][0] > 0, "nothing of the library was reused"
        assert [ids for ids, *_ in answer_over(model, "exact", libraries=[tmp_path / "kv"])] == [
            ids for ids, *_ in answer_over(model, "off")
        ]


def test_it_is_read_by_every_tenant_in_every_process_and_never_written(model: str, made: Path) -> None:
    before = photograph(made)
    engines = [open_engine(model, "identical", libraries=[made]) for _ in range(2)]
    expected = answer_over_own(model, "identical")
    for engine, namespace in zip(engines, ("one", "another"), strict=True):
        assert answer(engine, namespace=namespace) == expected
        engine.store.check()
    for engine in engines:
        engine.close()
    assert photograph(made) == before


@pytest.mark.skipif(not MAPS.exists(), reason="this system does not tell what is mapped")
def test_its_files_are_mapped_and_take_no_memory_of_the_store(model: str, made: Path) -> None:
    engine = open_engine(model, "identical", libraries=[made], max_bytes=0)
    answer(engine)
    assert all(str(file) in MAPS.read_text() for file in find_files(made))
    assert engine.stats()["store_bytes"] == engine.stats()["store_promoted"] == 0


def test_a_forked_child_reads_it_too(model: str, made: Path) -> None:
    engine = open_engine(model, "exact", libraries=[made], max_bytes=0)
    expected = answer(engine)
    child = os.fork()
    if not child:
        os._exit(int(answer(engine) != expected))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_it_needs_no_permission_to_write(model: str, library: Path) -> None:
    for path in [*library.rglob("*"), library]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = photograph(library)
    try:
        assert answer_over(model, "exact", libraries=[str(library)]) == answer_over_own(model, "exact")
        assert photograph(library) == before
    finally:
        for path in [library, *library.iterdir()]:
            path.chmod(0o755)


def test_another_user_may_mount_it(model: str, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answer_over_own(model, "exact")
    monkeypatch.setattr("os.geteuid", lambda: 54321)
    assert answer_over(model, "exact", libraries=[made]) == expected


def test_what_another_user_owns_or_everybody_may_write_is_not_read(model: str, library: Path) -> None:
    for file in find_files(library):
        file.chmod(0o666)
    said = answer_over(model, "exact", libraries=[library], max_bytes=0)
    assert said == answer_over(model, "exact", max_bytes=0)


def test_a_store_in_8_bits_reads_it_as_it_is(model: str, made: Path) -> None:
    said = answer_over(model, "identical", libraries=[made], kv_bits=8, max_bytes=0)
    assert said == answer_over(model, "identical", libraries=[made], max_bytes=0)


def test_a_link_to_it_can_be_mounted(model: str, made: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(made)
    said = answer_over(model, "exact", libraries=[tmp_path / "current", made])
    assert said == answer_over(model, "exact", libraries=[made])


def test_it_works_beside_a_directory_of_its_own(model: str, made: Path, tmp_path: Path) -> None:
    expected = answer_over(model, "identical", libraries=[made])
    first = open_engine(model, "identical", libraries=[made], directory=tmp_path / "own", ttl_s=3600)
    assert answer(first) == expected
    first.store.check()
    stored = first.stats()["store_entries"]
    first.close()
    second = open_engine(model, "identical", libraries=[made], directory=tmp_path / "own")
    again = answer(second)
    assert [ids for ids, *_ in again] == [ids for ids, *_ in expected]
    assert all(prefix > 0 for _, (prefix, *_), _ in again), "prompts are continued from its own directory"
    assert second.stats()["store_entries"] == stored
    second.store.check()
    second.close()


def test_two_libraries_with_the_same_text_are_read_as_one(model: str, made: Path, tmp_path: Path) -> None:
    texts = {"same.txt": FLOOD, "other.txt": "Nothing of this stands elsewhere, and no prompt asks for it here either."}
    warm(model, write_documents(tmp_path / "documents", texts), tmp_path / "second")
    engine = open_engine(model, "identical", libraries=[made, tmp_path / "second", made, str(made)])
    assert answer(engine) == answer_over(model, "identical", libraries=[made])
    assert engine.stats()["store_library_entries"] == 5
    engine.store.check()


def test_what_callers_forget_and_bounds_evict_is_not_in_it(model: str, made: Path) -> None:
    expected = answer_over(model, "identical", libraries=[made])
    engine = open_engine(model, "identical", libraries=[made], max_bytes=1, ttl_s=1e-6)
    assert answer(engine) == expected
    assert engine.forget("flood.txt") == engine.clear() == engine.clear("default") == 0
    assert answer(engine) == expected
    engine.close()
    assert answer(engine) == expected
    stats = engine.stats()
    assert (stats["store_library_entries"], stats["store_entries"], stats["store_bytes"]) == (3, 0, 0)
    engine.store.check()


def test_it_is_not_saved_with_what_callers_stored(model: str, made: Path, tmp_path: Path) -> None:
    engine = open_engine(model, "exact", libraries=[made])
    _ = engine.model
    assert engine.save(tmp_path / "saved") == 0
    engine.generate(PROMPTS[0], max_new_tokens=1)
    assert engine.save(tmp_path / "saved") == 1


def truncate(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)


def flip_a_byte(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)


def exchange(file: Path) -> None:
    others = [other for other in file.parent.glob("*.safetensors") if other != file]
    file.write_bytes(others[0].read_bytes())


@pytest.mark.parametrize("harm", [Path.unlink, truncate, flip_a_byte, exchange], ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("is_used", [False, True], ids=["before its first use", "after a use"])
def test_harmed_files_are_computed_anew(model: str, library: Path, harm: Callable[[Path], None], is_used: bool) -> None:
    plain = [ids for ids, *_ in answer_over(model, "off")]
    engine = open_engine(model, "exact", libraries=[library], max_bytes=0)
    _ = engine.model
    if is_used:
        assert [ids for ids, *_ in answer(engine)] == plain
    for file in find_files(library):
        harm(file)
    said = answer(engine)
    assert [ids for ids, *_ in said] == plain
    assert all(prefix == 0 for _, (prefix, *_), _ in said)
    assert engine.stats()["store_unreadable"] > 0
    engine.store.check()


def test_without_its_folder_everything_is_computed(model: str, library: Path) -> None:
    engine = open_engine(model, "exact", libraries=[library], max_bytes=0)
    plain = answer(engine)
    library.rename(library.with_name("moved"))
    said = answer(engine)
    assert [ids for ids, *_ in said] == [ids for ids, *_ in plain]
    assert all(prefix == 0 for _, (prefix, *_), _ in said)
    library.with_name("moved").rename(library)
    assert answer(engine) == plain, "it was away for a moment"


def test_files_that_are_missing_when_it_is_mounted_are_computed(model: str, library: Path) -> None:
    find_files(library)[0].unlink()
    engine = open_engine(model, "exact", libraries=[library])
    assert [ids for ids, *_ in answer(engine)] == [ids for ids, *_ in answer_over(model, "off")]
    assert engine.stats()["store_library_unusable"] > 0
    assert engine.stats()["store_library_entries"] < 3


def change_manifest(library: Path, **changes: Any) -> None:
    file = library / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda library: shutil.rmtree(library), "no library of KV"),
        (lambda library: (library / MANIFEST).unlink(), "no library of KV"),
        (lambda library: (library / MANIFEST).write_text("{"), "damaged"),
        (lambda library: change_manifest(library, model="another"), "damaged"),
        (lambda library: change_manifest(library, format=7), "format 7; accepted is 1"),
        (lambda library: next(library.glob("*/catalog.sqlite")).unlink(), "cannot be read"),
        (lambda library: next(library.glob("*/catalog.sqlite")).write_bytes(b"none"), "cannot be read"),
        (lambda library: library.chmod(0o777), "everybody may write"),
    ],
    ids=["gone", "no manifest", "half a manifest", "changed", "format", "no catalog", "catalog", "open to all"],
)
def test_what_is_no_library_is_refused_by_name(
    model: str, library: Path, spoil: Callable[[Path], object], said: str
) -> None:
    spoil(library)
    with pytest.raises(StoreFileError, match=said) as caught:
        _ = open_engine(model, libraries=[library]).model
    assert str(library) in str(caught.value)


def test_what_differs_of_the_model_is_named(
    made: Path, tmp_path: Path, tokens: PreTrainedTokenizerBase, model: str
) -> None:
    other = make_model("llama", len(tokens))
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    half = make_model("llama", len(tokens)).to(torch.bfloat16)
    several = AutoTokenizer.from_pretrained(resolve(REFERENCE_MODEL))
    several.add_tokens(["<one more>"])
    cases = {
        "weights": (other, tokens),
        "dtype": (half, tokens),
        "architecture": (make_model("qwen2", len(tokens)), tokens),
        "layers": (make_model("llama", len(tokens), num_hidden_layers=2), tokens),
        "tokenizer": (make_model("llama", len(tokens)), several),
    }
    for name, (changed, its_tokens) in cases.items():
        engine = open_engine(save_model(tmp_path / name, changed, its_tokens), libraries=[made])
        with pytest.raises(StoreFileError, match=f"{made} is another model's: its {name} is .*; accepted is"):
            _ = engine.model


def test_a_state_that_the_model_takes_on_later_reads_none_of_it(
    made: Path, tmp_path: Path, tokens: PreTrainedTokenizerBase, model: str
) -> None:
    engine = open_engine(model, "exact", libraries=[made], max_bytes=0)
    before = answer(engine)
    with torch.no_grad():
        engine.model.lm_head.weight.mul_(-1)
    assert all(prefix == 0 for _, (prefix, *_), _ in answer(engine))
    with torch.no_grad():
        engine.model.lm_head.weight.mul_(-1)
    assert answer(engine) == before


def test_an_engine_does_not_write_where_a_library_is(model: str, library: Path) -> None:
    before = photograph(library)
    with pytest.raises(StoreFileError, match=r"StoreConfig\.libraries"):
        _ = open_engine(model, directory=library).model
    assert photograph(library) == before


def test_a_config_with_libraries_can_be_compared_and_hashed(tmp_path: Path) -> None:
    assert StoreConfig(libraries=[tmp_path]) == StoreConfig(libraries=(tmp_path,))
    assert len({StoreConfig(libraries=[tmp_path]), StoreConfig(libraries=(tmp_path,))}) == 1


def test_a_fault_of_a_library_leaves_the_own_directory_free(model: str, library: Path, tmp_path: Path) -> None:
    """The next try tells of the library again, not of a directory that the first one holds."""
    change_manifest(library, format=7)
    engine: SemShareEngine = open_engine(model, libraries=[library], directory=tmp_path / "own")
    for _ in range(2):
        with pytest.raises(SemShareError, match="format 7"):
            _ = engine.model


def test_on_a_device_its_kv_is_promoted_and_evicted_but_not_lost(pretended_device: str, model: str, made: Path) -> None:
    from simulated_device import move_model

    source = open_engine(model)
    moved = move_model(source.model)
    config = open_engine(model, "exact", libraries=[made], max_bytes=60_000).config
    engine = SemShareEngine(moved, source.tokenizer, config)
    expected = [ids for ids, *_ in answer_over(model, "off")]
    for _ in range(2):
        said = answer(engine)
        assert [ids for ids, *_ in said] == expected and said[0][1][0] > 0
        engine.store.check()
    stats = engine.stats()
    assert stats["store_promoted"] > 0 and stats["store_bytes"] <= 60_000
    assert stats["store_library_entries"] == len(DOCUMENTS)
