"""How a model writes tool calls: learnt from its own chat template, which is rendered once with a made-up call.

What is learnt is the shape of calls as JSON with a name and arguments: what stands before and after it, the names of
its keys, one object for each call or a list of all. A template that shows no tools, or calls of another shape, gets
the format of the Hermes models instead. ``grammar`` holds a model to the format, and ``tool_calls`` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

Tool = Mapping[str, Any]  # in OpenAI's form
_ASK = {"role": "user", "content": "Please look it up."}
_REPLY = {"role": "assistant", "content": "I looked it up."}
_NAMES = ("probing_first", "probing_second")
_ARGUMENTS = {"probing_argument": "probing_value"}
_IDS = ("call_0123456789abcdef01234567", "probing01"), ("call_123456789abcdef012345678", "probing02")
_TOOL = {
    "type": "function",
    "function": {
        "name": "probing_tool",
        "description": "Looks it up.",
        "parameters": {
            "type": "object",
            "properties": {"probing_argument": {"type": "string", "description": "What to look up."}},
        },
    },
}
TEMPLATE_ERRORS = (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
SHORT_ID_CHARS = 9  # the only length of call ids that some templates take


@dataclass(frozen=True)
class ToolFormat:
    """How one chat template writes tool calls; the defaults are the format of the Hermes models.

    Attributes:
        opening: what stands before a call's JSON, without surrounding space; empty for bare JSON.
        closing: what stands behind the JSON, likewise.
        space: what stands between the JSON and its opening or closing.
        separator: what stands between calls that have their own opening and closing; None if a template takes one call.
        in_list: whether all calls stand in one JSON list.
        name_key: key of the tool's name in the JSON.
        arguments_key: key of the arguments.
        is_native: whether the template itself shows tools and calls; if not, messages describe them.
        takes_json_text: whether the template wants arguments as JSON text, else as an object.
        takes_short_ids: whether the template refuses ids that have not ``SHORT_ID_CHARS`` letters or digits.
    """

    opening: str = "<tool_call>"
    closing: str = "</tool_call>"
    space: str = "\n"
    separator: str | None = "\n"
    in_list: bool = False
    name_key: str = "name"
    arguments_key: str = "arguments"
    is_native: bool = False
    takes_json_text: bool = False
    takes_short_ids: bool = False

    @classmethod
    def learn(cls, tokenizer: PreTrainedTokenizerBase) -> ToolFormat:
        """Return the format of ``tokenizer``'s chat template; that of the Hermes models if it has none of its own."""
        if tokenizer.chat_template is None:
            return cls()
        return _Probe(tokenizer).learn() or cls()

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """Return the text of calls, given as names and arguments, as the model is to write them."""
        values = [{self.name_key: name, self.arguments_key: dict(arguments)} for name, arguments in calls]
        return self._wrap(values) if self.in_list else (self.separator or "\n").join(map(self._wrap, values))

    def _wrap(self, value: object) -> str:
        opening = self.opening + self.space if self.opening else ""
        closing = self.space + self.closing if self.closing else ""
        return f"{opening}{json.dumps(value, ensure_ascii=False)}{closing}"

    def find_marks(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        """Return the ids of the special tokens that the format is made of, which decoding must not drop."""
        special = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        fixed = f"{self.opening} {self.closing} {self.separator or ''}"
        wanted = {id_ for text, id_ in special.items() if text in fixed}
        return frozenset(wanted | {special[text] for text in self.openings if text in special})

    @property
    def openings(self) -> tuple[str, ...]:
        """The texts that a call may begin with: for bare JSON, the mark of Llama's models for tool code, or none."""
        return (self.opening,) if self.opening else ("<|python_tag|>", "")


class _Probe:
    """Renders a made-up call with one template, and looks at what comes out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def learn(self) -> ToolFormat | None:
        """Return the template's format; None if it shows no tools, or calls of another shape."""
        asked, reply = self._render([_ASK], add_generation_prompt=True), self._render([_ASK, _REPLY])
        if asked is None or "probing_tool" not in asked or reply is None or _REPLY["content"] not in reply:
            return None
        for ids in range(2):
            for write in (dict, json.dumps):
                found = self._learn_from([_make_call(at, ids, write) for at in range(2)], asked, reply)
                if found is not None:
                    return replace(found, takes_json_text=write is json.dumps, takes_short_ids=bool(ids))
        return None

    def _learn_from(self, calls: list[dict[str, Any]], asked: str, reply: str) -> ToolFormat | None:
        """Return the format by what two ``calls`` come out as; None if no shape is found.

        ``asked`` is a question, rendered for the model to answer; ``reply`` the question with a plain answer.
        """
        one = self._render([_ASK, _make_turn(calls[0])])
        place = None if one is None else _find_json(one, _NAMES[0])
        if one is None or place is None:
            return None
        start, stop, value = place
        entry = value[0] if isinstance(value, list) and len(value) == 1 else value
        pairs = list(entry.items()) if isinstance(entry, dict) else []
        name_key, arguments_key = (
            next((key for key, inner in pairs if inner == made_up), None) for made_up in (_NAMES[0], _ARGUMENTS)
        )
        heads = (reply[: reply.index(_REPLY["content"])].rstrip(), asked.rstrip())  # the model goes on behind these
        head = next((head for head in heads if one.startswith(head)), None)
        if head is None or name_key is None or arguments_key is None:
            return None
        before = one[len(head) : start].lstrip()
        behind = self._cut_end(one[stop:], reply)
        return ToolFormat(
            opening=before.strip(),
            closing=behind.strip(),
            space=before[len(before.rstrip()) :],
            separator=self._find_separator(calls, before, behind),
            in_list=isinstance(value, list),
            name_key=name_key,
            arguments_key=arguments_key,
            is_native=True,
        )

    def _cut_end(self, rest: str, reply: str) -> str:
        """Return ``rest``, which stands behind a call's JSON, up to the end of the turn, which ``reply`` shows."""
        end = reply[reply.index(_REPLY["content"]) + len(_REPLY["content"]) :].strip()
        at = rest.find(end) if end else -1
        special = [place for token in self._tokenizer.all_special_tokens if (place := rest.find(token)) >= 0]
        return rest[: at if at >= 0 else min(special, default=len(rest))]

    def _find_separator(self, calls: list[dict[str, Any]], before: str, behind: str) -> str | None:
        """Return what stands between two calls in one turn; None if the template does not show both."""
        two = self._render([_ASK, _make_turn(*calls)])
        places = [] if two is None else [place for name in _NAMES if (place := _find_json(two, name))]
        if two is None or len(places) != len(_NAMES):
            return None
        return two[places[0][1] : places[1][0]].removeprefix(behind).removesuffix(before)

    def _render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str | None:
        """Return the messages and a made-up tool as text, or None if the template refuses them."""
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=[_TOOL], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TEMPLATE_ERRORS:
            return None
        return str(text)


def _make_call(at: int, ids: int, write: Callable[[dict[str, str]], Any]) -> dict[str, Any]:
    function = {"name": _NAMES[at], "arguments": write(_ARGUMENTS)}
    return {"id": _IDS[at][ids], "type": "function", "function": function}


def _make_turn(*calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": list(calls)}


def _find_json(text: str, name: str) -> tuple[int, int, Any] | None:
    """Return start, stop and value of the outermost JSON around the tool's name; None if the name is in none."""
    at = text.find(name)
    for start in (start for start in range(max(at, 0)) if text[start] in "[{"):
        try:
            value, stop = json.JSONDecoder().raw_decode(text, start)
        except ValueError:
            continue
        if stop > at:
            return start, stop, value
    return None
