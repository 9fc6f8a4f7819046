"""Prompts to token ids: plain text, or messages through the tokenizer's chat template.

Generated replies are remembered as token ids. Text that is decoded and tokenized again can come out as other tokens,
which would break the exact prefix of a conversation's next turn; so where a remembered reply stands in the rendered
text, its own tokens are put in, if they decode to the same text.
"""

from __future__ import annotations

import inspect
import re
import threading
import warnings
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from semsharekv_integrations.errors import PromptError
from semsharekv_integrations.kv import Rendered, Segment, TokenIds
from semsharekv_integrations.model.tool_format import Tool, ToolFormat
from semsharekv_integrations.model.tool_messages import checked_message, native_messages, plain_messages

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]
MAX_REMEMBERED_REPLIES = 4096
_PASSAGE = re.compile(r"\S(?:.|\n(?!\s*\n))*")
_REFUSED = (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
RENDERING_OPTIONS = (
    frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    | {"messages", "conversations", "generation_indices"}
) - {"documents"}  # which a template shows beside the messages, and which are none of ours
ROLES = ("system", "developer", "user", "assistant", "tool")


class PromptRenderer:
    """Renders prompts with one tokenizer; safe to use from several threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._replies: OrderedDict[tuple[str, str], list[int]] = OrderedDict()
        self._pieces: dict[int, str] = {}
        self._lock = threading.Lock()

    @cached_property
    def tool_format(self) -> ToolFormat:
        """How the model writes tool calls."""
        return ToolFormat.of(self._tokenizer)

    def render(
        self,
        prompt: Prompt,
        documents: Mapping[str, str],
        namespace: str,
        tools: Sequence[Tool] = (),
        hints: Mapping[str, str] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """Token ids of ``prompt``, and where the texts of ``documents`` (by id) stand in it.

        ``tools`` are shown to the model, as its template does it or in the system message. ``hints`` are
        more texts that may stand there: they count where no named one does, the longest of those that overlap.
        ``template_kwargs`` are more variables for the chat template, none of ``RENDERING_OPTIONS``.

        Raises:
            PromptError: if it is empty, malformed, or refused by the chat template.
        """
        if not isinstance(prompt, (str, Sequence)):
            raise PromptError(f"prompt is {type(prompt).__name__}; accepted is text or a sequence of messages")
        if isinstance(prompt, str):
            if tools:
                raise PromptError("prompt is text; accepted with tools is a sequence of messages")
            messages, text, pieces = None, prompt, [self._plain(prompt)]
        else:
            messages = _checked(prompt)
            text = self._chat_text(messages, tools, template_kwargs or {})
            pieces = self._chat_pieces(text, messages, namespace)
        token_ids = [token_id for ids, _ in pieces for token_id in ids]
        if not token_ids:
            raise PromptError("prompt is empty; accepted is text or messages of at least one token")
        starts = list(accumulate((start for _, offsets in pieces for start in offsets), max))
        return Rendered(
            np.array(token_ids, dtype=np.int64),
            _with_hints(_segments(text, starts, documents), _segments(text, starts, hints or {})),
            _passages(text, starts),
            None if messages is None else _question(text, starts, messages),
        )

    def text_of(self, token_ids: TokenIds) -> str:
        """The text of ``token_ids`` [N], without special tokens."""
        return self._decode(token_ids.tolist())

    def pieces_of(self, token_ids: TokenIds) -> list[str]:
        """The text of each token [N], with the space that stands before it where a word begins."""
        known = self._pieces
        for token_id in set(token_ids.tolist()) - known.keys():
            known[token_id] = self._piece(token_id)
        return [known[token_id] for token_id in token_ids.tolist()]

    def remember_reply(self, text: str, token_ids: Sequence[int], namespace: str) -> None:
        """Keep the tokens of a generated reply, special tokens left out, for later turns of its conversation."""
        if not text:
            return
        special = set(self._tokenizer.all_special_ids)
        ids = [token_id for token_id in token_ids if token_id not in special]
        while len(ids) > 1 and len(self._decode(ids)) > len(text):  # the tokens of a stop string
            ids.pop()
        if self._decode(ids) != text:
            return
        with self._lock:
            self._replies[namespace, text] = ids
            self._replies.move_to_end((namespace, text))
            while len(self._replies) > MAX_REMEMBERED_REPLIES:
                self._replies.popitem(last=False)

    def forget_replies(self, namespace: str | None) -> None:
        """Drop the remembered replies of one namespace, or of all."""
        with self._lock:
            for key in [key for key in self._replies if namespace in (None, key[0])]:
                del self._replies[key]

    def chat_text(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), template_kwargs: Mapping[str, Any] | None = None
    ) -> str:
        """The messages through the chat template; a last assistant message is left open, to be continued."""
        return self._chat_text(_checked(messages), tools, template_kwargs or {})

    def _chat_text(
        self, messages: list[dict[str, Any]], tools: Sequence[Tool], template_kwargs: Mapping[str, Any]
    ) -> str:
        if tools or any("tool_calls" in message for message in messages):
            native = self.tool_format.is_native
            form = self.tool_format
            messages = native_messages(messages, form) if native else plain_messages(messages, tools, form)
            tools = tools if native else ()
        if self._tokenizer.chat_template is None:
            return _generic_chat_text(messages)
        try:
            return self._template(messages, tools, template_kwargs)
        except _REFUSED as error:
            folded = _fold_system(messages)
            if folded is None:
                raise PromptError(f"the model's chat template refuses the messages: {error}") from error
            return self._retry_template(folded, tools, template_kwargs)

    def _retry_template(
        self, messages: list[dict[str, Any]], tools: Sequence[Tool], template_kwargs: Mapping[str, Any]
    ) -> str:
        try:
            return self._template(messages, tools, template_kwargs)
        except _REFUSED as error:
            raise PromptError(f"the model's chat template refuses the messages: {error}") from error

    def _template(
        self, messages: list[dict[str, Any]], tools: Sequence[Tool], template_kwargs: Mapping[str, Any]
    ) -> str:
        if template_kwargs:
            self._warn_of_unread(template_kwargs)
        open_end = messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]
        return str(
            self._tokenizer.apply_chat_template(
                messages,
                tools=[dict(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=not open_end,
                continue_final_message=open_end,
                **template_kwargs,
            )
        )

    def _warn_of_unread(self, names: Iterable[str]) -> None:
        """Say which variables the chat template does not mention, so that they change nothing."""
        template = str(self._tokenizer.chat_template)
        unread = [name for name in names if not re.search(rf"\b{re.escape(name)}\b", template)]
        if unread:
            warnings.warn(
                f"the model's chat template reads no {', '.join(unread)} of chat_template_kwargs", stacklevel=2
            )

    def _plain(self, text: str) -> tuple[list[int], list[int]]:
        bos = self._tokenizer.bos_token
        return self._encode(text, add_special_tokens=not (bos and text.startswith(bos)))

    def _chat_pieces(
        self, text: str, messages: list[dict[str, Any]], namespace: str
    ) -> list[tuple[list[int], list[int]]]:
        add_special = self._tokenizer.chat_template is None
        whole = self._encode(text, add_special_tokens=add_special)
        pieces: list[tuple[list[int], list[int]]] = []
        done = cursor = 0  # characters put into pieces; characters searched
        for message in messages:
            at = text.find(message["content"], cursor)
            if at < 0:
                continue
            cursor = at + len(message["content"])
            if (ids := self._reply_ids(message, namespace)) is not None:
                before = self._encode(text[done:at], base=done, add_special_tokens=add_special and not done)
                pieces += [before, (ids, [at] * len(ids))]
                done = cursor
        if not pieces:
            return [whole]
        pieces.append(self._encode(text[done:], base=done))
        spliced = [token_id for ids, _ in pieces for token_id in ids]
        return (
            pieces if self._decode(spliced, keep_special=True) == self._decode(whole[0], keep_special=True) else [whole]
        )

    def _reply_ids(self, message: Message, namespace: str) -> list[int] | None:
        if message["role"] != "assistant":
            return None
        with self._lock:
            return self._replies.get((namespace, message["content"]))

    def _encode(self, text: str, *, base: int = 0, add_special_tokens: bool = False) -> tuple[list[int], list[int]]:
        """Token ids, and the character at which each starts (none from tokenizers that cannot tell)."""
        fast = self._tokenizer.is_fast
        encoded = self._tokenizer(
            text, add_special_tokens=add_special_tokens, return_offsets_mapping=fast, verbose=False
        )
        offsets = [base + start for start, _ in encoded["offset_mapping"]] if fast else []
        return list(encoded["input_ids"]), offsets

    def _piece(self, token_id: int) -> str:
        """One token's text; SentencePiece's mark for a leading space is kept, as decoding alone would drop it."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return token if token.startswith("▁") else self._decode([token_id], keep_special=True)

    def _decode(self, token_ids: list[int], *, keep_special: bool = False) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=not keep_special))


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    if not messages:
        raise PromptError("prompt has no messages; accepted is at least one")
    return [checked_message(index, message, ROLES) for index, message in enumerate(messages)]


