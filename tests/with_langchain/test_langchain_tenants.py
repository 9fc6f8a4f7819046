"""Whose KV a call may read, and which conversation it belongs to: fields, configs and keywords."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import ConfigurableField, RunnableConfig
from langchain_core.runnables.history import RunnableWithMessageHistory

from semsharekv_integrations import SemShareEngine
from semsharekv_integrations.langchain import ChatSemShareKV, SemShareKVLLM

EngineMaker = Callable[..., SemShareEngine]
Model = ChatSemShareKV | SemShareKVLLM
PROMPT = "In Prorna , a green flag was raised on Monday . What happened in Prorna ?"


@pytest.fixture(params=[ChatSemShareKV, SemShareKVLLM])
def model(request: pytest.FixtureRequest, make_engine: EngineMaker) -> Model:
    return request.param(engine=make_engine(), max_tokens=6)


def reused(model: Model, *args: Any, call: Any = None, **kwargs: Any) -> float:
    before = model.engine.stats()["reused_tokens"]
    (call or model).invoke(*args, **kwargs)
    return model.engine.stats()["reused_tokens"] - before


def tenant(name: str) -> RunnableConfig:
    return {"configurable": {"namespace": name}}


def test_models_of_one_engine_are_private_unless_told_otherwise(model: Model) -> None:
    other = type(model)(engine=model.engine, max_tokens=6)
    assert reused(model, PROMPT) == 0 and reused(model, PROMPT) > 0
    assert reused(other, PROMPT) == 0 and model.kv_namespace != other.kv_namespace
    one, two = (type(model)(engine=model.engine, max_tokens=6, namespace="ours") for _ in range(2))
    assert reused(one, PROMPT) == 0 and reused(two, PROMPT) > 0


def test_copies_of_a_model_stay_in_its_namespace(model: Model) -> None:
    model.invoke(PROMPT)
    copies: list[Any] = [
        model.bind(stop=["xyz"]),
        model.with_config(tags=["a"]),
        model.model_copy(),
        model.model_copy(update={"temperature": 0.5}),
        model.configurable_fields(max_tokens=ConfigurableField(id="limit")).with_config(configurable={"limit": 3}),
        model.with_retry(),
    ]
    for copy in copies:
        assert reused(model, PROMPT, call=copy) > 0, copy


def test_private_names_are_never_shown(model: Model) -> None:
    hidden = model.kv_namespace
    shown = [model, model._identifying_params, model._serialized, model.model_dump(), model.dict()]
    assert not any(hidden in f"{one!r}{one}" for one in shown)
    assert model._identifying_params == type(model)(engine=model.engine, max_tokens=6)._identifying_params


def test_keyword_goes_before_config_and_config_before_field(model: Model) -> None:
    fielded = type(model)(engine=model.engine, max_tokens=6, namespace="field")
    for number, (config, call, expected) in enumerate(
        [({}, {}, "field"), (tenant("config"), {}, "config"), (tenant("config"), {"namespace": "call"}, "call")]
    ):
        fielded.invoke(f"{number} {PROMPT}", config, **call)
        assert model.engine.clear(expected) == 1 and model.engine.stats()["store_entries"] == 0


def ways(model: Model) -> dict[str, Callable[[str, RunnableConfig], Any]]:
    events = {
        "events": lambda prompt, config: model.stream_events(prompt, config, version="v3").output,
        "async events": lambda prompt, config: asyncio.run(_event_output(model, prompt, config)),
    }
    return (events if isinstance(model, ChatSemShareKV) else {}) | {
        "invoke": model.invoke,
        "stream": lambda prompt, config: list(model.stream(prompt, config)),
        "ainvoke": lambda prompt, config: asyncio.run(model.ainvoke(prompt, config)),
        "astream": lambda prompt, config: asyncio.run(_drained(model, prompt, config)),
        "chain": lambda prompt, config: (model | str).invoke(prompt, config),
        "streamed chain": lambda prompt, config: list((model | str).stream(prompt, config)),
        "bound": lambda prompt, config: model.bind().invoke(prompt, config),
    }


async def _event_output(model: Model, prompt: str, config: RunnableConfig) -> Any:
    stream = await model.astream_events(prompt, config, version="v3")
    return await stream.output


async def _drained(model: Model, prompt: str, config: RunnableConfig) -> None:
    async for _ in model.astream(prompt, config):
        pass


@pytest.mark.parametrize("names", [{"thread_id": 42}, {"session_id": "42"}, {"thread_id": "42", "session_id": "7"}])
def test_config_reaches_the_engine_however_called(model: Model, names: dict[str, Any]) -> None:
    for way, call in ways(model).items():
        call(PROMPT, {"configurable": {"namespace": "tenant", **names}})
        assert model.engine.clear("tenant", session="42") == 1, way
        assert model.engine.stats()["store_entries"] == 0, way


@pytest.mark.parametrize("awaited", [False, True])
async def test_every_item_of_a_batch_has_its_own_config(model: Model, awaited: bool) -> None:
    configs: list[RunnableConfig] = [
        {"configurable": {"namespace": name, "thread_id": name}} for name in ("one", "two")
    ]
    await model.abatch([PROMPT, PROMPT], configs) if awaited else model.batch([PROMPT, PROMPT], configs)
    for name in ("one", "two"):
        assert model.engine.clear(name, session=name) == 1
    assert model.engine.stats()["store_entries"] == 0


def test_a_callers_session_goes_before_the_thread(model: Model) -> None:
    model.invoke(PROMPT, {"configurable": {"thread_id": "thread"}}, session="mine")
    assert model.engine.clear(model.kv_namespace, session="thread") == 0
    assert model.engine.clear(model.kv_namespace, session="mine") == 1


@pytest.mark.parametrize("bad", ["", 3])
def test_bad_namespaces_are_named(model: Model, bad: Any) -> None:
    with pytest.raises(ValueError, match="namespace"):
        model.invoke(PROMPT, tenant(bad))
    assert model.engine.stats()["requests"] == 0


def test_message_histories_are_sessions_of_their_tenant(make_engine: EngineMaker) -> None:
    chat = ChatSemShareKV(engine=make_engine(), max_tokens=6)
    histories: dict[str, InMemoryChatMessageHistory] = {}
    prompt = ChatPromptTemplate.from_messages([MessagesPlaceholder("history"), ("human", "{question}")])
    chain = RunnableWithMessageHistory(
        prompt | chat,
        lambda session_id: histories.setdefault(session_id, InMemoryChatMessageHistory()),
        input_messages_key="question",
        history_messages_key="history",
    )
    config: RunnableConfig = {"configurable": {"session_id": "abc", "namespace": "tenant"}}
    for question in (PROMPT, "And then ?"):
        chain.invoke({"question": question}, config)
    assert chat.engine.stats()["store_entries"] == chat.engine.clear("tenant", session="abc") > 0


@pytest.mark.parametrize("mode", ["exact", "identical"])
def test_edited_and_repeated_turns_branch_off(make_engine: EngineMaker, mode: str) -> None:
    """What two branches have in common is reused; each answer is that of a model that reuses nothing."""
    chat, plain = (ChatSemShareKV(engine=make_engine(name), max_tokens=8) for name in (mode, "off"))
    config: RunnableConfig = {"configurable": {"thread_id": "one"}}
    history: list[BaseMessage] = [HumanMessage(PROMPT)]
    said = plain.invoke(history).content  # so that both know the tokens of the reply
    assert chat.invoke(history, config).content == said
    history.append(AIMessage(said))
    shared = chat.engine.stats()["prompt_tokens"]
    turns = ("And then ?", "And then ?", "Who raised the flag in Prorna ?", "And then ?")
    for text in turns:
        branch = [*history, HumanMessage(text)]
        answer = chat.invoke(branch, config)
        assert answer.content == plain.invoke(branch).content
        assert answer.usage_metadata["input_token_details"]["cache_read"] >= shared
    assert chat.invoke([HumanMessage(PROMPT)], config).content == history[1].content


def test_langchains_cache_answers_across_threads_but_not_across_tenants(make_engine: EngineMaker) -> None:
    chat = ChatSemShareKV(engine=make_engine(), max_tokens=6, cache=InMemoryCache())
    for thread in ("one", "two"):
        chat.invoke(PROMPT, {"configurable": {"thread_id": thread}})
    assert chat.engine.stats()["requests"] == 1
    chat.invoke(PROMPT, tenant("other"))
    assert chat.engine.stats()["requests"] == 2
