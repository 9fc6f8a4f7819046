"""Tools and structured answers: every form that LangChain's callers use reaches the engine, and calls come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any, Literal, TypedDict

import pytest
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage, trim_messages
from langchain_core.tools import tool
from pydantic import BaseModel, Field, create_model

from semsharekv_integrations import GenerationChunk, SemShareEngine, ToolCall
from semsharekv_integrations.frameworks import is_json_text
from semsharekv_integrations.langchain import ChatSemShareKV, SemShareKVLLM
from semsharekv_integrations.langchain.messages import translate_messages

EngineMaker = Callable[..., SemShareEngine]


@tool
def get_news(town: str) -> str:
    """What happened in a town."""
    return f"A flood hit {town}."


class Weather(BaseModel):
    """The weather in a town."""

    town: str = Field(max_length=6)
    days: int = Field(ge=0, le=9)


class Tree(BaseModel):
    """A tree of towns."""

    town: str
    inner: list[Tree]


class WeatherDict(TypedDict):
    """The weather in a town."""

    town: Literal["Velmar", "Prorna"]
    days: Literal[1, 2, 3]


FLOOD = ToolCall("call_1", "get_news", {"town": "Prorna"})
STORM = ToolCall("call_2", "Weather", {"town": "Velmar", "days": 2})


class Scripted:
    """An engine whose answers are given, and which keeps what it was asked for."""

    def __init__(self, engine: SemShareEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self.answers = engine, [[GenerationChunk("yes")]]
        self.prompts: list[Any] = []
        self.options: list[dict[str, Any]] = []
        real = engine.stream

        def stream(prompt: Any, **options: Any) -> Generator[GenerationChunk, None, None]:
            self.prompts.append(prompt)
            self.options.append(options)
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            yield from answer
            *_, last = real("a", max_new_tokens=1)
            calls = tuple(call for chunk in answer for call in chunk.tool_calls)
            reason = "tool_calls" if calls else "stop"
            changed = {**last.generation.__dict__, "tool_calls": calls, "finish_reason": reason}
            yield GenerationChunk("", type(last.generation)(**changed))

        async def astream(prompt: Any, **options: Any) -> AsyncGenerator[GenerationChunk, None]:
            for chunk in stream(prompt, **options):
                yield chunk

        monkeypatch.setattr(engine, "stream", stream)
        monkeypatch.setattr(engine, "astream", astream)


class Heard(BaseCallbackHandler):
    """The tokens that a callback handler is told."""

    text = ""

    def on_llm_new_token(self, token: str, **_: Any) -> None:
        self.text += token


@pytest.fixture
def scripted(make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    return Scripted(make_engine(), monkeypatch)


@pytest.fixture
def chat(scripted: Scripted) -> ChatSemShareKV:
    return ChatSemShareKV(engine=scripted.engine)


@pytest.fixture
def random_chat(make_engine: EngineMaker) -> ChatSemShareKV:
    """Writes whatever it is held to."""
    return ChatSemShareKV(engine=make_engine(), max_tokens=200)


def calls(message: AIMessage) -> list[tuple[str, dict[str, Any], str | None]]:
    return [(call["name"], call["args"], call["id"]) for call in message.tool_calls]


async def test_calls_come_back_however_called(chat: ChatSemShareKV, scripted: Scripted) -> None:
    scripted.answers = [
        [GenerationChunk("I look"), GenerationChunk(".", tool_calls=(FLOOD,)), GenerationChunk("", tool_calls=(STORM,))]
    ]
    bound = chat.bind_tools([get_news, Weather])
    expected = [(call.name, call.arguments, call.id) for call in (FLOOD, STORM)]
    chunks = list(bound.stream("?"))
    streamed: Any = chunks[0]
    for chunk in chunks[1:]:
        streamed += chunk
    for message in (bound.invoke("?"), await bound.ainvoke("?"), streamed):
        assert calls(message) == expected and message.text == "I look."
        assert message.response_metadata["finish_reason"] == "tool_calls"
        assert not message.invalid_tool_calls
    pieces = [piece for chunk in chunks if isinstance(chunk, AIMessageChunk) for piece in chunk.tool_call_chunks]
    assert [(piece["index"], piece["name"], piece["id"]) for piece in pieces] == [
        (0, "get_news", "call_1"),
        (1, "Weather", "call_2"),
    ]
    names = [[tool["function"]["name"] for tool in options["tools"]] for options in scripted.options]
    assert names == [["get_news", "Weather"]] * 3


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ("auto", "auto"),
        ("none", "none"),
        (False, "none"),
        ("any", "any"),
        ("required", "any"),
        (True, "any"),
        ("get_news", "get_news"),
        ({"type": "function", "function": {"name": "get_news"}}, "get_news"),
        ({"type": "tool", "name": "get_news"}, "get_news"),
        ({"type": "any"}, "any"),
    ],
)
def test_tool_choice_in_every_form(chat: ChatSemShareKV, scripted: Scripted, given: Any, expected: str | None) -> None:
    chat.bind_tools([get_news], tool_choice=given).invoke("?")
    chat.bind_tools([get_news]).invoke("?", tool_choice=given)
    assert [options["tool_choice"] for options in scripted.options] == [expected] * 2


@pytest.mark.parametrize("given", [3, {"type": "function", "function": {}}, {"function": 3}, {"name": 3}, "nobody"])
def test_bad_tool_choices_are_named(random_chat: ChatSemShareKV, given: Any) -> None:
    with pytest.raises(ValueError, match="tool_choice is"):
        random_chat.bind_tools([get_news], tool_choice=given).invoke("?")


@pytest.mark.parametrize("choice", ["any", "Weather"])
async def test_a_model_that_must_call_does(random_chat: ChatSemShareKV, choice: str) -> None:
    bound = random_chat.bind_tools([Weather], tool_choice=choice, strict=True)
    for message in (bound.invoke("?"), await bound.ainvoke("?")):
        ((name, arguments, call_id),) = calls(message)
        assert name == "Weather" and call_id and Weather(**arguments)
        assert message.response_metadata["finish_reason"] == "tool_calls"


def test_no_tools_are_no_tools(chat: ChatSemShareKV, scripted: Scripted) -> None:
    chat.bind_tools([]).invoke("?")
    chat.bind_tools([], tool_choice="auto").invoke("?")
    assert all(options["tools"] is options["tool_choice"] is None for options in scripted.options)


def test_plain_llms_take_no_tools(make_engine: EngineMaker) -> None:
    with pytest.raises(ValueError, match="tools"):
        SemShareKVLLM(engine=make_engine()).invoke("?", tools=[{}])


def test_messages_with_calls_and_results() -> None:
    call = {"name": "get_news", "args": {"town": "Prorna"}, "id": "1", "type": "tool_call"}
    asked = AIMessage([{"type": "text", "text": "a"}, {"type": "tool_use", "id": "1"}, call], tool_calls=[call])
    done = ToolMessage("A flood .", tool_call_id="1", name="get_news", artifact=["x"])
    function = {"name": "get_news", "arguments": {"town": "Prorna"}}
    assert translate_messages([HumanMessage("?"), asked, done, AIMessage("b"), AIMessage("c")]) == [
        {"role": "user", "content": "?"},
        {
            "role": "assistant",
            "content": "a",
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "A flood .", "tool_call_id": "1", "name": "get_news"},
        {"role": "assistant", "content": "b\n\nc"},
    ]


def test_calls_stay_apart_from_other_turns() -> None:
    call = {"name": "get_news", "args": {}, "id": "1", "type": "tool_call"}
    assert len(translate_messages([AIMessage("a"), AIMessage("", tool_calls=[call]), AIMessage("b")])) == 3


@pytest.mark.parametrize("block", [{"type": "tool_use", "id": "1"}, {"type": "tool_call", "name": "a"}])
def test_call_blocks_without_their_call_are_refused(block: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="type is 'tool_"):
        translate_messages([AIMessage([block])])


@pytest.mark.parametrize("method", ["json_schema", "json_mode", "function_calling"])
@pytest.mark.parametrize("schema", [Weather, WeatherDict, Weather.model_json_schema()], ids=["class", "dict", "json"])
async def test_structured_answers(random_chat: ChatSemShareKV, schema: Any, method: Any) -> None:
    structured = random_chat.with_structured_output(schema, method=method, include_raw=True)
    for result in (structured.invoke("Weather ?"), await structured.ainvoke("Weather ?")):
        assert result["raw"].response_metadata["kv_cache"] and result["parsing_error"] is None
        assert isinstance(result["parsed"], Weather if schema is Weather else dict)
        assert Weather.model_validate(result["parsed"])


def test_structured_streams_end_with_the_whole(random_chat: ChatSemShareKV) -> None:
    structured = random_chat.with_structured_output(Weather)
    *_, last = structured.stream("Weather ?")
    assert last == structured.invoke("Weather ?")


def test_no_part_of_a_schema_is_lost(chat: ChatSemShareKV, scripted: Scripted) -> None:
    def ask(given: Any) -> list[Any]:
        """The schemas that text and the arguments of a call are held to."""
        for method in ("json_schema", "function_calling"):
            chat.with_structured_output(given, method=method, include_raw=True).invoke("?")  # type: ignore[arg-type]
        text, call = scripted.options[-2:]
        return [text["json_schema"], call["tools"][0]["function"]["parameters"]]

    own, named = Weather.model_json_schema(), {"name": "Weather", "schema": Weather.model_json_schema()}
    referring = {"title": "Weather", "$ref": "#/$defs/w", "$defs": {"w": own}}
    for form in (own, named, {"type": "json_schema", "json_schema": named}, referring):
        assert all(held["properties"] == own["properties"] and held["required"] for held in ask(form))
    for form in (Tree, Tree.model_json_schema()):
        for held in ask(form):
            assert held["properties"]["inner"]["items"] == {"$ref": "#/$defs/Tree"} and "Tree" in held["$defs"]
    chat.bind_tools([tool(lambda tree: "", args_schema=create_model("Plant", tree=Tree), description="a")]).invoke("?")
    assert "Tree" in scripted.options[-1]["tools"][0]["function"]["parameters"]["$defs"]
    towns = {"type": "array", "items": {"enum": ["Velmar"]}}
    chat.with_structured_output(towns, include_raw=True).invoke("?")
    assert scripted.options[-1]["json_schema"] == towns
    with pytest.raises(ValueError, match="title of a JSON schema is None"):
        chat.bind_tools([towns])


def test_counted_tokens_are_those_of_the_prompt(random_chat: ChatSemShareKV) -> None:
    call = {"name": "get_news", "args": {"town": "Prorna"}, "id": "1", "type": "tool_call"}
    talk = [SystemMessage("Be brief."), HumanMessage("?"), AIMessage("", tool_calls=[call])]
    talk += [ToolMessage("A flood.", tool_call_id="1"), HumanMessage("Where?")]
    count = random_chat.get_num_tokens_from_messages
    for length, tools in ((2, []), (5, []), (2, [get_news])):
        answer = random_chat.bind_tools(tools, max_tokens=1).invoke(talk[:length])
        assert answer.usage_metadata and answer.usage_metadata["input_tokens"] == count(talk[:length], tools)
    kept = trim_messages(talk * 9, max_tokens=2 * count(talk), token_counter=random_chat, start_on="human")
    assert count(talk) / 2 < count(kept) <= 2 * count(talk) and count([]) == 0


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_answers_that_were_cut_are_refused(make_engine: EngineMaker, method: Any) -> None:
    structured = ChatSemShareKV(engine=make_engine(), max_tokens=5).with_structured_output(Weather, method=method)
    with pytest.raises(OutputParserException, match="max_tokens is too small"):
        structured.invoke("Weather ?")
    with pytest.raises(OutputParserException, match="max_tokens is too small"):
        list(structured.stream("Weather ?"))
    stopping = ChatSemShareKV(engine=structured.first.bound.engine, max_tokens=200, stop=["own"])  # type: ignore[attr-defined]
    structured = stopping.with_structured_output(WeatherDict, method=method)
    if method == "function_calling":  # in a call, stop strings mean nothing
        assert structured.invoke("Weather ?")
        return
    for ask in (structured.invoke, lambda text: list(structured.stream(text))):
        with pytest.raises(OutputParserException, match="a stop string ended the answer"):
            ask("Weather ?")


def test_bad_structures_are_named(chat: ChatSemShareKV) -> None:
    with pytest.raises(ValueError, match="method is 'xml'; accepted is 'json_schema' or"):
        chat.with_structured_output(Weather, method="xml")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="schema is None"):
        chat.with_structured_output(None)
    with pytest.raises(ValueError, match=r"response_format is .*'xml'.*accepted is None, or type 'text'"):
        chat.invoke("?", response_format={"type": "xml"})


def test_answer_formats_in_openais_form(chat: ChatSemShareKV, scripted: Scripted) -> None:
    schema = Weather.model_json_schema()
    for form in (
        {"type": "json_schema", "json_schema": {"name": "w", "schema": schema}},
        {"type": "json_object"},
        {"type": "text"},
    ):
        chat.invoke("?", response_format=form)
    assert [options["json_schema"] for options in scripted.options] == [schema, {"type": "object"}, None]


def test_an_agent_with_tools_and_an_answer_format(chat: ChatSemShareKV, scripted: Scripted) -> None:
    """The model may call the tool or give the answer, which then is text and not a call."""
    scripted.answers = [
        [GenerationChunk("", tool_calls=(FLOOD,))],
        [GenerationChunk("", tool_calls=(ToolCall("call_3", "final_answer", {"town": "Prorna", "days": 3}),))],
    ]
    agent = create_agent(chat, [get_news], response_format=Weather, system_prompt="Be brief.")
    heard = Heard()
    done = agent.invoke({"messages": [("user", "?")]}, {"recursion_limit": 10, "callbacks": [heard]})
    assert done["structured_response"] == Weather(town="Prorna", days=3)
    result, answer = done["messages"][-2:]
    assert result.content == "A flood hit Prorna." and answer.text == '{"town": "Prorna", "days": 3}' == heard.text
    assert answer.response_metadata["finish_reason"] == "stop" and not answer.tool_calls
    assert all(options["tool_choice"] == "any" and len(options["tools"]) == 2 for options in scripted.options)
    assert scripted.prompts[0][0] == {"role": "system", "content": "Be brief."}
    assert [message["role"] for message in scripted.prompts[1]] == ["system", "user", "assistant", "tool"]


def test_an_agents_thread_and_artifacts_reach_the_engine(chat: ChatSemShareKV, scripted: Scripted) -> None:
    @tool(response_format="content_and_artifact")
    def find(town: str) -> tuple[str, Any]:
        """Find reports."""
        return f"Source 1\nA flood hit {town} .", [Document(f"A flood hit {town} .", id="flood"), Document("no")]

    scripted.answers = [[GenerationChunk("", tool_calls=(ToolCall("1", "find", {"town": "Prorna"}),))], []]
    agent = create_agent(chat, [find])
    config: Any = {"configurable": {"thread_id": "t", "namespace": "n"}, "recursion_limit": 10}
    agent.invoke({"messages": [("user", "?")]}, config)
    last = scripted.options[-1]
    assert last["documents"] == {"flood": "A flood hit Prorna ."}
    assert (last["session"], last["namespace"]) == ("t", "n")


def test_profiles_say_what_the_model_can(chat: ChatSemShareKV) -> None:
    assert chat.profile is not None
    assert chat.profile["tool_calling"] and chat.profile["tool_choice"] and chat.profile["structured_output"]


def test_tools_are_part_of_the_question(chat: ChatSemShareKV, scripted: Scripted) -> None:
    cached = chat.model_copy(update={"cache": InMemoryCache()})
    for model in (cached, cached.bind_tools([get_news]), cached.bind_tools([get_news], tool_choice="none")):
        model.invoke([SystemMessage("a"), HumanMessage("b")])
        model.invoke([SystemMessage("a"), HumanMessage("b")])
    assert len(scripted.options) == 3
    asyncio.run(cached.bind_tools([get_news]).ainvoke([SystemMessage("a"), HumanMessage("b")]))
    assert len(scripted.options) == 3


def test_an_answer_that_is_no_json_is_told_whatever_stands_in_it() -> None:
    assert [is_json_text(text) for text in ("{}", "{", "[" * 100_000, "")] == [True, False, False, False]
