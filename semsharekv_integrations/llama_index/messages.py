"""LlamaIndex's messages to the engine's on the way in, and the engine's answers to LlamaIndex's on the way out.

Any provider's model may have begun a history. Its text is read; reasoning, cache points and what an answer cites are
left out; images, sounds and files that are no text are refused: an answer without them would be wrong. Tool calls are
in both forms that LlamaIndex knows: blocks, and OpenAI's in ``additional_kwargs``. Knows neither settings nor models.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, closing
from typing import Any, TypeVar

from llama_index.core.base.llms import types
from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    DocumentBlock,
    MessageRole,
    TextBlock,
)

from semsharekv_integrations import frameworks
from semsharekv_integrations.errors import CallError, require
from semsharekv_integrations.report import Generation, GenerationChunk, ToolCall

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
_LATER_BLOCKS = {  # which early versions have not
    name: getattr(types, name, ()) for name in ("ToolCallBlock", "ThinkingBlock", "CitableBlock", "CitationBlock")
}
TOOL_CALL_BLOCK: Any = _LATER_BLOCKS["ToolCallBlock"]
_LEFT_OUT = (CachePoint, TOOL_CALL_BLOCK, _LATER_BLOCKS["ThinkingBlock"])
_ACCEPTED = "a text block, or a document of text with its data"


def translate_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Return the messages as chat templates take them; ``ValueError`` for anything but text, calls and results.

    Joins consecutive system or user messages. Leaves out a message whose blocks are all left out, as cache points are.
    """
    a_list = isinstance(messages, Sequence) and not isinstance(messages, str)
    require(a_list, "messages", type(messages).__name__, "a list of LlamaIndex's ChatMessage")
    return frameworks.merge_turns(_read_turns(messages), _MERGED_ROLES)


def _read_turns(messages: Sequence[ChatMessage]) -> Iterator[dict[str, Any]]:
    """Yield a turn for each message that has text or tool fields; ``ValueError`` for a bad message."""
    for index, message in enumerate(messages):
        require(isinstance(message, ChatMessage), f"messages[{index}]", type(message).__name__, "a ChatMessage")
        role, text, tools = _ROLES[message.role], _read_message(index, message), _read_tool_fields(message)
        if text is not None or tools:
            yield {"role": role, "content": text or "", **tools}


def _read_message(index: int, message: ChatMessage) -> str | None:
    """Return the joined text of a message's blocks: "" without blocks, None if all blocks are left out."""
    field, cites = f"messages[{index}].blocks", _ROLES[message.role] == "assistant"
    found = (_read_block(f"{field}[{at}]", block, cites=cites) for at, block in enumerate(message.blocks))
    texts = [text for text in found if text is not None]
    return None if message.blocks and not texts else "\n".join(texts)


def _read_block(field: str, block: Any, *, cites: bool) -> str | None:
    """Return a block's text, None if left out; ``cites`` leaves out citations. ``ValueError`` for other kinds."""
    if isinstance(block, TextBlock):
        return block.text
    if isinstance(block, _LEFT_OUT):
        return None
    if isinstance(block, _LATER_BLOCKS["CitationBlock"]):
        return None if cites else _read_block(f"{field}.cited_content", block.cited_content, cites=cites)
    if isinstance(block, _LATER_BLOCKS["CitableBlock"]):
        parts = (_read_block(f"{field}.content[{at}]", part, cites=cites) for at, part in enumerate(block.content))
        return "\n".join(part for part in parts if part is not None)
    text = _read_document(block) if isinstance(block, DocumentBlock) else None
    require(text is not None, field, getattr(block, "block_type", type(block).__name__), _ACCEPTED)
    return text


def _read_document(block: DocumentBlock) -> str | None:
    """Return a block's text; None without data, a ``text/`` type or valid UTF-8. Fetches nothing, opens no file."""
    if block.data is None or not str(block.document_mimetype).startswith("text/"):
        return None
    try:
        return block.resolve_document().read().decode()
    except UnicodeDecodeError:
        return None


def _read_tool_fields(message: ChatMessage) -> dict[str, Any]:
    """Return an assistant's ``tool_calls``, or of a tool's result the call's id and name; {} if there is nothing."""
    role, more = _ROLES[message.role], message.additional_kwargs
    if role == "assistant":
        calls = _read_history_calls(message)
        return {"tool_calls": [_write_call(call) for call in calls]} if calls else {}
    if message.role == MessageRole.FUNCTION and more.get("name"):
        call_id = more.get("tool_call_id") or frameworks.make_function_id(more["name"])
        return {"tool_call_id": call_id, "name": more["name"]}
    names = ("tool_call_id", "name") if role == "tool" else ()
    return {name: more[name] for name in names if more.get(name)}


def _read_history_calls(message: ChatMessage) -> list[ToolCall]:
    """Return the calls as in ``_list_calls``, or else the old ``function_call``; ``ValueError`` as there.

    Leaves out calls whose arguments are no JSON object, as cut answers may have them.
    """
    given, function = _list_calls(message), message.additional_kwargs.get("function_call")
    if isinstance(function, Mapping) and function.get("name") and not given:
        given = [(frameworks.make_function_id(function["name"]), function["name"], function.get("arguments"))]
    parsed = ((id_, name, frameworks.parse_arguments(arguments)) for id_, name, arguments in given)
    return [ToolCall(id_, name, arguments) for id_, name, arguments in parsed if arguments is not None]


