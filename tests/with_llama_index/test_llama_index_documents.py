"""Borders of documents in prompts that LlamaIndex builds: noted nodes, cache points, arguments of templates."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from llama_index.core import Document, MockEmbedding, PromptTemplate, Settings, SummaryIndex
from llama_index.core.llms import CacheControl, CachePoint, ChatMessage, TextBlock
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode

from semsharekv_integrations import SemShareEngine
from semsharekv_integrations.llama_index import SemShareKVLLM, SemShareKVPostprocessor
from semsharekv_integrations.llama_index.documents import MOST_NOTED_NODES, NodeNotes, find_documents

FLOOD = "In Velmar , the mayor said that the bridge was closed after the flood ."
FIRE = "A fire hit the old school of Osteck on Monday , reporters said ."
STRIKE = "The strike in Karna goes on . Nobody knows how long it will last ."
POINT = CachePoint(cache_control=CacheControl(type="ephemeral"))


def uses(response: Any) -> dict[str, int]:
    """Tokens of each document that the report of a call names."""
    return {use["document_id"]: use["tokens"] for use in response.raw["kv_cache"]["documents"]}


@pytest.fixture
def reports(settings: Any) -> Any:
    """The documents of each call so far, by id, as a function."""
    seen: list[dict[str, int]] = []
    settings.llm.engine.observe(lambda report: seen.append({use.document_id: use.tokens for use in report.documents}))
    return lambda: seen


def nodes_of(*texts: str, **fields: Any) -> list[NodeWithScore]:
    names = {FLOOD: "flood", FIRE: "fire", STRIKE: "strike"}
    return [NodeWithScore(node=TextNode(id_=names[text], text=text, **fields), score=1.0) for text in texts]


@pytest.mark.parametrize("mode", ["compact", "refine", "accumulate", "tree_summarize", "simple_summarize"])
async def test_a_query_engine_s_nodes_are_documents(settings: Any, reports: Any, mode: Any) -> None:
    documents = [Document(id_=str(n), text=text, metadata={"page": n}) for n, text in enumerate((FLOOD, FIRE))]
    index = SummaryIndex.from_documents(documents)
    engine = index.as_query_engine(response_mode=mode, node_postprocessors=[SemShareKVPostprocessor()])
    engine.query("What was closed ?")
    nodes = {node.node_id: node for node in index.docstore.docs.values()}
    found = {key: tokens for report in reports() for key, tokens in report.items()}
    assert found.keys() == nodes.keys()
    shown = MetadataMode.NONE if mode == "simple_summarize" else MetadataMode.LLM  # that one escapes line breaks
    for key, tokens in found.items():
        text = nodes[key].get_content(metadata_mode=shown)
        assert abs(tokens - len(settings.llm.tokenize(text))) <= 1, "with what the model sees of its metadata"
    once = len(reports())
    await engine.aquery("What was closed ?")
    assert sorted(map(str, reports()[once:])) == sorted(map(str, reports()[:once]))


def test_what_was_noted_can_be_forgotten_by_node_and_by_source(settings: Any) -> None:
    documents = [Document(id_=name, text=text) for name, text in (("flood", FLOOD), ("fire", FIRE))]
    index = SummaryIndex.from_documents(documents)
    llm, engine = settings.llm, index.as_query_engine(node_postprocessors=[SemShareKVPostprocessor()])
    (fire_node,) = [node for node in index.docstore.docs.values() if node.get_content() == FIRE]
    for name in ("flood", fire_node.node_id):
        engine.query("What was closed ?")
        assert llm.engine.stats()["store_entries"] == 1
        assert llm.engine.forget("strike", llm.kv_namespace) == 0
        assert llm.engine.forget(name, llm.kv_namespace) == 1
        assert llm.engine.stats()["store_entries"] == 0


def test_notes_are_hints(llm: SemShareKVLLM) -> None:
    llm.note(nodes_of(FLOOD, FIRE))
    assert uses(llm.complete("Who ?")) == {}
    assert uses(llm.complete(f"{FLOOD[:40]}\n\nWho ?")) == {}, "part of a node is none"
    for texts in ((FIRE, FLOOD), (FLOOD, FIRE)):
        names = ["flood" if text == FLOOD else "fire" for text in texts]
        assert list(uses(llm.complete("\n\n".join([*texts, "Who ?"])))) == names, "in order"
    assert uses(llm.chat([ChatMessage(content=FIRE), ChatMessage(role="assistant", content=FLOOD)])).keys() == {
        "fire",
        "flood",
    }
    given = {"other": FIRE}
    named = uses(llm.complete(f"{FIRE}\n\n{FLOOD}", documents=given))
    assert named.keys() == {"other", "flood"}, "the caller knows best, and what is known beside it stays known"


def test_notes_stay_in_their_namespace(llm: SemShareKVLLM) -> None:
    llm.note(nodes_of(FLOOD), namespace="theirs")
    assert uses(llm.complete(FLOOD)) == {}
    assert uses(llm.complete(FLOOD, namespace="theirs")).keys() == {"flood"}
    SemShareKVPostprocessor(llm=llm, namespace="ours").postprocess_nodes(nodes_of(FIRE), query_str="Who ?")
    assert uses(llm.complete(FIRE, namespace="theirs")) == {}
    assert uses(llm.scoped(namespace="ours").complete(FIRE)).keys() == {"fire"}


def test_a_node_within_another_is_named_without_a_place(llm: SemShareKVLLM) -> None:
    sentence = TextNode(id_="sentence", text=FIRE)
    window = TextNode(id_="window", text=f"{FLOOD} {FIRE} {STRIKE}")
    llm.note([sentence, window])
    response = llm.complete(f"{window.text}\n\nWho ?")
    assert uses(response).keys() == {"window"}
    assert llm.engine.forget("sentence", llm.kv_namespace) == 1


def test_few_notes_are_kept_and_the_latest_of_them() -> None:
    notes = NodeNotes()
    many = [TextNode(id_=str(n), text=f"This is node {n} .") for n in range(MOST_NOTED_NODES + 10)]

    def note(node: TextNode) -> None:
        notes.add("a" if int(node.node_id) % 2 else "b", [node])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(note, many))
    notes.add("a", [TextNode(id_="1", text="This is another node .")])
    kept = [*notes.list_latest("a"), *notes.list_latest("b")]
    assert len(kept) == MOST_NOTED_NODES == len({node.node_id for node in kept})
    assert notes.list_latest("a")[0].forms == ("This is another node .",)
    assert notes.list_latest("c") == []


def test_cache_points_end_documents(llm: SemShareKVLLM) -> None:
    blocks = [TextBlock(text=FLOOD), POINT, TextBlock(text=FIRE), TextBlock(text=STRIKE), POINT, POINT]
    message = ChatMessage(role="user", blocks=[*blocks, TextBlock(text="Who said so ?")])
    response = llm.chat([message])
    wanted = [len(llm.tokenize(text)) for text in (FLOOD, f"{FIRE}\n{STRIKE}")]
    assert all(abs(a - b) <= 1 for a, b in zip(uses(response).values(), wanted, strict=True))
    other = llm.scoped(namespace="other")
    plain = other.chat([ChatMessage(role="user", content=message.content)])
    assert plain.message.content == response.message.content and uses(plain) == {}
    llm.note(nodes_of(STRIKE))
    assert "strike" in uses(llm.chat([message])) and len(uses(llm.chat([message]))) == 2, "nodes come first"


async def _predictions(llm: SemShareKVLLM, template: PromptTemplate, **arguments: str) -> None:
    llm.predict(template, **arguments)
    await llm.apredict(template, **arguments)
    list(llm.stream(template, **arguments))
    _ = [token async for token in await llm.astream(template, **arguments)]


@pytest.mark.parametrize("chat", [True, False])
async def test_a_template_s_context_is_documents(make_engine: Callable[..., SemShareEngine], chat: bool) -> None:
    llm = SemShareKVLLM(engine=make_engine(), max_tokens=2, is_chat_model=chat)
    seen: list[list[int]] = []
    llm.engine.observe(lambda report: seen.append([use.tokens for use in report.documents]))
    template = PromptTemplate("Context :\n{context_str}\n\nQuestion : {query_str}\nAnswer :")
    texts = (FLOOD, FIRE)
    await _predictions(llm, template, context_str="\n\n".join([*texts, "Short ."]), query_str=STRIKE)
    assert len(seen) == 4 and all(documents == seen[0] for documents in seen)
    wanted = [len(llm.tokenize(text)) for text in texts]
    assert all(abs(a - b) <= 1 for a, b in zip(seen[0], wanted, strict=True)), "neither the question nor scraps"

    seen.clear()
    filled = PromptTemplate("Existing : {context_msg}\nQuestion : {query_str}").partial_format(context_msg=FIRE)
    await _predictions(llm, filled, query_str=STRIKE)
    llm.predict(template, context_str=[FIRE], query_str=STRIKE)  # as simple_summarize does
    assert [len(documents) for documents in seen] == [1] * 5


def test_nodes_count_rather_than_their_paragraphs(llm: SemShareKVLLM) -> None:
    node = TextNode(id_="long", text=f"{FLOOD}\n\n{FIRE}")
    llm.note([node])
    template = PromptTemplate("{context_str}\n\n{query_str}")
    documents = find_documents(
        llm._get_prompt(template, context_str=f"{node.text}\n\n{STRIKE}", query_str="Who ?"),
        llm._nodes.list_latest(llm.kv_namespace),
    )
    assert list(documents.values()) == [node.text, STRIKE]  # type: ignore[union-attr]


def test_other_llms_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "_llm", MockEmbedding(embed_dim=2))
    with pytest.raises(ValueError, match="llm is 'MockEmbedding'; accepted is a SemShareKVLLM"):
        SemShareKVPostprocessor()
    with pytest.raises(ValueError, match="llm"):
        SemShareKVPostprocessor(llm=MockEmbedding(embed_dim=2))  # type: ignore[arg-type]


def test_the_postprocessor_is_serialized_without_the_llm(llm: SemShareKVLLM) -> None:
    told = SemShareKVPostprocessor(llm=llm, namespace="ours", order="stored", before="Read: ")
    again = SemShareKVPostprocessor.from_dict(told.to_dict(), llm=llm)
    settings = {"namespace": "ours", "order": "stored", "before": "Read: "}
    assert told.to_dict() == {**settings, "class_name": "SemShareKVPostprocessor"}
    assert again.llm is llm and {name: getattr(again, name) for name in settings} == settings
