"""Tools and answer formats in the forms that LangChain's callers give them, as the engine takes them.

If a call has both tools and a schema for the answer, the schema becomes one more tool, whose call is the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from graphlib import CycleError, TopologicalSorter
from operator import itemgetter
from typing import Any, ClassVar, Literal, get_args

from langchain_core.exceptions import OutputParserException
from langchain_core.messages.tool import ToolCallChunk, tool_call_chunk
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import Runnable, RunnableLambda, RunnableParallel, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel

from semsharekv_integrations.errors import require
from semsharekv_integrations.frameworks import is_json_text
from semsharekv_integrations.langchain.base import CallOptions
from semsharekv_integrations.report import GenerationChunk
from semsharekv_integrations.request import GenerateOptions

Choice = str | bool | dict[str, Any] | None
Tool = dict[str, Any] | type | Callable[..., Any] | BaseTool
Method = Literal["json_schema", "function_calling", "json_mode"]
METHODS: tuple[Method, ...] = get_args(Method)
_OPENAI_CHOICES = {"required": "any", True: "any", False: "none"}
_JSON_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_SCHEMA_KEYS = {"properties", "items", "prefixItems", "anyOf", "oneOf", "allOf", "enum", "const", "$ref"}
_CHOICES = "None, 'auto', 'none', 'any', 'required', True, False, a tool's name, or a dict that names one"


def translate_choice(choice: Any) -> str | None:
    """Return the engine's ``tool_choice`` for any form that LangChain's models take; ``ValueError`` for others."""
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        name = function.get("name", choice.get("type")) if isinstance(function, Mapping) else None
        require(isinstance(name, str), "tool_choice", choice, _CHOICES)
        choice = name
    require(choice is None or isinstance(choice, str | bool), "tool_choice", choice, _CHOICES)
    return _OPENAI_CHOICES.get(choice, choice)


class ChatOptions(CallOptions):
    """What one call of a chat model sets."""

    tools: list[dict[str, Any]] = []  # in OpenAI's form; see ``bind_tools``
    tool_choice: Any = None  # ``auto``, ``none``, ``any``, or a tool's name; in the forms of OpenAI and Anthropic too
    json_schema: dict[str, Any] | None = None  # that the answer is held to; see ``with_structured_output``
    response_format: dict[str, Any] | None = None  # as OpenAI has it: ``text``, ``json_object``, ``json_schema``
    parallel_tool_calls: bool = True  # False: an answer's first tool call alone counts
    chat_template_kwargs: dict[str, Any] | None = None  # more variables for the chat template

    def make_other_options(self) -> GenerateOptions:
        """Return tools, choice, JSON schema and template variables; ``ValueError`` if they do not go together."""
        variables = GenerateOptions(chat_template_kwargs=self.chat_template_kwargs)
        schema, choice = self._find_schema(), translate_choice(self.tool_choice)
        if not self.tools or schema is None or choice == "none":
            tools = self.tools or None
            chosen = choice if tools else None
            return variables | GenerateOptions(tools=tools, tool_choice=chosen, json_schema=schema)
        require(choice in (None, "auto"), "tool_choice", choice, "None, 'auto' or 'none' beside an answer format")
        answer = {"name": self.answer_tool, "description": "Give the final answer.", "parameters": schema}
        tools = [*self.tools, {"type": "function", "function": answer}]
        return variables | GenerateOptions(tools=tools, tool_choice="any")

    @property
    def answer_tool(self) -> str:
        """The name of the tool whose call is the answer: ``final_answer``, with "_" behind while others have it."""
        name, names = "final_answer", {tool.get("function", {}).get("name") for tool in self.tools}
        while name in names:
            name += "_"
        return name

    def _find_schema(self) -> dict[str, Any] | None:
        """Return the JSON schema to hold the answer to, or None; ``ValueError`` for a bad or a second answer format."""
        if self.response_format is None:
            return self.json_schema
        require(self.json_schema is None, "response_format", self.response_format, "None beside json_schema")
        kind, given = self.response_format.get("type"), self.response_format.get("json_schema")
        if kind == "json_schema" and isinstance(given, Mapping) and isinstance(given.get("schema"), Mapping):
            return dict(given["schema"])
        accepted = "None, or type 'text', 'json_object', or 'json_schema' with json_schema.schema"
        require(kind in ("text", "json_object"), "response_format", self.response_format, accepted)
        return {"type": "object"} if kind == "json_object" else None


class ToolCallChunks:
    """Counts the tool calls of one answer and tells those apart that are the answer itself."""

    def __init__(self, options: ChatOptions) -> None:
        self._answer_tool, self._may_be_several = options.answer_tool, options.parallel_tool_calls
        self._is_first = True
        self.count = 0

    def read(self, chunk: GenerationChunk) -> tuple[str, list[ToolCallChunk]]:
        """Return text and calls of a chunk. The arguments of a call of the answer tool become text; others are counted.

        Unless calls may be parallel, only the answer's first counts.
        """
        text, calls = chunk.text, []
        for call in chunk.tool_calls:
            if not (self._is_first or self._may_be_several):
                break
            self._is_first, arguments = False, json.dumps(call.arguments, ensure_ascii=False)
            if call.name == self._answer_tool:
                text += arguments
            else:
                calls.append(tool_call_chunk(name=call.name, args=arguments, id=call.id, index=self.count))
                self.count += 1
        return text, calls


class _RequireComplete:
    """Has a parser refuse an answer that was cut, as it may parse as something shorter."""

    is_text: ClassVar[bool] = False
    """Whether the answer is the JSON text itself, and not a call."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """Return what the parser returns; ``OutputParserException`` for an answer that was cut."""
        first = result[0]
        message = first.message if isinstance(first, ChatGeneration) else None
        reason = None if message is None else message.response_metadata.get("finish_reason")
        if reason == "length":
            needed = "max_tokens is too small for the answer: it was cut before its JSON ended"
            raise OutputParserException(needed, llm_output=first.text)
        if reason is not None and self.is_text and not is_json_text(first.text):
            needed = "a stop string ended the answer before its JSON did: call without stop"
            raise OutputParserException(needed, llm_output=first.text)
        return super().parse_result(result, partial=partial)  # type: ignore[misc]


class _Json(_RequireComplete, JsonOutputParser):
    is_text: ClassVar[bool] = True


class _Object(_RequireComplete, PydanticOutputParser[Any]):
    is_text: ClassVar[bool] = True


class _Call(_RequireComplete, JsonOutputKeyToolsParser): ...


class _ObjectOfCall(_RequireComplete, PydanticToolsParser): ...


def make_json_schema(schema: Any, method: Method) -> dict[str, Any]:
    """Return the JSON schema of ``schema``; in ``json_mode`` without one, any object. Else ``ValueError`` for None."""
    require(method in METHODS, "method", method, " or ".join(map(repr, METHODS)))
    if schema is None and method == "json_mode":
        return {"type": "object"}
    require(schema is not None, "schema", schema, "a pydantic class, a TypedDict, or a JSON schema")
    own = _find_own_schema(schema)
    return convert_to_json_schema(schema) if own is None else own


def convert_tool(tool: Tool) -> dict[str, Any]:
    """Return a tool in OpenAI's form. A JSON schema is named by its title; ``ValueError`` without one."""
    own = _find_own_schema(tool)
    if own is None:
        return convert_to_openai_tool(tool)
    parameters = {key: value for key, value in own.items() if key not in ("title", "description")}
    if not isinstance(tool, Mapping):
        return {"type": "function", "function": convert_to_openai_tool(tool)["function"] | {"parameters": parameters}}
    name = own.get("title")
    require(isinstance(name, str), "title of a JSON schema", name, "a text, which names the tool")
    described = {"name": name, "description": own.get("description", "")}
    return {"type": "function", "function": described | {"parameters": parameters}}


