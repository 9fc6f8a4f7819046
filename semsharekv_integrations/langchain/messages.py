"""LangChain's messages as the mappings that chat templates take, and finished generations as LangChain reports them.

Any provider's model may have begun a history. Its text is read. Reasoning and what a provider's own servers did is left
out. An image, a sound or a file is refused: an answer without it would be wrong. Knows nothing about models.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, closing
from typing import Any

from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata

from semsharekv_integrations import frameworks
from semsharekv_integrations.errors import ContextWindowError, require
from semsharekv_integrations.report import Generation, GenerationChunk

PROVIDER = "semsharekv"  # LangChain trusts reported usage where this is the model's provider too
_ROLES: tuple[tuple[type[BaseMessage], str], ...] = (
    (SystemMessage, "system"),
    (HumanMessage, "user"),
    (AIMessage, "assistant"),
    (ToolMessage, "tool"),
    (FunctionMessage, "tool"),
)
_CHAT_ROLES = {"human": "user", "ai": "assistant", "model": "assistant", "chatbot": "assistant", "function": "tool"}
_ACCEPTED = "'text' or 'text-plain', with its text"
_CALLS = ("tool_call", "tool_use", "function_call")
_RESULTS = ("tool_result", "function_call_output")
_TEXT_KEYS = dict.fromkeys(("text", "text-plain", "input_text", "output_text", "guard_content"), "text")
_TEXT_KEYS["refusal"] = "refusal"
_LEFT_OUT = {  # in whatever message: they are no part of what is said
    "thinking", "redacted_thinking", "reasoning", "reasoning_content", "citation", "non_standard_annotation",
    "prompt_cache_breakpoint", "cache_point", "invalid_tool_call", "tool_call_chunk", "input_json_delta",
    "tool_reference",
}  # fmt: skip
_MEDIA = {
    "image", "image_url", "input_image", "image_generation_call", "audio", "input_audio", "output_audio", "video",
    "video_url", "file", "input_file", "file_data", "media", "document",
}  # fmt: skip
_CACHE_POINTS = {"cachePoint", "cache_point", "cacheControl"}  # the only keys of blocks without a type


def translate_messages(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Return the messages as turns in OpenAI's form; ``ValueError`` for an unknown kind, or for media.

    Joins consecutive plain turns of one role. Leaves out a message with only blocks that are left out, as reasoning is.
    """
    return frameworks.merge_turns(
        turn for index, message in enumerate(messages) for turn in _split_turns(f"messages[{index}]", message)
    )


def _split_turns(field: str, message: BaseMessage) -> Iterator[dict[str, Any]]:
    """Yield a message's turns: each tool result in its content, then the rest, unless all of that is left out."""
    role = _find_role(field, message)
    blocks = [message.content] if isinstance(message.content, str) else message.content
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for at, block in enumerate(blocks):
        name = f"{field}.content[{at}]"
        kind = block.get("type") if isinstance(block, Mapping) else None
        if isinstance(block, Mapping) and kind in _RESULTS and role == "user":
            yield _read_result(name, block)
        elif isinstance(block, Mapping) and kind in _CALLS and role == "assistant":
            calls += [] if _has_calls(message) else filter(None, [_read_call(name, block)])
        elif (text := _read_text(name, block, in_answer=role == "assistant")) is not None:
            texts.append(text)
    more = _read_tool_fields(message, calls)
    if texts or more or not blocks:
        yield {"role": role, "content": "".join(texts), **more}


def _find_role(field: str, message: BaseMessage) -> str:
    """Return the message's role in chat templates, a chat message's own included; ``ValueError`` for another kind."""
    if isinstance(message, ChatMessage):
        return _CHAT_ROLES.get(message.role, message.role)
    role = next((role for kind, role in _ROLES if isinstance(message, kind)), None)
    require(role is not None, field, type(message).__name__, "a system, human, AI, tool, function or chat message")
    return str(role)


def _read_result(field: str, block: Mapping[str, Any]) -> dict[str, Any]:
    """Return the turn for a tool result in a user's message, in Anthropic's or OpenAI's form."""
    content = _join_texts(f"{field}.content", block.get("content", block.get("output")))
    call_id = block.get("tool_use_id") or block.get("call_id") or ""
    return {"role": "tool", "content": content, "tool_call_id": str(call_id)}


def _has_calls(message: BaseMessage) -> bool:
    """Return True if the message lists its calls, valid or not, beside its content; its call blocks repeat them."""
    return isinstance(message, AIMessage) and bool(message.tool_calls or message.invalid_tool_calls)


