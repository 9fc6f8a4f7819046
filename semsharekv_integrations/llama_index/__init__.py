"""LlamaIndex over the engine."""

from semsharekv_integrations.llama_index.llm import SemShareKVLLM
from semsharekv_integrations.llama_index.postprocessor import SemShareKVPostprocessor, SemShareKVWarmer

__all__ = ["SemShareKVLLM", "SemShareKVPostprocessor", "SemShareKVWarmer"]
