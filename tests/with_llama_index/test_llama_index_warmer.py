"""Nodes whose KV is computed at ingestion: queries reuse it, pipelines do not skip it where it is gone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.node_parser import TokenTextSplitter
from llama_index.core.schema import ImageNode, TextNode

from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine, StoreConfig
from semsharekv_integrations.errors import ContextWindowError
from semsharekv_integrations.llama_index import SemShareKVLLM, SemShareKVWarmer

EAGER = ReuseConfig(mode="identical", min_run_tokens=8, max_compute_ratio=1.0, max_deviation=100.0)
TEXTS = (
    "A flood hit the old town of Prorna in May , and the mayor said that many people were affected .",
    "The report from Velmar names a fire at the bridge , which was closed on Monday for repairs .",
)
DOCUMENTS = [Document(id_=str(n), text=text, metadata={"page": n}) for n, text in enumerate(TEXTS)]


@pytest.fixture
def llm(make_engine: Callable[..., SemShareEngine]) -> SemShareKVLLM:
    return SemShareKVLLM(engine=make_engine(reuse=EAGER), max_tokens=3)


def entries(llm: SemShareKVLLM) -> float:
    return llm.engine.stats()["store_entries"]


async def _run(pipeline: IngestionPipeline, asynchronous: bool, documents: Any = DOCUMENTS) -> Any:
    return await pipeline.arun(documents=documents) if asynchronous else pipeline.run(documents=documents)


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_queries_reuse_what_was_ingested(llm: SemShareKVLLM, asynchronous: bool) -> None:
    splitter = TokenTextSplitter(chunk_size=60, chunk_overlap=0, tokenizer=llm.tokenize)
    pipeline = IngestionPipeline(transformations=[splitter, SemShareKVWarmer(llm=llm)])
    nodes = await _run(pipeline, asynchronous)
    assert entries(llm) == len(nodes) == len(DOCUMENTS)

    shown = [node.get_content("llm") for node in reversed(nodes)]
    report = llm.complete("\n\n".join(["Some news .", *shown, "Who was affected ?"])).raw["kv_cache"]  # type: ignore[index]
    assert {use["document_id"] for use in report["documents"]} == {node.node_id for node in nodes}
    assert all(use["reused_tokens"] > use["tokens"] / 3 for use in report["documents"])
    assert llm.engine.forget(nodes[0].node_id, llm.kv_namespace) == 1


def test_nodes_come_back_as_they_were(llm: SemShareKVLLM) -> None:
    nodes = [TextNode(text=TEXTS[0]), TextNode(text=" "), ImageNode(image="x"), TextNode(text=TEXTS[1])]
    before = [node.to_dict() for node in nodes]
    returned = SemShareKVWarmer(llm=llm)(nodes)
    assert returned is nodes and [node.to_dict() for node in returned] == before
    assert entries(llm) == 2


def test_its_settings_reach_the_engine(make_engine: Callable[..., SemShareEngine]) -> None:
    per_token = make_engine().generate("x", max_new_tokens=1).report.kv_bytes / 3  # at most
    engine = make_engine(reuse=EAGER, store=StoreConfig(max_bytes=int(per_token * 90)))
    llm = SemShareKVLLM(engine=engine, max_tokens=1)
    SemShareKVWarmer(llm=llm, namespace="shelf", pinned=True)([TextNode(id_="a", text=TEXTS[0])])
    for word in TEXTS[1].split():
        llm.complete(word + TEXTS[1])
    assert engine.forget("a", "shelf") == 1, "what is pinned stays"
    for ttl_s, is_there in ((None, True), (1e-9, False)):
        named = llm.scoped(namespace=f"for {ttl_s} s")
        SemShareKVWarmer(llm=named, ttl_s=ttl_s)([TextNode(text=TEXTS[0])])
        report = named.complete(TEXTS[0]).raw["kv_cache"]  # type: ignore[index]
        assert (report["prefix_tokens"] > 0) == is_there
    with pytest.raises(ValueError, match=r"ttl_s is 0; accepted is None or a positive number of seconds"):
        SemShareKVWarmer(llm=llm, ttl_s=0)


def test_what_does_not_fit_is_told(
    make_engine: Callable[..., SemShareEngine], caplog: pytest.LogCaptureFixture
) -> None:
    small = SemShareKVLLM(engine=make_engine(reuse=EAGER, store=StoreConfig(max_bytes=1)))
    SemShareKVWarmer(llm=small)([TextNode(text=TEXTS[0])])
    assert [record.message for record in caplog.records] == ["nodes_not_kept"]
    narrow = SemShareKVLLM(engine=make_engine(reuse=EAGER, max_context_tokens=10))
    with pytest.raises(ContextWindowError):
        SemShareKVWarmer(llm=narrow)([TextNode(text=TEXTS[0])])


def test_a_pipeline_s_cache_skips_it_while_the_kv_is_there(make_engine: Callable[..., SemShareEngine]) -> None:
    engine, cache = make_engine(reuse=EAGER), IngestionCache()
    llm = SemShareKVLLM(engine=engine, namespace="shelf")

    def ingest(llm: SemShareKVLLM, **settings: Any) -> float:
        before = entries(llm)
        IngestionPipeline(transformations=[SemShareKVWarmer(llm=llm, **settings)], cache=cache).run(documents=DOCUMENTS)
        return entries(llm) - before

    assert ingest(llm) == 2
    engine.clear("shelf")
    assert ingest(llm) == ingest(llm.scoped(session="s")) == 0, "the cache was told that it is done"
    assert ingest(llm, pinned=True) == 2
    assert ingest(llm, namespace="another") == 2
    assert ingest(SemShareKVLLM(engine=make_engine(reuse=EAGER), namespace="shelf")) == 2, "as in another process"


def test_kv_on_disk_outlives_the_process(model_path: Path, tmp_path: Path) -> None:
    def warmer(folder: str) -> SemShareKVWarmer:
        config = EngineConfig(reuse=EAGER, store=StoreConfig(directory=str(tmp_path / folder)))
        return SemShareKVWarmer(llm=SemShareKVLLM(model=str(model_path), config=config), namespace="shelf")

    assert warmer("one").to_dict() == warmer("one").to_dict() != warmer("two").to_dict()
    private = [warmer("one").model_copy(update={"namespace": None}).to_dict() for _ in range(2)]
    assert private[0] != private[1], "nobody will find it again"


def test_it_is_serialized_without_the_llm(llm: SemShareKVLLM, settings: Any) -> None:
    told = SemShareKVWarmer(llm=llm, namespace="shelf", pinned=True, ttl_s=60)
    plain = told.to_json()
    assert llm.object_name not in plain
    again = SemShareKVWarmer.from_json(plain, llm=llm)
    assert again.to_json() == plain and again.llm is llm
    assert SemShareKVWarmer.from_json(plain).llm is settings.llm, "the global one"
