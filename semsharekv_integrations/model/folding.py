"""Messages brought into forms that strict chat templates take, from the least to the most changed.

Some templates refuse a system message, two turns of one role in a row, an answer at the beginning, or empty turns.
Nothing that was said is left out; who said it may be lost where a template has no word for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

Messages = list[dict[str, Any]]
_SILENCE = "..."  # what an empty turn of the user's says where a template wants words


def foldings(messages: Messages) -> Iterator[Messages]:
    """The messages as they are, then each form that differs from the one before."""
    yield messages
    for step in _STEPS:
        folded = _merged(step(messages))
        if folded and folded != messages:
            messages = folded
            yield messages


def without_developer(messages: Messages) -> Messages:
    """Messages of the developer as those of the system."""
    return [message | {"role": "system"} if message["role"] == "developer" else message for message in messages]


def _merged(messages: Sequence[dict[str, Any]]) -> Messages:
    """Neighbours of one role made one, but for tool results and what follows calls."""
    merged: Messages = []
    for message in messages:
        before = merged[-1] if merged else None
        mergeable = before is not None and before["role"] == message["role"] != "tool" and "tool_calls" not in before
        if before is None or not mergeable:
            merged.append(message)
            continue
        said = [content for content in (before["content"], message["content"]) if content]
        calls = {"tool_calls": message["tool_calls"]} if "tool_calls" in message else {}
        merged[-1] = before | calls | {"content": "\n\n".join(said)}
    return merged


def _with_one_system(messages: Messages) -> Messages:
    """System messages behind the first turn as the user's words."""
    start = _num_systems(messages)
    later = (message | {"role": "user"} if message["role"] == "system" else message for message in messages[start:])
    return [*messages[:start], *later]


def _begun_by_user(messages: Messages) -> Messages:
    """An answer at the beginning, such as a greeting, behind an empty turn of the user's."""
    start = _num_systems(messages)
    if start == len(messages) or messages[start]["role"] != "assistant":
        return messages
    return [*messages[:start], {"role": "user", "content": ""}, *messages[start:]]


def _without_system(messages: Messages) -> Messages:
    """System messages as the user's words."""
    return [message | {"role": "user"} if message["role"] == "system" else message for message in messages]


def _without_empty(messages: Messages) -> Messages:
    """Empty messages left out, where no user's turn between answers would be missing."""
    kept = [m for m in messages if m["content"].strip() or m["role"] in ("user", "tool") or "tool_calls" in m]
    return [
        message if message["role"] != "user" or message["content"].strip() else message | {"content": _SILENCE}
        for message in _merged(kept)
    ]


def _num_systems(messages: Messages) -> int:
    """How many system messages stand at the beginning."""
    return next((at for at, message in enumerate(messages) if message["role"] != "system"), len(messages))


_STEPS: tuple[Callable[[Messages], Messages], ...] = (
    list,  # neighbours of one role are merged behind every step
    _with_one_system,
    _begun_by_user,
    _without_system,
    _without_empty,
)
