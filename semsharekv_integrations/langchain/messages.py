"""LangChain's messages as the mappings that chat templates take. Knows nothing about models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from semsharekv_integrations.checks import require
from semsharekv_integrations.langchain.blocks import CALLS, RESULTS, block_call, block_text, joined_text, openai_call

_ROLES: tuple[tuple[type[BaseMessage], str], ...] = (
    (SystemMessage, "system"),
    (HumanMessage, "user"),
    (AIMessage, "assistant"),
    (ToolMessage, "tool"),
    (FunctionMessage, "tool"),
)
_CHAT_ROLES = {"human": "user", "ai": "assistant", "model": "assistant", "chatbot": "assistant", "function": "tool"}
_KEYS = ("role", "content")


def engine_messages(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Messages with ``role`` and ``content``, tool calls and what tool results refer to, as OpenAI has them.

    Consecutive messages of one role become one, joined by an empty line, since many templates refuse them; only tool
    calls and tool results stay apart. A message whose blocks are all left out is left out itself.

    Raises:
        ValueError: if a message is of an unknown kind or holds anything but text.
    """
    merged: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        for turn in _turns(f"messages[{index}]", message):
            if merged and merged[-1]["role"] == turn["role"] and merged[-1].keys() == turn.keys() == set(_KEYS):
                merged[-1]["content"] += f"\n\n{turn['content']}"
            else:
                merged.append(turn)
    return merged


def _turns(field: str, message: BaseMessage) -> Iterator[dict[str, Any]]:
    """The turns that a message is: one as a rule, with the results of tools in turns of their own before it."""
    role = _role(field, message)
    blocks = [message.content] if isinstance(message.content, str) else message.content
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for at, block in enumerate(blocks):
        name = f"{field}.content[{at}]"
        kind = block.get("type") if isinstance(block, Mapping) else None
        if isinstance(block, Mapping) and kind in RESULTS and role == "user":
            yield _result(name, block)
        elif isinstance(block, Mapping) and kind in CALLS and role == "assistant":
            calls += [] if _has_calls(message) else filter(None, [block_call(name, block)])
        elif (text := block_text(name, block, in_answer=role == "assistant")) is not None:
            texts.append(text)
    more = _of_tools(message, calls)
    if texts or more or not blocks:
        yield {"role": role, "content": "".join(texts), **more}


def _result(field: str, block: Mapping[str, Any]) -> dict[str, Any]:
    """A tool's result that stands in a user's message, as Anthropic and OpenAI's responses have it."""
    content = joined_text(f"{field}.content", block.get("content", block.get("output")))
    call_id = block.get("tool_use_id") or block.get("call_id") or ""
    return {"role": "tool", "content": content, "tool_call_id": str(call_id)}


def _has_calls(message: BaseMessage) -> bool:
    """Whether a message has its calls beside its content, where what its blocks say of them stands as well."""
    return isinstance(message, AIMessage) and bool(message.tool_calls or message.invalid_tool_calls)


def _of_tools(message: BaseMessage, calls: list[dict[str, Any]]) -> dict[str, Any]:
    if isinstance(message, FunctionMessage):
        return {"tool_call_id": _function_id(message.name), "name": message.name}
    if isinstance(message, ToolMessage):
        return {"tool_call_id": message.tool_call_id} | ({"name": message.name} if message.name else {})
    if isinstance(message, AIMessage):
        given = (openai_call(call["name"], call["args"], call["id"] or "") for call in message.tool_calls)
        calls = [call for call in given if call] or calls or _function_call(message)
    return {"tool_calls": calls} if calls else {}


def _function_call(message: AIMessage) -> list[dict[str, Any]]:
    """The call of a message from before there were tools."""
    function = message.additional_kwargs.get("function_call")
    if _has_calls(message) or not isinstance(function, Mapping) or not function.get("name"):
        return []
    call = openai_call(function["name"], function.get("arguments"), _function_id(function["name"]))
    return [call] if call else []


def _function_id(name: object) -> str:
    """What binds a function's result to its call, which have names alone."""
    return f"function-{name}"


def _role(field: str, message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return _CHAT_ROLES.get(message.role, message.role)
    role = next((role for kind, role in _ROLES if isinstance(message, kind)), None)
    require(role is not None, field, type(message).__name__, "a system, human, AI, tool, function or chat message")
    return str(role)
