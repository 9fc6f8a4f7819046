"""LangChain over the engine: models, and what tells them of documents. It must not know how KV is reused."""

from typing import TYPE_CHECKING, Any

from semsharekv_integrations.langchain.arranging import SemShareKVArranger
from semsharekv_integrations.langchain.chat_models import ChatSemShareKV
from semsharekv_integrations.langchain.documents import DocumentTracker, SemShareKVWarmer
from semsharekv_integrations.langchain.llms import SemShareKVLLM

if TYPE_CHECKING:
    from semsharekv_integrations.langchain.middleware import SemShareKVMiddleware as SemShareKVMiddleware

__all__ = [  # what needs nothing more
    "ChatSemShareKV",
    "DocumentTracker",
    "SemShareKVArranger",
    "SemShareKVLLM",
    "SemShareKVWarmer",
]


def __getattr__(name: str) -> Any:
    """Import and return ``SemShareKVMiddleware``; ``ImportError`` without ``langchain``. Else ``AttributeError``."""
    if name != "SemShareKVMiddleware":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from semsharekv_integrations.langchain.middleware import SemShareKVMiddleware
    except ModuleNotFoundError as error:
        needed = 'SemShareKVMiddleware needs langchain: pip install -e ".[agents]"'
        raise ImportError(needed) from error
    return SemShareKVMiddleware
