"""What a model's fields and a single call may set of the engine's options, and how one is laid over the other.

Knows nothing about prompts, messages or loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    "max_tokens",
)
_CALL_OPTIONS = (*GenerateOptions.__annotations__, "max_tokens")
_IGNORED_OPTIONS = ("extra_headers",)  # LlamaIndex's DocumentContextExtractor sends it to every LLM


def given_options(call: Mapping[str, Any]) -> dict[str, Any]:
    """What a call sets to anything but None, with the token limit under its one name here, ``max_tokens``.

    Raises:
        ValueError: naming what is unknown.
    """
    unknown = sorted(call.keys() - {*_CALL_OPTIONS, *_IGNORED_OPTIONS})
    require(not unknown, "keyword arguments", unknown, ", ".join(_CALL_OPTIONS))
    given = {name: value for name, value in call.items() if value is not None and name not in _IGNORED_OPTIONS}
    if "max_new_tokens" in given:
        limit = given.get("max_tokens")
        require(limit is None, "max_tokens", limit, "nothing beside max_new_tokens")
        given["max_tokens"] = given.pop("max_new_tokens")
    return given


def engine_options(options: Mapping[str, Any]) -> GenerateOptions:
    """``options`` under the engine's names.

    Raises:
        ValueError: if the token limit is not one.
    """
    named = dict(options)
    limit = named.pop("max_tokens")
    require(isinstance(limit, int) and limit >= 1, "max_tokens", limit, "an integer of 1 or more")
    return GenerateOptions(**named, max_new_tokens=limit)  # type: ignore[typeddict-item]
