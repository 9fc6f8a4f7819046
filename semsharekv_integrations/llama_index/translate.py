"""LlamaIndex's messages to the engine's on the way in, and the engine's answers to LlamaIndex's on the way out.

Knows neither settings nor models; every function depends on its arguments only.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing, closing
from typing import Any, TypeVar

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    MessageRole,
    TextBlock,
)

from semsharekv_integrations.checks import require
from semsharekv_integrations.kv import Generation, GenerationChunk

Response = TypeVar("Response", ChatResponse, CompletionResponse)
Responder = Callable[[str, str | None, Generation | None, str], Response]

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


def engine_messages(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Messages with ``role`` and ``content``, as chat templates take them.

    Consecutive system messages, and consecutive user messages, become one, joined by an empty line, since many
    templates refuse them. Cache points are left out: see ``documents``.

    Raises:
        ValueError: if a message holds anything but text.
    """
    merged: list[dict[str, str]] = []
    for index, message in enumerate(messages):
        role, text = _ROLES[message.role], _text(index, message)
        if merged and merged[-1]["role"] == role and role in _MERGED_ROLES:
            merged[-1]["content"] += f"\n\n{text}"
        else:
            merged.append({"role": role, "content": text})
    return merged


def _text(index: int, message: ChatMessage) -> str:
    for at, block in enumerate(message.blocks):
        kind = getattr(block, "block_type", type(block).__name__)
        require(isinstance(block, TextBlock | CachePoint), f"messages[{index}].blocks[{at}]", kind, "a text block")
    return message.content or ""


def chat_response(text: str, delta: str | None, generation: Generation | None, model_name: str) -> ChatResponse:
    """The answer so far; ``generation`` once it is complete."""
    message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
    return ChatResponse(message=message, delta=delta, **_details(generation, model_name))


def completion_response(
    text: str, delta: str | None, generation: Generation | None, model_name: str
) -> CompletionResponse:
    """The completion so far; ``generation`` once it is complete."""
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


def stream_responses(
    chunks: Generator[GenerationChunk, None, None], respond: Responder[Response], model_name: str
) -> Generator[Response, None, None]:
    """One response for each chunk, with the text so far; closing this generator cancels the engine's call."""
    text = ""
    with closing(chunks):
        for chunk in chunks:
            text += chunk.text
            yield respond(text, chunk.text, chunk.generation, model_name)


async def astream_responses(
    chunks: AsyncGenerator[GenerationChunk, None], respond: Responder[Response], model_name: str
) -> AsyncGenerator[Response, None]:
    """As ``stream_responses``."""
    text = ""
    async with aclosing(chunks):
        async for chunk in chunks:
            text += chunk.text
            yield respond(text, chunk.text, chunk.generation, model_name)
