"""The demonstration: a summarization chain, a query engine and a chat, each call beside a full prefill.

The articles are made up (see ``lab.world``), so the right answers are known. Every call runs twice on the same
weights: with reuse, and with mode ``off`` as the baseline for time and text. In modes that reuse KV off the prefix, the
articles of chain and query engine come in another order at each call, and in mode ``semantic`` also reworded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from semsharekv_integrations.config import EngineConfig, ReuseConfig
from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.lab import prompts, world

ANSWER_TOKENS_PER_DOCUMENT = 60  # a summary has a line for each
NUM_CALLS = 10
Ask = Callable[[str, list[world.Document]], tuple[str, dict[str, Any]]]  # question on documents to answer and report


@dataclass(frozen=True)
class Call:
    """One call of the demo, with reuse and beside it in full.

    Attributes:
        scenario: which part of the demo.
        question: what was asked.
        answer: what the model said.
        right: whether that is the one right answer (of a summary, with its lines in any order).
        same_as_off: whether a full prefill gave the same text.
        report: the reuse report.
        off_ttft_s: seconds to the first token with a full prefill.
    """

    scenario: str
    question: str
    answer: str
    right: bool
    same_as_off: bool
    report: dict[str, Any]
    off_ttft_s: float

    @property
    def speedup(self) -> float:
        """Time to first token of a full prefill over that with reuse."""
        return self.off_ttft_s / self.report["ttft_s"]

    @property
    def reused_documents(self) -> list[str]:
        """Ids of the articles most of whose tokens came from the cache."""
        return [use["document_id"] for use in self.report["documents"] if 2 * use["reused_tokens"] > use["tokens"]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return {**asdict(self), "speedup": self.speedup}


class Demo:
    """Runs the scenarios on one engine.

    Args:
        engine: loaded or not; a second engine in mode ``off`` shares its weights.
        num_documents: articles in each scenario.
        seed: of the articles and questions.
    """

    def __init__(self, engine: SemShareEngine, num_documents: int = 2, seed: int = 7) -> None:
        self.engine = engine
        self.off = SemShareEngine(engine.model, engine.tokenizer, EngineConfig(reuse=ReuseConfig(mode="off")))
        self.num_documents = num_documents
        self.answer_tokens = ANSWER_TOKENS_PER_DOCUMENT * max(num_documents, 1)
        self.rng = Random(seed)
        self._warm_up()

    def run(self) -> Iterator[Call]:
        """Every call as it is done."""
        yield from self._scenario("LangChain summarization chain", self._chain, summarize=True)
        yield from self._scenario("LlamaIndex query engine", self._query_engine)
        yield from self._scenario("Chat with several turns", self._chat, questions=4)

    def _warm_up(self) -> None:
        """One throw-away call on each engine, so that no timing holds one-time costs."""
        for engine in (self.engine, self.off):
            engine.generate("Warm up.", max_new_tokens=2, namespace="demo-warm-up")

    def _scenario(
        self,
        name: str,
        make: Callable[[SemShareEngine], Ask],
        *,
        summarize: bool = False,
        questions: int = 3,
    ) -> Iterator[Call]:
        documents = world.make_documents(self.rng, self.num_documents)
        asked = world.converse(self.rng, documents, questions - summarize)
        if summarize:
            asked.insert(0, (prompts.SUMMARY_REQUESTS[0], prompts.summary(documents)))
        reusing, full = make(self.engine), make(self.off)
        for question, expected in asked:
            answer, report = reusing(question, documents)
            off_answer, off_report = full(question, documents)
            documents = self._next(documents)
            right = prompts.right_share(answer, expected) == 1
            yield Call(name, question, answer, right, answer == off_answer, report, off_report["ttft_s"])

    def _next(self, documents: list[world.Document]) -> list[world.Document]:
        """The articles as the next call gets them, with the same facts."""
        mode = self.engine.mode
        if mode == "semantic":
            documents = [world.reword(self.rng, document) for document in documents]
        return documents if mode in ("off", "exact") else [*documents[1:], documents[0]]

    def _chain(self, engine: SemShareEngine) -> Ask:
        """A stuff chain: every article goes into the system message."""
        from langchain_core.prompts import ChatPromptTemplate

        from semsharekv_integrations.langchain import ChatSemShareKV

        template = [("system", "You are a helpful assistant. Use these documents:\n\n{context}"), ("human", "{input}")]
        model = ChatSemShareKV(engine=engine, namespace="demo-chain", max_tokens=self.answer_tokens)
        prompt = ChatPromptTemplate.from_messages(template)

        def ask(question: str, documents: list[world.Document]) -> tuple[str, dict[str, Any]]:
            chain = prompt | model.bind(documents=_by_town(documents))
            message = chain.invoke({"context": prompts.join(documents), "input": question})
            return str(message.content), message.response_metadata["kv_cache"]

        return ask

    def _query_engine(self, engine: SemShareEngine) -> Ask:
        """A query engine over all articles, with LlamaIndex's own templates."""
        from llama_index.core import Document, Settings, SummaryIndex
        from llama_index.core.callbacks import CallbackManager

        from semsharekv_integrations.llama_index import SemShareKVLLM

        llm = SemShareKVLLM(engine=engine, namespace="demo-query", max_tokens=self.answer_tokens)
        Settings.tokenizer = llm.tokenize
        reports = _report_collector()

        def ask(question: str, documents: list[world.Document]) -> tuple[str, dict[str, Any]]:
            index = SummaryIndex.from_documents([Document(text=document.text) for document in documents])
            query_engine = index.as_query_engine(llm=llm, response_mode="compact")
            llm.callback_manager = CallbackManager([reports])  # only now: the index gives the LLM its own
            return str(query_engine.query(question)), reports.latest

        return ask

    def _chat(self, engine: SemShareEngine) -> Ask:
        """A conversation: the articles come with the first question, each turn adds to the history."""
        from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage

        from semsharekv_integrations.langchain import ChatSemShareKV

        model = ChatSemShareKV(engine=engine, namespace="demo-chat", max_tokens=self.answer_tokens)
        history: list[BaseMessage] = [SystemMessage(prompts.PLAIN_SYSTEMS[0])]

        def ask(question: str, documents: list[world.Document]) -> tuple[str, dict[str, Any]]:
            text = question if len(history) > 1 else f"{prompts.join(documents)}\n\nQuestion: {question}"
            history.append(HumanMessage(text))
            message = model.invoke(history, documents=_by_town(documents))
            history.append(message)
            return str(message.content), message.response_metadata["kv_cache"]

        return ask


def _by_town(documents: list[world.Document]) -> dict[str, str]:
    return {document.town: document.text for document in documents}


def _report_collector() -> Any:
    """A LlamaIndex callback handler that keeps the reuse report of the latest LLM call as ``latest``."""
    from llama_index.core.callbacks.base_handler import BaseCallbackHandler
    from llama_index.core.callbacks.schema import CBEventType, EventPayload

    class ReportCollector(BaseCallbackHandler):
        def __init__(self) -> None:
            super().__init__(event_starts_to_ignore=[], event_ends_to_ignore=[])
            self.latest: dict[str, Any] = {}

        def on_event_start(self, event_type: CBEventType, *args: Any, **kwargs: Any) -> str:
            return ""

        def on_event_end(self, event_type: CBEventType, payload: Any = None, *args: Any, **kwargs: Any) -> None:
            if event_type == CBEventType.LLM and payload:
                response = payload.get(EventPayload.RESPONSE) or payload.get(EventPayload.COMPLETION)
                self.latest = response.raw["kv_cache"]

        def start_trace(self, trace_id: str | None = None) -> None: ...

        def end_trace(self, trace_id: str | None = None, trace_map: Any = None) -> None: ...

    return ReportCollector()
