"""What code written for other LLMs passes, copies of an LLM, and prompts that are none."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core.llms import ChatMessage

from semsharekv_integrations import SemShareEngine, SemShareError
from semsharekv_integrations.llama_index import SemShareKVLLM

PROMPT = "The storm closed the bridge ."
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if shout %} NOW !{% endif %}"


@pytest.mark.parametrize("name", ["max_tokens", "max_new_tokens"])
def test_limits_have_two_names(llm: SemShareKVLLM, name: str) -> None:
    built = SemShareKVLLM(engine=llm.engine, **{name: 3})
    assert built.max_tokens == 3 and built.complete(PROMPT).text == llm.complete(PROMPT, **{name: 3}).text


@pytest.mark.parametrize(
    "fields",
    [
        {"context_window": 4096},
        {"generate_kwargs": {"do_sample": True}},
        {"additional_kwargs": {}},
        {"model_name": "x"},
        {"tokenizer_name": "x"},
        {"device_map": "auto"},
        {"temprature": 1.0},
    ],
)
def test_unknown_fields_are_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"keyword arguments is .*{next(iter(fields))}.*accepted is engine, .*temper"):
        SemShareKVLLM(model="semsharekv/reference", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "semsharekv/reference", "config": {"reuse": "exact"}}, "config"),
        ({"model": "semsharekv/reference", "config": "exact"}, "config is 'exact'; accepted is an EngineConfig"),
        ({"model": "semsharekv/reference", "mode": "fast"}, "mode is 'fast'; accepted is None or 'auto'"),
        ({"model": 5}, "model"),
        ({}, "model is None; accepted is a path or hub id, unless engine= is given"),
        ({"engine": "semsharekv/reference"}, "engine is 'str'; accepted is None or a SemShareEngine"),
    ],
)
def test_what_makes_no_engine_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SemShareKVLLM(**fields)


@pytest.mark.parametrize("prompt", [None, 5, ["a"], b"x", ChatMessage("Hi .")])
async def test_a_completion_of_no_text_is_refused(llm: SemShareKVLLM, prompt: Any) -> None:
    for ask in (llm.complete, llm.stream_complete):
        with pytest.raises((SemShareError, ValueError), match="prompt"):
            ask(prompt)
    with pytest.raises((SemShareError, ValueError), match="prompt"):
        await llm.acomplete(prompt)


@pytest.mark.parametrize("messages", [None, 5, "Hi .", [("user", "Hi .")], [None]])
async def test_a_chat_of_no_messages_is_refused(llm: SemShareKVLLM, messages: Any) -> None:
    for ask in (llm.chat, llm.stream_chat):
        with pytest.raises((SemShareError, ValueError), match="messages"):
            ask(messages)
    with pytest.raises((SemShareError, ValueError), match="messages"):
        await llm.achat(messages)


def test_texts_that_are_no_unicode_are_refused_by_name(llm: SemShareKVLLM) -> None:
    for ask in (llm.complete, lambda text: llm.chat([ChatMessage(text)])):
        with pytest.raises(SemShareError, match=r"prompt is .*; accepted is text without lone surrogates"):
            ask("Caf\ud800 prices rose .")
    with pytest.raises(ValueError, match=r"text is .*; accepted is a text without lone surrogates"):
        llm.tokenize("Caf\ud800")


def test_templates_are_told_more(make_engine: Callable[..., SemShareEngine]) -> None:
    engine = make_engine()
    tokenizer = copy.copy(engine.tokenizer)
    tokenizer.chat_template = TEMPLATE
    engine = SemShareEngine(engine.model, tokenizer, engine.config)
    llm = SemShareKVLLM(engine=engine, max_tokens=3)
    told = SemShareKVLLM(engine=engine, max_tokens=3, chat_template_kwargs={"shout": True})
    messages = [ChatMessage(PROMPT)]

    def length(of: SemShareKVLLM, **call: Any) -> int:
        return int(of.chat(messages, **call).raw["usage"]["prompt_tokens"])

    assert length(told) == length(llm, chat_template_kwargs={"shout": True}) > length(llm)
    assert length(told, chat_template_kwargs={}) == length(llm)
    assert told.to_dict()["chat_template_kwargs"] == {"shout": True}


def test_copies_share_the_engine_and_its_kv(llm: SemShareKVLLM) -> None:
    expected = llm.complete(PROMPT)
    for copied in (copy.deepcopy(llm), copy.copy(llm), llm.model_copy(deep=True)):
        assert copied.engine is llm.engine and copied.kv_namespace == llm.kv_namespace
        again = copied.complete(PROMPT)
        assert again.text == expected.text and again.raw["kv_cache"]["prefix_tokens"] > 0


def test_pickles_are_made_again() -> None:
    llm = SemShareKVLLM(model="semsharekv/reference", mode="exact", dtype="float32", max_tokens=6)
    expected = llm.complete(PROMPT).text
    again = pickle.loads(pickle.dumps(llm))
    assert not again.engine.is_loaded and again.to_dict() == llm.to_dict()
    assert again.engine.config == llm.engine.config and again.complete(PROMPT).text == expected
    shared = pickle.loads(pickle.dumps(SemShareKVLLM(engine=llm.engine, max_tokens=6)))
    assert shared.engine.config == llm.engine.config and shared.complete(PROMPT).text == expected


def test_a_given_model_is_not_pickled(llm: SemShareKVLLM) -> None:
    with pytest.raises(TypeError, match="was given its model; accepted to pickle is one of "):
        pickle.dumps(llm)
