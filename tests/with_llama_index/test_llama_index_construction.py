"""What the constructor takes and refuses, what it does not load, and what is known of a model before it is loaded."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine, StoreConfig
from semsharekv_integrations.errors import ModelLoadError
from semsharekv_integrations.llama_index import SemShareKVLLM

PROMPT = "What did the mayor say about the flood ?"


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


@pytest.mark.usefixtures("no_loading")
def test_construction_reads_nothing() -> None:
    llm = SemShareKVLLM("no/such-model", namespace="n", max_tokens=7)
    assert not llm.engine.is_loaded
    assert llm.to_payload()["model_name"] == "no/such-model"


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("shared", [False, True])
def test_metadata_is_true_before_the_weights_are_there(model_path: Path, llama: PreTrainedModel, shared: bool) -> None:
    name = str(model_path)
    given: Any = {"engine": SemShareEngine.from_pretrained(name)} if shared else {"model": name}
    llm = SemShareKVLLM(**given, max_tokens=33)
    metadata = llm.metadata
    assert metadata.context_window == llama.config.max_position_embeddings
    assert (metadata.num_output, metadata.is_chat_model, metadata.model_name) == (33, True, name)
    assert metadata.is_function_calling_model
    assert not SemShareKVLLM(**given, is_function_calling_model=False).metadata.is_function_calling_model
    assert not SemShareKVLLM(**given, messages_to_prompt=str).metadata.is_function_calling_model
    assert llm.tokenize(PROMPT)
    assert not llm.engine.is_loaded


def test_loading_changes_no_metadata_and_no_tokens(model_path: Path) -> None:
    llm = SemShareKVLLM(model=str(model_path), max_tokens=3)
    before = llm.metadata, llm.tokenize(PROMPT)
    llm.complete(PROMPT)
    assert llm.engine.is_loaded
    assert (llm.metadata, llm.tokenize(PROMPT)) == before


def test_tokens_are_the_model_s_without_special_ones(llm: SemShareKVLLM, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(llm.tokenize(PROMPT)) == PROMPT
    assert not set(llm.tokenize(PROMPT)) & set(tokenizer.all_special_ids)


def test_a_tokenizer_without_chat_template_is_no_chat_model(model_path: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(model_path).save_pretrained(tmp_path)
    llm = SemShareKVLLM(model=str(tmp_path), max_tokens=3)
    assert not llm.metadata.is_chat_model and not llm.metadata.is_function_calling_model
    assert SemShareKVLLM(model=str(tmp_path), is_chat_model=True).metadata.is_chat_model
    assert not SemShareKVLLM(model=str(model_path), is_chat_model=False).metadata.is_chat_model
    llm.complete(PROMPT)
    assert not llm.metadata.is_chat_model


@pytest.mark.parametrize("loaded", [False, True])
def test_the_configured_context_window_counts(model_path: Path, loaded: bool) -> None:
    llm = SemShareKVLLM(model=str(model_path), config=EngineConfig(max_context_tokens=99), max_tokens=2)
    if loaded:
        llm.complete(PROMPT)
    assert llm.metadata.context_window == 99


def test_a_model_that_is_not_there_is_named() -> None:
    llm = SemShareKVLLM(model="/no/such/folder")
    with pytest.raises(ModelLoadError, match="/no/such/folder"):
        _ = llm.metadata
    with pytest.raises(ModelLoadError, match="/no/such/folder"):
        llm.complete(PROMPT)


@pytest.mark.parametrize("mode", ["off", "exact"])
def test_mode_reaches_the_engine_and_config_keeps_the_rest(model_path: Path, mode: Any) -> None:
    config = EngineConfig(reuse=ReuseConfig(min_prefix_tokens=4), store=StoreConfig(max_bytes=10**7))
    llm = SemShareKVLLM(model=str(model_path), mode=mode, config=config, max_tokens=2)
    assert llm.engine.config.reuse == ReuseConfig(mode=mode, min_prefix_tokens=4)
    assert llm.engine.config.store == config.store
    llm.complete(PROMPT)
    assert (llm.complete(PROMPT).raw["kv_cache"]["prefix_tokens"] > 0) == (mode == "exact")
    assert SemShareKVLLM(model="m", config=EngineConfig(reuse=ReuseConfig(mode=mode))).engine.config.reuse.mode == mode


def test_device_dtype_and_model_kwargs_reach_the_loader(model_path: Path) -> None:
    for dtype in ("bfloat16", torch.bfloat16):
        llm = SemShareKVLLM(model=str(model_path), device=torch.device("cpu"), dtype=dtype, max_tokens=2)
        assert llm.engine.model.dtype == torch.bfloat16
    eager = SemShareKVLLM(model=str(model_path), model_kwargs={"attn_implementation": "eager"})
    assert eager.engine.model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"mode": "fast"},
            "mode is 'fast'; accepted is None or 'auto' or 'off' or 'exact' or 'identical' or 'semantic' or 'paper'",
        ),
        ({"temperature": -0.5}, "temperature is -0.5; accepted is 0 or more"),
        ({"top_p": 0.0}, "top_p is 0.0; accepted is above 0, up to 1"),
        ({"top_k": 0}, "top_k is 0; accepted is None or 1 or more"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; accepted is"),
        ({"max_tokens": 0}, "max_tokens is 0; accepted is an integer of 1 or more"),
        ({"stop": [""]}, "stop is .* accepted is None, or strings of 1 to"),
        ({"namespace": ""}, "namespace is ''; accepted is None or a non-empty string"),
        ({"model": None}, "model is None; accepted is a path or hub id, unless engine= is given"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_bad_fields_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SemShareKVLLM(**{"model": "some/model", **fields})


@pytest.mark.parametrize(
    "field",
    [
        {"mode": "off"},
        {"model": "other"},
        {"config": EngineConfig(max_context_tokens=50)},
        {"device": "cuda"},
        {"dtype": "float16"},
        {"model_kwargs": {"revision": "main"}},
    ],
)
def test_fields_that_contradict_a_shared_engine_are_refused(
    make_engine: Callable[..., SemShareEngine], field: dict[str, Any]
) -> None:
    (name,) = field
    with pytest.raises(ValueError, match=f"{name} is .* accepted is .*nothing beside engine="):
        SemShareKVLLM(engine=make_engine(), **field)


def test_a_shared_engine_is_shared(make_engine: Callable[..., SemShareEngine]) -> None:
    engine = make_engine("off")
    llm = SemShareKVLLM(engine=engine, mode="off")
    assert llm.engine is SemShareKVLLM(engine=engine).engine is llm.model_copy().engine is engine
    assert (llm.mode, llm.config, llm.model) == ("off", engine.config, engine.name)


@pytest.mark.parametrize("field", ["model", "mode", "config", "device", "dtype", "model_kwargs"])
def test_what_the_engine_was_made_of_cannot_be_changed(llm: SemShareKVLLM, field: str) -> None:
    with pytest.raises(ValueError, match="frozen"):
        setattr(llm, field, None)
    with pytest.raises(ValueError, match=f"^{field} is 'x'; accepted is .*a copy has the same engine"):
        llm.model_copy(update={field: "x"})


def test_settings_survive_serialization_and_secrets_do_not(model_path: Path) -> None:
    llm = SemShareKVLLM(
        model=str(model_path),
        mode="off",
        config=EngineConfig(max_context_tokens=77),
        dtype=torch.float32,
        model_kwargs={"token": "secret"},
        seed=4,
        stop=["."],
    )
    plain = llm.to_json()
    assert "secret" not in plain + repr(llm) + json.dumps(llm.to_payload())
    again = SemShareKVLLM.from_json(plain)
    assert again.to_json() == plain
    assert again.engine.config == llm.engine.config
    assert pickle.loads(pickle.dumps(llm)).to_json() == plain
