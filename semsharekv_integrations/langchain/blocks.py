"""Content blocks as text, in a history that any provider's model may have begun.

Text is read. Reasoning and what a provider's own servers did is left out, as chat templates leave it out of earlier
turns. What holds an image, a sound or a file is refused: the answer would be about something else without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from semsharekv_integrations.checks import require

ACCEPTED = "'text' or 'text-plain', with its text"
CALLS = ("tool_call", "tool_use", "function_call")
RESULTS = ("tool_result", "function_call_output")
_TEXT_KEYS = {
    "text": "text",
    "text-plain": "text",
    "input_text": "text",
    "output_text": "text",
    "guard_content": "text",
    "refusal": "refusal",
}
_LEFT_OUT = {  # in whatever message: they are no part of what is said
    "thinking",
    "redacted_thinking",
    "reasoning",
    "reasoning_content",
    "citation",
    "non_standard_annotation",
    "prompt_cache_breakpoint",
    "cache_point",
    "invalid_tool_call",
    "tool_call_chunk",
    "input_json_delta",
    "tool_reference",
}
_MEDIA = {
    "image",
    "image_url",
    "input_image",
    "image_generation_call",
    "audio",
    "input_audio",
    "output_audio",
    "video",
    "video_url",
    "file",
    "input_file",
    "file_data",
    "media",
    "document",
}
_CACHE_POINTS = ("cachePoint", "cache_point", "cacheControl")  # the only keys of blocks without a type


def block_text(field: str, block: Any, *, in_answer: bool) -> str | None:
    """The text of a content block, or None for one that is left out.

    Args:
        field: what the block is called in an error.
        block: the block.
        in_answer: whether a model wrote it: what is neither text nor media there is a provider's bookkeeping.

    Raises:
        ValueError: if the block cannot be read and matters.
    """
    if isinstance(block, str):
        return block
    require(isinstance(block, Mapping), field, type(block).__name__, "a text or a mapping with a type")
    kind, value = block.get("type"), block.get("value")
    if kind == "non_standard" and isinstance(value, Mapping):
        return block_text(f"{field}.value", value, in_answer=in_answer)
    if kind in _LEFT_OUT or (kind is None and block.keys() <= set(_CACHE_POINTS)):
        return None
    text = _own_text(field, block)
    if text is None and in_answer and kind not in _MEDIA and kind not in _TEXT_KEYS:
        said = block.get("content" if kind == "compaction" else "text")
        return said if isinstance(said, str) else None
    require(text is not None, f"{field}.type", kind, ACCEPTED)
    return text


def _own_text(field: str, block: Mapping[str, Any]) -> str | None:
    """The text that a block of some type holds, in the place that its type has for it."""
    kind, source = str(block.get("type")), block.get("source")
    text: Any = block.get(_TEXT_KEYS[kind]) if kind in _TEXT_KEYS else None
    if kind == "file" and block.get("source_type") == "text":
        text = block.get("text")
    elif kind == "document" and isinstance(source, Mapping) and source.get("type") == "text":
        text = source.get("data")
    elif kind == "document" and isinstance(source, Mapping) and source.get("type") == "content":
        return joined_text(f"{field}.source.content", source.get("content"))
    elif kind == "search_result":
        return joined_text(f"{field}.content", block.get("content"))
    elif kind == "json":
        return json.dumps(block.get("json"), ensure_ascii=False)
    return text if isinstance(text, str) else None


def joined_text(field: str, content: Any) -> str:
    """The text of blocks within a block; they may be one text, or nothing.

    Raises:
        ValueError: if one of them is no text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    require(isinstance(content, Sequence), field, type(content).__name__, "a text, or blocks in a list")
    texts = (block_text(f"{field}[{at}]", block, in_answer=False) for at, block in enumerate(content))
    return "".join(text for text in texts if text)


def block_call(field: str, block: Mapping[str, Any]) -> dict[str, Any] | None:
    """The call that a block holds, in OpenAI's form; None if its arguments are no JSON, as those of a cut answer.

    Raises:
        ValueError: if the block has no name or no arguments.
    """
    given = next((block[key] for key in ("args", "input", "arguments") if key in block), None)
    require(bool(block.get("name")) and given is not None, f"{field}.type", block.get("type"), f"{ACCEPTED}, or a call")
    return openai_call(block["name"], given, block.get("call_id") or block.get("id") or "")


def openai_call(name: str, arguments: Any, call_id: str) -> dict[str, Any] | None:
    """A call in OpenAI's form; None if its arguments are neither an object nor JSON text of one."""
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = json.loads(arguments or "{}", strict=False)
    if not isinstance(arguments, Mapping):
        return None
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}
