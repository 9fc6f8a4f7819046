"""What a model's fields and a single call may set of the engine's options, and how one is laid over the other.

Knows nothing about prompts, messages or loading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.tools.types import BaseTool

from semsharekv_integrations.checks import require
from semsharekv_integrations.request import GenerateOptions

FIELD_OPTIONS = (
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "seed",
    "stop",
    "namespace",
    "session",
    "chat_template_kwargs",
    "max_tokens",
)
_CALL_OPTIONS = (*GenerateOptions.__annotations__, "max_tokens", "parallel_tool_calls")
_ELSEWHERE = ("extra_headers", "parallel_tool_calls")  # the one sent by DocumentContextExtractor, the other for answers


def given_options(call: Mapping[str, Any]) -> dict[str, Any]:
    """What a call sets to anything but None, with the token limit under its one name here, ``max_tokens``.

    Raises:
        ValueError: naming what is unknown.
    """
    unknown = sorted(call.keys() - {*_CALL_OPTIONS, *_ELSEWHERE})
    require(not unknown, "keyword arguments", unknown, ", ".join(_CALL_OPTIONS))
    given = {name: value for name, value in call.items() if value is not None and name not in _ELSEWHERE}
    given = under_own_names(given)
    if "tools" in given:
        given["tools"] = openai_tools(given["tools"])
    if "tool_choice" in given:
        given["tool_choice"] = _engine_choice(given["tool_choice"])
    return given


def under_own_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` with the token limit under its one name here, ``max_tokens``.

    Raises:
        ValueError: if it is given twice.
    """
    renamed = dict(given)
    if renamed.get("max_new_tokens") is not None:
        limit = renamed.get("max_tokens")
        require(limit is None, "max_tokens", limit, "nothing beside max_new_tokens")
        renamed["max_tokens"] = renamed["max_new_tokens"]
    renamed.pop("max_new_tokens", None)
    return renamed


def openai_tools(tools: Any) -> Any:
    """Tools as OpenAI has them where they are LlamaIndex's; anything else unchanged, for the engine to check."""
    if not isinstance(tools, Sequence):
        return tools
    return [
        tool.metadata.to_openai_tool(skip_length_check=True) if isinstance(tool, BaseTool) else tool for tool in tools
    ]


def _engine_choice(choice: Any) -> Any:
    """The engine's name for a tool choice in OpenAI's form."""
    if isinstance(choice, Mapping):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        return name or choice  # which the engine refuses
    return "any" if choice == "required" else choice


def engine_options(options: Mapping[str, Any]) -> GenerateOptions:
    """``options`` under the engine's names.

    Raises:
        ValueError: if the token limit is not one.
    """
    named = dict(options)
    limit = named.pop("max_tokens")
    require(isinstance(limit, int) and limit >= 1, "max_tokens", limit, "an integer of 1 or more")
    return GenerateOptions(**named, max_new_tokens=limit)  # type: ignore[typeddict-item]
