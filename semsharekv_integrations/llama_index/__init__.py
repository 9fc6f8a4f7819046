"""LlamaIndex over the engine: an LLM, and what tells it of nodes. It must not know how KV is reused."""

from semsharekv_integrations.llama_index.llm import SemShareKVLLM
from semsharekv_integrations.llama_index.postprocessor import SemShareKVPostprocessor, SemShareKVWarmer

__all__ = ["SemShareKVLLM", "SemShareKVPostprocessor", "SemShareKVWarmer"]