def read_calls(message: ChatMessage) -> list[ToolCall]:
    """Return the calls in a message's blocks, or else ``additional_kwargs``; ``ValueError`` if one is malformed."""
    calls = []
    for id_, name, arguments in _list_calls(message):
        parsed = frameworks.parse_arguments(arguments)
        require(parsed is not None, "arguments of a tool call", arguments, "an object, or one as JSON text")
        calls.append(ToolCall(id_, name, parsed or {}))
    return calls


def _list_calls(message: ChatMessage) -> list[tuple[str, str, Any]]:
    """Return id, name and unparsed arguments of each call, from blocks or else from ``additional_kwargs``.

    Raises ``ValueError`` for a call there that is not in OpenAI's form.
    """
    blocks: list[Any] = [block for block in message.blocks if isinstance(block, TOOL_CALL_BLOCK)]
    if blocks:
        return [(block.tool_call_id or "", block.tool_name, block.tool_kwargs) for block in blocks]
    return [_read_call(call) for call in message.additional_kwargs.get("tool_calls") or ()]


def _read_call(call: Any) -> tuple[str, str, Any]:
    """Return id ("" if missing), name and unparsed arguments of a call in OpenAI's form; else ``ValueError``."""
    plain = call.model_dump() if hasattr(call, "model_dump") else call  # OpenAI's own classes
    function = plain.get("function") if isinstance(plain, Mapping) else None
    form = '{"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}'
    require(isinstance(function, Mapping) and bool(function.get("name")), "tool_calls", call, form)
    assert isinstance(function, Mapping)
    return plain.get("id") or "", function["name"], function.get("arguments")


def _write_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"id": call.id, "type": "function", "function": function}


def make_chat_response(
    text: str, delta: str | None, calls: Sequence[ToolCall], generation: Generation | None, *, model_name: str
) -> ChatResponse:
    """Make a response of the answer so far; usage and report stand in it once ``generation`` is there."""
    blocks: list[Any] = [TextBlock(text=text)] if text or not calls else []
    if TOOL_CALL_BLOCK:
        named = ({"tool_call_id": call.id, "tool_name": call.name, "tool_kwargs": call.arguments} for call in calls)
        blocks += [TOOL_CALL_BLOCK(**call) for call in named]
    more = {"tool_calls": [_write_call(call) for call in calls]} if calls else {}
    message = ChatMessage(role=MessageRole.ASSISTANT, blocks=blocks, additional_kwargs=more)
    return ChatResponse(message=message, delta=delta, **_describe_generation(generation, model_name))


def keep_one_call(respond: Responder[ChatResponse]) -> Responder[ChatResponse]:
    """Return a function that calls ``respond`` with the first tool call alone."""
    return lambda text, delta, calls, generation: respond(text, delta, calls[:1], generation)


def make_completion_response(
    text: str, delta: str | None, calls: Sequence[ToolCall], generation: Generation | None, *, model_name: str
) -> CompletionResponse:
    """Make a response of the completion so far, ignoring ``calls``; with usage once ``generation`` is there."""
    return CompletionResponse(text=text, delta=delta, **_describe_generation(generation, model_name))


def _describe_generation(generation: Generation | None, model_name: str) -> dict[str, Any]:
    """Return a response's ``raw`` and ``additional_kwargs``; {} while there is no ``generation``."""
    if generation is None:
        return {}
    report, counts = generation.report, frameworks.count_tokens(generation.report)
    usage = counts | {"prompt_tokens_details": {"cached_tokens": report.reused_tokens}}
    told = {"model": model_name, "finish_reason": generation.finish_reason, "usage": usage}
    return {"raw": told | {"kv_cache": report.to_dict()}, "additional_kwargs": counts}


def make_whole_response(generation: Generation, respond: Responder[Response]) -> Response:
    """Return the response that ``respond`` makes of a finished call, without a delta."""
    return respond(generation.text, None, generation.tool_calls, generation)


def stream_responses(
    chunks: Generator[GenerationChunk, None, None], respond: Responder[Response]
) -> Generator[Response, None, None]:
    """Yield one response for each chunk, with the text so far; closing this generator cancels the engine's call."""
    text, calls = "", tuple[ToolCall, ...]()
    with hand_on_errors(), closing(chunks):
        for chunk in chunks:
            text, calls = text + chunk.text, calls + chunk.tool_calls
            yield respond(text, chunk.text, calls, chunk.generation)


async def astream_responses(
    chunks: AsyncGenerator[GenerationChunk, None], respond: Responder[Response]
) -> AsyncGenerator[Response, None]:
    """As ``stream_responses``, for asynchronous chunks."""
    text, calls = "", tuple[ToolCall, ...]()
    with hand_on_errors():
        async with aclosing(chunks):
            async for chunk in chunks:
                text, calls = text + chunk.text, calls + chunk.tool_calls
                yield respond(text, chunk.text, calls, chunk.generation)


def hand_on_errors() -> AbstractContextManager[None]:
    """Return a context manager that re-raises a ``ValueError`` or ``TypeError`` as a ``CallError``.

    LlamaIndex takes the two for an answer that cannot be parsed, and goes on as if the model had said nothing.
    """
    return frameworks.translate_errors((ValueError, TypeError), _make_call_error)


def _make_call_error(error: Exception) -> CallError:
    return CallError(str(error) if isinstance(error, ValueError) else f"TypeError: {error}")
