"""The LLM inside LlamaIndex's own query engines, chat engines, programs and agents, offline."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from llama_index.core import Document, SummaryIndex
from llama_index.core.agent.workflow import ReActAgent
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine, SimpleChatEngine
from llama_index.core.output_parsers import PydanticOutputParser
from llama_index.core.program import LLMTextCompletionProgram
from pydantic import BaseModel

from semsharekv_integrations import SemShareEngine
from semsharekv_integrations.llama_index import SemShareKVLLM

TOWNS = ("Velmar", "Hexvia", "Cenro", "Dora")
FACTS = [f"In {town} , the mayor said that the bridge was closed ." for town in TOWNS]
DOCUMENTS = [Document(text=fact + " Reporters saw it ." * 70) for fact in FACTS]


@pytest.fixture
def calls(settings: Any) -> Any:
    """The responses of all LLM calls so far, as a function."""
    handler = LlamaDebugHandler(print_trace_on_end=False)
    settings.callback_manager = CallbackManager([handler])

    def responses() -> list[Any]:
        ends = [end.payload or {} for _, end in handler.get_event_pairs(CBEventType.LLM)]
        return [end.get(EventPayload.RESPONSE) or end.get(EventPayload.COMPLETION) for end in ends]

    return responses


@pytest.mark.parametrize("mode", ["compact", "tree_summarize", "refine"])
async def test_query_engines_answer(calls: Any, mode: Any) -> None:
    index = SummaryIndex.from_documents(DOCUMENTS)
    engine = index.as_query_engine(response_mode=mode)
    answer = str(engine.query("What was closed ?"))
    first = calls()
    assert answer and answer == first[-1].message.content
    assert len(first) > 1, "the documents do not fit one prompt"
    window = 1024
    assert all(call.raw["usage"]["total_tokens"] <= window for call in first)

    assert str(await engine.aquery("What was closed ?")) == answer
    repeated = calls()[len(first) :]
    assert all(call.raw["kv_cache"]["prefix_tokens"] == call.raw["usage"]["prompt_tokens"] - 1 for call in repeated)
    assert sorted(call.message.content for call in repeated) == sorted(call.message.content for call in first)


async def test_query_engines_stream(settings: Any) -> None:
    index = SummaryIndex.from_documents(DOCUMENTS[:1])
    whole = str(index.as_query_engine().query("What was closed ?"))
    engine = index.as_query_engine(streaming=True)
    assert "".join(engine.query("What was closed ?").response_gen) == whole
    streamed = await engine.aquery("What was closed ?")
    assert "".join([text async for text in streamed.response_gen]) == whole


def test_a_system_prompt_is_merged_with_the_template_s_own(settings: Any) -> None:
    settings.llm.system_prompt = "You write news ."
    index = SummaryIndex.from_documents(DOCUMENTS[:1])
    assert str(index.as_query_engine(response_mode="tree_summarize").query("What was closed ?"))


@pytest.mark.parametrize("engine_class", [SimpleChatEngine, ContextChatEngine, CondensePlusContextChatEngine])
async def test_chat_engines_converse(calls: Any, engine_class: Any) -> None:
    retriever = SummaryIndex.from_documents([Document(text=fact) for fact in FACTS]).as_retriever()
    engine = engine_class.from_defaults(**({} if engine_class is SimpleChatEngine else {"retriever": retriever}))
    first = engine.chat("What was closed ?")
    second = await engine.achat("Who said so ?")
    third = engine.stream_chat("And then ?")
    assert "".join(third.response_gen) == calls()[-1].message.content
    fourth = await engine.astream_chat("Is it so ?")
    assert "".join([text async for text in fourth.async_response_gen()]) == calls()[-1].message.content
    assert [message.role.value for message in engine.chat_history] == ["user", "assistant"] * 4
    assert engine.chat_history[1].content == str(first)
    assert engine.chat_history[3].content == str(second)

    chats = [call.raw for call in calls() if hasattr(call, "message")]
    assert len(chats) == 4
    for earlier, later in pairwise(chats):  # chat engines strip streamed replies, so only prompts surely recur
        assert later["kv_cache"]["prefix_tokens"] >= earlier["usage"]["prompt_tokens"] - 1, "documents and history"


class _Fact(BaseModel):
    town: str


async def test_structured_programs_reach_the_model(calls: Any, settings: Any) -> None:
    parser = PydanticOutputParser(output_cls=_Fact)
    program = LLMTextCompletionProgram.from_defaults(
        output_parser=parser, prompt_template_str="Which town : {text}", llm=settings.llm
    )
    with pytest.raises(ValueError, match="Could not extract json"):  # a random model writes no JSON
        program(text="Velmar", llm_kwargs={"max_tokens": 3})
    with pytest.raises(ValueError, match="Could not extract json"):
        await program.acall(text="Velmar", llm_kwargs={"max_tokens": 3})
    assert [call.raw["usage"]["completion_tokens"] for call in calls()] == [3, 3]


async def test_agents_run(calls: Any, settings: Any, make_engine: Callable[..., SemShareEngine]) -> None:
    def mayor(town: str) -> str:
        """Who is mayor."""
        return f"Anna of {town}"

    settings.llm = SemShareKVLLM(engine=make_engine(max_context_tokens=4096), max_tokens=5)
    agent = ReActAgent(tools=[mayor], llm=settings.llm)
    answer = await agent.run("Who is mayor of Velmar ?")
    assert calls(), "the agent asked the model"
    assert str(answer) == calls()[-1].message.content
