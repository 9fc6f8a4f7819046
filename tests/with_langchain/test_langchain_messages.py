"""LangChain messages to role and content pairs."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from semsharekv_integrations.langchain.messages import engine_messages


def pairs(*messages: BaseMessage) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in engine_messages(messages)]


def test_every_kind_has_its_role() -> None:
    assert pairs(
        SystemMessage("s"), HumanMessage("h"), AIMessage("a"), ToolMessage("t", tool_call_id="1"), AIMessageChunk("c")
    ) == [("system", "s"), ("user", "h"), ("assistant", "a"), ("tool", "t"), ("assistant", "c")]


@pytest.mark.parametrize(("given", "expected"), [("human", "user"), ("ai", "assistant"), ("developer", "developer")])
def test_chat_messages_bring_their_role(given: str, expected: str) -> None:
    assert pairs(ChatMessage("x", role=given)) == [(expected, "x")]


def test_consecutive_turns_of_one_role_become_one() -> None:
    merged = pairs(HumanMessage("a"), HumanMessage("b"), AIMessage("c"), AIMessage("d"), HumanMessage("e"))
    assert merged == [("user", "a\n\nb"), ("assistant", "c\n\nd"), ("user", "e")]


def test_tool_results_stay_apart() -> None:
    assert len(pairs(ToolMessage("a", tool_call_id="1"), ToolMessage("b", tool_call_id="2"))) == 2


def test_text_blocks_are_joined_as_they_are() -> None:
    blocks: list[Any] = [
        {"type": "text", "text": "a ", "cache_control": {"type": "ephemeral"}},
        "b ",
        {"type": "text-plain", "text": "c", "mime_type": "text/plain"},
    ]
    assert pairs(HumanMessage(blocks)) == [("user", "a b c")]


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        {"type": "image", "base64": "AAAA", "mime_type": "image/png"},
        {"type": "audio", "base64": "AAAA", "mime_type": "audio/wav"},
        {"type": "text-plain", "base64": "AAAA", "mime_type": "text/plain"},
        {"text": "of no type"},
    ],
)
def test_anything_but_text_is_refused(block: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"messages\[1\].content\[1\].type is .*; accepted is 'text'"):
        engine_messages([SystemMessage("s"), HumanMessage(["look:", block])])


def test_unknown_messages_are_refused() -> None:
    with pytest.raises(ValueError, match=r"messages\[0\] is 'FunctionMessage'"):
        engine_messages([FunctionMessage("x", name="f")])


def test_messages_are_left_as_they_were() -> None:
    given = [HumanMessage("a"), HumanMessage("b")]
    engine_messages(given)
    assert given == [HumanMessage("a"), HumanMessage("b")]
