"""Documents are known without separators: from tools' artifacts, callbacks and marked blocks, in every kind of call."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest
from langchain_classic.chains import LLMChain, StuffDocumentsChain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableConfig, RunnableLambda, RunnablePassthrough

from semsharekv_integrations import SemShareEngine
from semsharekv_integrations.langchain import ChatSemShareKV, DocumentTracker, SemShareKVLLM

EngineMaker = Callable[..., SemShareEngine]
FLAG = Document("In Prorna , a green flag was raised on Monday .", id="flag")
FLOOD = Document("In Erivia , a flood affected 12 people .", metadata={"id": "flood"})
QUESTION = "What happened in Prorna ?"
ELSEWHERE: Any = {"configurable": {"namespace": "elsewhere"}}
ASK = ChatPromptTemplate.from_messages([("system", "Read this : {context}"), ("human", "{question}")])


class Fixed(BaseRetriever):
    """Always finds the same."""

    found: list[Document] = [FLAG, FLOOD]

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return self.found


@pytest.fixture
def chat(make_engine: EngineMaker) -> ChatSemShareKV:
    return ChatSemShareKV(engine=make_engine(), max_tokens=4)


def joined(documents: list[Document]) -> str:
    return "\n\n".join(document.page_content for document in documents)


def seen(model: ChatSemShareKV | SemShareKVLLM) -> Callable[[], list[str]]:
    """Ids of the documents of the calls since, in the order in which they were reported."""
    ids: list[str] = []
    model.engine.observe(lambda report: ids.extend(document.document_id for document in report.documents))

    def taken() -> list[str]:
        found, ids[:] = list(ids), []
        return found

    return taken


def retrieval(model: Any) -> Any:
    given = {"context": Fixed() | joined, "question": RunnablePassthrough()}
    return given | ASK | model


ARTIFACTS = [[FLAG, FLOOD], (FLAG, FLOOD), {"found": {"documents": [FLAG, FLOOD], "scores": [1, 2]}}, [[FLAG], FLOOD]]


@pytest.mark.parametrize("artifact", ARTIFACTS, ids=repr)
def test_artifacts_of_tools(chat: ChatSemShareKV, artifact: Any) -> None:
    ids = seen(chat)
    content = f"Source: a\n{FLAG.page_content}\n\nSource: b\n{FLOOD.page_content}"
    chat.invoke([HumanMessage(QUESTION), AIMessage("."), ToolMessage(content, tool_call_id="1", artifact=artifact)])
    assert ids() == ["flag", "flood"]


def test_artifacts_of_which_only_one_stands_in_the_message(chat: ChatSemShareKV) -> None:
    ids = seen(chat)
    message = ToolMessage(FLAG.page_content, tool_call_id="1", artifact=[FLAG, FLOOD, Document("")])
    chat.invoke([HumanMessage(QUESTION), AIMessage("."), message])
    assert ids() == ["flag"]
    assert chat.engine.forget("flood", chat.kv_namespace) == 0, "what is not there is not named either"


def test_artifacts_that_are_no_documents_are_nothing(chat: ChatSemShareKV) -> None:
    ids = seen(chat)
    chat.invoke([HumanMessage(QUESTION), ToolMessage("12", tool_call_id="1", artifact={"a": [object(), "12"]})])
    assert ids() == []


def test_marked_blocks(chat: ChatSemShareKV) -> None:
    ids = seen(chat)
    marked = {"cache_control": {"type": "ephemeral"}}
    blocks: list[Any] = [
        {"type": "text", "text": "Read this : "},
        {"type": "text", "text": FLAG.page_content, **marked},
        {"type": "text", "text": FLOOD.page_content, **marked},
    ]
    chat.invoke([SystemMessage(blocks), HumanMessage(QUESTION)])
    assert len(ids()) == 2
    chat.invoke([SystemMessage(blocks), HumanMessage(QUESTION)], documents=[FLAG])
    named = ids()
    assert named[0] == "flag" and len(named) == 2 and "flood" not in named


def test_a_marked_block_around_known_documents_is_no_border(chat: ChatSemShareKV) -> None:
    ids = seen(chat)
    block = {"type": "text", "text": joined([FLAG, FLOOD]), "cache_control": {"type": "ephemeral"}}
    chat.invoke([SystemMessage([block]), HumanMessage(QUESTION)], documents=[FLAG, FLOOD])
    assert ids() == ["flag", "flood"]


def test_two_texts_of_one_id_are_two_documents(chat: ChatSemShareKV) -> None:
    ids = seen(chat)
    chunks = [Document(text.page_content, metadata={"id": "same"}) for text in (FLAG, FLOOD)]
    chat.invoke([HumanMessage(QUESTION), ToolMessage(joined(chunks), tool_call_id="1", artifact=chunks)])
    first, second = ids()
    assert first == "same" != second


async def test_what_retrievers_return(chat: ChatSemShareKV) -> None:
    ids, chain = seen(chat), retrieval(chat)
    config: RunnableConfig = {"callbacks": [DocumentTracker()]}
    chain.invoke(QUESTION, config)
    assert ids() == ["flag", "flood"]
    list(chain.stream(QUESTION, config))
    assert ids() == ["flag", "flood"]
    await chain.ainvoke(QUESTION, config)
    assert ids() == ["flag", "flood"]
    assert [piece async for piece in chain.astream(QUESTION, config)] and ids() == ["flag", "flood"]
    chain.batch([QUESTION, QUESTION], config)
    assert ids() == ["flag", "flood"] * 2
    assert [event async for event in chain.astream_events(QUESTION, config, version="v2")]
    assert ids() == ["flag", "flood"]
    chain.invoke(QUESTION, ELSEWHERE)
    assert ids() == [], "without a tracker, where nobody has named them before"


async def test_what_goes_into_a_stuff_chain(chat: ChatSemShareKV) -> None:
    ids, chain = seen(chat), create_stuff_documents_chain(chat, ASK)
    config: RunnableConfig = {"callbacks": [DocumentTracker()]}
    variables = {"context": [FLAG, FLOOD], "question": QUESTION}
    chain.invoke(variables, config)
    assert ids() == ["flag", "flood"]
    list(chain.stream(variables, config))
    assert ids() == ["flag", "flood"]
    await chain.ainvoke(variables, config)
    assert ids() == ["flag", "flood"]


@pytest.mark.parametrize("cls", [ChatSemShareKV, SemShareKVLLM])
async def test_what_goes_into_a_classic_chain(make_engine: EngineMaker, cls: Any) -> None:
    model = cls(engine=make_engine(), max_tokens=4)
    prompt = PromptTemplate.from_template("{context}\n\n{question}")
    chain = StuffDocumentsChain(llm_chain=LLMChain(llm=model, prompt=prompt), document_variable_name="context")
    ids, config = seen(model), {"callbacks": [DocumentTracker()]}
    chain.invoke({"input_documents": [FLAG, FLOOD], "question": QUESTION}, config)
    assert ids() == ["flag", "flood"]
    await chain.ainvoke({"input_documents": [FLAG, FLOOD], "question": QUESTION}, config)
    assert ids() == ["flag", "flood"]


def test_llms_hear_of_them_too(make_engine: EngineMaker) -> None:
    llm = SemShareKVLLM(engine=make_engine(), max_tokens=4)
    ids, chain = seen(llm), retrieval(llm)
    config: RunnableConfig = {"callbacks": [DocumentTracker()]}
    chain.invoke(QUESTION, config)
    assert ids() == ["flag", "flood"]
    assert list(chain.stream(QUESTION, config)) and ids() == ["flag", "flood"]


def test_a_step_that_finds_documents_in_its_own_way(chat: ChatSemShareKV) -> None:
    search = RunnableLambda(lambda question: {"context": [FLAG], "question": question})
    answer = RunnableLambda(lambda state: chat.invoke(f"{joined(state['context'])}\n\n{state['question']}"))
    ids, chain = seen(chat), search | answer
    chain.invoke(QUESTION, {"callbacks": [DocumentTracker()]})
    assert ids() == ["flag"]


def test_runs_do_not_hear_of_each_other(chat: ChatSemShareKV) -> None:
    tracker, ids = DocumentTracker(), seen(chat)
    retrieval(chat).invoke(QUESTION, {"callbacks": [tracker]})
    assert ids() == ["flag", "flood"]
    chain, config = ASK | chat, ELSEWHERE | {"callbacks": [tracker]}
    chain.invoke({"context": FLAG.page_content, "question": QUESTION}, config)
    chat.invoke(FLAG.page_content, config)
    assert ids() == []


def test_a_tracker_of_retriever_and_model_alone(chat: ChatSemShareKV) -> None:
    tracker = DocumentTracker()
    model = chat.model_copy(update={"callbacks": [tracker]})
    chain = (
        {"context": Fixed().with_config(callbacks=[tracker]) | joined, "question": RunnablePassthrough()} | ASK | model
    )
    ids = seen(chat)
    chain.invoke(QUESTION)
    assert ids() == ["flag", "flood"]


def test_separate_calls_with_one_tracker(chat: ChatSemShareKV) -> None:
    config: RunnableConfig = {"callbacks": [DocumentTracker()]}
    found = Fixed().invoke(QUESTION, config)
    ids = seen(chat)
    chat.invoke(joined(found), config)
    list(chat.stream(joined(found), config))
    assert ids() == ["flag", "flood"] * 2


def test_a_tracker_keeps_no_more_than_it_may() -> None:
    tracker = DocumentTracker(max_runs=3, max_documents=2)
    roots = [uuid4() for _ in range(5)]
    for root in roots:
        tracker.on_chain_start({}, {"docs": [Document(f"{root} {count}") for count in range(4)]}, run_id=root)
    assert [len(tracker.documents_of(root)) for root in roots] == [0, 0, 2, 2, 2]
    assert tracker.documents_of(roots[-1])[-1][1] == f"{roots[-1]} 3"
    for root in roots:
        tracker.on_chain_error(ValueError(), run_id=root)
    assert not any(tracker.documents_of(root) for root in roots) and not tracker._root_of and not tracker._texts


def test_what_is_over_is_forgotten(chat: ChatSemShareKV) -> None:
    tracker = DocumentTracker()
    retrieval(chat).invoke(QUESTION, {"callbacks": [tracker]})
    gc.collect()
    assert not tracker._root_of and not tracker._texts


@pytest.mark.parametrize("bounds", [{"max_runs": 0}, {"max_documents": "many"}])
def test_bad_bounds_are_named(bounds: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bounds))} is .*accepted is 1 or more"):
        DocumentTracker(**bounds)


def test_traces_are_not_filled_with_documents(chat: ChatSemShareKV) -> None:
    class Params(DocumentTracker):
        params: Any = None

        def on_chat_model_start(self, *_: Any, **kwargs: Any) -> None:
            self.params = kwargs

    tracker = Params()
    retrieval(chat).invoke(QUESTION, {"callbacks": [tracker]})
    assert tracker.params and "Prorna , a green" not in repr(tracker.params)
