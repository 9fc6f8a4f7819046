"""The eight calls agree with each other and with the engine, and tell what they did."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import AudioBlock, CacheControl, CachePoint, ChatMessage, ImageBlock, TextBlock
from llama_index.core.schema import Document, NodeWithScore, TextNode

from semsharekv_integrations import CallError, SemShareEngine
from semsharekv_integrations.llama_index import SemShareKVLLM

PROMPT = "What did the mayor say about the flood in the old town ?"
MESSAGES = [ChatMessage(role="system", content="Answer briefly ."), ChatMessage(role="user", content=PROMPT)]
DOCUMENT = "Reporters said that the bridge was closed on Monday ."


async def _all_chats(llm: SemShareKVLLM, **kwargs: Any) -> list[str | None]:
    streamed = list(llm.stream_chat(MESSAGES, **kwargs))
    astreamed = [response async for response in await llm.astream_chat(MESSAGES, **kwargs)]
    return [
        llm.chat(MESSAGES, **kwargs).message.content,
        (await llm.achat(MESSAGES, **kwargs)).message.content,
        streamed[-1].message.content,
        "".join(response.delta or "" for response in streamed),
        astreamed[-1].message.content,
        "".join(response.delta or "" for response in astreamed),
    ]


async def _all_completions(llm: SemShareKVLLM, **kwargs: Any) -> list[str]:
    streamed = list(llm.stream_complete(PROMPT, **kwargs))
    astreamed = [response async for response in await llm.astream_complete(PROMPT, **kwargs)]
    return [
        llm.complete(PROMPT, **kwargs).text,
        (await llm.acomplete(PROMPT, **kwargs)).text,
        streamed[-1].text,
        "".join(response.delta or "" for response in streamed),
        astreamed[-1].text,
        "".join(response.delta or "" for response in astreamed),
    ]


@pytest.mark.parametrize("options", [{}, {"max_tokens": 5}, {"temperature": 1.5, "seed": 3}])
async def test_all_forms_agree_with_the_engine(llm: SemShareKVLLM, options: dict[str, Any]) -> None:
    wanted = {"max_new_tokens" if name == "max_tokens" else name: value for name, value in options.items()}
    chat = [{"role": "system", "content": "Answer briefly ."}, {"role": "user", "content": PROMPT}]
    chat_text = llm.engine.generate(chat, **{"max_new_tokens": 12, **wanted}).text
    text = llm.engine.generate(PROMPT, **{"max_new_tokens": 12, **wanted}).text
    assert text and chat_text and text != chat_text
    assert await _all_chats(llm, **options) == [chat_text] * 6
    assert await _all_completions(llm, **options) == [text] * 6


async def test_a_stop_string_ends_every_form_and_is_left_out(llm: SemShareKVLLM) -> None:
    chat_text, text = llm.chat(MESSAGES).message.content or "", llm.complete(PROMPT).text
    chat_stop, stop = chat_text[6:9], text[6:9]
    assert await _all_chats(llm, stop=[chat_stop]) == [chat_text.split(chat_stop)[0]] * 6
    assert await _all_completions(llm, stop=stop) == [text.split(stop)[0]] * 6
    assert llm.complete(PROMPT, stop=stop).raw["finish_reason"] == "stop"


def test_fields_are_what_calls_fall_back_to(make_engine: Callable[..., SemShareEngine]) -> None:
    engine = make_engine()
    sampling = {"temperature": 1.5, "top_p": 0.9, "top_k": 7, "repetition_penalty": 1.3, "seed": 5, "max_tokens": 9}
    given = SemShareKVLLM(engine=engine, **sampling)
    by_field = given.complete(PROMPT).text
    plain = SemShareKVLLM(engine=engine)
    assert by_field == plain.complete(PROMPT, **sampling).text
    assert by_field == given.complete(PROMPT, **dict.fromkeys(sampling)).text, "None means the field's value"
    for name in ("top_k", "repetition_penalty", "seed", "temperature"):
        assert by_field != plain.complete(PROMPT, **{**sampling, name: 1}).text, name


def test_streams_grow_and_only_the_last_response_is_complete(llm: SemShareKVLLM) -> None:
    text = ""
    *growing, last = llm.stream_chat(MESSAGES)
    assert len(growing) > 3
    for response in [*growing, last]:
        text += response.delta or ""
        assert response.message.content == text
        assert response.message.role == "assistant"
    assert all(response.raw is None for response in growing)
    assert last.raw["usage"]["completion_tokens"] == 12
    assert last.raw["usage"] | {"prompt_tokens_details": 0} == llm.chat(MESSAGES).raw["usage"] | {
        "prompt_tokens_details": 0
    }


def test_the_second_call_reuses_the_first(llm: SemShareKVLLM) -> None:
    first, second = llm.chat(MESSAGES), llm.chat(MESSAGES)
    assert first.raw["kv_cache"]["prefix_tokens"] == 0
    assert first.raw["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second.message.content == first.message.content
    prompt_tokens = second.raw["usage"]["prompt_tokens"]
    assert second.raw["kv_cache"]["prefix_tokens"] == prompt_tokens - 1
    assert second.raw["usage"]["prompt_tokens_details"]["cached_tokens"] == prompt_tokens - 1


def test_a_conversation_reuses_its_earlier_turns(llm: SemShareKVLLM) -> None:
    answer = llm.chat(MESSAGES)
    then = llm.chat([*MESSAGES, answer.message, ChatMessage(role="user", content="And then ?")])
    usage = answer.raw["usage"]
    assert then.raw["kv_cache"]["prefix_tokens"] >= usage["prompt_tokens"] + usage["completion_tokens"] - 1


def test_raw_is_plain_json_and_adds_up(llm: SemShareKVLLM) -> None:
    llm.chat(MESSAGES)
    response = llm.chat(MESSAGES)
    raw = response.raw
    assert json.loads(json.dumps(raw)) == raw
    assert set(raw) == {"model", "finish_reason", "usage", "kv_cache"}
    usage = raw["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert raw["finish_reason"] == "length"
    assert raw["model"] == llm.metadata.model_name
    assert response.additional_kwargs["completion_tokens"] == usage["completion_tokens"]
    assert response.message.additional_kwargs == {}, "they would be sent back with the history"


@pytest.mark.parametrize(
    ("documents", "document_id"),
    [
        ({"a": DOCUMENT}, "a"),
        ([TextNode(text=DOCUMENT, id_="a")], "a"),
        ([NodeWithScore(node=TextNode(text=DOCUMENT, id_="a", metadata={"x": 1}), score=0.5)], "a"),
        ([Document(text=DOCUMENT, id_="a")], "a"),
        ([DOCUMENT], None),
    ],
)
def test_documents_are_reported_and_can_be_forgotten(
    llm: SemShareKVLLM, documents: Any, document_id: str | None
) -> None:
    response = llm.complete(f"{DOCUMENT} {PROMPT}", documents=documents, session="s")
    (use,) = response.raw["kv_cache"]["documents"]
    assert document_id in (None, use["document_id"])
    assert abs(use["tokens"] - len(llm.tokenize(DOCUMENT))) <= 1, "tokens at its borders may belong to either side"
    assert llm.engine.forget(use["document_id"], llm.kv_namespace) == 1


@pytest.mark.parametrize(
    ("role", "name"), [("chatbot", "assistant"), ("model", "assistant"), ("developer", "system"), ("function", "tool")]
)
def test_roles_of_other_vendors_mean_the_same(llm: SemShareKVLLM, role: str, name: str) -> None:
    user = ChatMessage(role="user", content=PROMPT)
    theirs = llm.chat([ChatMessage(role=role, content="Well ."), user])
    ours = llm.engine.generate(
        [{"role": name, "content": "Well ."}, {"role": "user", "content": PROMPT}],
        max_new_tokens=12,
        namespace=llm.kv_namespace,
    )
    assert theirs.message.content == ours.text
    assert ours.report.prefix_tokens == ours.report.prompt_tokens - 1, "both rendered the same prompt"


def test_turns_of_one_role_are_merged_and_cache_points_left_out(llm: SemShareKVLLM) -> None:
    point = CachePoint(cache_control=CacheControl(type="ephemeral"))
    split = [
        ChatMessage(role="user", blocks=[TextBlock(text="One"), point, TextBlock(text="two")]),
        ChatMessage(role="user", content="three"),
    ]
    merged = llm.chat([ChatMessage(role="user", content="One\ntwo\n\nthree")])
    again = llm.chat(split)
    assert again.message.content == merged.message.content
    assert again.raw["kv_cache"]["prefix_tokens"] == again.raw["usage"]["prompt_tokens"] - 1


@pytest.mark.parametrize("block", [ImageBlock(image=base64.b64encode(b"x")), AudioBlock(audio=base64.b64encode(b"x"))])
def test_images_and_sounds_are_refused(llm: SemShareKVLLM, block: Any) -> None:
    messages = [MESSAGES[0], ChatMessage(role="user", blocks=[TextBlock(text="See"), block])]
    with pytest.raises(
        CallError, match=rf"messages\[1\]\.blocks\[1\] is '{block.block_type}'; accepted is a text block"
    ):
        llm.chat(messages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1}, "keyword arguments is .*temprature.*accepted is .*temperature"),
        ({"functions": None}, "keyword arguments is .*functions"),
        ({"temperature": -1.0}, "temperature is -1.0; accepted is 0 or more"),
        ({"max_tokens": 0}, "max_tokens is 0; accepted is an integer of 1 or more"),
        ({"max_new_tokens": "x"}, "max_tokens is 'x'; accepted is an integer"),
        ({"max_tokens": 3, "max_new_tokens": 3}, "max_tokens is 3; accepted is nothing beside max_new_tokens"),
        ({"namespace": ""}, "namespace is ''"),
        ({"documents": "text"}, "documents is 'text'; accepted is None, texts in a list"),
        ({"documents": [TextNode(text="x"), 5]}, "documents is 5; accepted is"),
        ({"documents": [TextNode(text=t, id_="a") for t in "xy"]}, "documents is \"two texts with the id 'a'\""),
    ],
)
def test_bad_options_are_refused_by_name(llm: SemShareKVLLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CallError, match=message):
        llm.chat(MESSAGES, **options)
    with pytest.raises(CallError, match=message):
        llm.stream_complete(PROMPT, **options)


def test_what_llama_index_sends_to_every_llm_is_tolerated(llm: SemShareKVLLM) -> None:
    assert (
        llm.chat(MESSAGES, max_tokens=4, extra_headers={"anthropic-beta": "x"}).raw["usage"]["completion_tokens"] == 4
    )


def test_prompt_functions_are_honoured(make_engine: Callable[..., SemShareEngine]) -> None:
    engine = make_engine()
    custom = SemShareKVLLM(
        engine=engine,
        max_tokens=4,
        completion_to_prompt=lambda prompt: f"Q : {prompt} A :",
        messages_to_prompt=lambda messages: " ".join(str(message.content) for message in messages),
    )
    plain = SemShareKVLLM(engine=engine, max_tokens=4)
    wrapped = plain.complete("Q : Who ? A :").text
    assert custom.complete("Who ?").text == wrapped != custom.complete("Who ?", formatted=True).text
    assert custom.chat(MESSAGES).message.content == plain.complete(f"Answer briefly . {PROMPT}").text


def test_token_counters_read_the_usage(llm: SemShareKVLLM) -> None:
    counter = TokenCountingHandler(tokenizer=lambda text: [0] * 10**6)
    llm.callback_manager = CallbackManager([counter])
    usages = [
        llm.chat(MESSAGES).raw["usage"],
        llm.complete(PROMPT).raw["usage"],
        list(llm.stream_chat(MESSAGES))[-1].raw["usage"],
        list(llm.stream_complete(PROMPT))[-1].raw["usage"],
    ]
    assert counter.prompt_llm_token_count == sum(usage["prompt_tokens"] for usage in usages)
    assert counter.completion_llm_token_count == sum(usage["completion_tokens"] for usage in usages)


class _Names(BaseEventHandler):
    """Records the class names of events."""

    names: list[str] = []

    def handle(self, event: Any, **_: Any) -> None:
        self.names.append(event.class_name())


async def test_observers_see_every_call(llm: SemShareKVLLM) -> None:
    handler, dispatcher = _Names(), get_dispatcher()
    dispatcher.add_event_handler(handler)
    try:
        await _all_chats(llm, max_tokens=2)
        await _all_completions(llm, max_tokens=2)
    finally:
        dispatcher.event_handlers.remove(handler)
    for name in ("LLMChatStartEvent", "LLMChatEndEvent", "LLMCompletionStartEvent", "LLMCompletionEndEvent"):
        assert handler.names.count(name) == 4, name
    assert handler.names.count("LLMChatInProgressEvent") >= 4
