"""The layouts that people build, unchanged but for the model's class, on the model that ships: answers and reuse.

``measured()`` gives the figures of one layout in one mode, always with the same documents and questions; ``table()``
those of all, beside a full prefill's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from random import Random
from typing import Any, NamedTuple, TypedDict

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, dynamic_prompt, wrap_model_call
from langchain.tools import ToolRuntime, tool
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.chains.summarize import load_summarize_chain
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.messages import ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.vectorstores import InMemoryVectorStore
from langgraph.checkpoint.memory import MemorySaver
from langgraph.graph import START, MessagesState, StateGraph

from semsharekv_integrations import EngineConfig, ReuseConfig, ReuseReport, SemShareEngine, world
from semsharekv_integrations.langchain import ChatSemShareKV, DocumentTracker, SemShareKVMiddleware
from semsharekv_integrations.model.loading import REFERENCE_MODEL

Pairs = Iterator[tuple[str, str]]  # what was said and what is right
NUM_DOCUMENTS = 5
TOOL_TEMPLATE = """{{ bos_token }}{% if tools %}<|system|>You can call
{%- for tool in tools %} {{ tool.function.name }}{% endfor %}.<|end|>{% endif %}
{%- for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
SYSTEM = world.SYSTEM_WRAPS[5].replace("{docs}", "{context}")


class Words(Embeddings):
    """Texts with the same capitalized words are near each other."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        vector = [0.0] * 4096
        for word in text.replace(".", " ").replace(",", " ").replace("?", " ").split():
            if word[0].isupper():
                vector[int.from_bytes(word.encode(), "big") % 4093] += 1.0
        return vector


def articles(rng: Random, count: int = NUM_DOCUMENTS) -> tuple[list[world.Document], list[Document]]:
    made = world.make_documents(rng, count)
    return made, [Document(document.text, id=document.town) for document in made]


def store_of(documents: list[Document]) -> InMemoryVectorStore:
    store = InMemoryVectorStore(Words())
    store.add_documents(documents)
    return store


def questions(rng: Random, made: list[world.Document], count: int = 3) -> list[tuple[str, str]]:
    return [world.ask(rng, document) for document in rng.sample(made, count)]


def stuff(chat: ChatSemShareKV, rng: Random) -> Pairs:
    """Documents in the system message, in another order each time."""
    made, documents = articles(rng)
    chain = create_stuff_documents_chain(chat, ChatPromptTemplate.from_messages([("system", SYSTEM), ("human", "{q}")]))
    for question, expected in questions(rng, made):
        documents = rng.sample(documents, len(documents))
        yield chain.invoke({"context": documents, "q": question}, tracked()), expected


def retrieval_chain(chat: ChatSemShareKV, rng: Random) -> Pairs:
    """The retrieval tutorial of the classic chains."""
    made, documents = articles(rng)
    prompt = ChatPromptTemplate.from_messages([("system", SYSTEM), ("human", "{input}")])
    retriever = store_of(documents).as_retriever(search_kwargs={"k": 3})
    chain = create_retrieval_chain(retriever, create_stuff_documents_chain(chat, prompt))
    for question, expected in questions(rng, made):
        yield chain.invoke({"input": question}, tracked())["answer"], expected


def rag_pipe(chat: ChatSemShareKV, rng: Random) -> Pairs:
    """The retrieval tutorial written as a pipe, with no callbacks at all."""
    made, documents = articles(rng)
    prompt = ChatPromptTemplate.from_template(world.USER_WRAPS[3].replace("{docs}", "{context}"))
    retriever = store_of(documents).as_retriever(search_kwargs={"k": 3})
    given = {"context": retriever | _joined, "question": RunnablePassthrough()}
    chain = given | prompt | chat | StrOutputParser()
    for question, expected in questions(rng, made):
        yield chain.invoke(question), expected


def rag_graph(chat: ChatSemShareKV, rng: Random) -> Pairs:
    """The retrieval tutorial as a graph of two nodes."""

    class State(TypedDict):
        question: str
        context: list[Document]
        answer: str

    made, documents = articles(rng)
    store, prompt = store_of(documents), ChatPromptTemplate.from_messages([("system", SYSTEM), ("human", "{question}")])

    def retrieve(state: State) -> dict[str, Any]:
        return {"context": store.similarity_search(state["question"], k=3)}

    def generate(state: State) -> dict[str, Any]:
        messages = prompt.invoke({"question": state["question"], "context": _joined(state["context"])})
        return {"answer": chat.invoke(messages).content}

    graph: Any = StateGraph(State).add_sequence([retrieve, generate]).add_edge(START, "retrieve").compile()
    for question, expected in questions(rng, made):
        yield graph.invoke({"question": question}, tracked())["answer"], expected


def message_history(chat: ChatSemShareKV, rng: Random) -> Pairs:
    """The chat history tutorial; the documents come with the first question."""
    made, documents = articles(rng)
    histories: dict[str, InMemoryChatMessageHistory] = {}
    prompt = ChatPromptTemplate.from_messages(
        [("system", world.PLAIN_SYSTEMS[0]), MessagesPlaceholder("history"), ("human", "{input}")]
    )
    chain = RunnableWithMessageHistory(
        prompt | chat,
        lambda session_id: histories.setdefault(session_id, InMemoryChatMessageHistory()),
        input_messages_key="input",
        history_messages_key="history",
    )
    for turn, (question, expected) in enumerate(questions(rng, made)):
        text = question if turn else world.USER_WRAPS[1].format(docs=_joined(documents), question=question)
        yield chain.invoke({"input": text}, {"configurable": {"session_id": "abc2"}}).content, expected


def graph_chatbot(chat: ChatSemShareKV, rng: Random) -> Pairs:
    """The chatbot tutorial: a graph with a memory, of two threads."""
    made, documents = articles(rng)

    def call_model(state: MessagesState) -> dict[str, Any]:
        return {"messages": [chat.invoke(state["messages"])]}

    graph = StateGraph(MessagesState).add_node("model", call_model).add_edge(START, "model")
    app = graph.compile(checkpointer=MemorySaver())
    for thread in ("abc123", "abc234"):
        for turn, (question, expected) in enumerate(questions(rng, made, 2)):
            text = question if turn else world.USER_WRAPS[1].format(docs=_joined(documents), question=question)
            done = app.invoke({"messages": [("user", text)]}, {"configurable": {"thread_id": thread}})  # type: ignore[call-overload]
            yield done["messages"][-1].content, expected


def map_reduce(chat: ChatSemShareKV, rng: Random) -> Pairs:
    """Every document is summarized, and a question asked about the summaries; then another document comes."""
    made, documents = articles(rng, 2)
    asking = PromptTemplate.from_template(world.USER_WRAPS[3].replace("{docs}", "{text}"))
    chain = load_summarize_chain(chat, chain_type="map_reduce", combine_prompt=asking)
    for kept in (slice(0, 1), slice(0, 2)):
        question, expected = world.ask(rng, made[0], rng.choice(world.CORE_KINDS))
        given = {"input_documents": documents[kept], "question": question}
        yield chain.invoke(given, tracked())["output_text"], expected


def summaries(chain_type: str) -> Callable[[ChatSemShareKV, Random], Pairs]:
    """The summarization chains as they come; the second time in another order."""

    def summarize(chat: ChatSemShareKV, rng: Random) -> Pairs:
        chain = load_summarize_chain(chat, chain_type=chain_type)
        made, documents = articles(rng, 2)
        for order in (1, -1):
            said = chain.invoke({"input_documents": documents[::order]}, tracked())["output_text"]
            yield said, world.join_summaries(made[::order])

    return summarize


def agent_with_tool(chat: ChatSemShareKV, rng: Random) -> Pairs:
    """The retrieval tutorial as an agent whose tool returns documents as artifacts.

    The model that ships has not learnt to call tools, and reads a question only behind the documents: so a template
    says how it calls, middleware when, and the tool repeats the question.
    """
    made, documents = articles(rng)
    store = store_of(documents)

    @tool(response_format="content_and_artifact")
    def retrieve_context(runtime: ToolRuntime) -> tuple[str, list[Document]]:
        """Find what is known about the question."""
        question = runtime.state["messages"][0].text
        found = store.similarity_search(question, k=3)
        return world.USER_WRAPS[1].format(docs=_joined(found), question=question), found

    @wrap_model_call
    def look_first(request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Any]) -> Any:
        looked = isinstance(request.messages[-1], ToolMessage)
        return handler(request.override(tool_choice="none" if looked else "any"))

    agent = create_agent(chat, [retrieve_context], middleware=[look_first, SemShareKVMiddleware()])
    for question, expected in questions(rng, made):
        yield agent.invoke({"messages": [("user", question)]})["messages"][-1].text, expected


def agent_with_context(chat: ChatSemShareKV, rng: Random) -> Pairs:
    """The retrieval tutorial as an agent whose middleware puts documents into the system message."""
    made, documents = articles(rng)
    store = store_of(documents)

    @dynamic_prompt
    def prompt_with_context(request: ModelRequest[Any]) -> str:
        found = store.similarity_search(request.state["messages"][-1].text, k=3)
        return world.SYSTEM_WRAPS[2].format(docs=_joined(found))

    agent = create_agent(chat, [], middleware=[prompt_with_context])
    for question, expected in questions(rng, made):
        yield agent.invoke({"messages": [("user", question)]})["messages"][-1].text, expected


def tracked() -> Any:
    return {"callbacks": [DocumentTracker()]}


def _joined(documents: list[Document]) -> str:
    return "\n\n".join(document.page_content for document in documents)


class Layout(NamedTuple):
    """What a layout does, the least share of prompt tokens that it has to reuse, and a template if it needs one."""

    run: Callable[[ChatSemShareKV, Random], Pairs]
    reused_share: float
    template: str | None = None


LAYOUTS = {
    "stuff": Layout(stuff, 0.4),
    "retrieval chain": Layout(retrieval_chain, 0.25),
    "pipe": Layout(rag_pipe, 0.3),
    "retrieval graph": Layout(rag_graph, 0.3),
    "message history": Layout(message_history, 0.6),
    "graph chatbot": Layout(graph_chatbot, 0.6),
    "summary, stuff": Layout(summaries("stuff"), 0.3),
    "agent with tool": Layout(agent_with_tool, 0.3, TOOL_TEMPLATE),
    "agent with context": Layout(agent_with_context, 0.2),
    "map-reduce": Layout(map_reduce, 0.3),
    "summary, refine": Layout(summaries("refine"), 0.15),
}


class Figures(NamedTuple):
    """What one layout came to in one mode."""

    answers: int
    right: float
    prompt_tokens: int
    reused_tokens: int
    compute_ratio: float


@cache
def engine(mode: str, template: str | None = None) -> SemShareEngine:
    config = EngineConfig(reuse=ReuseConfig(mode=mode))  # type: ignore[arg-type]
    if template is None:
        return SemShareEngine.from_pretrained(REFERENCE_MODEL, config)
    shipped = engine(mode)
    tokenizer = copy.deepcopy(shipped.tokenizer)
    tokenizer.chat_template = template
    return SemShareEngine(shipped.model, tokenizer, config)


@cache
def measured(name: str, mode: str = "identical") -> Figures:
    """Right answers, tokens, and the share computed."""
    reports: list[ReuseReport] = []
    chat = ChatSemShareKV(engine=engine(mode, LAYOUTS[name].template), max_tokens=90)
    chat.engine.observe(reports.append)
    right = [world.share_right(*pair) for pair in LAYOUTS[name].run(chat, Random(name))]
    tokens = sum(report.prompt_tokens for report in reports)
    computed = sum(report.compute_ratio * report.prompt_tokens for report in reports)
    reused = sum(report.reused_tokens for report in reports)
    return Figures(len(right), sum(right), tokens, reused, computed / tokens)


def table() -> str:
    """Every layout's figures, in the columns of Markdown."""
    columns = ("layout", "answers", "right", "by full prefill", "prompt tokens", "reused", "computed")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in LAYOUTS:
        found, full = measured(name), measured(name, "off")
        cells = (name, found.answers, f"{found.right:g}", f"{full.right:g}", found.prompt_tokens, found.reused_tokens)
        lines.append(f"| {' | '.join(map(str, cells))} | {found.compute_ratio:.0%} |")
    return "\n".join(lines)


@pytest.mark.parametrize("name", LAYOUTS)
def test_answers_are_as_right_as_by_full_prefill_and_less_is_computed(name: str) -> None:
    found = measured(name)
    if found.right < found.answers:  # else a full prefill can do no better
        assert found.right >= measured(name, "off").right
    assert found.reused_tokens >= LAYOUTS[name].reused_share * found.prompt_tokens
    assert found.compute_ratio <= 1 - LAYOUTS[name].reused_share / 2
