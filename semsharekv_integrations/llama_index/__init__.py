"""LlamaIndex over the engine."""

from semsharekv_integrations.llama_index.llm import SemShareKVLLM

__all__ = ["SemShareKVLLM"]