def _find_own_schema(given: Any) -> dict[str, Any] | None:
    """Return the JSON schema of what LangChain's conversion would leave parts out of; None for all else.

    That is a mapping that is a JSON schema, or has one as OpenAI's answer formats do; a class or a tool, if its schema
    refers to itself.
    """
    if isinstance(given, Mapping):
        form = given.get("json_schema", given)
        inner = form.get("schema") if isinstance(form, Mapping) else None
        if isinstance(inner, Mapping):
            return _unfold({**inner, **({"title": form["name"]} if "name" in form else {})})
        is_schema = bool(given.keys() & _SCHEMA_KEYS) or given.get("type") in _JSON_TYPES
        return _unfold(given) if is_schema and "name" not in given else None
    source = given.tool_call_schema if isinstance(given, BaseTool) else given
    if isinstance(source, type) and issubclass(source, BaseModel):
        source = source.model_json_schema()
    return _unfold(source) if isinstance(source, Mapping) and _refers_to_itself(source) else None


def _unfold(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema that is but a reference to one of its ``$defs`` as that one."""
    name = str(schema.get("$ref")).removeprefix("#/$defs/")
    if name not in schema.get("$defs", {}):
        return dict(schema)
    return {**schema["$defs"][name], **{key: value for key, value in schema.items() if key != "$ref"}}


def _refers_to_itself(schema: Mapping[str, Any]) -> bool:
    """Return whether a ``$ref`` in a part of the schema leads back to that part."""
    inner = {key: value for key, value in schema.items() if key not in ("$defs", "definitions")}
    parts = {f"#/{key}/{name}": part for key in schema.keys() - inner for name, part in schema[key].items()}
    named = {at: set(re.findall(r'"\$ref": "(.*?)"', json.dumps(part))) for at, part in {"#": inner, **parts}.items()}
    try:
        TopologicalSorter(named).prepare()
    except CycleError:
        return True
    return False


def _make_parser(schema: Any, method: Method) -> Runnable[Any, Any]:
    """Make the parser for objects of a pydantic class, else dictionaries; it raises for an answer that was cut."""
    is_class = isinstance(schema, type) and is_basemodel_subclass(schema)
    if method == "function_calling":
        if is_class:
            return _ObjectOfCall(tools=[schema], first_tool_only=True)
        return _Call(key_name=convert_tool(schema)["function"]["name"], first_tool_only=True)
    return _Object(pydantic_object=schema) if is_class else _Json()


def add_parser(model: Runnable[Any, Any], schema: Any, method: Method, *, include_raw: bool) -> Runnable[Any, Any]:
    """Return ``model`` with its parser; with ``include_raw`` it gives a dictionary, and parser errors in that."""
    parser = _make_parser(schema, method)
    if not include_raw:
        return model | parser
    good = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=RunnableLambda(_return_none))
    bad = RunnablePassthrough.assign(parsed=RunnableLambda(_return_none))
    return RunnableParallel(raw=model) | good.with_fallbacks([bad], exception_key="parsing_error")


def _return_none(_: Any) -> None:
    return None
