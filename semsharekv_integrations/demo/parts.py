"""The demo's three parts, built as their frameworks build them: each maps a question to an answer.

All take a namespace, so that what one has computed serves the others, and repeated runs know nothing of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from semsharekv_integrations.engine import SemShareEngine


class Asked(NamedTuple):
    """What one call is given.

    Attributes:
        question: what to ask.
        articles: texts by id, in the order in which they stand in the prompt.
        history: earlier questions and answers of the same conversation.
        max_tokens: most tokens of the answer.
    """

    question: str
    articles: Mapping[str, str]
    history: Sequence[tuple[str, str]]
    max_tokens: int


Ask = Callable[[Asked], str]
SYSTEM = "You are a helpful assistant. Use these documents:\n\n"  # of all three, so that they begin alike


class Part(NamedTuple):
    """One part of the demo.

    Attributes:
        title: for people.
        make: for an engine and a namespace, what answers.
        is_chat: whether a call hands on what was said before; its articles keep their order then.
    """

    title: str
    make: Callable[[SemShareEngine, str], Ask]
    is_chat: bool = False


def make_chain(engine: SemShareEngine, namespace: str) -> Ask:
    """A LangChain chain that stuffs every article into the system message."""
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import ChatPromptTemplate

    from semsharekv_integrations.langchain import ChatSemShareKV

    prompt = ChatPromptTemplate.from_messages([("system", f"{SYSTEM}{{context}}"), ("human", "{input}")])

    def ask(asked: Asked) -> str:
        model = ChatSemShareKV(engine=engine, namespace=namespace, max_tokens=asked.max_tokens)
        chain = prompt | model.bind(documents=dict(asked.articles)) | StrOutputParser()
        return chain.invoke({"context": "\n\n".join(asked.articles.values()), "input": asked.question})

    return ask


def make_query_engine(engine: SemShareEngine, namespace: str) -> Ask:
    """A LlamaIndex query engine over all articles."""
    from llama_index.core import ChatPromptTemplate, Document, Settings, SummaryIndex
    from llama_index.core.llms import ChatMessage

    from semsharekv_integrations.llama_index import SemShareKVLLM

    system, user = ChatMessage(f"{SYSTEM}{{context_str}}", role="system"), ChatMessage("{query_str}", role="user")
    template = ChatPromptTemplate(message_templates=[system, user])

    def ask(asked: Asked) -> str:
        llm = SemShareKVLLM(engine=engine, namespace=namespace, max_tokens=asked.max_tokens)
        Settings.tokenizer = llm.tokenize
        index = SummaryIndex.from_documents([Document(text=text, id_=key) for key, text in asked.articles.items()])
        query_engine = index.as_query_engine(llm=llm, response_mode="compact", text_qa_template=template)
        return str(query_engine.query(asked.question))

    return ask


def make_chat(engine: SemShareEngine, namespace: str) -> Ask:
    """A conversation in LangChain's messages: the articles are in the system message, turns add to the history."""
    from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

    from semsharekv_integrations.langchain import ChatSemShareKV

    def ask(asked: Asked) -> str:
        model = ChatSemShareKV(engine=engine, namespace=namespace, max_tokens=asked.max_tokens)
        texts = "\n\n".join(asked.articles.values())
        messages: list[BaseMessage] = [SystemMessage(f"{SYSTEM}{texts}")]
        for question, answer in asked.history:
            messages += [HumanMessage(question), AIMessage(answer)]
        messages.append(HumanMessage(asked.question))
        options: dict[str, Any] = {"documents": dict(asked.articles), "session": "demo chat"}
        return str(model.invoke(messages, **options).content)

    return ask


PARTS: dict[str, Part] = {
    "chain": Part("LangChain summarization chain", make_chain),
    "query": Part("LlamaIndex query engine", make_query_engine),
    "chat": Part("Chat with several turns", make_chat, is_chat=True),
}
