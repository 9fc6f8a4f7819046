"""The chains that people put these models into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from langchain_classic.chains import LLMChain, MapReduceDocumentsChain, ReduceDocumentsChain, StuffDocumentsChain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.runnables.history import RunnableWithMessageHistory

from semsharekv_integrations import SemShareEngine
from semsharekv_integrations.langchain import ChatSemShareKV, SemShareKVLLM

EngineMaker = Callable[..., SemShareEngine]
DOCUMENTS = [
    Document("In Prorna , a green flag was raised on Monday ."),
    Document("In Erivia , a flood affected 12 people ."),
    Document("In Halberg , a shelter was opened by the mayor ."),
]
QUESTIONS = ("What happened in Prorna ?", "What happened in Erivia ?")
ASK = ChatPromptTemplate.from_messages([("system", "Read this : {context}"), ("human", "{question}")])


@pytest.fixture
def engine(make_engine: EngineMaker) -> SemShareEngine:
    return make_engine()


def reused(engine: SemShareEngine, call: Callable[[], Any]) -> float:
    before = engine.stats()["reused_tokens"]
    call()
    return engine.stats()["reused_tokens"] - before


async def test_prompt_model_parser(engine: SemShareEngine, make_engine: EngineMaker) -> None:
    chain = ASK | ChatSemShareKV(engine=engine, max_tokens=10) | StrOutputParser()
    variables = {"context": DOCUMENTS[0].page_content, "question": QUESTIONS[0]}
    plain = make_engine("off").generate(
        [
            {"role": "system", "content": f"Read this : {DOCUMENTS[0].page_content}"},
            {"role": "user", "content": QUESTIONS[0]},
        ],
        max_new_tokens=10,
    )
    assert chain.invoke(variables) == "".join(chain.stream(variables)) == await chain.ainvoke(variables) == plain.text
    assert "".join([piece async for piece in chain.astream(variables)]) == plain.text


def test_stuff_chain_reuses_its_documents_for_the_next_question(engine: SemShareEngine) -> None:
    chat = ChatSemShareKV(engine=engine, max_tokens=6)
    chain = create_stuff_documents_chain(chat, ASK)
    documents_tokens = sum(chat.get_num_tokens(document.page_content) for document in DOCUMENTS)
    chain.invoke({"context": DOCUMENTS, "question": QUESTIONS[0]})
    again = reused(engine, lambda: chain.invoke({"context": DOCUMENTS, "question": QUESTIONS[1]}))
    assert again >= documents_tokens


@pytest.mark.parametrize("cls", [ChatSemShareKV, SemShareKVLLM])
def test_classic_stuff_chain(engine: SemShareEngine, cls: type[ChatSemShareKV] | type[SemShareKVLLM]) -> None:
    prompt = PromptTemplate.from_template("{context}\n\n{question}")
    chain = StuffDocumentsChain(
        llm_chain=LLMChain(llm=cls(engine=engine, max_tokens=6), prompt=prompt), document_variable_name="context"
    )
    first = chain.invoke({"input_documents": DOCUMENTS, "question": QUESTIONS[0]})["output_text"]
    assert first == chain.invoke({"input_documents": DOCUMENTS, "question": QUESTIONS[0]})["output_text"] != ""
    assert engine.stats()["reused_tokens"] > 20


async def test_map_reduce_hands_over_all_prompts_of_the_map_step(engine: SemShareEngine) -> None:
    llm = SemShareKVLLM(engine=engine, max_tokens=6)
    summarize = LLMChain(llm=llm, prompt=PromptTemplate.from_template("Say in short what this text tells us : {text}"))
    join = LLMChain(llm=llm, prompt=PromptTemplate.from_template("Say all of this in short : {text}"))
    combine = StuffDocumentsChain(llm_chain=join, document_variable_name="text")
    chain = MapReduceDocumentsChain(
        llm_chain=summarize,
        reduce_documents_chain=ReduceDocumentsChain(combine_documents_chain=combine),
        document_variable_name="text",
    )
    instruction = llm.get_num_tokens("Say in short what this text tells us :")
    answers: list[Any] = []
    assert reused(engine, lambda: answers.append(chain.invoke(DOCUMENTS)["output_text"])) >= 2 * instruction
    assert engine.stats()["requests"] == len(DOCUMENTS) + 1
    assert (await chain.ainvoke(DOCUMENTS))["output_text"] == answers[0]


def test_history_is_reused_turn_by_turn(engine: SemShareEngine) -> None:
    histories: dict[str, InMemoryChatMessageHistory] = {}
    prompt = ChatPromptTemplate.from_messages([MessagesPlaceholder("history"), ("human", "{question}")])
    chain = RunnableWithMessageHistory(
        prompt | ChatSemShareKV(engine=engine, max_tokens=8),
        lambda session_id: histories.setdefault(session_id, InMemoryChatMessageHistory()),
        input_messages_key="question",
        history_messages_key="history",
    )
    config: Any = {"configurable": {"session_id": "one"}}
    first = chain.invoke({"question": QUESTIONS[0]}, config)
    second = chain.invoke({"question": QUESTIONS[1]}, config)
    before = first.usage_metadata["input_tokens"] + first.usage_metadata["output_tokens"] - 1
    assert second.usage_metadata["input_token_details"]["cache_read"] >= before


def test_fallbacks_and_retries_see_errors(engine: SemShareEngine) -> None:
    chat = ChatSemShareKV(engine=engine, max_tokens=6)
    assert chat.bind(foo=1).with_fallbacks([chat]).invoke("Hello").text == chat.invoke("Hello").text


async def test_events_carry_tokens_and_usage(engine: SemShareEngine) -> None:
    chain = ASK | ChatSemShareKV(engine=engine, max_tokens=6) | StrOutputParser()
    variables = {"context": "nothing", "question": QUESTIONS[0]}
    events = [event async for event in chain.astream_events(variables, version="v2")]
    ended = next(event for event in events if event["event"] == "on_chat_model_end")["data"]["output"]
    pieces = [event["data"]["chunk"].text for event in events if event["event"] == "on_chat_model_stream"]
    assert "".join(pieces) == ended.text == chain.invoke(variables) and ended.usage_metadata["output_tokens"] == 6
