"""Tools and structured output: LlamaIndex's calls in all their forms, and the agents and programs over them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

import pytest
from llama_index.core import Document, PromptTemplate, SummaryIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ToolCallBlock
from llama_index.core.llms import ChatMessage, TextBlock
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from pydantic import BaseModel, Field

from semsharekv_integrations import CallError, SemShareEngine
from semsharekv_integrations.llama_index import SemShareKVLLM, SemShareKVPostprocessor

ASK = ChatMessage(role="user", content="What is the weather in Velmar ?")


class Place(BaseModel):
    """A town and a number of days."""

    town: Literal["Velmar", "Prorna"]
    days: int = Field(ge=1, le=9)


def _forecast(town: str, days: int) -> str:
    return f"Rain in {town} for {days} days ."


FORECAST = FunctionTool.from_defaults(_forecast, name="forecast", description="The weather .", fn_schema=Place)
MAYOR = FunctionTool.from_defaults(lambda town, days: "Anna", name="mayor", description="Who .", fn_schema=Place)
TOOLS = [FORECAST, MAYOR]


@pytest.fixture
def llm(make_engine: Callable[..., SemShareEngine]) -> SemShareKVLLM:
    return SemShareKVLLM(engine=make_engine(max_context_tokens=4096), max_tokens=60, temperature=1.0, seed=7)


async def _all_answers(llm: SemShareKVLLM, **options: Any) -> list[Any]:
    options = {"tools": TOOLS, "user_msg": ASK, **options}
    *_, streamed = llm.stream_chat_with_tools(**options)
    astreamed = [response async for response in await llm.astream_chat_with_tools(**options)]
    return [
        llm.chat_with_tools(**options),
        await llm.achat_with_tools(**options),
        streamed,
        astreamed[-1],
    ]


def _named(llm: SemShareKVLLM, response: Any) -> list[tuple[str, Any]]:
    selections = llm.get_tool_calls_from_response(response, error_on_no_tool_call=False)
    return [(selection.tool_name, selection.tool_kwargs) for selection in selections]


async def test_calls_are_the_same_in_all_forms(llm: SemShareKVLLM) -> None:
    first, *others = await _all_answers(llm, tool_required=True)
    ((name, arguments),) = _named(llm, first)
    assert name in {"forecast", "mayor"} and Place(**arguments)
    assert all(_named(llm, other) == [(name, arguments)] for other in others)
    for response in (first, *others):
        (block,) = response.message.blocks
        (call,) = response.message.additional_kwargs["tool_calls"]
        assert isinstance(block, ToolCallBlock) and block.tool_call_id == call["id"]
        assert (block.tool_name, block.tool_kwargs) == (name, arguments)
        assert call["function"] == {"name": name, "arguments": json.dumps(arguments)}
        assert response.raw["finish_reason"] == "tool_calls"
        assert ChatMessage.model_validate(json.loads(response.message.model_dump_json())) == response.message


@pytest.mark.parametrize("choice", ["mayor", {"type": "function", "function": {"name": "mayor"}}])
def test_a_tool_can_be_chosen(llm: SemShareKVLLM, choice: Any) -> None:
    ((name, _),) = _named(llm, llm.chat_with_tools(TOOLS, "Who ?", tool_choice=choice))
    assert name == "mayor"
    openai = [tool.metadata.to_openai_tool() for tool in TOOLS]
    ((name, _),) = _named(llm, llm.chat([ASK], tools=openai, tool_choice=choice))
    assert name == "mayor"
    answer = llm.chat_with_tools(TOOLS, "Who ?", tool_choice="none", max_tokens=4)
    assert _named(llm, answer) == [] and answer.message.content


def test_bad_tools_are_refused_by_name(llm: SemShareKVLLM) -> None:
    with pytest.raises(ValueError, match=r"tools is \[\]; accepted is at least one to choose from"):
        llm.chat_with_tools([], "Who ?", tool_required=True)
    with pytest.raises(CallError, match="tool_choice is 'cook'"):
        llm.chat_with_tools(TOOLS, "Who ?", tool_choice="cook")
    with pytest.raises(CallError, match=r"tools\[0\] is 'forecast'"):
        llm.chat([ASK], tools=["forecast"])
    with pytest.raises(ValueError, match=r"answer is .*; accepted is one with a tool call"):
        llm.get_tool_calls_from_response(llm.chat([ASK], max_tokens=3))
    with pytest.raises(CallError, match=r"tool_calls is .* accepted is .*function"):
        llm.chat([ASK, ChatMessage(role="assistant", additional_kwargs={"tool_calls": [{"id": "x"}]}), ASK])
    assert llm.chat_with_tools([], "Who ?", max_tokens=3).message.content, "no tools, no calls"


def test_several_calls_only_where_they_are_allowed() -> None:
    from semsharekv_integrations.llama_index.messages import keep_one_call, make_chat_response, read_calls
    from semsharekv_integrations.report import ToolCall

    calls = [ToolCall("1", "forecast", {}), ToolCall("2", "mayor", {})]

    def respond(*answer: Any) -> Any:
        return make_chat_response(*answer, model_name="x")

    assert read_calls(respond("", None, calls, None).message) == calls
    assert read_calls(keep_one_call(respond)("", None, calls, None).message) == calls[:1]


@pytest.mark.parametrize("form", ["blocks", "additional_kwargs", "text arguments"])
def test_calls_and_results_reach_the_model_as_they_are(llm: SemShareKVLLM, form: str) -> None:
    arguments: Any = {"town": "Velmar", "days": 2}
    text = json.dumps(arguments)
    function = {"id": "call_1", "type": "function", "function": {"name": "forecast", "arguments": text}}
    calling = ChatMessage(role="assistant", content="I look .", additional_kwargs={"tool_calls": [function]})
    if form != "additional_kwargs":
        given = arguments if form == "blocks" else text
        block = ToolCallBlock(tool_call_id="call_1", tool_name="forecast", tool_kwargs=given)
        calling = ChatMessage(role="assistant", blocks=[TextBlock(text="I look ."), block])
    result = ChatMessage(role="tool", content="Rain .", additional_kwargs={"tool_call_id": "call_1"})
    answer = llm.chat([ASK, calling, result], tools=TOOLS, tool_choice="none", max_tokens=4)
    plain = llm.engine.generate(
        [
            {"role": "user", "content": ASK.content},
            {"role": "assistant", "content": "I look .", "tool_calls": [function]},
            {"role": "tool", "content": "Rain .", "tool_call_id": "call_1"},
        ],
        tools=[tool.metadata.to_openai_tool() for tool in TOOLS],
        tool_choice="none",
        max_new_tokens=4,
        temperature=1.0,
        seed=7,
        namespace=llm.kv_namespace,
    )
    assert plain.text == answer.message.content
    assert plain.report.prefix_tokens == plain.report.prompt_tokens - 1, "both rendered the same prompt"


def test_tools_run(llm: SemShareKVLLM) -> None:
    answer = llm.predict_and_call([FORECAST], "Rain ?", tool_required=True)
    (source,) = answer.sources
    assert str(answer) == source.content == _forecast(**source.raw_input["kwargs"])
    program = FunctionCallingProgram.from_defaults(Place, prompt_template_str="Where : {text}", llm=llm)
    assert isinstance(program(text="Velmar"), Place)


@pytest.mark.parametrize("streaming", [True, False])
async def test_function_agents_run(llm: SemShareKVLLM, streaming: bool) -> None:
    reports: list[Any] = []
    llm.engine.observe(reports.append)
    agent = FunctionAgent(tools=TOOLS, llm=llm, initial_tool_choice="any", streaming=streaming)
    handler = agent.run("What is the weather in Velmar ?")
    answer = await handler
    (call,) = answer.tool_calls
    assert call.tool_name in {"forecast", "mayor"} and not call.tool_output.is_error
    assert len(reports) == 2 and str(answer)
    first, second = reports
    assert second.prefix_tokens >= first.prompt_tokens - 1, "the turn with the result continues the one with the call"


class News(BaseModel):
    """What happened."""

    place: Place
    closed: list[bool] = Field(min_length=1, max_length=3)


TEMPLATE = PromptTemplate("What happened : {text}")


async def _all_objects(llm: SemShareKVLLM, kind: Any = News) -> list[Any]:
    *_, streamed = llm.stream_structured_predict(kind, TEMPLATE, text="A flood .")
    astream = await llm.astream_structured_predict(kind, TEMPLATE, text="A flood .")
    return [
        llm.structured_predict(kind, TEMPLATE, text="A flood ."),
        await llm.astructured_predict(kind, TEMPLATE, text="A flood ."),
        streamed,
        [partial async for partial in astream][-1],
    ]


@pytest.mark.parametrize("chat", [True, False])
async def test_structured_output_is_what_was_asked_for(make_engine: Callable[..., SemShareEngine], chat: bool) -> None:
    engine = make_engine(max_context_tokens=4096)
    llm = SemShareKVLLM(engine=engine, max_tokens=80, is_chat_model=chat)
    first, *others = await _all_objects(llm)
    assert isinstance(first, News)
    assert all(other == first for other in others)
    assert TEMPLATE.output_parser is None, "the caller's template is as it was"
    by_tool = llm.model_copy(update={"pydantic_program_mode": PydanticProgramMode.DEFAULT})
    if chat:
        first, *others = await _all_objects(by_tool, Place)
        assert isinstance(first, Place) and all(other == first for other in others)
        with pytest.raises(ValueError, match="accepted is a whole Place"):
            list(by_tool.stream_structured_predict(Place, TEMPLATE, {"max_tokens": 3}, text="A flood ."))
    with pytest.raises(ValueError, match="json"):
        llm.structured_predict(News, TEMPLATE, llm_kwargs={"max_tokens": 3}, text="A flood .")
    with pytest.raises(ValueError, match="whole json"):
        list(llm.stream_structured_predict(News, TEMPLATE, llm_kwargs={"stop": ["losed"]}, text="A flood ."))


async def test_structured_llms_answer_in_query_engines(settings: Any) -> None:
    settings.llm = SemShareKVLLM(engine=settings.llm.engine, max_tokens=60)
    structured = settings.llm.as_structured_llm(Place)
    assert isinstance(structured.chat([ASK]).raw, Place)
    assert isinstance((await structured.achat([ASK])).raw, Place)
    assert [response.raw for response in structured.stream_chat([ASK])][-1] == structured.chat([ASK]).raw
    index = SummaryIndex.from_documents([Document(text="Rain in Velmar for days .")])
    told = SemShareKVPostprocessor(llm=settings.llm)
    engine = index.as_query_engine(llm=structured, response_mode="tree_summarize", node_postprocessors=[told])
    assert isinstance(engine.query("Where does it rain ?").response, Place)
    by_class = index.as_query_engine(output_cls=Place, response_mode="compact")
    assert isinstance(by_class.query("Where does it rain ?").response, Place)