def _generic_chat_text(messages: list[dict[str, Any]]) -> str:
    warnings.warn("the tokenizer has no chat_template: messages are rendered as 'role: content' lines", stacklevel=2)
    lines = [f"{message['role']}: {message['content']}" for message in messages]
    return "\n".join(lines) if messages[-1]["role"] == "assistant" else "\n".join([*lines, "assistant:"])


def _fold_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The system message put before the first user message, for templates that know no system role."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    system, user, *rest = messages
    return [user | {"content": f"{system['content']}\n\n{user['content']}"}, *rest]


def _segments(text: str, starts: list[int], documents: Mapping[str, str]) -> list[Segment]:
    """Where each document's text first stands, in tokens; documents that are not in the text are left out.

    ``starts`` is where each token starts, in characters; special tokens put behind the text claim the last place.
    """
    found = []
    for document_id, content in documents.items():
        content = content.strip()
        at = text.find(content)
        if at >= 0 and starts and content:
            found.append(Segment(document_id, *_tokens_between(starts, at, at + len(content))))
    return found


def _with_hints(named: list[Segment], hinted: list[Segment]) -> list[Segment]:
    """In order: the named ones, and of the others those that overlap neither a named one nor a longer one."""
    kept = list(named)
    for segment in sorted(hinted, key=lambda s: s.start - s.stop):
        if all(segment.stop <= other.start or other.stop <= segment.start for other in kept):
            kept.append(segment)
    return sorted(kept, key=lambda s: (s.start, s.stop))


def _passages(text: str, starts: list[int]) -> list[Segment]:
    """The parts of the text between blank lines, in tokens."""
    spans = [match.span() for match in _PASSAGE.finditer(text)] if starts else []
    found = [Segment("", *_tokens_between(starts, *span)) for span in spans]
    return [segment for segment in found if segment.stop > segment.start]


def _question(text: str, starts: list[int], messages: Sequence[Message]) -> tuple[int, int] | None:
    """Where the content of the last user message stands, in tokens."""
    contents = [message["content"].strip() for message in messages if message["role"] == "user"]
    at = text.rfind(contents[-1]) if contents and starts else -1
    return None if at < 0 else _tokens_between(starts, at, at + len(contents[-1]))


def _tokens_between(starts: list[int], first: int, last: int) -> tuple[int, int]:
    """The tokens of the characters from ``first`` to ``last``; the first may begin before, perhaps with a space."""
    return max(0, bisect_right(starts, first) - 1), bisect_left(starts, last)
