"""LangChain over the engine."""

from semsharekv_integrations.langchain.chat_models import ChatSemShareKV
from semsharekv_integrations.langchain.llms import SemShareKVLLM
from semsharekv_integrations.langchain.tracking import DocumentTracker

__all__ = ["ChatSemShareKV", "DocumentTracker", "SemShareKVLLM"]
