"""Documents in the stored order inside LangChain: behind a retriever, and in an agent's messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from langchain.agents import AgentState, create_agent
from langchain.agents.middleware import ModelRequest
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.retrievers import BaseRetriever

from semsharekv_integrations import SemShareEngine
from semsharekv_integrations.langchain import ChatSemShareKV, SemShareKVArranger, SemShareKVLLM, SemShareKVMiddleware
from semsharekv_integrations.langchain.middleware import arrange_request, inform_model

TOWNS = ("Velmar", "Osteck", "Karna", "Dora")
NEWS = [Document(f"News from {town}, by the Morning Post. Shops in {town} stayed shut.", id=town) for town in TOWNS]
A, B, C, D = NEWS
PROMPT = ChatPromptTemplate.from_messages([("system", "Use these documents:\n\n{context}"), ("human", "{input}")])


class Found(BaseRetriever):
    """Finds the documents that the query names, in its order."""

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return [NEWS[TOWNS.index(word)] for word in query.split() if word in TOWNS]


@pytest.fixture
def engine(make_engine: Callable[..., SemShareEngine]) -> SemShareEngine:
    return make_engine()


def retrieve(model: Any, **options: Any) -> ContextualCompressionRetriever:
    arranger = SemShareKVArranger(model=model, **options)
    return ContextualCompressionRetriever(base_compressor=arranger, base_retriever=Found())


def ids(documents: Sequence[Document]) -> list[str | None]:
    return [document.id for document in documents]


@pytest.mark.parametrize("awaited", [False, True])
async def test_a_retrieval_chain_reuses_what_the_last_one_read(engine: SemShareEngine, awaited: bool) -> None:
    chat, metadata = ChatSemShareKV(engine=engine, max_tokens=4), list[dict[str, Any]]()

    def note(message: AIMessage) -> AIMessage:
        metadata.append(message.response_metadata["kv_cache"])
        return message

    chain = create_retrieval_chain(retrieve(chat), create_stuff_documents_chain(chat | note, PROMPT))
    for query in ("Velmar Osteck Karna ?", "Dora Karna Osteck Velmar !"):
        done = await chain.ainvoke({"input": query}) if awaited else chain.invoke({"input": query})
    assert ids(done["context"]) == ["Velmar", "Osteck", "Karna", "Dora"]
    first, second = metadata
    assert first["arranged_tokens"] == 0
    read = sum(chat.get_num_tokens(document.page_content) for document in (A, B, C))
    assert second["prefix_tokens"] >= second["arranged_tokens"] >= read - chat.get_num_tokens(D.page_content)
    assert [use["document_id"] for use in second["documents"]] == ids(done["context"]), "known without being named"


def test_a_text_chain_with_what_stands_before(engine: SemShareEngine) -> None:
    llm = SemShareKVLLM(engine=engine, max_tokens=4)
    chain = create_stuff_documents_chain(llm, PromptTemplate.from_template("Read: {context}\n\n{input}"))
    chain.invoke({"context": [A, B], "input": "Who?"})
    assert ids(retrieve(llm, before="Read: ").invoke("Karna Osteck Velmar")) == ["Velmar", "Osteck", "Karna"]
    assert ids(retrieve(llm, before="Look: ").invoke("Karna Osteck Velmar")) == ["Karna", "Osteck", "Velmar"]
    assert ids(retrieve(llm, namespace="other").invoke("Osteck Velmar")) == ["Osteck", "Velmar"]


def test_messages_may_stand_before(engine: SemShareEngine) -> None:
    chat = ChatSemShareKV(engine=engine, max_tokens=4)
    create_stuff_documents_chain(chat, PROMPT).invoke({"context": [A, B], "input": "Who?"})
    for head, order in (("Use these documents:\n\n", ["Velmar", "Osteck"]), ("Use those:\n\n", ["Osteck", "Velmar"])):
        assert ids(retrieve(chat, before=[SystemMessage(head)]).invoke("Osteck Velmar")) == order


def test_all_documents_come_back(engine: SemShareEngine) -> None:
    chat = ChatSemShareKV(engine=engine, max_tokens=4)
    create_stuff_documents_chain(chat, PROMPT).invoke({"context": [A, B], "input": "Who?"})
    blank, twin = Document(" ", id="blank"), Document(C.page_content, id="Velmar")
    given = [B, blank, A, B, twin]
    found = SemShareKVArranger(model=engine, namespace=chat.kv_namespace).compress_documents(given, "?")
    assert [id(document) for document in found] == [id(document) for document in (A, B, twin, blank, B)]
    same = [C, blank, D, C]
    assert SemShareKVArranger(model=chat).compress_documents(same, "?") == same


def test_what_no_arranger_can_be_made_of_is_refused() -> None:
    with pytest.raises(ValueError, match="model is 'FakeListChatModel'; accepted is a ChatSemShareKV"):
        SemShareKVArranger(model=FakeListChatModel(responses=["."]))
    with pytest.raises(ValueError, match="arrange is 1; accepted is True or False"):
        SemShareKVMiddleware(arrange=1)  # type: ignore[arg-type]


class State(AgentState):
    """A state with documents beside its messages."""

    found: list[Document]


@pytest.mark.parametrize("awaited", [False, True])
async def test_an_agent_reads_documents_in_the_stored_order(engine: SemShareEngine, awaited: bool) -> None:
    chat = ChatSemShareKV(engine=engine, max_tokens=4, namespace="ours")

    async def ask(documents: Sequence[Document], arrange: bool = True) -> dict[str, Any]:
        text = "Read:\n\n" + "\n\n".join(document.page_content for document in documents)
        state: Any = {"messages": [HumanMessage(f"{text}\n\nWho?")], "found": list(documents)}
        agent: Any = create_agent(chat, [], middleware=[SemShareKVMiddleware(arrange)], state_schema=State)
        done = await agent.ainvoke(state) if awaited else agent.invoke(state)
        assert done["messages"][0].content == state["messages"][0].content, "the state has changed"
        found: dict[str, Any] = done["messages"][-1].response_metadata["kv_cache"]
        return found

    first, plain, arranged = await ask([A, B]), await ask([C, B, A], arrange=False), await ask([C, B, A])
    assert [use["document_id"] for use in plain["documents"]] == ["Karna", "Osteck", "Velmar"]
    assert [use["document_id"] for use in arranged["documents"]] == ["Karna", "Osteck", "Velmar"]
    assert first["arranged_tokens"] == plain["arranged_tokens"] == 0
    again = await ask([D, B, A])
    assert [use["document_id"] for use in again["documents"]] == ["Velmar", "Osteck", "Dora"]
    assert again["arranged_tokens"] > chat.get_num_tokens(A.page_content)


SOURCE = "Source: {id}\nContent: {text}"


@pytest.mark.parametrize("form", ["{text}", SOURCE, "<doc>{text}</doc>", "[{id}] {text} (end)"])
@pytest.mark.parametrize("role", ["system", "tool"])
def test_titles_move_with_their_documents(engine: SemShareEngine, form: str, role: str) -> None:
    chat = ChatSemShareKV(engine=engine, max_tokens=2)

    def make(documents: Sequence[Document]) -> ModelRequest[Any]:
        parts = [form.format(id=document.id, text=document.page_content) for document in documents]
        content = "Found:\n\n" + "\n\n".join(parts) + "\n\nThat is all."
        if role == "system":
            return ModelRequest(
                model=chat,
                messages=[HumanMessage("Who?")],
                system_message=SystemMessage(content),
                state=held(documents),
            )
        call = AIMessage("", tool_calls=[{"name": "look", "args": {}, "id": "1"}])
        result = ToolMessage(content, tool_call_id="1", artifact=list(documents))
        return ModelRequest(model=chat, messages=[HumanMessage("Who?"), call, result], state=held(documents))

    def held(documents: Sequence[Document]) -> Any:
        return {"messages": [], "found": list(documents)}

    def read(request: ModelRequest[Any]) -> str:
        first = request.system_message
        return str(first.content if first is not None else request.messages[-1].content)

    def send(request: ModelRequest[Any]) -> dict[str, Any]:
        first = [request.system_message] if request.system_message else []
        settings: Any = request.model_settings
        answer = chat.invoke([*first, *request.messages], **settings)
        found: dict[str, Any] = answer.response_metadata["kv_cache"]
        return found

    send(arrange_request(inform_model(make([A, B, C]))))
    asked = arrange_request(inform_model(make([D, B, A])))
    assert read(asked) == read(make([A, B, D]))
    assert send(asked)["arranged_tokens"] > chat.get_num_tokens(A.page_content)


@pytest.mark.parametrize(
    "content",
    [
        "{a} and then {b}, but {c}",  # not alike, and no empty lines
        "{a}\n\nIn between stands something else.\n\n{b}\n\n{c}",
        "1. {a}\n\n2. {b}\n\n3. {c}",  # numbers would move
        "{a}\n\n{b}\n\n{a}",
        "{a}",
    ],
)
def test_what_is_no_row_of_documents_stays(engine: SemShareEngine, content: str) -> None:
    chat = ChatSemShareKV(engine=engine, max_tokens=2)
    texts = dict(zip("abc", (document.page_content for document in NEWS), strict=False))
    for order in ("abc", "cba"):
        named = dict(zip("abc", (texts[key] for key in order), strict=True))
        messages = [HumanMessage(content.format(**named))]
        request: ModelRequest[Any] = ModelRequest(model=chat, messages=messages, state={"found": NEWS})  # type: ignore[typeddict-unknown-key]
        arranged = arrange_request(inform_model(request))
        assert arranged.messages == messages
        chat.invoke(arranged.messages, **arranged.model_settings)


def test_other_models_are_left_alone() -> None:
    other: ModelRequest[Any] = ModelRequest(model=FakeListChatModel(responses=["."]), messages=[])
    assert arrange_request(other) is other
