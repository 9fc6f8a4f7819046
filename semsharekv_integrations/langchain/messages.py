"""LangChain's messages as the mappings that chat templates take. Knows nothing about models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage

from semsharekv_integrations.checks import require
from semsharekv_integrations.langchain.tools import tool_calls_of

_ROLES: tuple[tuple[type[BaseMessage], str], ...] = (
    (SystemMessage, "system"),
    (HumanMessage, "user"),
    (AIMessage, "assistant"),
    (ToolMessage, "tool"),
)
_CHAT_ROLES = {"human": "user", "ai": "assistant"}
_TEXT_BLOCKS = ("text", "text-plain")
_CALL_BLOCKS = ("tool_call", "tool_call_chunk", "tool_use")  # what they say stands in the message's tool_calls as well
_KEYS = ("role", "content")


def engine_messages(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Messages with ``role`` and ``content``, tool calls and what tool results refer to, as OpenAI has them.

    Consecutive messages of one role become one, joined by an empty line, since many templates refuse them; only tool
    calls and tool results stay apart.

    Raises:
        ValueError: if a message is of an unknown kind or holds anything but text.
    """
    merged: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        turn = {"role": _role(index, message), "content": _text(index, message), **_of_tools(message)}
        if merged and merged[-1]["role"] == turn["role"] and merged[-1].keys() == turn.keys() == set(_KEYS):
            merged[-1]["content"] += f"\n\n{turn['content']}"
        else:
            merged.append(turn)
    return merged


def _of_tools(message: BaseMessage) -> dict[str, Any]:
    if isinstance(message, ToolMessage):
        return {"tool_call_id": message.tool_call_id} | ({"name": message.name} if message.name else {})
    if isinstance(message, AIMessage) and message.tool_calls:
        return {"tool_calls": tool_calls_of(message)}
    return {}


def _role(index: int, message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return _CHAT_ROLES.get(message.role, message.role)
    role = next((role for kind, role in _ROLES if isinstance(message, kind)), None)
    require(role is not None, f"messages[{index}]", type(message).__name__, "a system, human, AI, tool or chat message")
    return str(role)


def _text(index: int, message: BaseMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    texts = []
    for at, block in enumerate(message.content):
        kind = "text" if isinstance(block, str) else block.get("type")
        if kind in _CALL_BLOCKS and isinstance(message, AIMessage) and message.tool_calls:
            continue
        text = block if isinstance(block, str) else block.get("text")
        field = f"messages[{index}].content[{at}].type"
        require(kind in _TEXT_BLOCKS and isinstance(text, str), field, kind, "'text' or 'text-plain', with its text")
        texts.append(str(text))
    return "".join(texts)