def _read_call(field: str, block: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a block's call; None if its arguments are no JSON object; ``ValueError`` without name or arguments."""
    given = next((block[key] for key in ("args", "input", "arguments") if key in block), None)
    accepted = f"{_ACCEPTED}, or a call"
    require(bool(block.get("name")) and given is not None, f"{field}.type", block.get("type"), accepted)
    return _make_call(block["name"], given, block.get("call_id") or block.get("id") or "")


def _make_call(name: str, arguments: Any, call_id: str) -> dict[str, Any] | None:
    """Return a call in OpenAI's form; None if its arguments are neither an object nor JSON text of one."""
    parsed = frameworks.parse_arguments(arguments)
    if parsed is None:
        return None
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": parsed}}


def _read_tool_fields(message: BaseMessage, calls: list[dict[str, Any]]) -> dict[str, Any]:
    """Return an AI message's ``tool_calls``, or else ``calls``; a result's call id and name; {} if there is nothing."""
    if isinstance(message, FunctionMessage):
        return {"tool_call_id": frameworks.make_function_id(message.name), "name": message.name}
    if isinstance(message, ToolMessage):
        return {"tool_call_id": message.tool_call_id} | ({"name": message.name} if message.name else {})
    if isinstance(message, AIMessage):
        given = (_make_call(call["name"], call["args"], call["id"] or "") for call in message.tool_calls)
        calls = [call for call in given if call] or calls or _read_function_call(message)
    return {"tool_calls": calls} if calls else {}


def _read_function_call(message: AIMessage) -> list[dict[str, Any]]:
    """Return the old ``function_call`` as a list of one; [] if it is missing, malformed, or beside other calls."""
    function = message.additional_kwargs.get("function_call")
    if _has_calls(message) or not isinstance(function, Mapping) or not function.get("name"):
        return []
    call = _make_call(function["name"], function.get("arguments"), frameworks.make_function_id(function["name"]))
    return [call] if call else []


def _read_text(field: str, block: Any, *, in_answer: bool) -> str | None:
    """Return a block's text, or None if it is left out; ``ValueError`` if it matters and cannot be read.

    In a model's message (``in_answer``), a block of an unknown kind gives the text that it has, or is left out.
    """
    if isinstance(block, str):
        return block
    require(isinstance(block, Mapping), field, type(block).__name__, "a text or a mapping with a type")
    kind, value = block.get("type"), block.get("value")
    if kind == "non_standard" and isinstance(value, Mapping):
        return _read_text(f"{field}.value", value, in_answer=in_answer)
    if kind in _LEFT_OUT or (kind is None and block.keys() <= _CACHE_POINTS):
        return None
    text = _find_text(field, block)
    if text is None and in_answer and kind not in _MEDIA and kind not in _TEXT_KEYS:
        said = block.get("content" if kind == "compaction" else "text")
        return said if isinstance(said, str) else None
    require(text is not None, f"{field}.type", kind, _ACCEPTED)
    return text


def _find_text(field: str, block: Mapping[str, Any]) -> str | None:
    """Return the text that the block holds where its type has it; None if there is no text."""
    kind, source = str(block.get("type")), block.get("source")
    text: Any = block.get(_TEXT_KEYS[kind]) if kind in _TEXT_KEYS else None
    if kind == "file" and block.get("source_type") == "text":
        text = block.get("text")
    elif kind == "document" and isinstance(source, Mapping) and source.get("type") == "text":
        text = source.get("data")
    elif kind == "document" and isinstance(source, Mapping) and source.get("type") == "content":
        return _join_texts(f"{field}.source.content", source.get("content"))
    elif kind == "search_result":
        return _join_texts(f"{field}.content", block.get("content"))
    elif kind == "json":
        return json.dumps(block.get("json"), ensure_ascii=False)
    return text if isinstance(text, str) else None


def _join_texts(field: str, content: Any) -> str:
    """Return the joined text of blocks within a block; "" for None, a text as it is. ``ValueError`` for media."""
    if content is None or isinstance(content, str):
        return content or ""
    require(isinstance(content, Sequence), field, type(content).__name__, "a text, or blocks in a list")
    texts = (_read_text(f"{field}[{at}]", block, in_answer=False) for at, block in enumerate(content))
    return "".join(text for text in texts if text)


def describe_answer(generation: Generation, model_name: str) -> tuple[UsageMetadata, dict[str, Any]]:
    """Return token counts, ``cache_read`` being those reused; and model, finish reason and report, in plain JSON."""
    report, counts = generation.report, frameworks.count_tokens(generation.report)
    usage = UsageMetadata(
        input_tokens=counts["prompt_tokens"],
        output_tokens=counts["completion_tokens"],
        total_tokens=counts["total_tokens"],
        input_token_details=InputTokenDetails(cache_read=report.reused_tokens),
    )
    told = {"model_name": model_name, "model_provider": PROVIDER, "finish_reason": generation.finish_reason}
    return usage, told | {"kv_cache": report.to_dict()}


class PromptOverflowError(ContextWindowError, ContextOverflowError):
    """A prompt that is too long, as the error that LangChain's middleware and fallbacks look for."""


def raise_overflow() -> AbstractContextManager[None]:
    """Return a context manager that re-raises a ``ContextWindowError`` as a ``PromptOverflowError``."""
    return frameworks.translate_errors(ContextWindowError, lambda error: PromptOverflowError(str(error)))


def stream_pieces(
    chunks: Generator[GenerationChunk, None, None], make_piece: Callable[[GenerationChunk], Any], run_manager: Any
) -> Iterator[Any]:
    """Yield what ``make_piece`` makes of each chunk, after telling ``run_manager``. Closing this cancels the call."""
    with raise_overflow(), closing(chunks):
        for chunk in chunks:
            piece = make_piece(chunk)
            if run_manager:
                run_manager.on_llm_new_token(piece.text, chunk=piece)
            yield piece


async def astream_pieces(
    chunks: AsyncGenerator[GenerationChunk, None], make_piece: Callable[[GenerationChunk], Any], run_manager: Any
) -> AsyncIterator[Any]:
    """As ``stream_pieces``, for asynchronous chunks."""
    with raise_overflow():
        async with aclosing(chunks):
            async for chunk in chunks:
                piece = make_piece(chunk)
                if run_manager:
                    await run_manager.on_llm_new_token(piece.text, chunk=piece)
                yield piece
