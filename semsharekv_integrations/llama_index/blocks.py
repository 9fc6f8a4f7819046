"""Content blocks of LlamaIndex's messages as text, in a history that any provider's model may have begun.

Text is read; reasoning, cache points and what an answer cites are left out; what holds an image, a sound or a file that
is no text is refused: the answer would be about something else without it. Knows nothing about tool calls.
"""

from __future__ import annotations

from typing import Any

from llama_index.core.base.llms import types
from llama_index.core.base.llms.types import CachePoint, ChatMessage, DocumentBlock, TextBlock

from semsharekv_integrations.checks import require

_LATER_BLOCKS = {  # which early versions have not
    name: getattr(types, name, ()) for name in ("ToolCallBlock", "ThinkingBlock", "CitableBlock", "CitationBlock")
}
TOOL_CALL_BLOCK: Any = _LATER_BLOCKS["ToolCallBlock"]
_LEFT_OUT = (CachePoint, TOOL_CALL_BLOCK, _LATER_BLOCKS["ThinkingBlock"])
_ACCEPTED = "a text block, or a document of text with its data"


def message_text(index: int, message: ChatMessage) -> str | None:
    """The text of a message; None if it has blocks, all of which are left out.

    Raises:
        ValueError: naming the block that is no text.
    """
    cites = message.role in ("assistant", "chatbot", "model")
    texts = []
    for at, block in enumerate(message.blocks):
        text = _block_text(f"messages[{index}].blocks[{at}]", block, cites=cites)
        if text is not None:
            texts.append(text)
    return None if message.blocks and not texts else "\n".join(texts)


def _block_text(field: str, block: Any, *, cites: bool) -> str | None:
    """The text of a block, or None for one that is left out; ``cites`` if what it cites is said beside it."""
    if isinstance(block, TextBlock):
        return block.text
    if isinstance(block, _LEFT_OUT):
        return None
    if isinstance(block, _LATER_BLOCKS["CitationBlock"]):
        return None if cites else _block_text(f"{field}.cited_content", block.cited_content, cites=cites)
    if isinstance(block, _LATER_BLOCKS["CitableBlock"]):
        parts = (_block_text(f"{field}.content[{at}]", part, cites=cites) for at, part in enumerate(block.content))
        return "\n".join(part for part in parts if part is not None)
    text = _document_text(block) if isinstance(block, DocumentBlock) else None
    require(text is not None, field, getattr(block, "block_type", type(block).__name__), _ACCEPTED)
    return text


def _document_text(block: DocumentBlock) -> str | None:
    """The text of a document that brings it along; nothing is fetched, and no file is opened."""
    if block.data is None or not str(block.document_mimetype).startswith("text/"):
        return None
    try:
        return block.resolve_document().read().decode()
    except UnicodeDecodeError:
        return None
