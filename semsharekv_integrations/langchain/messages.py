"""LangChain's messages as the role and content pairs that chat templates take. Knows nothing about models."""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage

from semsharekv_integrations.checks import require

_ROLES: tuple[tuple[type[BaseMessage], str], ...] = (
    (SystemMessage, "system"),
    (HumanMessage, "user"),
    (AIMessage, "assistant"),
    (ToolMessage, "tool"),
)
_CHAT_ROLES = {"human": "user", "ai": "assistant"}
_TEXT_BLOCKS = ("text", "text-plain")


def engine_messages(messages: Sequence[BaseMessage]) -> list[dict[str, str]]:
    """Messages with ``role`` and ``content``.

    Consecutive messages of one role become one, joined by an empty line, since many templates refuse them; only tool
    results stay apart.

    Raises:
        ValueError: if a message is of an unknown kind or holds anything but text.
    """
    merged: list[dict[str, str]] = []
    for index, message in enumerate(messages):
        role, content = _role(index, message), _text(index, message)
        if merged and merged[-1]["role"] == role != "tool":
            merged[-1]["content"] += f"\n\n{content}"
        else:
            merged.append({"role": role, "content": content})
    return merged


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
        text = block if isinstance(block, str) else block.get("text")
        field = f"messages[{index}].content[{at}].type"
        require(kind in _TEXT_BLOCKS and isinstance(text, str), field, kind, "'text' or 'text-plain', with its text")
        texts.append(str(text))
    return "".join(texts)
