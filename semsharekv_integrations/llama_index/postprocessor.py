"""Two places in LlamaIndex's pipelines that tell the LLM of nodes before prompts hold them; neither changes a node.

One is the last postprocessor of a query engine, the other the last transformation of an ingestion pipeline.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

from llama_index.core import Settings
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle, TransformComponent
from pydantic import Field, computed_field, field_validator

from semsharekv_integrations.errors import check_lifetime, require
from semsharekv_integrations.frameworks import arrange_items
from semsharekv_integrations.llama_index.base import EngineLLM
from semsharekv_integrations.llama_index.documents import NodeText
from semsharekv_integrations.logs import log_trouble
from semsharekv_integrations.request import check_optional_name


def find_settings_llm() -> EngineLLM:
    """Return LlamaIndex's global LLM; ``ValueError`` unless it is one of this package's."""
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
        llm: that answers, a ``SemShareKVLLM``; ``Settings.llm`` at construction if not given. Not serialized.
        namespace: whose prompts the nodes will stand in; None for that of ``llm``.
        order: ``given`` (the default) to return the nodes as they came, or ``stored`` for the order that continues the
            longest stored prefix, as ``SemShareEngine.arrange`` finds it. Scores and nodes stay as they are.
        before: with ``stored``, the text that stands before the nodes in a text prompt; None to see it from stored
            prompts.
    """

    llm: EngineLLM = Field(default_factory=find_settings_llm, exclude=True)
    namespace: str | None = None
    order: Literal["given", "stored"] = "given"
    before: str | None = None

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex serializes."""
        return "SemShareKVPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        """Note ``nodes`` for the LLM and return them, unchanged but for their ``order``."""
        self.llm.note(nodes, self.namespace)
        if self.order == "given":
            return nodes
        texts = [NodeText.read(node) for node in nodes]
        named = [(text.node_id, next(iter(text.forms), "")) for text in texts]
        namespace = self.namespace or self.llm.kv_namespace
        return arrange_items(self.llm.engine, nodes, named, namespace=namespace, before=self.before)


class SemShareKVWarmer(TransformComponent):
    """Computes the KV of nodes when they are ingested, so that the first query that retrieves them reuses it.

    Put it behind the splitter and whatever else changes nodes' texts::

        IngestionPipeline(transformations=[SentenceSplitter(chunk_size=256), SemShareKVWarmer(llm=llm)])

    A pipeline skips transformations that its cache has seen with the same nodes and settings. So the settings tell
    where the KV is: in a directory, or with this LLM object. They do not tell whether it is still there: after KV was
    evicted or cleared, run the pipeline without its cache. Not for pipelines that run in several processes, each of
    which would compute KV for itself. In mode ``exact`` of use only to prompts that begin with a node's text.

    Attributes:
        llm: whose engine keeps the KV; ``Settings.llm`` at construction if it is not given. Not serialized.
        namespace: who may reuse it; None for the namespace of ``llm``.
        pinned: whether the store never evicts it to make room. Default False.
        ttl_s: seconds after their last use at which entries expire, or None to keep them while there is room.
        progress: whether to show a progress bar. Default False. Not serialized.
    """

    llm: EngineLLM = Field(default_factory=find_settings_llm, exclude=True)
    namespace: str | None = None
    pinned: bool = False
    ttl_s: float | None = None
    progress: bool = Field(default=False, exclude=True)

    @field_validator("ttl_s", mode="before")
    @classmethod
    def _check_lifetime(cls, ttl_s: Any) -> Any:
        check_lifetime("ttl_s", ttl_s)
        return ttl_s

    @computed_field(repr=False)  # type: ignore[prop-decorator]
    @property
    def kept_in(self) -> str:
        """A digest of model, namespace, and store directory (else this LLM object), for the pipeline's cache."""
        engine = self.llm.engine
        place = str(engine.config.store.directory or self.llm.object_name)
        return hashlib.blake2b("\0".join([engine.name, place, self._namespace]).encode(), digest_size=8).hexdigest()

    @property
    def _namespace(self) -> str:
        return check_optional_name("namespace", self.namespace) or self.llm.kv_namespace

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex serializes."""
        return "SemShareKVWarmer"

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Compute and store KV of nodes with text, log how many found no room, note the nodes; return all nodes.

        Raises:
            ContextWindowError: if a node's text is longer than the model's context window.
        """
        forms = {node.node_id: NodeText.read(node).forms for node in nodes}
        texts = {key: found[0] for key, found in forms.items() if found}
        stored = self.llm.engine.warm(texts, self._namespace, self.pinned, self.ttl_s, self.progress)
        if stored < len(texts) and self.llm.engine.config.reuse.mode != "off":
            log_trouble("nodes_not_kept", nodes=len(texts) - stored)
        self.llm.note(nodes, self._namespace)
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """As ``__call__``, in a thread, without blocking the event loop."""
        return await asyncio.to_thread(self, nodes, **kwargs)
