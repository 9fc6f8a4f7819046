"""Servers for a test, around the tiny Llama, or for a file of tests, around the shipped model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from running_server import KEYS, RunningServer, Serve
from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine
from semsharekv_integrations.serving import ServerConfig


@pytest.fixture
def serve(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[Serve]:
    """Serves the tiny Llama, or the engine given, by the settings given, until the test ends."""
    running: list[RunningServer] = []

    def start(engine: SemShareEngine | None = None, mode: str = "exact", **config: Any) -> RunningServer:
        if engine is None:
            engine = SemShareEngine(llama, tokenizer, EngineConfig(reuse=ReuseConfig(mode=mode)))  # type: ignore[arg-type]
        config = {"api_keys": KEYS, "model": "tiny", "page": False} | config
        running.append(RunningServer(engine, ServerConfig(**config)).__enter__())
        return running[-1]

    yield start
    for server in running:
        server.__exit__()


@pytest.fixture
def endless(
    tokenizer: PreTrainedTokenizerBase, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> SemShareEngine:
    """An engine whose answers end at ``max_tokens`` alone."""
    monkeypatch.setattr(llama.generation_config, "eos_token_id", None)
    monkeypatch.setattr(llama.config, "eos_token_id", None)
    return SemShareEngine(llama, tokenizer, EngineConfig(reuse=ReuseConfig(mode="exact"), max_context_tokens=8192))


@pytest.fixture(scope="module")
def trained() -> Iterator[RunningServer]:
    """Serves the shipped model, with two keys."""
    engine = SemShareEngine.from_pretrained("semsharekv/reference", EngineConfig(reuse=ReuseConfig(mode="identical")))
    with RunningServer(engine, ServerConfig(model="news", api_keys=KEYS, page=False)) as server:
        yield server.wait_until_loaded()
