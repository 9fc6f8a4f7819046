"""LangChain messages to role and content pairs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from langchain_core.load import dumpd, load
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    HumanMessageChunk,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)

from semsharekv_integrations.langchain.messages import translate_messages


def pairs(*messages: BaseMessage) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in translate_messages(messages)]


def test_every_kind_has_its_role() -> None:
    assert pairs(
        SystemMessage("s"), HumanMessage("h"), AIMessage("a"), ToolMessage("t", tool_call_id="1"), AIMessageChunk("c")
    ) == [("system", "s"), ("user", "h"), ("assistant", "a"), ("tool", "t"), ("assistant", "c")]


@pytest.mark.parametrize(
    ("given", "expected"), [("human", "user"), ("ai", "assistant"), ("developer", "developer"), ("function", "tool")]
)
def test_chat_messages_bring_their_role(given: str, expected: str) -> None:
    assert pairs(ChatMessage("x", role=given)) == [(expected, "x")]


def test_consecutive_turns_of_one_role_become_one() -> None:
    merged = pairs(HumanMessage("a"), HumanMessage("b"), AIMessage("c"), AIMessage("d"), HumanMessage("e"))
    assert merged == [("user", "a\n\nb"), ("assistant", "c\n\nd"), ("user", "e")]


def test_tool_results_stay_apart() -> None:
    assert len(pairs(ToolMessage("a", tool_call_id="1"), ToolMessage("b", tool_call_id="2"))) == 2


def test_text_blocks_are_joined_as_they_are() -> None:
    blocks: list[Any] = [
        {"type": "text", "text": "a ", "cache_control": {"type": "ephemeral"}},
        "b ",
        {"type": "text-plain", "text": "c", "mime_type": "text/plain"},
    ]
    assert pairs(HumanMessage(blocks)) == [("user", "a b c")]


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        {"type": "image", "base64": "AAAA", "mime_type": "image/png"},
        {"type": "audio", "base64": "AAAA", "mime_type": "audio/wav"},
        {"type": "text-plain", "base64": "AAAA", "mime_type": "text/plain"},
        {"text": "of no type"},
    ],
)
def test_anything_but_text_is_refused(block: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"messages\[1\].content\[1\].type is .*; accepted is 'text'"):
        translate_messages([SystemMessage("s"), HumanMessage(["look:", block])])


def test_unknown_messages_are_refused() -> None:
    with pytest.raises(ValueError, match=r"messages\[0\] is 'RemoveMessage'"):
        translate_messages([RemoveMessage("x")])


def test_messages_are_left_as_they_were() -> None:
    given = [HumanMessage("a"), HumanMessage("b")]
    translate_messages(given)
    assert given == [HumanMessage("a"), HumanMessage("b")]


TEXT = {"type": "text", "text": "Anna Kelsen."}
CALL = {"name": "f", "args": {"town": "Prorna"}, "id": "1", "type": "tool_call"}
LEFT_OUT: list[dict[str, Any]] = [
    {"type": "thinking", "thinking": "Hm.", "signature": "x"},
    {"type": "redacted_thinking", "data": "x"},
    {"type": "reasoning", "reasoning": "Hm."},
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}], "encrypted_content": "x"},
    {"type": "reasoning_content", "reasoning_content": {"text": "Hm.", "signature": "x"}},
    {"type": "non_standard", "value": {"type": "thinking", "thinking": "Hm."}},
    {"type": "non_standard", "value": {"executed": True}},
    {"type": "server_tool_use", "id": "2", "name": "web_search", "input": {"query": "mayor"}},
    {"type": "server_tool_call", "id": "2", "name": "web_search", "args": {"query": "mayor"}},
    {"type": "server_tool_result", "tool_call_id": "2", "status": "success", "output": {}},
    {"type": "web_search_tool_result", "tool_use_id": "2", "content": [{"type": "web_search_result", "url": "x"}]},
    {"type": "file_search_call", "id": "2", "queries": ["mayor"], "status": "completed"},
    {"type": "code_interpreter_call", "id": "2", "code": "1", "outputs": []},
    {"type": "executable_code", "executable_code": "1", "language": "PYTHON"},
    {"type": "mcp_call", "id": "2", "name": "f", "arguments": "{}", "server_label": "x"},
    {"type": "invalid_tool_call", "name": "f", "args": "{", "id": "1", "error": "cut"},
    {"type": "tool_call_chunk", "name": "f", "args": "{", "id": "1", "index": 0},
    {"type": "function_call", "name": "f", "arguments": "{", "call_id": "1"},
    {"type": "something_new", "payload": 1},
    {"cachePoint": {"type": "default"}},
]


@pytest.mark.parametrize("block", LEFT_OUT, ids=lambda block: str(block.get("type")))
def test_what_is_no_text_of_an_answer_is_left_out(block: dict[str, Any]) -> None:
    asked, again = HumanMessage("Who?"), HumanMessage("Since when?")
    plain = translate_messages([asked, AIMessage("Anna Kelsen."), again])
    for content in ([block, TEXT], [TEXT, block]):
        assert translate_messages([asked, AIMessage(content), again]) == plain
        assert translate_messages([asked, AIMessageChunk(content), again]) == plain
    assert translate_messages([asked, AIMessage([block]), again]) == translate_messages([asked, again]), (
        "nothing was said"
    )


@pytest.mark.parametrize(
    "block",
    [
        {"type": "refusal", "refusal": "No."},
        {"type": "output_text", "text": "No.", "annotations": [{"type": "url_citation", "url": "x"}]},
        {"type": "text", "text": "No.", "citations": [{"type": "char_location", "cited_text": "x"}], "index": 0},
        {"type": "non_standard", "value": {"type": "text", "text": "No."}},
        {"text": "No."},
    ],
    ids=lambda block: str(block.get("type")),
)
def test_what_an_answer_says_is_read(block: dict[str, Any]) -> None:
    assert pairs(AIMessage([block])) == [("assistant", "No.")]


@pytest.mark.parametrize(
    "block",
    [
        {"type": "input_text", "text": "A flood."},
        {"type": "file", "source_type": "text", "text": "A flood.", "mime_type": "text/plain"},
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "A flood."}, "title": "n"},
        {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "A flood."}]}},
        {"type": "search_result", "source": "x", "title": "n", "content": [{"type": "text", "text": "A flood."}]},
    ],
    ids=lambda block: str(block["type"]),
)
def test_documents_of_text_are_read(block: dict[str, Any]) -> None:
    assert pairs(HumanMessage([block])) == [("user", "A flood.")]
    assert pairs(ToolMessage([block], tool_call_id="1")) == [("tool", "A flood.")]


@pytest.mark.parametrize("role", [HumanMessage, AIMessage, SystemMessage])
@pytest.mark.parametrize("kind", ["image", "image_url", "input_image", "audio", "video", "file", "document", "media"])
def test_media_are_refused_in_every_message(role: Any, kind: str) -> None:
    for block in ({"type": kind, "url": "x"}, {"type": "non_standard", "value": {"type": kind, "url": "x"}}):
        with pytest.raises(ValueError, match=rf"messages\[0\].content\[1\].*type is '{kind}'; accepted is 'text'"):
            translate_messages([role([TEXT, block])])


@pytest.mark.parametrize(
    "block",
    [
        {"type": "tool_call", "name": "f", "args": {"town": "Prorna"}, "id": "1"},
        {"type": "tool_use", "name": "f", "input": {"town": "Prorna"}, "id": "1"},
        {"type": "function_call", "name": "f", "arguments": json.dumps({"town": "Prorna"}), "call_id": "1", "id": "fc"},
    ],
    ids=lambda block: str(block["type"]),
)
def test_calls_count_once_wherever_they_stand(block: dict[str, Any]) -> None:
    done = ToolMessage("42", tool_call_id="1")
    expected = translate_messages([AIMessage("", tool_calls=[CALL]), done])
    assert translate_messages([AIMessage([block], tool_calls=[CALL]), done]) == expected
    for content in ([block], [{"type": "thinking", "thinking": "Hm."}, block]):
        assert translate_messages([AIMessage(content), done]) == expected


def test_functions_from_before_tools_are_read() -> None:
    function = {"name": "f", "arguments": json.dumps({"town": "Prorna"})}
    call, result = translate_messages(
        [AIMessage("", additional_kwargs={"function_call": function}), FunctionMessage("42", name="f")]
    )
    assert call["tool_calls"][0]["function"] == {"name": "f", "arguments": {"town": "Prorna"}}
    assert result == {"role": "tool", "content": "42", "name": "f", "tool_call_id": call["tool_calls"][0]["id"]}
    cut = AIMessage("Hm.", additional_kwargs={"function_call": {"name": "f", "arguments": "{"}})
    assert translate_messages([cut]) == [{"role": "assistant", "content": "Hm."}]


@pytest.mark.parametrize(
    "block",
    [
        {"type": "tool_result", "tool_use_id": "1", "content": "42"},
        {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "42"}]},
        {"type": "function_call_output", "call_id": "1", "output": "42"},
    ],
)
def test_results_in_users_messages_are_those_of_tools(block: dict[str, Any]) -> None:
    asked = AIMessage("", tool_calls=[CALL])
    expected = translate_messages([asked, ToolMessage("42", tool_call_id="1"), HumanMessage("Thanks.")])
    assert translate_messages([asked, HumanMessage([block, {"type": "text", "text": "Thanks."}])]) == expected
    assert translate_messages([asked, HumanMessage([block])]) == expected[:2]


def test_invalid_calls_are_left_out() -> None:
    invalid = [{"name": "f", "args": "{", "id": "1", "error": "cut", "type": "invalid_tool_call"}]
    assert translate_messages([AIMessage("Hm.", invalid_tool_calls=invalid)]) == [
        {"role": "assistant", "content": "Hm."}
    ]
    openai = {"tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}]}
    assert translate_messages([AIMessage("Hm.", additional_kwargs=openai)]) == [{"role": "assistant", "content": "Hm."}]
    assert (
        len(translate_messages([AIMessage("", invalid_tool_calls=invalid), ToolMessage("Bad", tool_call_id="1")])) == 2
    )


def test_a_history_read_from_disk_is_the_same() -> None:
    history: list[BaseMessage] = [
        SystemMessage("s"),
        HumanMessageChunk("h"),
        AIMessage([*LEFT_OUT[:3], TEXT], tool_calls=[CALL]),
        ToolMessage("42", tool_call_id="1", artifact=["x"]),
        ChatMessage("x", role="developer"),
    ]
    again = load(json.loads(json.dumps(dumpd(history))), allowed_objects="all")
    assert translate_messages(again) == translate_messages(history)
