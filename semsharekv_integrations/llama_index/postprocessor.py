"""A query engine's last node postprocessor, which tells the LLM what was retrieved. Changes no nodes."""

from __future__ import annotations

from typing import Any

from llama_index.core import Settings
from llama_index.core.bridge.pydantic import Field
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle

from semsharekv_integrations.checks import require
from semsharekv_integrations.llama_index.base import EngineLLM


class SemShareKVPostprocessor(BaseNodePostprocessor):
    """Notes the retrieved nodes for the LLM, which then knows their borders and ids in the prompts that follow.

    Put it behind all postprocessors that change nodes' texts::

        index.as_query_engine(llm=llm, node_postprocessors=[reranker, SemShareKVPostprocessor(llm=llm)])

    Prompts reuse KV without it too; with it, reports tell how much of each node was reused, and
    ``llm.engine.forget(node_id, llm.kv_namespace)`` drops what was computed from it.

    Attributes:
        llm: that answers; None for ``Settings.llm``. Not serialized.
        namespace: whose prompts the nodes will stand in; None for that of ``llm``.
    """

    llm: EngineLLM | None = Field(default=None, exclude=True)
    namespace: str | None = None

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex serializes."""
        return "SemShareKVPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        engine_llm(self.llm).note(nodes, self.namespace)
        return nodes


def engine_llm(llm: Any) -> EngineLLM:
    """``llm``, or ``Settings.llm`` where it is None.

    Raises:
        ValueError: if that is another class of LLM.
    """
    found: Any = Settings.llm if llm is None else llm
    require(isinstance(found, EngineLLM), "llm", type(found).__name__, "a SemShareKVLLM, here or as Settings.llm")
    return found
