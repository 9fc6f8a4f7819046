"""Messages to text: through the tokenizer's chat template, or as plain lines where there is none.

Some templates refuse a system message, two turns of one role in a row, an answer at the beginning, or empty turns;
others leave out what the system or the user says. They get the messages folded, from the least to the most changed.
Nothing that was said is left out; who said it may be lost where a template has no word for it. Knows nothing about
tokens.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from semsharekv_integrations.errors import PromptError
from semsharekv_integrations.text.tool_calls import convert_messages, flatten_messages
from semsharekv_integrations.text.tool_format import TEMPLATE_ERRORS, Tool, ToolFormat

Messages = list[dict[str, Any]]
RENDERING_OPTIONS = (
    frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    | {"messages", "conversations", "generation_indices"}
) - {"documents"}  # which a template shows beside the messages, and which are none of ours
_MOST_OPENED = 64  # characters of an answer that a template may write by itself
_PARTS_AS_TEXT = re.compile(r"""['"]type['"]: ?['"]text['"]""")  # by a template that takes no parts
_SILENCE = "..."  # what an empty turn of the user's says where a template wants words
_SPEAKERS = ("user", "system", "assistant")  # of plain lines


class ChatTemplate:
    """Renders messages with one tokenizer's template; safe to use from several threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def tool_format(self) -> ToolFormat:
        """The way the model writes tool calls, learnt from its template at first use."""
        return ToolFormat.learn(self._tokenizer)

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end an answer: none with a template, else the beginnings of the next turn ("user:")."""
        if self._tokenizer.chat_template is not None:
            return ()
        return tuple(f"\n{name}:" for role in _SPEAKERS for name in (role, role.capitalize()))

    def render(self, messages: Messages, tools: Sequence[Tool] = (), variables: Mapping[str, Any] | None = None) -> str:
        """Return checked messages as text. A last answer is left open. Warns if the template leaves out what was said.

        Args:
            variables: more variables for the template, none of ``RENDERING_OPTIONS``. Warns of those it does not read.

        Raises:
            PromptError: if the template refuses the messages in every form.
        """
        template = self._tokenizer.chat_template
        if "developer" not in str(template):
            messages = _replace_role(messages, "developer", "system")
        if variables:
            self._warn_of_unread(variables)
        has_tools = bool(tools) or any(m["role"] == "tool" or "tool_calls" in m for m in messages)
        form = self.tool_format if has_tools else ToolFormat()
        if has_tools and not form.is_native:
            messages, tools = flatten_messages(messages, tools, form), ()
        if template is None:
            return _write_plain_lines(messages)
        options = {"tools": [dict(tool) for tool in tools] or None, **(variables or {})}
        return self._render_first_whole(_add_parts(_list_forms(messages, form)), options)

    def _render_first_whole(self, forms: Iterable[Messages], options: Mapping[str, Any]) -> str:
        """Return the first text that leaves nothing out, else the first, with a warning; ``PromptError`` if none."""
        partial, refusal, refused = None, None, []
        for messages in forms:
            try:
                text = self._apply(messages, options, open_end=_is_open(messages))
            except TEMPLATE_ERRORS as error:
                refusal = refusal or error
                refused.append(messages)
                continue
            if _shows_all(text, messages):
                return text
            partial = text if partial is None else partial
        if partial is None:
            partial = self._render_behind_mark(refused, options)
            if partial is None:
                raise PromptError(f"the model's chat template refuses the messages: {refusal}") from refusal
            return partial
        warnings.warn("the model's chat template leaves out or rewrites what some of the messages say", stacklevel=2)
        return partial

    def _render_behind_mark(self, forms: Iterable[Messages], options: Mapping[str, Any]) -> str | None:
        """Return the first form that works, as text, with its last answer put unchanged behind the mark of its turn.

        Returns None if none works. This serves templates that change an answer, such as those that strip its reasoning.
        """
        for messages in filter(_is_open, forms):
            with suppress(*TEMPLATE_ERRORS):
                before = self._apply(messages[:-1], options, open_end=False)
                if _shows_all(before, messages[:-1]):
                    return _join(before, _get_text(messages[-1]))
        return None

    def _apply(self, messages: Messages, options: Mapping[str, Any], *, open_end: bool) -> str:
        """Return the messages as text; ``open_end`` leaves a last answer open, else the model's turn is opened."""
        ends = {"add_generation_prompt": not open_end, "continue_final_message": open_end}
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **ends, **options))

    def _warn_of_unread(self, names: Iterable[str]) -> None:
        """Warn of variables that the chat template does not mention, so that they change nothing."""
        template = str(self._tokenizer.chat_template)
        unread = [name for name in names if not re.search(rf"\b{re.escape(name)}\b", template)]
        if unread:
            warnings.warn(
                f"the model's chat template reads no {', '.join(unread)} of chat_template_kwargs", stacklevel=2
            )


