"""Agents of ``langchain.agents``: what their state knows reaches the model."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import AgentState, create_agent
from langchain.agents.middleware import ModelRequest
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.runnables import RunnableConfig

from semsharekv_integrations import SemShareEngine
from semsharekv_integrations import langchain as ours
from semsharekv_integrations.langchain import ChatSemShareKV, SemShareKVMiddleware
from semsharekv_integrations.langchain.middleware import inform_model

FLAG = Document("In Prorna , a green flag was raised on Monday .", id="flag")
FLOOD = Document("In Erivia , a flood affected 12 people .", id="flood")
IN_THREAD: RunnableConfig = {"configurable": {"thread_id": "thread", "namespace": "tenant"}}


class Found(AgentState):
    """A state with documents beside its messages."""

    found: list[Document]


@pytest.fixture
def chat(make_engine: Callable[..., SemShareEngine]) -> ChatSemShareKV:
    return ChatSemShareKV(engine=make_engine(), max_tokens=4)


def state(**beside: Any) -> Any:
    return {"messages": [HumanMessage(f"{FLAG.page_content}\n\n{FLOOD.page_content}\n\nWhat happened ?")], **beside}


@pytest.mark.parametrize("awaited", [False, True])
async def test_documents_and_thread_of_the_state_reach_the_model(chat: ChatSemShareKV, awaited: bool) -> None:
    agent: Any = create_agent(chat, [], middleware=[SemShareKVMiddleware()], state_schema=Found)
    given = state(found=[FLAG, FLOOD])
    done = await agent.ainvoke(given, IN_THREAD) if awaited else agent.invoke(given, IN_THREAD)
    report = done["messages"][-1].response_metadata["kv_cache"]
    assert [use["document_id"] for use in report["documents"]] == ["flag", "flood"]
    assert chat.engine.clear("tenant", session="thread") == 1


def test_documents_of_trimmed_messages_are_known(chat: ChatSemShareKV) -> None:
    whole = [HumanMessage("."), AIMessage("."), ToolMessage(".", tool_call_id="1", artifact={"docs": [FLAG]})]
    request: ModelRequest[Any] = ModelRequest(model=chat, messages=whole[:1], state={"messages": whole})
    assert inform_model(request).model_settings["tracked_documents"] == {FLAG.page_content: "flag"}


def test_other_models_are_left_alone() -> None:
    request: ModelRequest[Any] = ModelRequest(model=FakeListChatModel(responses=["a"]), messages=[], state=state())
    assert inform_model(request) is request


def test_settings_of_the_agent_hold(chat: ChatSemShareKV) -> None:
    request: ModelRequest[Any] = ModelRequest(
        model=chat, messages=[], state=state(found=[FLAG]), model_settings={"session": "mine", "max_tokens": 2}
    )
    settings = inform_model(request).model_settings
    assert (settings["session"], settings["max_tokens"]) == ("mine", 2)


def test_all_but_the_middleware_needs_langchain_core_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    importing = {
        path.name
        for path in Path(ours.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("langchain", "langgraph")
    }
    assert importing == {"middleware.py"}
    monkeypatch.setitem(sys.modules, "langchain.agents.middleware", None)
    monkeypatch.delitem(sys.modules, "semsharekv_integrations.langchain.middleware")
    exec("from semsharekv_integrations.langchain import *", {})
    with pytest.raises(ImportError, match=r"pip install -e .*\[agents\]"):
        _ = ours.SemShareKVMiddleware
