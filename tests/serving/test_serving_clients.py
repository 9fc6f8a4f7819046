"""The clients that people use need nothing but another address: the frameworks' own classes for OpenAI's API."""

from __future__ import annotations

from typing import Literal

import openai
import pytest
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

from running_server import KEYS, RunningServer, Serve

pytestmark = pytest.mark.enable_socket
ASKED = "The mayor of Velmar is Anna Kelsen.\n\nWho is the mayor of Velmar?"


class Place(BaseModel):
    town: str


@tool
def look_up(town: Literal["Velmar"]) -> str:
    """Look a town up."""
    return town


def test_langchains_chat_model_for_openai(trained: RunningServer) -> None:
    model = ChatOpenAI(model="news", base_url=f"{trained.url}/v1", api_key=KEYS[0], max_tokens=16, max_retries=0)
    first, again = model.invoke(ASKED), model.invoke(ASKED)
    assert first.content == again.content and "Kelsen" in str(first.content)
    assert again.usage_metadata["input_token_details"]["cache_read"] == again.usage_metadata["input_tokens"] - 1
    pieces = list(model.stream([HumanMessage(ASKED)], stream_usage=True))
    assert "".join(str(piece.content) for piece in pieces) == first.content
    assert sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata) > 1
    assert [answer.content for answer in model.batch([ASKED, ASKED])] == [first.content] * 2
    with pytest.raises(openai.BadRequestError, match="logprobs"):
        model.invoke(ASKED, logprobs=True)


async def test_langchains_chat_model_without_blocking(trained: RunningServer) -> None:
    model = ChatOpenAI(model="news", base_url=f"{trained.url}/v1", api_key=KEYS[0], max_tokens=16, max_retries=0)
    said = await model.ainvoke(ASKED)
    assert "".join([str(piece.content) async for piece in model.astream(ASKED)]) == said.content


def test_langchains_tools_and_schemas(serve: Serve) -> None:
    server = serve().wait_until_loaded()
    model = ChatOpenAI(model="tiny", base_url=f"{server.url}/v1", api_key=KEYS[0], max_tokens=300, max_retries=0)
    said = model.bind_tools([look_up], tool_choice="required", parallel_tool_calls=False).invoke(ASKED)
    assert [call["name"] for call in said.tool_calls] == ["look_up"]
    schema = {"title": "place", "type": "object", "properties": {"town": {"enum": ["Velmar"]}}, "required": ["town"]}
    for method in ("json_schema", "function_calling"):
        assert model.with_structured_output(schema, method=method).invoke(ASKED) == {"town": "Velmar"}


def test_llama_indexs_model_for_like_servers(trained: RunningServer) -> None:
    url = f"{trained.url}/v1"
    model = OpenAILike(
        model="news", api_base=url, api_key=KEYS[0], is_chat_model=True, max_tokens=16, max_retries=0, temperature=0
    )
    turns = [ChatMessage(role="user", content=ASKED)]
    said = model.chat(turns)
    assert "Kelsen" in str(said.message.content)
    assert said.raw.usage.prompt_tokens_details.cached_tokens >= 0
    assert "".join(str(piece.delta) for piece in model.stream_chat(turns)) == said.message.content
    plain = OpenAILike(model="news", api_base=url, api_key=KEYS[0], is_chat_model=False, max_tokens=8, max_retries=0)
    whole = plain.complete(ASKED).text
    assert "".join(str(piece.delta) for piece in plain.stream_complete(ASKED)) == whole
