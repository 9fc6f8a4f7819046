"""A query engine's last node postprocessor, which tells the LLM what was retrieved. Changes no nodes."""

from __future__ import annotations

from typing import Any

from llama_index.core import Settings
from llama_index.core.bridge.pydantic import Field
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle

from semsharekv_integrations.checks import require
from semsharekv_integrations.llama_index.base import EngineLLM


def settings_llm() -> EngineLLM:
    """LlamaIndex's global LLM.

    Raises:
        ValueError: if that is of another class.
    """
    llm: Any = Settings.llm
    require(isinstance(llm, EngineLLM), "llm", type(llm).__name__, "a SemShareKVLLM, here or as Settings.llm")
    return llm


class SemShareKVPostprocessor(BaseNodePostprocessor):
    """Notes the retrieved nodes for the LLM, which then knows their borders and ids in the prompts that follow.

    Put it behind all postprocessors that change nodes' texts::

        index.as_query_engine(llm=llm, node_postprocessors=[reranker, SemShareKVPostprocessor(llm=llm)])

    Prompts reuse KV without it too; with it, reports tell how much of each node was reused, and
    ``llm.engine.forget(node_id, llm.kv_namespace)`` drops what was computed from it.

    Attributes:
        llm: that answers; ``Settings.llm`` at construction if it is not given. Not serialized.
        namespace: whose prompts the nodes will stand in; None for that of ``llm``.

    Raises:
        ValueError: if the LLM is of another class.
    """

    llm: EngineLLM = Field(default_factory=settings_llm, exclude=True)
    namespace: str | None = None

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex serializes."""
        return "SemShareKVPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        self.llm.note(nodes, self.namespace)
        return nodes
