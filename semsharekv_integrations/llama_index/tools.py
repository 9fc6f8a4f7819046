"""Tool calls as LlamaIndex asks for them: what goes into a chat, and what is read from its answer.

Knows nothing about how a model writes calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools.types import BaseTool

from semsharekv_integrations.checks import require
from semsharekv_integrations.kv import Generation, ToolCall
from semsharekv_integrations.llama_index.base import EngineLLM
from semsharekv_integrations.llama_index.translate import Responder, message_calls


class ToolCallingLLM(EngineLLM):
    """An LLM that calls tools."""

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of ``chat`` for a chat with tools; a ``tool_choice`` given overrides ``tool_required``."""
        if isinstance(user_msg, str):
            user_msg = ChatMessage(role=MessageRole.USER, content=user_msg)
        messages = [*(chat_history or ()), *([user_msg] if user_msg else ())]
        choice = kwargs.pop("tool_choice", None) or ("any" if tool_required else None)
        require(bool(tools) or choice in (None, "auto", "none"), "tools", list(tools), "at least one to choose from")
        given = {"tools": list(tools), "tool_choice": choice, "parallel_tool_calls": allow_parallel_tool_calls}
        return {"messages": messages, **(given if tools else {}), **kwargs}

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The tool calls of an answer.

        Raises:
            ValueError: if there are none, unless ``error_on_no_tool_call`` is False.
        """
        calls = message_calls(response.message)
        require(bool(calls) or not error_on_no_tool_call, "answer", response.message.content, "one with a tool call")
        return [ToolSelection(tool_id=call.id, tool_name=call.name, tool_kwargs=call.arguments) for call in calls]


def with_one_call(respond: Responder[ChatResponse]) -> Responder[ChatResponse]:
    """``respond``, told of the first tool call alone."""

    def first_only(
        text: str, delta: str | None, calls: Sequence[ToolCall], generation: Generation | None
    ) -> ChatResponse:
        return respond(text, delta, calls[:1], generation)

    return first_only
