"""What code written for other models passes: taken where it means something here, refused by name where it does not."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool

from semsharekv_integrations import GenerationChunk, PromptError, SemShareEngine, ToolCall
from semsharekv_integrations.langchain import ChatSemShareKV, DocumentTracker, SemShareKVLLM
from semsharekv_integrations.langchain.tools import ChatOptions, ToolCallChunks
from tiny_models import EngineMaker

PROMPT = "The storm closed the bridge ."
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if shout %} NOW !{% endif %}"
Model = ChatSemShareKV | SemShareKVLLM


@pytest.fixture(params=[ChatSemShareKV, SemShareKVLLM])
def model(request: Any, make_engine: EngineMaker) -> Any:
    return request.param(engine=make_engine(), max_tokens=6)


@pytest.fixture
def chat(make_engine: EngineMaker) -> ChatSemShareKV:
    """One whose template has a variable."""
    engine = make_engine()
    tokenizer = copy.copy(engine.tokenizer)
    tokenizer.chat_template = TEMPLATE
    return ChatSemShareKV(engine=SemShareEngine(engine.model, tokenizer, engine.config), max_tokens=6)


def said(answer: Any) -> str:
    return str(getattr(answer, "content", answer))


@pytest.mark.parametrize("name", ["max_tokens", "max_new_tokens", "max_completion_tokens", "num_predict"])
def test_limits_have_the_names_of_other_models(model: Model, name: str) -> None:
    expected = said(model.invoke(PROMPT, max_tokens=2))
    assert said(model.invoke(PROMPT, **{name: 2})) == expected == said(model.bind(**{name: 2}).invoke(PROMPT))
    assert said(type(model)(engine=model.engine, **{name: 2}).invoke(PROMPT)) == expected
    with pytest.raises(ValueError, match="max_tokens is 0"):
        model.invoke(PROMPT, **{name: 0})


def test_stop_strings_have_the_name_of_other_models(model: Model) -> None:
    stop = [said(model.invoke(PROMPT)).split()[1]]
    assert said(model.invoke(PROMPT, stop_sequences=stop)) == said(model.invoke(PROMPT, stop=stop))
    assert said(type(model)(engine=model.engine, max_tokens=6, stop_sequences=stop).invoke(PROMPT)) == said(
        model.invoke(PROMPT, stop=stop)
    )


@pytest.mark.parametrize(
    "option", [{"n": 1}, {"logprobs": False}, {"stream_usage": True}, {"stream_options": {"include_usage": True}}]
)
def test_what_has_one_meaning_here_is_taken(model: Model, option: dict[str, Any]) -> None:
    plain = said(model.invoke(PROMPT))
    assert said(model.invoke(PROMPT, **option)) == plain
    assert "".join(map(said, model.stream(PROMPT, **option))) == plain


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"n": 2}, "n is 2; accepted is 1"),
        ({"logprobs": True}, "logprobs is True; accepted is False"),
        ({"stream_usage": "yes"}, "stream_usage is 'yes'; accepted is True or False"),
        ({"stream_options": {"x": 1}}, "stream_options is .*include_usage"),
        ({"reasoning_effort": "low"}, r"keyword arguments is \['reasoning_effort'\]; accepted is temperature"),
        ({"extra_body": {}}, "extra_body"),
        ({"functions": []}, "functions"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"do_sample": True}, "do_sample"),
    ],
)
def test_what_means_nothing_here_is_refused_by_name(model: Model, option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.invoke(PROMPT, **option)
    with pytest.raises(ValueError, match=message):
        list(model.bind(**option).stream(PROMPT))


def test_texts_that_are_no_unicode_are_refused_by_name(model: Model) -> None:
    with pytest.raises(PromptError, match=r"prompt is .*; accepted is text without lone surrogates"):
        model.invoke("Caf\ud800 prices rose .")
    with pytest.raises(ValueError, match=r"text is .*; accepted is a text without lone surrogates"):
        model.get_num_tokens("Caf\ud800")


def test_templates_are_told_more(chat: ChatSemShareKV) -> None:
    plain = chat.invoke(PROMPT).usage_metadata
    told = chat.invoke(PROMPT, chat_template_kwargs={"shout": True}).usage_metadata
    assert plain and told and told["input_tokens"] > plain["input_tokens"]
    built = ChatSemShareKV(engine=chat.engine, max_tokens=6, chat_template_kwargs={"shout": True})
    assert built.invoke(PROMPT).usage_metadata["input_tokens"] == told["input_tokens"]  # type: ignore[index]
    assert built.invoke(PROMPT, chat_template_kwargs={}).usage_metadata["input_tokens"] == plain["input_tokens"]  # type: ignore[index]
    assert built._get_llm_string() != ChatSemShareKV(engine=chat.engine, max_tokens=6)._get_llm_string()
    with pytest.raises(ValueError, match="chat_template_kwargs"):
        chat.invoke(PROMPT, chat_template_kwargs="shout")


@tool
def search(query: str) -> str:
    """Search."""
    return query


@pytest.mark.parametrize("option", [{"parallel_tool_calls": False}, {"parallel_tool_calls": True}, {}])
def test_parallel_calls_can_be_refused(make_engine: EngineMaker, option: dict[str, Any]) -> None:
    chat = ChatSemShareKV(engine=make_engine(max_context_tokens=4096), max_tokens=6)
    assert chat.bind_tools([search], **option).invoke("Hi .")
    with pytest.raises(ValueError, match="parallel_tool_calls"):
        chat.bind_tools([search], parallel_tool_calls="maybe").invoke("Hi .")


@pytest.mark.parametrize("is_answer", [False, True])
def test_one_call_at_most_is_the_first(is_answer: bool) -> None:
    """However they come, and whether or not one of them is the answer itself."""
    options = ChatOptions(parallel_tool_calls=False)
    names = [options.answer_tool if is_answer else "f", "g", "h"]
    calls = [ToolCall(str(at), name, {"x": at}) for at, name in enumerate(names)]
    for chunks in ([calls], [calls[:1], calls[1:]]):
        kept = ToolCallChunks(options)
        found = [kept.read(GenerationChunk("", tool_calls=tuple(group))) for group in chunks]
        texts, streamed = "".join(text for text, _ in found), [call["name"] for _, some in found for call in some]
        assert (bool(texts), streamed) == ((True, []) if is_answer else (False, ["f"]))
    several = ToolCallChunks(ChatOptions()).read(GenerationChunk("", tool_calls=tuple(calls)))[1]
    assert len(several) == (2 if is_answer else 3)


def test_anthropic_s_way_to_refuse_parallel_calls(make_engine: EngineMaker) -> None:
    chat = ChatSemShareKV(engine=make_engine(), max_tokens=6)
    bound: Any = chat.bind_tools([search], tool_choice={"type": "any", "disable_parallel_tool_use": True})
    assert bound.kwargs["parallel_tool_calls"] is False and bound.kwargs["tool_choice"] == "any"


@pytest.mark.parametrize("shape", [{}, {"callbacks": [DocumentTracker()]}])
def test_copies_share_the_engine_and_its_kv(model: Model, shape: dict[str, Any]) -> None:
    model = type(model)(engine=model.engine, max_tokens=6, **shape)
    expected = model.invoke(PROMPT)
    for copied in (copy.deepcopy(model), copy.copy(model), model.model_copy(deep=True)):
        assert copied.engine is model.engine and copied.kv_namespace == model.kv_namespace
        assert said(copied.invoke(PROMPT)) == said(expected)
    assert copy.deepcopy(model.bind(stop=["x"])).bound.engine is model.engine  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [ChatSemShareKV, SemShareKVLLM])
def test_pickles_are_made_again(kind: Any) -> None:
    model = kind(model="semsharekv/reference", mode="exact", dtype="float32", max_tokens=6, seed=3)
    expected = said(model.invoke([HumanMessage(PROMPT)]))
    again = pickle.loads(pickle.dumps(model))
    assert not again.engine.is_loaded and again.engine.config == model.engine.config
    assert again.model_dump() == model.model_dump()
    assert said(again.invoke([HumanMessage(PROMPT)])) == expected
    shared = pickle.loads(pickle.dumps(kind(engine=model.engine, max_tokens=6)))
    assert said(shared.invoke([HumanMessage(PROMPT)])) == expected


def test_a_given_model_is_not_pickled(model: Model) -> None:
    with pytest.raises(TypeError, match="was given its model; accepted to pickle is one of "):
        pickle.dumps(model)
