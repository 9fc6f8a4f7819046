"""Fixtures that all tests share: the shipped tokenizer, a tiny random Llama, and engines around it."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine
from semsharekv_integrations.model.loading import REFERENCE_MODEL, resolve
from simulated_device import explain_absence, pretended
from tiny_models import EngineMaker, make_model

settings.register_profile(  # a busy machine is no failure; in CI the same examples every time, elsewhere new ones
    "unhurried", deadline=None, derandomize="CI" in os.environ
)
settings.load_profile("unhurried")
torch.set_num_threads(1)  # on models this small, more threads only get in each other's way


def pytest_collection_finish() -> None:
    """Take what is imported and collected, which stays, from what each collection of garbage looks through."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(resolve(REFERENCE_MODEL))


@pytest.fixture(scope="session")
def llama(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return make_model("llama", len(tokenizer))


@pytest.fixture
def make_engine(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> EngineMaker:
    """An engine with an empty store around the tiny Llama, or around the model given."""

    def make(mode: str = "exact", model: PreTrainedModel | None = None, **config: Any) -> SemShareEngine:
        config.setdefault("reuse", ReuseConfig(mode=mode))  # type: ignore[arg-type]
        return SemShareEngine(model if model is not None else llama, tokenizer, EngineConfig(**config))

    return make


@pytest.fixture
def pretended_device() -> Iterator[str]:
    """The name of a simulated accelerator that is there for this test; see ``simulated_device``."""
    problem = explain_absence()
    if problem:
        pytest.skip(f"no device can be pretended: {problem}")
    with pretended():
        yield "cuda:0"
