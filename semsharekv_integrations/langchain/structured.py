"""Answers as objects: a model whose text is held to a schema, and the parser behind it.

Knows nothing about how sampling is held to a schema.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any, Literal

from langchain_core.exceptions import OutputParserException
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import Runnable, RunnableLambda, RunnableParallel, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass

from semsharekv_integrations.checks import require

Method = Literal["json_schema", "function_calling", "json_mode"]
METHODS = ("json_schema", "function_calling", "json_mode")


class _Whole:
    """Refuses what the token limit cut, since it could be read as something shorter."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """As in the base class.

        Raises:
            OutputParserException: also if the answer was cut.
        """
        first = result[0]
        message = first.message if isinstance(first, ChatGeneration) else None
        if message is not None and message.response_metadata.get("finish_reason") == "length":
            needed = "max_tokens is too small for the answer: it was cut before its JSON ended"
            raise OutputParserException(needed, llm_output=first.text)
        return super().parse_result(result, partial=partial)  # type: ignore[misc]


class _Json(_Whole, JsonOutputParser):
    pass


class _Object(_Whole, PydanticOutputParser[Any]):
    pass


class _Call(_Whole, JsonOutputKeyToolsParser):
    pass


class _ObjectOfCall(_Whole, PydanticToolsParser):
    pass


def json_schema_of(schema: Any, method: Method) -> dict[str, Any]:
    """The JSON schema of a pydantic class, a typed dictionary, or a schema; in ``json_mode`` without one, any object.

    Raises:
        ValueError: if the method is unknown, or there is no schema where one is needed.
    """
    require(method in METHODS, "method", method, " or ".join(map(repr, METHODS)))
    if schema is None and method == "json_mode":
        return {"type": "object"}
    require(schema is not None, "schema", schema, "a pydantic class, a TypedDict, or a JSON schema")
    return convert_to_json_schema(schema)


def parser_of(schema: Any, method: Method) -> Runnable[Any, Any]:
    """The parser of answers that were held to ``schema``."""
    is_class = isinstance(schema, type) and is_basemodel_subclass(schema)
    if method == "function_calling":
        if is_class:
            return _ObjectOfCall(tools=[schema], first_tool_only=True)
        return _Call(key_name=convert_to_openai_tool(schema)["function"]["name"], first_tool_only=True)
    return _Object(pydantic_object=schema) if is_class else _Json()


def parsed(model: Runnable[Any, Any], parser: Runnable[Any, Any], *, include_raw: bool) -> Runnable[Any, Any]:
    """``model`` and ``parser``; with ``include_raw`` the raw message beside the object, or the parser's error."""
    if not include_raw:
        return model | parser
    good = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=RunnableLambda(_nothing))
    bad = RunnablePassthrough.assign(parsed=RunnableLambda(_nothing))
    return RunnableParallel(raw=model) | good.with_fallbacks([bad], exception_key="parsing_error")


def _nothing(_: Any) -> None:
    return None
