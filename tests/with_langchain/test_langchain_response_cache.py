"""LangChain's response cache answers for the model that was asked, in the state that it is in."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.caches import InMemoryCache
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine, StoreConfig
from semsharekv_integrations.langchain import ChatSemShareKV, SemShareKVLLM
from tiny_models import make_model

PROMPT = "The mayor of Velmar is"


@pytest.fixture(params=[ChatSemShareKV, SemShareKVLLM])
def cls(request: pytest.FixtureRequest) -> Any:
    return request.param


def ask(cls: Any, engine: SemShareEngine, cache: Any, **fields: Any) -> int:
    """How many requests the engine itself was asked for one answer."""
    before = engine.stats()["requests"]
    cls(engine=engine, cache=cache, max_tokens=4, **fields).invoke(PROMPT)
    return int(engine.stats()["requests"] - before)


def rows_changed(model: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight[7].add_(1)


def cast(model: Any, tokenizer: Any) -> None:
    model.bfloat16()


def other_template(model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[0].content }}"


def other_penalty(model: Any, tokenizer: Any) -> None:
    model.generation_config.repetition_penalty = 1.7


CHANGES: list[Callable[[Any, Any], None]] = [rows_changed, cast, other_template, other_penalty]


@pytest.fixture
def own_tokenizer(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Any:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return type(tokenizer).from_pretrained(tmp_path / "tokenizer")


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_an_engine_that_was_changed_answers_anew(cls: Any, own_tokenizer: Any, change: Any) -> None:
    model, cache = make_model("llama", len(own_tokenizer)), InMemoryCache()
    engine = SemShareEngine(model, own_tokenizer)
    assert [ask(cls, engine, cache), ask(cls, engine, cache)] == [1, 0]
    change(model, own_tokenizer)
    assert [ask(cls, engine, cache), ask(cls, engine, cache)] == [1, 0]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_two_models_of_one_name_are_two(cls: Any, own_tokenizer: Any, tmp_path: Path, change: Any) -> None:
    cache, models = InMemoryCache(), [make_model("llama", len(own_tokenizer)) for _ in range(3)]
    first, same = (SemShareEngine(model, own_tokenizer) for model in models[:2])
    assert [ask(cls, first, cache), ask(cls, same, cache)] == [1, 0], "the same weights are the same model"
    change(models[2], own_tokenizer)
    assert ask(cls, SemShareEngine(models[2], own_tokenizer), cache) == 1


def test_adapters_are_told_apart_and_found_again(cls: Any, tokenizer: Any) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model: Any = get_peft_model(make_model("llama", len(tokenizer)), lora, adapter_name="tone")
    model.add_adapter("law", lora)
    engine, cache = SemShareEngine(model, tokenizer), InMemoryCache()
    asked = []
    for name in ("tone", "law", "tone", "law"):
        model.set_adapter(name)
        asked.append(ask(cls, engine, cache))
    assert asked == [1, 1, 0, 0]


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(reuse=ReuseConfig(mode="identical")),
        EngineConfig(reuse=ReuseConfig(mode="identical"), store=StoreConfig(kv_bits=8)),
        EngineConfig(max_context_tokens=100),
    ],
    ids=["mode", "kv_bits", "window"],
)
def test_settings_are_told_apart(cls: Any, llama: PreTrainedModel, tokenizer: Any, config: EngineConfig) -> None:
    cache = InMemoryCache()
    assert ask(cls, SemShareEngine(llama, tokenizer), cache) == 1
    assert ask(cls, SemShareEngine(llama, tokenizer, config), cache) == 1


async def test_asynchronously_and_in_streams_too(cls: Any, tokenizer: Any) -> None:
    model, cache = make_model("llama", len(tokenizer)), InMemoryCache()
    engine = SemShareEngine(model, tokenizer)
    asked = cls(engine=engine, cache=cache, max_tokens=4)
    await asked.ainvoke(PROMPT)
    await asked.ainvoke(PROMPT)
    assert engine.stats()["requests"] == 1
    rows_changed(model, tokenizer)
    await asked.ainvoke(PROMPT)
    assert engine.stats()["requests"] == 2
    rows_changed(model, tokenizer)
    list(asked.stream(PROMPT))
    assert engine.stats()["requests"] == 3


def test_a_model_by_name_goes_by_its_files_and_loads_nothing(cls: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model("llama", len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    first, same = (SemShareEngine.from_pretrained(str(tmp_path)) for _ in range(2))
    identity = first.identity()
    assert identity == same.identity() and not first.is_loaded
    assert first.model is not None and first.identity() == identity
    assert SemShareEngine.from_pretrained(str(tmp_path), revision="b").identity() != identity
    rows_changed(first.model, tokenizer)
    assert first.identity() != identity
    rows_changed(model, tokenizer)
    model.save_pretrained(tmp_path)
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    other = SemShareEngine.from_pretrained(str(tmp_path))
    assert other.identity() != identity and not other.is_loaded
