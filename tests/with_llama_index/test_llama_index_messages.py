"""LlamaIndex's messages, in a history that any provider's model may have begun, to role and content pairs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llama_index.core.base.llms.types import (
    AudioBlock,
    CacheControl,
    CachePoint,
    ChatMessage,
    CitableBlock,
    CitationBlock,
    DocumentBlock,
    ImageBlock,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
    VideoBlock,
)

from semsharekv_integrations import CallError
from semsharekv_integrations.llama_index import SemShareKVLLM
from semsharekv_integrations.llama_index.messages import translate_messages

TEXT = TextBlock(text="Anna Kelsen.")
ASKED, AGAIN = ChatMessage("Who?"), ChatMessage("Since when?")
CITATION = CitationBlock(cited_content="The mayor.", source="x", title="n", additional_location_info={})
LEFT_OUT = [
    ThinkingBlock(content="Hm.", additional_information={"signature": "x"}),
    ThinkingBlock(content=None),
    CachePoint(cache_control=CacheControl(type="ephemeral")),
    CITATION,
    ToolCallBlock(tool_call_id="1", tool_name="f", tool_kwargs='{"town": '),
]


def answer(*blocks: Any, **more: Any) -> ChatMessage:
    return ChatMessage(role="assistant", blocks=list(blocks), additional_kwargs=more)


@pytest.mark.parametrize("block", LEFT_OUT, ids=lambda block: type(block).__name__)
def test_what_is_no_text_of_an_answer_is_left_out(block: Any) -> None:
    plain = translate_messages([ASKED, answer(TEXT), AGAIN])
    assert translate_messages([ASKED, answer(block, TEXT), AGAIN]) == plain
    assert translate_messages([ASKED, answer(TEXT, block), AGAIN]) == plain
    again = ChatMessage.model_validate(json.loads(answer(block, TEXT).model_dump_json()))
    assert translate_messages([ASKED, again, AGAIN]) == plain, "read from a chat store"
    assert translate_messages([ASKED, answer(block), AGAIN]) == translate_messages([ASKED, AGAIN]), "nothing was said"


@pytest.mark.parametrize(
    "block",
    [
        CitableBlock(title="n", source="x", content="A flood."),
        DocumentBlock(data=b"A flood.", document_mimetype="text/plain"),
        CitableBlock(title="n", source="x", content=[DocumentBlock(data=b"A flood.", document_mimetype="text/html")]),
        CitationBlock(cited_content="A flood.", source="x", title="n", additional_location_info={}),
    ],
    ids=lambda block: type(block).__name__,
)
def test_documents_of_text_are_read(block: Any) -> None:
    assert translate_messages([ChatMessage(blocks=[block])]) == [{"role": "user", "content": "A flood."}]


@pytest.mark.parametrize("role", ["user", "assistant", "system", "tool"])
@pytest.mark.parametrize(
    "block",
    [
        ImageBlock(image=b"x"),
        AudioBlock(audio=b"x"),
        VideoBlock(video=b"x"),
        DocumentBlock(data=b"%PDF", document_mimetype="application/pdf"),
        DocumentBlock(url="https://example.com/a.txt", document_mimetype="text/plain"),
        DocumentBlock(data=b"\xff\xfe\x00", document_mimetype="text/plain"),
        CitableBlock(title="n", source="x", content=[ImageBlock(image=b"x")]),
    ],
    ids=lambda block: type(block).__name__,
)
def test_what_is_no_text_is_refused_by_name(llm: SemShareKVLLM, role: str, block: Any) -> None:
    message = ChatMessage(role=role, blocks=[TEXT, block])
    with pytest.raises(CallError, match=r"messages\[1\]\.blocks\[1\].* is '\w+'; accepted is a text block"):
        llm.chat([ASKED, message])


def test_functions_from_before_tools_are_read() -> None:
    call, result = translate_messages(
        [
            answer(function_call={"name": "f", "arguments": '{"town": "Prorna"}'}),
            ChatMessage("42", role="function", additional_kwargs={"name": "f"}),
        ]
    )
    assert json.loads(call["tool_calls"][0]["function"]["arguments"]) == {"town": "Prorna"}
    assert result["tool_call_id"] == call["tool_calls"][0]["id"] and result["name"] == "f"
    assert translate_messages([answer(TEXT, function_call={"name": "f", "arguments": "{"})]) == translate_messages(
        [answer(TEXT)]
    )


def test_invalid_calls_are_left_out() -> None:
    openai = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}
    good = {"id": "2", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    (message,) = translate_messages([answer(TEXT, tool_calls=[openai, good])])
    assert [call["id"] for call in message["tool_calls"]] == ["2"]


@pytest.mark.parametrize("messages", ["a text", [("user", "Hi")], [{"role": "user", "content": "Hi"}], 5])
def test_what_are_no_messages_is_refused(messages: Any) -> None:
    with pytest.raises(ValueError, match=r"messages(\[0\])? is '\w+'; accepted is a"):
        translate_messages(messages)
