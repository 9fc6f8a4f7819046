"""Answers over HTTP are the engine's own, whole and streamed, and say what was reused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from running_server import KEYS, RunningServer, Serve
from semsharekv_integrations import SemShareEngine
from semsharekv_integrations.report import GenerationChunk
from semsharekv_integrations.serving.answers import Form

pytestmark = pytest.mark.enable_socket
ARTICLES = [
    "The mayor of Velmar is Anna Kelsen. The schools open again on Monday, and the shops stay shut.",
    "In Osteck the bridge cost 17 million crowns. It was opened in the morning by the mayor.",
]
QUESTION = "Who is the mayor of Velmar?"


def ask(*articles: str, question: str = QUESTION) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "\n\n".join([*articles, question])}]


def test_an_answer_is_the_engines_own_and_what_was_sent_before_is_not_computed_again(trained: RunningServer) -> None:
    alone = SemShareEngine.from_pretrained("semsharekv/reference")
    client = trained.connect()
    messages = ask(*ARTICLES)
    first, again = (client.chat.completions.create(model="news", messages=messages, max_tokens=24) for _ in range(2))
    wanted = alone.generate(messages, max_new_tokens=24)
    assert first.choices[0].message.content == again.choices[0].message.content == wanted.text
    assert first.choices[0].finish_reason == wanted.finish_reason
    assert first.usage.prompt_tokens == wanted.report.prompt_tokens
    assert first.usage.completion_tokens == len(wanted.token_ids)
    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1
    assert again.kv_cache["prefix_tokens"] == again.usage.prompt_tokens - 1


def test_moved_documents_are_reused_and_named(trained: RunningServer) -> None:
    client = trained.connect()
    client.chat.completions.create(model="news", messages=ask(*ARTICLES), max_tokens=1)
    parts = [{"type": "text", "text": text} for text in (*reversed(ARTICLES), QUESTION)]
    in_parts = client.chat.completions.create(model="news", messages=[{"role": "user", "content": parts}], max_tokens=1)
    named = {"documents": [{"id": "velmar", "text": ARTICLES[0]}, {"id": "osteck", "text": ARTICLES[1]}]}
    by_name = client.chat.completions.create(
        model="news", messages=ask(*reversed(ARTICLES)), max_tokens=1, extra_body=named
    )
    assert len(in_parts.kv_cache["documents"]) == 3
    assert {document["document_id"] for document in by_name.kv_cache["documents"]} >= {"velmar", "osteck"}
    for answer in (in_parts, by_name):
        assert answer.usage.prompt_tokens_details.cached_tokens > 0.3 * answer.usage.prompt_tokens


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_a_stream_says_what_the_whole_answer_says(trained: RunningServer, kind: str) -> None:
    client, asked = trained.connect(), ask(ARTICLES[0])
    create: Any = client.chat.completions.create if kind == "chat" else client.completions.create
    given: dict[str, Any] = {"messages": asked} if kind == "chat" else {"prompt": asked[0]["content"]}
    given |= {"model": "news", "max_tokens": 16}
    whole = create(**given)
    chunks = list(create(**given, stream=True, stream_options={"include_usage": True}))
    *pieces, last, usage = chunks

    def read(choice: Any) -> str:
        return (choice.delta.content or "") if kind == "chat" else choice.text

    text = whole.choices[0].message.content if kind == "chat" else whole.choices[0].text
    assert "".join(read(chunk.choices[0]) for chunk in (*pieces, last)) == text
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.choices[0].finish_reason is None and chunk.usage is None for chunk in pieces)
    assert usage.choices == [] and usage.usage.completion_tokens == whole.usage.completion_tokens
    assert last.kv_cache["output_tokens"] == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in create(**given, stream=True)), "only where it is asked for"


def test_an_event_is_one_line_whatever_the_answer_says() -> None:
    """Clients that cut lines as Python does would else read half of it."""
    said = "one\x85two\u2028three\u2029four\nfive"
    (_, event) = Form(is_chat=True, model="m").begin(with_usage=False).tell(GenerationChunk(said))
    line, end = event.splitlines()
    assert end == "" and json.loads(line.removeprefix("data: "))["choices"][0]["delta"] == {"content": said}


def test_a_session_goes_on_by_its_key(trained: RunningServer) -> None:
    client = trained.connect()
    turn = ask(ARTICLES[1], question="Where is the bridge?")
    said = client.chat.completions.create(model="news", messages=turn, max_tokens=8, prompt_cache_key="talk")
    turns = [*turn, said.choices[0].message.model_dump(), {"role": "user", "content": "And who opened it?"}]
    again = client.chat.completions.create(model="news", messages=turns, max_tokens=8, prompt_cache_key="talk")
    assert again.usage.prompt_tokens_details.cached_tokens >= said.usage.prompt_tokens - 1


TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a town up.",
        "parameters": {"type": "object", "properties": {"town": {"enum": ["Velmar", "Osteck"]}}, "required": ["town"]},
    },
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look_up"}}])
def test_a_tool_that_must_be_called_is_called_whole_and_streamed(serve: Serve, choice: Any) -> None:
    client = serve().wait_until_loaded().connect()
    given: dict[str, Any] = {"model": "tiny", "messages": ask(), "tools": [TOOL], "tool_choice": choice}
    given |= {"max_tokens": 200, "parallel_tool_calls": False}
    whole = client.chat.completions.create(**given).choices[0]
    (call,) = whole.message.tool_calls
    assert whole.finish_reason == "tool_calls" and call.function.name == "look_up"
    assert json.loads(call.function.arguments)["town"] in ("Velmar", "Osteck")
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**given, stream=True)]
    (told,) = [each for delta in deltas for each in delta.tool_calls or ()]
    assert (told.index, told.function.name, told.function.arguments) == (0, "look_up", call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "Anna Kelsen"}
    turns = [*ask(), whole.message.model_dump(exclude_none=True), result]
    assert client.chat.completions.create(model="tiny", messages=turns, tools=[TOOL], max_tokens=4).choices


def test_an_answer_in_json_has_the_schema(serve: Serve) -> None:
    client = serve().wait_until_loaded().connect()
    schema = {"type": "object", "properties": {"town": {"enum": ["Velmar"]}}, "required": ["town"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}}
    said = client.chat.completions.create(model="tiny", messages=ask(), response_format=wanted, max_tokens=200)
    assert json.loads(said.choices[0].message.content) == {"town": "Velmar"}
    free = client.chat.completions.create(
        model="tiny", messages=ask(), response_format={"type": "json_object"}, max_tokens=400
    )
    if free.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(free.choices[0].message.content), dict)


def test_a_seed_makes_a_drawn_answer_again(serve: Serve) -> None:
    client = serve().wait_until_loaded().connect()
    given: dict[str, Any] = {"model": "tiny", "messages": ask(), "temperature": 1.0, "max_tokens": 12}
    one, same, other = (
        client.chat.completions.create(**given, seed=seed).choices[0].message.content for seed in (1, 1, 2)
    )
    assert one == same != other


def test_no_tenant_reads_what_another_wrote(trained: RunningServer) -> None:
    texts = ask("Nobody else shall know of this: the harvest in Marwin was lost.", ARTICLES[0])
    used = [
        trained.connect(key).chat.completions.create(model="news", messages=texts, max_tokens=1).usage for key in KEYS
    ]
    alone = [usage.prompt_tokens_details.cached_tokens for usage in used]
    assert max(alone) < 12, "no more than what the template begins with"
