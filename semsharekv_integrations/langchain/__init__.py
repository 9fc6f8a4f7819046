"""LangChain over the engine. Needs ``langchain-core`` alone, but for the middleware, which is loaded when named."""

from typing import TYPE_CHECKING, Any

from semsharekv_integrations.langchain.chat_models import ChatSemShareKV
from semsharekv_integrations.langchain.documents import DocumentTracker
from semsharekv_integrations.langchain.llms import SemShareKVLLM
from semsharekv_integrations.langchain.warming import SemShareKVWarmer

if TYPE_CHECKING:
    from semsharekv_integrations.langchain.middleware import SemShareKVMiddleware as SemShareKVMiddleware

__all__ = ["ChatSemShareKV", "DocumentTracker", "SemShareKVLLM", "SemShareKVWarmer"]  # what needs nothing more


def __getattr__(name: str) -> Any:
    if name != "SemShareKVMiddleware":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from semsharekv_integrations.langchain.middleware import SemShareKVMiddleware
    except ModuleNotFoundError as error:
        needed = 'SemShareKVMiddleware needs langchain: pip install -e ".[agents]"'
        raise ImportError(needed) from error
    return SemShareKVMiddleware
