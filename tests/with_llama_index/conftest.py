"""LlamaIndex set up offline: the model's own tokenizer, mock embeddings, and no way to reach OpenAI's tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_index.core
import pytest
import tiktoken
from llama_index.core import MockEmbedding, Settings
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from semsharekv_integrations import SemShareEngine
from semsharekv_integrations.llama_index import SemShareKVLLM


@pytest.fixture
def llm(make_engine: Callable[..., SemShareEngine]) -> SemShareKVLLM:
    return SemShareKVLLM(engine=make_engine(), max_tokens=12)


@pytest.fixture
def settings(make_engine: Callable[..., SemShareEngine], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """LlamaIndex's global settings around a model with room for its prompt templates; restored afterwards."""

    def refuse(*_: object) -> None:
        raise AssertionError("LlamaIndex asked for OpenAI's tokenizer")

    saved = copy.copy(vars(Settings))
    monkeypatch.setattr(tiktoken, "encoding_for_model", refuse)
    monkeypatch.setattr(llama_index.core, "global_tokenizer", None)
    llm = SemShareKVLLM(engine=make_engine(max_context_tokens=1024), max_tokens=12)
    Settings.llm, Settings.tokenizer, Settings.embed_model = llm, llm.tokenize, MockEmbedding(embed_dim=5)
    yield Settings
    vars(Settings).update(saved)


@pytest.fixture(scope="session")
def model_path(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: Any) -> Path:
    """The tiny model as files."""
    path: Path = tmp_path_factory.mktemp("model")
    llama.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
