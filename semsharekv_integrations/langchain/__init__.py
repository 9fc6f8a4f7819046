"""LangChain over the engine."""

from semsharekv_integrations.langchain.chat_models import ChatSemShareKV
from semsharekv_integrations.langchain.llms import SemShareKVLLM

__all__ = ["ChatSemShareKV", "SemShareKVLLM"]
