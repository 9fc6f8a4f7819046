"""Prompts beyond the context window: LangChain's middleware and fallbacks hear of them, and of reported usage."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ModelFallbackMiddleware, SummarizationMiddleware
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import StructuredTool

from semsharekv_integrations import ContextWindowError, EngineConfig
from semsharekv_integrations.langchain import ChatSemShareKV, SemShareKVLLM
from tiny_models import EngineMaker

LONG = "The storm closed the bridge . " * 200
Model = ChatSemShareKV | SemShareKVLLM


@pytest.fixture(params=[ChatSemShareKV, SemShareKVLLM])
def model(request: Any, make_engine: EngineMaker) -> Any:
    return request.param(engine=make_engine(), max_tokens=4)


async def _astream(model: Model) -> list[Any]:
    return [chunk async for chunk in model.astream(LONG)]


WAYS: dict[str, Callable[[Model], Any]] = {
    "invoke": lambda model: model.invoke(LONG),
    "ainvoke": lambda model: asyncio.run(model.ainvoke(LONG)),
    "stream": lambda model: list(model.stream(LONG)),
    "astream": lambda model: asyncio.run(_astream(model)),
    "batch": lambda model: model.batch(["Hi .", LONG]),
    "abatch": lambda model: asyncio.run(model.abatch(["Hi .", LONG])),
}


@pytest.mark.parametrize("way", WAYS)
def test_both_sides_know_the_error(model: Model, way: str) -> None:
    for known in (ContextOverflowError, ContextWindowError):
        with pytest.raises(known, match=r"prompt has (more than )?\d+ tokens; accepted is up to"):
            WAYS[way](model)


def test_fallbacks_for_overflow_are_taken(model: Model, make_engine: EngineMaker) -> None:
    roomy = type(model)(engine=make_engine(max_context_tokens=4096), max_tokens=4)
    known = model.with_fallbacks([roomy], exceptions_to_handle=(ContextOverflowError,))
    assert known.invoke(LONG) and asyncio.run(known.ainvoke(LONG)), "the larger window answers"


def test_agents_fall_back_on_a_larger_window(make_engine: EngineMaker) -> None:
    small, large = (ChatSemShareKV(engine=make_engine(max_context_tokens=n), max_tokens=4) for n in (64, 4096))
    agent = create_agent(small, middleware=[ModelFallbackMiddleware(large)])
    answer = agent.invoke({"messages": [HumanMessage(LONG)]})["messages"][-1]
    assert answer.usage_metadata["input_tokens"] > 64


def _tools() -> list[StructuredTool]:
    about = "Weather of a city. Give the city by its full name. "
    return [StructuredTool.from_function(lambda city: "sunny", name=f"weather_{i}", description=about) for i in "abc"]


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream"])
def test_reported_usage_starts_a_summary(make_engine: EngineMaker, way: str) -> None:
    """Tools count in reported tokens, and not in LangChain's estimate of the messages."""
    chat = ChatSemShareKV(engine=make_engine(max_context_tokens=4000), max_tokens=4)
    asked = [HumanMessage("Where is the bridge ?")]
    first = _answer(create_agent(chat, _tools()), asked, way)
    reported = first[-1].usage_metadata["total_tokens"]
    trigger = ("tokens", reported - 1)
    agent = create_agent(
        chat, _tools(), middleware=[SummarizationMiddleware(chat, trigger=trigger, keep=("messages", 1))]
    )
    later = _answer(agent, [*first, HumanMessage("And where is the port ?")], way)
    assert len(later) < len(first) + 2, "the first turn was summarized"


def _answer(agent: Any, messages: list[Any], way: str) -> list[Any]:
    if way == "ainvoke":
        return list(asyncio.run(agent.ainvoke({"messages": messages}))["messages"])
    if way == "stream":
        return list(list(agent.stream({"messages": messages}, stream_mode="values"))[-1]["messages"])
    return list(agent.invoke({"messages": messages})["messages"])


def test_a_summary_that_overflows_is_tried_with_less() -> None:
    chat = ChatSemShareKV(
        model="semsharekv/reference", config=EngineConfig(max_context_tokens=2500), max_tokens=8, namespace="a"
    )
    turns = [(HumanMessage(f"{i}. The mayor is Anna Kelsen. " * 60), AIMessage(f"{i}. I see.")) for i in range(8)]
    history = [message for turn in turns for message in turn]
    options: Any = {"trigger": ("messages", 4), "keep": ("messages", 1), "trim_tokens_to_summarize": None}
    agent = create_agent(chat, middleware=[SummarizationMiddleware(chat, **options)])
    messages = agent.invoke({"messages": history})["messages"]
    assert len(messages) < len(history) and messages[-1].response_metadata["finish_reason"] in ("stop", "length")


async def test_the_provider_is_the_same_everywhere(make_engine: EngineMaker) -> None:
    chat = ChatSemShareKV(engine=make_engine(), max_tokens=4)
    streamed = list(chat.stream("Hi ."))
    whole = streamed[0]
    for chunk in streamed[1:]:
        whole += chunk
    answers = [chat.invoke("Hi ."), await chat.ainvoke("Hi ."), whole]
    assert {answer.response_metadata["model_provider"] for answer in answers} == {chat._get_ls_params()["ls_provider"]}
