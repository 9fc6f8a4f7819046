"""The calls of ``semsharekv demo``: what is asked, how it is asked in each framework, and how it is timed.

Real models read made-up news in plain English (``assets/articles.toml``). The built-in model knows nothing but the
synthetic news world, so it reads that. Each call is made with reuse, and beside it as a full prefill of the same
prompt. Repeats for the times have namespaces of their own, which have seen as much as that of the first run.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from random import Random
from statistics import median
from typing import Any, NamedTuple

from semsharekv_integrations import world
from semsharekv_integrations.config import EngineConfig, ReuseConfig
from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.report import ReuseReport

_ANSWER_TOKENS = 24
_WORLD_ANSWER_TOKENS_PER_ARTICLE = 60  # a summary has a line for each
_SUMS = ("prompt_tokens", "prefix_tokens", "identical_tokens", "fuzzy_tokens", "recomputed_tokens", "ttft_s")
_WARM_UP_CHARACTERS = 400  # of an article; enough to be reused in another place
_SYSTEM = "You are a helpful assistant. Use these documents:\n\n"  # of every part, so that all prompts begin alike


class Question(NamedTuple):
    """A question, and what a right answer holds."""

    text: str
    expected: str


class Asked(NamedTuple):
    """What one call is given."""

    question: str
    articles: Mapping[str, str]  # texts by id, in the order in which they stand in the prompt
    history: Sequence[tuple[str, str]]  # earlier questions and answers of the same conversation
    max_tokens: int  # of the answer


Ask = Callable[[Asked], str]


class Part(NamedTuple):
    """One part of the demo."""

    title: str
    make: Callable[[SemShareEngine, str], Ask]  # for an engine and a namespace
    is_chat: bool = False  # a call then hands on what was said before, and the articles keep their order


@dataclass(frozen=True)
class Script:
    """All that is read and asked."""

    articles: Mapping[str, str]  # texts by id; all of them stand in every prompt
    questions: Mapping[str, Sequence[Question]]  # of each of ``PARTS``, in order
    is_right: Callable[[str, str], bool]  # of an answer and what is expected
    answer_tokens: int  # most of them
    reword: Callable[[Random, str], str] | None = None  # the same facts in other words, where there are such words


@dataclass(frozen=True)
class Call:
    """One call of the demo, with reuse and beside it in full."""

    scenario: str  # the title of its part
    question: str
    answer: str
    right: bool  # whether the answer holds what is expected
    same_as_off: bool  # whether a full prefill of the same prompt gave the same text
    report: dict[str, Any]  # of the first run
    ttft_s: float  # with reuse, the median of all runs
    off_ttft_s: float  # with a full prefill, likewise

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, fit for JSON; ``speedup`` is the full prefill's time over that with reuse."""
        return {**asdict(self), "speedup": self.off_ttft_s / self.ttft_s}


class Demo:
    """Makes the calls of a script, each ``runs`` times, on one engine; one in mode ``off`` shares its weights.

    ``tell`` gets each call's part and answer once there is one, before the runs that only take its times.
    """

    def __init__(
        self,
        engine: SemShareEngine,
        script: Script,
        runs: int = 3,
        seed: int = 7,
        tell: Callable[[str, str], object] = lambda _part, _answer: None,
    ) -> None:
        self.engine, self.script, self.runs, self.tell = engine, script, runs, tell
        self._off = SemShareEngine(engine.model, engine.tokenizer, EngineConfig(reuse=ReuseConfig(mode="off")))
        self._reports: list[ReuseReport] = []
        for observed in (engine, self._off):
            observed.observe(self._reports.append)
        self._rng = Random(seed)

    @property
    def changes_order(self) -> bool:
        """Whether chain and query engine get the articles in another order: where KV is reused off the prefix."""
        return self.engine.mode not in ("off", "exact")

    def warm_up(self) -> None:
        """Run the chain on a little text in two orders, with reuse and without, so no time has one-time costs."""
        few = {name: text[:_WARM_UP_CHARACTERS] for name, text in list(self.script.articles.items())[:2]}
        for articles in (few, dict(reversed(few.items()))):
            asked = Asked("What happened?", articles, (), 2)
            for engine in (self.engine, self._off):
                make_chain(engine, "demo warm-up")(asked)

    def run(self) -> Iterator[Call]:
        """Make the script's calls, in order of ``PARTS``, and yield each when all its runs are done."""
        for name, part in PARTS.items():
            askers = [part.make(self.engine, f"demo {run}") for run in range(self.runs)]
            ask_in_full = part.make(self._off, "demo")
            history: list[tuple[str, str]] = []
            for number, question in enumerate(self.script.questions[name]):
                articles = self.script.articles if number == 0 or part.is_chat else self._shuffle_articles()
                asked = Asked(question.text, articles, tuple(history), self.script.answer_tokens)
                call = self._make_call(part, question, asked, askers, ask_in_full)
                if part.is_chat:
                    history.append((question.text, call.answer))
                yield call

    def _shuffle_articles(self) -> Mapping[str, str]:
        """Return articles in random order (reworded in mode ``semantic``), or as they are if the order stays."""
        articles = self.script.articles
        if not self.changes_order:
            return articles
        reword = self.script.reword if self.engine.mode == "semantic" else None
        names = self._rng.sample(list(articles), len(articles))
        return {name: reword(self._rng, articles[name]) if reword else articles[name] for name in names}

    def _make_call(self, part: Part, question: Question, asked: Asked, askers: list[Ask], ask_in_full: Ask) -> Call:
        """Make one call in all its runs; tell its answer after the first. Outside chats, repeats say one token."""
        short = asked._replace(max_tokens=1)
        again = asked if part.is_chat else short
        answer, report = self._answer(askers[0], asked)
        self.tell(part.title, answer)
        full_answer, full_report = self._answer(ask_in_full, asked)
        seconds, full_seconds = [report["ttft_s"]], [full_report["ttft_s"]]
        for ask in askers[1:]:
            seconds.append(self._answer(ask, again)[1]["ttft_s"])
            full_seconds.append(self._answer(ask_in_full, short)[1]["ttft_s"])
        return Call(
            scenario=part.title,
            question=question.text,
            answer=answer,
            right=self.script.is_right(answer, question.expected),
            same_as_off=answer == full_answer,
            report=report,
            ttft_s=median(seconds),
            off_ttft_s=median(full_seconds),
        )

    def _answer(self, ask: Ask, asked: Asked) -> tuple[str, dict[str, Any]]:
        """Ask; return stripped answer and report, of several engine calls the last's, with sums over all."""
        self._reports.clear()
        answer = ask(asked).strip()
        reports = [report.to_dict() for report in self._reports]
        return answer, {**reports[-1], **{name: sum(report[name] for report in reports) for name in _SUMS}}


