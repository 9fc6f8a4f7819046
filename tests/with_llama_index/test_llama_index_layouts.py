"""Query engines and chat engines as tutorials build them, on the model that ships: answers stay right, KV is reused.

Each is asked the same questions with reuse and without. What came of it is printed with ``pytest -s``.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import sqrt
from random import Random
from typing import Any
from zlib import crc32

import pytest
from llama_index.core import Document, PromptTemplate, Settings, VectorStoreIndex
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RouterQueryEngine
from llama_index.core.selectors import EmbeddingSingleSelector
from llama_index.core.tools import QueryEngineTool

from semsharekv_integrations import EngineConfig, ReuseConfig, ReuseReport, SemShareEngine, world
from semsharekv_integrations.llama_index import SemShareKVLLM, SemShareKVPostprocessor, SemShareKVWarmer
from semsharekv_integrations.model.loading import REFERENCE_MODEL

NUM_DOCUMENTS, NUM_RETRIEVED, NUM_QUESTIONS, NUM_TURNS = 7, 4, 3, 5
Ask = Callable[[str], Any]
# In words that the model that ships has learnt; it answers where others condense, which finds the same documents.
CONDENSE = "{chat_history}\n\nQuestion: {question}\nAnswer:"
REFINE = PromptTemplate(
    "Context information is below.\n---------------------\n{existing_answer}\n\n{context_msg}\n"
    "---------------------\nGiven the context information and not prior knowledge, answer the query.\n"
    "Query: {query_str}\nAnswer: "
)


class WordBag(BaseEmbedding):
    """Texts are alike if they have words in common."""

    def _get_text_embedding(self, text: str) -> list[float]:
        counts = [0.0] * 512
        for word in text.replace("?", " ").replace(".", " ").replace(",", " ").split():
            counts[crc32(word.encode()) % 512] += 1.0
        norm = sqrt(sum(count * count for count in counts)) or 1.0
        return [count / norm for count in counts]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


@dataclass(frozen=True)
class Row:
    """What a layout's questions came to.

    Attributes:
        layout: its name.
        calls: of the model.
        prompt_tokens: of all of them.
        reused_tokens: that came from the store.
        compute_ratio: token-layers computed over those of full prefills.
        questions: asked.
        right: of them answered right.
        right_without: as many with mode ``off``.
    """

    layout: str
    calls: int
    prompt_tokens: int
    reused_tokens: int
    compute_ratio: float
    questions: int
    right: int
    right_without: int


def _query(mode: Any, **options: Any) -> Callable[[VectorStoreIndex], Ask]:
    options = {"similarity_top_k": NUM_RETRIEVED, **options}
    return lambda index: index.as_query_engine(response_mode=mode, **options).query


def _chat(mode: str, **options: Any) -> Callable[[VectorStoreIndex], Ask]:
    def make(index: VectorStoreIndex) -> Ask:
        memory = ChatMemoryBuffer.from_defaults(chat_store_key="reader", llm=Settings.llm)
        llm = Settings.llm.scoped(session=memory.chat_store_key)  # type: ignore[attr-defined]
        told = SemShareKVPostprocessor(llm=llm)
        chat = index.as_chat_engine(
            chat_mode=mode,  # type: ignore[arg-type]
            llm=llm,
            memory=memory,
            similarity_top_k=NUM_RETRIEVED,
            node_postprocessors=[told],
            **options,
        )
        return chat.chat

    return make


def _router(index: VectorStoreIndex) -> Ask:
    nodes = list(index.docstore.docs.values())
    halves = (VectorStoreIndex(nodes[: len(nodes) // 2]), VectorStoreIndex(nodes[len(nodes) // 2 :]))
    tools = [
        QueryEngineTool.from_defaults(
            half.as_query_engine(similarity_top_k=NUM_RETRIEVED),
            description="News from " + " ".join(str(node.ref_doc_id) for node in half.docstore.docs.values()),
        )
        for half in halves
    ]
    return RouterQueryEngine(selector=EmbeddingSingleSelector.from_defaults(), query_engine_tools=tools).query


def _warmed(index: VectorStoreIndex) -> Ask:
    SemShareKVWarmer()(list(index.docstore.docs.values()))
    return _query("compact")(index)


LAYOUTS: dict[str, Callable[[VectorStoreIndex], Ask]] = {
    "starter": lambda index: index.as_query_engine().query,
    "compact": _query("compact"),
    "compact, warmed": _warmed,
    "refine": _query("refine", similarity_top_k=2, refine_template=REFINE),
    "tree_summarize": _query("tree_summarize"),
    "accumulate": _query("accumulate", similarity_top_k=2),
    "router": _router,
    "context chat": _chat("context"),
    "condense_plus_context chat": _chat("condense_plus_context", condense_prompt=CONDENSE),
}


@cache
def _engine(mode: str) -> SemShareEngine:
    return SemShareEngine.from_pretrained(REFERENCE_MODEL, EngineConfig(reuse=ReuseConfig(mode=mode)))  # type: ignore[arg-type]


@cache
def _asked(layout: str, mode: str) -> tuple[list[str], list[str], list[ReuseReport]]:
    """The answers, the right answers, and the reports of all calls."""
    rng = Random(layout.split(",")[0])
    documents = world.make_documents(rng, NUM_DOCUMENTS, extra_facts=1)
    num_questions = NUM_TURNS if "chat" in layout else NUM_QUESTIONS
    questions = [world.ask(rng, document) for document in rng.sample(documents, num_questions)]
    llm, reports = SemShareKVLLM(engine=_engine(mode), max_tokens=28), list[ReuseReport]()
    llm.engine.observe(reports.append)
    Settings.llm, Settings.tokenizer, Settings.embed_model = llm, llm.tokenize, WordBag()
    Settings.node_parser = SentenceSplitter(id_func=lambda at, document: f"{document.id_} {at}")
    index = VectorStoreIndex.from_documents([Document(id_=document.town, text=document.text) for document in documents])
    ask = LAYOUTS[layout](index)
    answers = [str(ask(question)).strip() for question, _ in questions]
    return answers, [right for _, right in questions], list(reports)


def row_of(layout: str, mode: str = "identical") -> Row:
    """What comes of one layout in ``mode``, beside mode ``off``."""
    plain, wanted, _ = _asked(layout.split(",")[0], "off")
    answers, _, reports = _asked(layout, mode)
    tokens = sum(report.prompt_tokens for report in reports)
    return Row(
        layout,
        calls=len(reports),
        prompt_tokens=tokens,
        reused_tokens=sum(report.reused_tokens for report in reports),
        compute_ratio=round(sum(report.compute_ratio * report.prompt_tokens for report in reports) / tokens, 3),
        questions=len(wanted),
        right=sum(right in said for said, right in zip(answers, wanted, strict=True)),
        right_without=sum(right in said for said, right in zip(plain, wanted, strict=True)),
    )


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    """Of every layout, by name."""
    saved = copy.copy(vars(Settings))
    found = {layout: row_of(layout) for layout in LAYOUTS}
    vars(Settings).update(saved)
    sys.stdout.write("\n" + "\n".join(map(str, found.values())) + "\n")
    return found


def test_answers_are_as_right_as_without_reuse(rows: dict[str, Row]) -> None:
    without = sum(row.right_without for row in rows.values())
    assert without >= 0.9 * sum(row.questions for row in rows.values()), "the model reads these layouts"
    assert sum(row.right for row in rows.values()) >= 0.95 * without
    assert all(row.right >= row.right_without - 1 for row in rows.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reuses_kv(rows: dict[str, Row], layout: str) -> None:
    row = rows[layout]
    assert row.calls >= row.questions
    assert row.reused_tokens > 0.1 * row.prompt_tokens
    assert row.compute_ratio < 0.9


def test_what_was_warmed_is_reused_from_the_first_question_on(rows: dict[str, Row]) -> None:
    assert rows["compact, warmed"].compute_ratio < 0.7 * rows["compact"].compute_ratio
    assert _asked("compact", "identical")[2][0].reused_tokens == 0
    assert _asked("compact, warmed", "identical")[2][0].reused_tokens > 0
