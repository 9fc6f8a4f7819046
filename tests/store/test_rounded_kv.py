"""KV that lay in 8 bits is nobody's exact KV, on whatever way it comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from semsharekv_integrations import ReuseConfig, SemShareEngine, StoreConfig
from tiny_models import EngineMaker

PROMPTS = [
    f"{number} News from Velmar . The mayor of Velmar is Anna Kelsen . The cost is {number}" for number in "1234"
]
ASKED = " million crowns . Who is the mayor ?"


def rounding(make_engine: EngineMaker, directory: Path | None = None) -> SemShareEngine:
    engine = make_engine(reuse=ReuseConfig(mode="identical"), store=StoreConfig(kv_bits=8, directory=directory))
    for prompt in PROMPTS:
        engine.generate(prompt, max_new_tokens=1)
    return engine


def assert_unused(engine: SemShareEngine) -> None:
    for prompt in PROMPTS:
        assert engine.generate(prompt + ASKED, max_new_tokens=1).report.reused_tokens == 0
        engine.clear()


@pytest.mark.parametrize("mode", ["exact", "identical", "semantic", "paper"])
def test_a_directory_keeps_it_apart(make_engine: EngineMaker, tmp_path: Path, mode: str) -> None:
    rounding(make_engine, tmp_path).close()
    engine = make_engine(mode, store=StoreConfig(directory=tmp_path))
    assert_unused(engine)
    engine.close()
    again = make_engine(reuse=ReuseConfig(mode="identical"), store=StoreConfig(kv_bits=8, directory=tmp_path))
    assert again.generate(PROMPTS[0] + ASKED, max_new_tokens=1).report.prefix_tokens > 0, "whoever rounds has it still"
    again.close()


@pytest.mark.parametrize("mode", ["exact", "identical", "semantic", "paper"])
def test_a_file_says_it(make_engine: EngineMaker, tmp_path: Path, mode: str) -> None:
    file = tmp_path / "kv.safetensors"
    assert rounding(make_engine).save(file) == len(PROMPTS)
    engine = make_engine(mode)
    assert engine.load(file) == 0 and engine.store.stats()["refused"] == len(PROMPTS)
    assert_unused(engine)
    again = make_engine(reuse=ReuseConfig(mode="identical"), store=StoreConfig(kv_bits=8))
    assert again.load(file) == len(PROMPTS)
    assert again.save(file) == len(PROMPTS) and engine.load(file) == 0, "handed on, it is as rounded as before"


def test_a_store_that_keeps_kv_as_it_is_takes_none(make_engine: EngineMaker) -> None:
    engine, exact = rounding(make_engine), make_engine()
    assert [exact.store.put(reference) for reference in engine.store.fetch_all()] == [False] * len(PROMPTS)
    exact.store.check()


def test_what_is_exact_may_be_rounded(make_engine: EngineMaker, tmp_path: Path) -> None:
    exact, file = make_engine(), tmp_path / "kv.safetensors"
    exact.generate(PROMPTS[0], max_new_tokens=1)
    exact.save(file)
    engine = make_engine(reuse=ReuseConfig(mode="identical"), store=StoreConfig(kv_bits=8))
    assert engine.load(file) == 1
    assert engine.generate(PROMPTS[0] + ASKED, max_new_tokens=1).report.prefix_tokens > 0


def test_rounded_files_in_a_directory_of_exact_ones_are_unreadable(make_engine: EngineMaker, tmp_path: Path) -> None:
    """As where another program, or an older version of this one, put them."""
    rounded = rounding(make_engine)
    stores: list[Any] = [
        type(rounded.store)(StoreConfig(kv_bits=bits, directory=tmp_path), min_run_tokens=8) for bits in (8, None)
    ]
    for store in stores:
        store.open("ab12", torch.float32, torch.device("cpu"))
        for reference in rounded.store.fetch_all():
            store.put(reference)
        found = [store.fetch(reference.id, reference.namespace) for reference in store.references()]
        if store.config.kv_bits is None:
            assert found == [None] * len(found) and store.stats()["unreadable"] > 0
        store.check()
        store.close()
