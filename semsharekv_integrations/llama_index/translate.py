"""LlamaIndex's messages to the engine's on the way in, and the engine's answers to LlamaIndex's on the way out.

Tool calls are in both forms that LlamaIndex knows: blocks, and in ``additional_kwargs`` as OpenAI has them. Knows
neither settings nor models; every function depends on its arguments only.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, closing, suppress
from typing import Any, TypeVar

from llama_index.core.base.llms import types
from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    MessageRole,
    TextBlock,
)

from semsharekv_integrations.checks import require
from semsharekv_integrations.kv import Generation, GenerationChunk, ToolCall
from semsharekv_integrations.llama_index.refusals import handed_on

Response = TypeVar("Response", ChatResponse, CompletionResponse)
Responder = Callable[[str, str | None, Sequence[ToolCall], Generation | None], Response]

_ROLES = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.TOOL: "tool",
    MessageRole.FUNCTION: "tool",
}
_MERGED_ROLES = ("system", "user")
_ToolCallBlock: Any = getattr(types, "ToolCallBlock", None)  # which early versions have not
_KNOWN_BLOCKS: tuple[Any, ...] = (TextBlock, CachePoint, *([_ToolCallBlock] if _ToolCallBlock else []))


def engine_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages with ``role`` and ``content``, and what belongs to tools, as chat templates take them.

    Consecutive system messages, and consecutive user messages, become one, joined by an empty line, since many
    templates refuse them. Cache points are left out: see ``documents``.

    Raises:
        ValueError: if a message holds anything but text and tool calls.
    """
    merged: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        role, text = _ROLES[message.role], _text(index, message)
        if merged and merged[-1]["role"] == role and role in _MERGED_ROLES:
            merged[-1]["content"] += f"\n\n{text}"
        else:
            merged.append({"role": role, "content": text, **_of_tools(role, message)})
    return merged


def _text(index: int, message: ChatMessage) -> str:
    for at, block in enumerate(message.blocks):
        kind = getattr(block, "block_type", type(block).__name__)
        require(isinstance(block, _KNOWN_BLOCKS), f"messages[{index}].blocks[{at}]", kind, "a text block")
    return message.content or ""


def _of_tools(role: str, message: ChatMessage) -> dict[str, Any]:
    """An assistant's tool calls, or which call a tool's result belongs to."""
    if role == "assistant":
        calls = message_calls(message)
        return {"tool_calls": [openai_call(call) for call in calls]} if calls else {}
    names = ("tool_call_id", "name") if role == "tool" else ()
    return {name: message.additional_kwargs[name] for name in names if message.additional_kwargs.get(name)}


def message_calls(message: ChatMessage) -> list[ToolCall]:
    """The tool calls of a message: its blocks', or else those in ``additional_kwargs``.

    Raises:
        ValueError: if one is in no known form.
    """
    blocks: list[Any] = [block for block in message.blocks if isinstance(block, _KNOWN_BLOCKS[2:])]
    if blocks:
        return [ToolCall(block.tool_call_id or "", block.tool_name, _arguments(block.tool_kwargs)) for block in blocks]
    return [_parsed_call(call) for call in message.additional_kwargs.get("tool_calls") or ()]


def _parsed_call(call: Any) -> ToolCall:
    plain = call.model_dump() if hasattr(call, "model_dump") else call  # OpenAI's own classes
    function = plain.get("function") if isinstance(plain, Mapping) else None
    form = '{"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}'
    require(isinstance(function, Mapping) and bool(function.get("name")), "tool_calls", call, form)
    assert isinstance(function, Mapping)
    return ToolCall(plain.get("id") or "", function["name"], _arguments(function.get("arguments")))


def _arguments(arguments: Any) -> dict[str, Any]:
    """Arguments of a call, given as such or as JSON text."""
    parsed = arguments
    with suppress(json.JSONDecodeError):
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    require(isinstance(parsed, dict), "arguments of a tool call", arguments, "an object, or one as JSON text")
    return dict(parsed)


def openai_call(call: ToolCall) -> dict[str, Any]:
    """A tool call as OpenAI has it, with its arguments as JSON text."""
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"id": call.id, "type": "function", "function": function}


def chat_response(
    text: str, delta: str | None, calls: Sequence[ToolCall], generation: Generation | None, *, model_name: str
) -> ChatResponse:
    """The answer so far; ``generation`` once it is complete."""
    blocks: list[Any] = [TextBlock(text=text)] if text or not calls else []
    if _ToolCallBlock is not None:
        named = ({"tool_call_id": call.id, "tool_name": call.name, "tool_kwargs": call.arguments} for call in calls)
        blocks += [_ToolCallBlock(**call) for call in named]
    more = {"tool_calls": [openai_call(call) for call in calls]} if calls else {}
    message = ChatMessage(role=MessageRole.ASSISTANT, blocks=blocks, additional_kwargs=more)
    return ChatResponse(message=message, delta=delta, **_details(generation, model_name))


def completion_response(
    text: str, delta: str | None, calls: Sequence[ToolCall], generation: Generation | None, *, model_name: str
) -> CompletionResponse:
    """The completion so far, in which there are no calls; ``generation`` once it is complete."""
    return CompletionResponse(text=text, delta=delta, **_details(generation, model_name))


def _details(generation: Generation | None, model_name: str) -> dict[str, Any]:
    if generation is None:
        return {}
    report = generation.report
    counts = {
        "prompt_tokens": report.prompt_tokens,
        "completion_tokens": report.output_tokens,
        "total_tokens": report.prompt_tokens + report.output_tokens,
    }
    raw = {
        "model": model_name,
        "finish_reason": generation.finish_reason,
        "usage": counts | {"prompt_tokens_details": {"cached_tokens": report.reused_tokens}},
        "kv_cache": report.to_dict(),
    }
    return {"raw": raw, "additional_kwargs": counts}


def whole_response(generation: Generation, respond: Responder[Response]) -> Response:
    """The response that a finished call gives."""
    return respond(generation.text, None, generation.tool_calls, generation)


def stream_responses(
    chunks: Generator[GenerationChunk, None, None], respond: Responder[Response]
) -> Generator[Response, None, None]:
    """One response for each chunk, with the text so far; closing this generator cancels the engine's call."""
    text, calls = "", tuple[ToolCall, ...]()
    with handed_on(), closing(chunks):
        for chunk in chunks:
            text, calls = text + chunk.text, calls + chunk.tool_calls
            yield respond(text, chunk.text, calls, chunk.generation)


async def astream_responses(
    chunks: AsyncGenerator[GenerationChunk, None], respond: Responder[Response]
) -> AsyncGenerator[Response, None]:
    """As ``stream_responses``."""
    text, calls = "", tuple[ToolCall, ...]()
    with handed_on():
        async with aclosing(chunks):
            async for chunk in chunks:
                text, calls = text + chunk.text, calls + chunk.tool_calls
                yield respond(text, chunk.text, calls, chunk.generation)
