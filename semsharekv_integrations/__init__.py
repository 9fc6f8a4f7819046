"""KV-cache reuse across similar prompts for local transformers models, in LangChain and LlamaIndex.

Public names are imported when first used: ``import semsharekv_integrations`` loads neither torch nor a framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from semsharekv_integrations.config import AuditConfig, EngineConfig, ReuseConfig, StoreConfig
    from semsharekv_integrations.engine import SemShareEngine
    from semsharekv_integrations.errors import (
        CallError,
        ContextWindowError,
        ModelLoadError,
        PromptError,
        SemShareError,
        StoreFileError,
        UnsupportedModelError,
        UnsupportedVersionError,
    )
    from semsharekv_integrations.report import Generation, GenerationChunk, ReuseReport, ToolCall
    from semsharekv_integrations.sampling import SamplingConfig

__version__ = "0.1.0"

_MODULES = {
    "config": ("AuditConfig", "EngineConfig", "ReuseConfig", "StoreConfig"),
    "engine": ("SemShareEngine",),
    "errors": (
        "CallError",
        "ContextWindowError",
        "ModelLoadError",
        "PromptError",
        "SemShareError",
        "StoreFileError",
        "UnsupportedModelError",
        "UnsupportedVersionError",
    ),
    "report": ("Generation", "GenerationChunk", "ReuseReport", "ToolCall"),
    "sampling": ("SamplingConfig",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AuditConfig",
    "CallError",
    "ContextWindowError",
    "EngineConfig",
    "Generation",
    "GenerationChunk",
    "ModelLoadError",
    "PromptError",
    "ReuseConfig",
    "ReuseReport",
    "SamplingConfig",
    "SemShareEngine",
    "SemShareError",
    "StoreConfig",
    "StoreFileError",
    "ToolCall",
    "UnsupportedModelError",
    "UnsupportedVersionError",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