def read_news() -> Script:
    """Read articles and questions for real models from the package's ``articles.toml``."""
    found = tomllib.loads((files("semsharekv_integrations") / "assets" / "articles.toml").read_text(encoding="utf-8"))
    return Script(
        articles={article["id"]: article["text"].strip() for article in found["article"]},
        questions={part: [Question(**one) for one in found["questions"][part]] for part in PARTS},
        is_right=lambda said, expected: expected.lower() in said.lower(),
        answer_tokens=_ANSWER_TOKENS,
    )


def make_world_news(num_articles: int, seed: int) -> Script:
    """Make up news and questions of the synthetic world, for the built-in model; the same for the same ``seed``."""
    rng = Random(seed)
    documents = world.make_documents(rng, num_articles)
    asked = [Question(text, answer) for text, answer in world.converse(rng, documents, 6)]
    summary = Question(world.SUMMARY_REQUESTS[0], world.join_summaries(documents))
    by_text = {document.text: document for document in documents}
    return Script(
        articles={document.town: document.text for document in documents},
        questions={"chain": [summary, asked[0]], "query": asked[1:3], "chat": asked[3:]},
        is_right=lambda said, expected: world.share_right(said, expected) == 1,
        answer_tokens=_WORLD_ANSWER_TOKENS_PER_ARTICLE * num_articles,
        reword=lambda rng, text: world.reword(rng, by_text[text]).text,
    )


def make_chain(engine: SemShareEngine, namespace: str) -> Ask:
    """Return a function that asks a LangChain chain with every article in the system message."""
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import ChatPromptTemplate

    from semsharekv_integrations.langchain import ChatSemShareKV

    prompt = ChatPromptTemplate.from_messages([("system", f"{_SYSTEM}{{context}}"), ("human", "{input}")])

    def ask(asked: Asked) -> str:
        model = ChatSemShareKV(engine=engine, namespace=namespace, max_tokens=asked.max_tokens)
        chain = prompt | model.bind(documents=dict(asked.articles)) | StrOutputParser()
        return chain.invoke({"context": "\n\n".join(asked.articles.values()), "input": asked.question})

    return ask


def make_query_engine(engine: SemShareEngine, namespace: str) -> Ask:
    """Return a function that asks a LlamaIndex query engine over all articles; it sets ``Settings.tokenizer``."""
    from llama_index.core import ChatPromptTemplate, Document, Settings, SummaryIndex
    from llama_index.core.llms import ChatMessage

    from semsharekv_integrations.llama_index import SemShareKVLLM

    system, user = ChatMessage(f"{_SYSTEM}{{context_str}}", role="system"), ChatMessage("{query_str}", role="user")
    template = ChatPromptTemplate(message_templates=[system, user])

    def ask(asked: Asked) -> str:
        """Build index and query engine for this call and return the answer's text."""
        llm = SemShareKVLLM(engine=engine, namespace=namespace, max_tokens=asked.max_tokens)
        Settings.tokenizer = llm.tokenize
        index = SummaryIndex.from_documents([Document(text=text, id_=key) for key, text in asked.articles.items()])
        query_engine = index.as_query_engine(llm=llm, response_mode="compact", text_qa_template=template)
        return str(query_engine.query(asked.question))

    return ask


def make_chat(engine: SemShareEngine, namespace: str) -> Ask:
    """Return a function that asks in LangChain's messages: articles in the system message, history, question."""
    from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

    from semsharekv_integrations.langchain import ChatSemShareKV

    def ask(asked: Asked) -> str:
        """Send articles, history and question as messages and return the answer's text."""
        model = ChatSemShareKV(engine=engine, namespace=namespace, max_tokens=asked.max_tokens)
        texts = "\n\n".join(asked.articles.values())
        messages: list[BaseMessage] = [SystemMessage(f"{_SYSTEM}{texts}")]
        for question, answer in asked.history:
            messages += [HumanMessage(question), AIMessage(answer)]
        messages.append(HumanMessage(asked.question))
        return str(model.invoke(messages, documents=dict(asked.articles), session="demo chat").content)

    return ask


PARTS: dict[str, Part] = {
    "chain": Part("LangChain summarization chain", make_chain),
    "query": Part("LlamaIndex query engine", make_query_engine),
    "chat": Part("Chat with several turns", make_chat, is_chat=True),
}
