"""Nodes in the stored order inside LlamaIndex's query engines."""

from __future__ import annotations

from typing import Any

import pytest
from llama_index.core import PromptTemplate, get_response_synthesizer
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from semsharekv_integrations.llama_index import SemShareKVLLM, SemShareKVPostprocessor

TOWNS = ("Velmar", "Osteck", "Karna", "Dora")
TEXTS = [f"News from {town}, by the Morning Post. Shops in {town} stayed shut." for town in TOWNS]


class Found(BaseRetriever):
    """Finds the nodes that the query names, in its order."""

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        named = [TOWNS.index(word) for word in query_bundle.query_str.split() if word in TOWNS]
        return [
            NodeWithScore(node=TextNode(id_=TOWNS[n], text=TEXTS[n]), score=1 - place / 9)
            for place, n in enumerate(named)
        ]


@pytest.fixture
def reports(settings: Any) -> list[Any]:
    seen: list[Any] = []
    settings.llm.engine.observe(seen.append)
    return seen


def names(nodes: Any) -> list[tuple[str, float]]:
    return [(item.node.node_id, round(item.score, 2)) for item in nodes]


@pytest.mark.parametrize("order", ["given", "stored"])
@pytest.mark.parametrize("awaited", [False, True])
async def test_a_query_engine_reuses_what_the_last_query_read(
    settings: Any, reports: list[Any], awaited: bool, order: Any
) -> None:
    engine = RetrieverQueryEngine(
        Found(), get_response_synthesizer(), node_postprocessors=[SemShareKVPostprocessor(order=order)]
    )
    for query in ("Velmar Osteck Karna ?", "Dora Karna Osteck Velmar !"):
        done = await engine.aquery(query) if awaited else engine.query(query)
    found = names(done.source_nodes)
    assert sorted(found) == sorted([("Dora", 1.0), ("Karna", 0.89), ("Osteck", 0.78), ("Velmar", 0.67)])
    first, second = reports
    assert first.arranged_tokens == 0
    if order == "given":
        assert [key for key, _ in found] == ["Dora", "Karna", "Osteck", "Velmar"] and second.arranged_tokens == 0
    else:
        assert [key for key, _ in found] == ["Velmar", "Osteck", "Karna", "Dora"]
        assert second.prefix_tokens >= second.arranged_tokens > 2 * len(settings.llm.tokenize(TEXTS[0]))
        assert [use.document_id for use in second.documents] == ["Velmar", "Osteck", "Karna", "Dora"]


def test_the_number_stands_in_raw(llm: SemShareKVLLM) -> None:
    template = PromptTemplate("Read: {context_str}\n\n{query_str}")
    nodes = [NodeWithScore(node=TextNode(id_=town, text=text)) for town, text in zip(TOWNS, TEXTS, strict=True)]
    stored = SemShareKVPostprocessor(llm=llm, order="stored", before="Read: ")

    def ask(given: list[NodeWithScore], query: str) -> Any:
        texts = [node.text for node in stored.postprocess_nodes(given)]
        return llm.complete(template.format(context_str="\n\n".join(texts), query_str=query)).raw["kv_cache"]

    assert ask(nodes[:2], "Who?")["arranged_tokens"] == 0
    again = ask(nodes[::-1], "When?")
    assert again["prefix_tokens"] >= again["arranged_tokens"] > len(llm.tokenize(TEXTS[0]))


def test_other_orders_are_refused(llm: SemShareKVLLM) -> None:
    with pytest.raises(ValueError, match="order"):
        SemShareKVPostprocessor(llm=llm, order="shortest")  # type: ignore[arg-type]
