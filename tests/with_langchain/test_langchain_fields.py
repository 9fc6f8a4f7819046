"""Constructing the models: lazily, with clear refusals, and with an identity that LangChain's cache can trust."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.caches import InMemoryCache
from langchain_core.runnables import ConfigurableField
from pydantic import BaseModel, ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from semsharekv_integrations import EngineConfig, ModelLoadError, ReuseConfig, SemShareEngine, StoreConfig
from semsharekv_integrations.langchain import ChatSemShareKV, SemShareKVLLM

EngineMaker = Callable[..., SemShareEngine]
ModelClass = type[ChatSemShareKV] | type[SemShareKVLLM]
PROMPT = "In Prorna , a green flag was raised on Monday ."


@pytest.fixture(params=[ChatSemShareKV, SemShareKVLLM])
def cls(request: pytest.FixtureRequest) -> ModelClass:
    return request.param


@pytest.fixture
def saved(tmp_path: Path, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def text(answer: Any) -> str:
    return answer if isinstance(answer, str) else str(answer.text)


def test_weights_are_loaded_at_the_first_call(cls: ModelClass, saved: str, make_engine: EngineMaker) -> None:
    model = cls(model=saved, max_tokens=8)
    assert not model.engine.is_loaded and model._get_ls_params()["ls_model_name"] == saved
    assert str(model) and repr(model) and model._identifying_params and not model.engine.is_loaded
    identity = model._identifying_params
    assert text(model.invoke(PROMPT)) == text(cls(engine=make_engine(), max_tokens=8).invoke(PROMPT))
    assert model.engine.is_loaded and model._identifying_params == identity


def test_a_missing_model_is_an_error_of_the_first_call(cls: ModelClass, tmp_path: Path) -> None:
    model = cls(model=str(tmp_path / "nowhere"))
    with pytest.raises(ModelLoadError, match="nowhere"):
        model.invoke(PROMPT)


def test_loading_options_reach_the_model(cls: ModelClass, saved: str) -> None:
    model = cls(model=saved, dtype="bfloat16", device="cpu", model_kwargs={"attn_implementation": "eager"})
    assert model.engine.model.dtype == torch.bfloat16 and model.engine.model.config._attn_implementation == "eager"


def test_mode_and_config_reach_the_engine(cls: ModelClass) -> None:
    config = EngineConfig(store=StoreConfig(max_bytes=123))
    model = cls(model="some/model", mode="off", config=config)
    assert model.engine.config == model.config == EngineConfig(ReuseConfig("off"), StoreConfig(max_bytes=123))
    assert cls(model="some/model", config=EngineConfig(ReuseConfig("off"))).mode == "off"


def test_an_engine_brings_its_name_and_settings(cls: ModelClass, make_engine: EngineMaker) -> None:
    engine = make_engine("off")
    model = cls(engine=engine)
    assert (model.engine, model.model, model.mode, model.config) == (engine, engine.name, "off", engine.config)
    assert cls(engine=engine, mode="off", config=engine.config, model=engine.name).engine is engine
    written = json.loads(model.model_dump_json())
    assert (written["device"], written["dtype"], written["mode"]) == ("cpu", "float32", "off")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "model is None; accepted is a path or hub id, or an engine"),
        ({"model": 3}, "model is 3"),
        ({"model": "m", "mode": "fast"}, "mode is 'fast'; accepted is None or 'auto' or 'off' or 'exact'"),
        ({"model": "m", "config": {"reuse": 1}}, "config is .*accepted is None or an EngineConfig"),
        ({"model": "m", "temprature": 1}, "'temprature'.*accepted is .*temperature"),
        ({"model": "m", "temperature": -0.5}, "temperature is -0.5"),
        ({"model": "m", "max_tokens": 0}, "max_tokens is 0"),
        ({"model": "m", "max_tokens": 1, "max_new_tokens": 2}, "max_new_tokens is 2"),
        ({"model": "m", "top_p": 0}, "top_p is 0"),
        ({"model": "m", "top_k": 0}, "top_k is 0"),
        ({"model": "m", "stop": [""]}, "stop is"),
        ({"model": "m", "stop": "text"}, "stop\n"),
        ({"model": "m", "namespace": ""}, "namespace is ''"),
        ({"model": "m", "model_kwargs": "x"}, "model_kwargs is 'x'"),
        ({"engine": "m"}, "engine is 'str'"),
    ],
)
def test_bad_fields_are_named(cls: ModelClass, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**fields)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "another"),
        ("mode", "off"),
        ("config", EngineConfig(max_context_tokens=99)),
        ("device", "cuda"),
        ("dtype", "float16"),
        ("model_kwargs", {"revision": "main"}),
    ],
)
def test_fields_that_contradict_the_engine_are_refused(
    cls: ModelClass, make_engine: EngineMaker, name: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*engine"):
        cls(engine=make_engine(), **{name: value})


@pytest.mark.parametrize("name", ["model", "engine", "mode", "config", "device", "dtype", "model_kwargs"])
def test_what_was_loaded_cannot_be_renamed(cls: ModelClass, name: str) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(cls(model="m"), name, None)
    if name != "engine":
        with pytest.raises(ValueError, match=f"^{name} is 'x'; accepted is .*a copy has the same engine"):
            cls(model="m").model_copy(update={name: "x"})


def test_rebuilding_with_another_field_keeps_the_engine(cls: ModelClass, saved: str) -> None:
    model = cls(model=saved, dtype="float32", device="cpu", max_tokens=8)
    configurable = model.configurable_fields(max_tokens=ConfigurableField(id="limit"))
    whole = text(configurable.invoke(PROMPT))
    short = text(configurable.invoke(PROMPT, config={"configurable": {"limit": 3}}))
    assert whole.startswith(short) and len(short) < len(whole)
    assert model.engine.stats()["requests"] == 2


@pytest.mark.parametrize(("name", "value"), [("device", "meta"), ("dtype", "float16"), ("model_kwargs", {"a": 1})])
def test_rebuilding_with_another_way_to_load_is_refused(cls: ModelClass, name: str, value: Any) -> None:
    """It would have no effect."""
    model = cls(model="m", dtype="float32", device="cpu", model_kwargs={"revision": "main"})
    configurable = model.configurable_fields(**{name: ConfigurableField(id=name)})
    with pytest.raises(ValueError, match=f"{name} is .*beside engine="):
        configurable.invoke(PROMPT, config={"configurable": {name: value}})


def test_an_instance_goes_into_other_pydantic_models_as_it_is(cls: ModelClass) -> None:
    class Holder(BaseModel):
        llm: cls  # type: ignore[valid-type]

    model = cls(model="m")
    assert Holder(llm=model).llm is model


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "n"},
        {"mode": "off"},
        {"config": EngineConfig(ReuseConfig(min_prefix_tokens=5))},
        {"config": EngineConfig(max_context_tokens=99)},
        {"config": EngineConfig(store=StoreConfig(directory=Path("kv"), libraries=[Path("library"), "other"]))},
        {"dtype": "float16"},
        {"device": "cuda"},
        {"model_kwargs": {"revision": "abc"}},
        {"model_kwargs": {"torch_dtype": torch.float16}},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"top_k": 5},
        {"repetition_penalty": 2.0},
        {"seed": 3},
        {"max_tokens": 7},
        {"stop": ["x"]},
        {"namespace": "other"},
    ],
    ids=str,
)
def test_identity_varies_with_all_that_can_change_text(cls: ModelClass, changed: dict[str, Any]) -> None:
    same, other = cls(model="m")._identifying_params, cls(**{"model": "m", **changed})._identifying_params
    assert same == cls(model="m")._identifying_params and same != other
    assert json.loads(json.dumps(other)) == other


def test_spellings_of_one_thing_have_one_identity(cls: ModelClass) -> None:
    by_name, by_object = cls(model="m", dtype="bfloat16"), cls(model="m", dtype=torch.bfloat16)
    assert by_name._identifying_params == by_object._identifying_params


def test_secrets_stay_out_of_traces(cls: ModelClass) -> None:
    model = cls(model="m", model_kwargs={"token": "hf_secret"})
    keyed = ChatSemShareKV(model="m", api_key="hf_secret")
    for shown in (
        model,
        model._identifying_params,
        model._serialized,
        model.model_dump_json(),
        keyed,
        keyed._serialized,
    ):
        assert "hf_secret" not in f"{shown!r}{shown}"


@pytest.fixture
def cached(cls: ModelClass, make_engine: EngineMaker) -> Any:
    return cls(engine=make_engine(), max_tokens=8, cache=InMemoryCache())


def requests(model: Any) -> float:
    return model.engine.stats()["requests"]


async def test_langchains_cache_answers_the_same_call(cached: Any) -> None:
    first = text(cached.invoke(PROMPT))
    assert text(cached.invoke(PROMPT)) == text(await cached.ainvoke(PROMPT)) == first and requests(cached) == 1


@pytest.mark.parametrize(
    "changed",
    [{"temperature": 1.0}, {"max_tokens": 3}, {"max_new_tokens": 4}, {"stop": ["x"]}, {"namespace": "other"}],
    ids=str,
)
async def test_langchains_cache_tells_calls_apart(cached: Any, changed: dict[str, Any]) -> None:
    cached.invoke(PROMPT)
    cached.invoke(PROMPT, **changed)
    assert requests(cached) == 2
    await cached.ainvoke("Another prompt .")
    await cached.ainvoke("Another prompt .", **changed)
    assert requests(cached) == 4
    await cached.ainvoke(PROMPT, **changed)
    assert requests(cached) == 4


@pytest.mark.parametrize("changed", [{"stop": ["x"]}, {"max_tokens": 3}, {"seed": 1}], ids=str)
def test_langchains_cache_tells_models_apart(cached: Any, changed: dict[str, Any]) -> None:
    cached.invoke(PROMPT)
    other = type(cached)(engine=cached.engine, **{"max_tokens": 8, "cache": cached.cache, **changed})
    other.invoke(PROMPT)
    assert requests(cached) == 2


def test_profile_has_the_context_window_without_weights(saved: str, make_engine: EngineMaker) -> None:
    chat = ChatSemShareKV(model=saved)
    assert chat.profile["max_input_tokens"] == 512 and not chat.engine.is_loaded
    assert ChatSemShareKV(engine=make_engine()).profile["max_input_tokens"] == 512
    bounded = ChatSemShareKV(model=saved, config=EngineConfig(max_context_tokens=99))
    assert bounded.profile["max_input_tokens"] == bounded.engine.context_window == 99
    assert "max_input_tokens" not in ChatSemShareKV(model="some/model-not-here").profile


def test_tracing_names_model_and_call(cls: ModelClass) -> None:
    params = cls(model="m", stop=["x"], temperature=0.5)._get_ls_params(max_new_tokens=3)
    assert params["ls_provider"] == "semsharekv" and params["ls_model_name"] == "m" and params["ls_stop"] == ["x"]
    assert params["ls_max_tokens"] == 3 and params["ls_temperature"] == 0.5
