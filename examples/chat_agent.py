"""An agent that chats about news and remembers the conversation: LangChain's ``create_agent`` with a checkpointer.

An instruct model looks for articles by itself, with a tool. The model that ships has not learnt to call tools: for it
the articles are retrieved first, at each turn, and stand before the conversation.

    python examples/chat_agent.py --chat
    python examples/chat_agent.py --model Qwen/Qwen2.5-0.5B-Instruct

Needs ``pip install -e ".[agents]"``.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

from langchain.agents import AgentState, create_agent
from langchain.agents.middleware import ModelRequest, before_model, dynamic_prompt
from langchain_core.documents import Document
from langchain_core.tools import tool
from langgraph.checkpoint.memory import MemorySaver

from reuse_table import REFERENCE_MODEL, ReuseTable, model_arguments, run
from semsharekv_integrations import SemShareEngine, world
from semsharekv_integrations.langchain import ChatSemShareKV, SemShareKVMiddleware

NEWS = world.make_documents(Random(5), 8)
ARTICLES = [Document(article.text, id=article.town) for article in NEWS]


@tool(response_format="content_and_artifact")
def search(question: str) -> tuple[str, list[Document]]:
    """Find news articles that answer a question."""
    words = set(re.findall(r"\w+", question.lower()))  # in your code, any retriever
    shared = {article.id: len(words & set(re.findall(r"\w+", article.page_content.lower()))) for article in ARTICLES}
    found = sorted(ARTICLES, key=lambda article: -shared[article.id])[:4]
    return "\n\n".join(article.page_content for article in found), found  # the model sees where the documents end


class Retrieved(AgentState):
    """The state of an agent with articles retrieved for it: the middleware tells the model where they end."""

    text: str
    articles: list[Document]


@before_model(state_schema=Retrieved)
def retrieve_first(state: Any, runtime: Any) -> dict[str, Any]:
    text, articles = search.func(state["messages"][-1].text)
    return {"text": text, "articles": articles}


@dynamic_prompt
def with_articles(request: ModelRequest) -> str:
    return f"You are a helpful assistant. Use these documents:\n\n{request.state['text']}"


def agent(engine: SemShareEngine, *, tools: bool) -> Callable[[str], str]:
    """One conversation; in your code, ``ChatSemShareKV(model="...")`` makes the engine by itself."""
    model, memory = ChatSemShareKV(engine=engine), MemorySaver()
    if tools:
        made = create_agent(model, [search], middleware=[SemShareKVMiddleware()], checkpointer=memory)
    else:
        made = create_agent(
            model, [], middleware=[retrieve_first, with_articles, SemShareKVMiddleware()], checkpointer=memory
        )
    thread: Any = {"configurable": {"thread_id": "chat"}}
    return lambda text: made.invoke({"messages": [("human", text)]}, thread)["messages"][-1].text


def typed() -> Iterator[str]:
    """What is typed, until the input ends."""
    print(f"Ask about {', '.join(article.town for article in NEWS)}, such as: {world.ask(Random(5), NEWS[0])[0]}")
    while True:
        try:
            if text := input("you: ").strip():
                yield text
        except (EOFError, KeyboardInterrupt):
            return


def main(argv: Sequence[str] | None = None) -> ReuseTable:
    parser = model_arguments(__doc__)
    parser.add_argument("--chat", action="store_true", help="read questions from the terminal, until it is closed")
    args = parser.parse_args(argv)
    table = ReuseTable(args.model, args.mode)
    tools = args.model != REFERENCE_MODEL
    reusing, in_full = (agent(engine, tools=tools) for engine in (table.engine, table.full))
    for question in typed() if args.chat else [question for question, _ in world.converse(Random(5), NEWS, 5)]:
        asked = table.ask(question, reusing, in_full, question)
        if args.chat:
            print(f"agent: {asked.answer}")
    table.show()
    return table


if __name__ == "__main__":
    run(main)