def _list_forms(messages: Messages, form: ToolFormat) -> Iterator[Messages]:
    """Yield forms of the messages, the least changed first; at last those in which calls and results are text."""
    if not form.is_native:
        yield from fold_messages(messages)
        return
    for folded in fold_messages(messages):
        yield convert_messages(folded, form)
    if any(m["role"] == "tool" or "tool_calls" in m for m in messages):
        yield from fold_messages(flatten_messages(messages, (), form))


def _add_parts(forms: Iterable[Messages]) -> Iterator[Messages]:
    """Yield the forms, then, for templates that read nothing else, each with its contents as lists of parts."""
    tried = []
    for messages in forms:
        tried.append(messages)
        yield messages
    for messages in tried:
        yield [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _get_text(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return str(content if isinstance(content, str) else content[0]["text"])


def _is_open(messages: Messages) -> bool:
    return messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]


def _join(before: str, answer: str) -> str:
    """Return ``before`` and ``answer`` joined. What ``before`` ends with of the answer's beginning is not repeated."""
    common = max(length for length in range(len(answer[:_MOST_OPENED]) + 1) if before.endswith(answer[:length]))
    return before + answer[common:]


def _shows_all(text: str, messages: Messages) -> bool:
    """Return whether the text has all system and user messages, stripped, and shows no list of parts as code."""
    if messages and not isinstance(messages[0]["content"], str) and _PARTS_AS_TEXT.search(text):
        return False
    cursor = 0
    for message in messages:
        if message["role"] not in ("system", "user"):
            continue
        content = _get_text(message).strip()
        at = text.find(content, cursor)
        if at < 0 and content not in text:
            return False
        cursor = max(cursor, at + len(content))
    return True


def _write_plain_lines(messages: Messages) -> str:
    warnings.warn("the tokenizer has no chat_template: messages are rendered as 'role: content' lines", stacklevel=2)
    lines = [f"{message['role']}: {message['content']}" for message in messages]
    return "\n".join(lines) if messages[-1]["role"] == "assistant" else "\n".join([*lines, "assistant:"])


def fold_messages(messages: Messages) -> Iterator[Messages]:
    """Yield the messages as they are, then after each folding step that changes them."""
    yield messages
    for step in _STEPS:
        folded = _merge(step(messages))
        if folded and folded != messages:
            messages = folded
            yield messages


def _replace_role(messages: Iterable[dict[str, Any]], old: str, new: str) -> Messages:
    return [message | {"role": new} if message["role"] == old else message for message in messages]


def _merge(messages: Sequence[dict[str, Any]]) -> Messages:
    """Return the messages with neighbours of one role joined, but for tool results and what follows calls."""
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


def _keep_one_system(messages: Messages) -> Messages:
    """Return the messages with all system messages behind the leading ones as user messages."""
    start = _count_systems(messages)
    return [*messages[:start], *_replace_role(messages[start:], "system", "user")]


def _begin_with_user(messages: Messages) -> Messages:
    """Put an empty user turn before the first turn if that is an answer, such as a greeting."""
    start = _count_systems(messages)
    if start == len(messages) or messages[start]["role"] != "assistant":
        return messages
    return [*messages[:start], {"role": "user", "content": ""}, *messages[start:]]


def _drop_empty(messages: Messages) -> Messages:
    """Leave out empty system messages and answers, join neighbours of one role, write ``...`` in empty user turns."""
    kept = [m for m in messages if m["content"].strip() or m["role"] in ("user", "tool") or "tool_calls" in m]
    return [
        message if message["role"] != "user" or message["content"].strip() else message | {"content": _SILENCE}
        for message in _merge(kept)
    ]


def _count_systems(messages: Messages) -> int:
    return next((at for at, message in enumerate(messages) if message["role"] != "system"), len(messages))


_STEPS: tuple[Callable[[Messages], Messages], ...] = (
    list,  # neighbours of one role are merged behind every step
    _keep_one_system,
    _begin_with_user,
    partial(_replace_role, old="system", new="user"),
    _drop_empty,
)
