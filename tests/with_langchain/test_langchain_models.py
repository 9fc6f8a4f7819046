"""What the chat model and the plain LLM promise alike: every way to call them agrees, and nothing is dropped."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage
from transformers import PreTrainedTokenizerBase

from semsharekv_integrations import ContextWindowError, ReuseReport, SemShareEngine
from semsharekv_integrations.langchain import ChatSemShareKV, SemShareKVLLM

EngineMaker = Callable[..., SemShareEngine]
Model = ChatSemShareKV | SemShareKVLLM
PROMPT = "In Prorna , a green flag was raised on Monday . What happened in Prorna ?"
OTHERS = [f"In Prorna , {count} people were affected by the flood ." for count in range(6)]


@pytest.fixture(params=[ChatSemShareKV, SemShareKVLLM])
def model(request: pytest.FixtureRequest, make_engine: EngineMaker) -> Model:
    return request.param(engine=make_engine(), max_tokens=12)


def text(answer: Any) -> str:
    return answer if isinstance(answer, str) else str(answer.text)


def details(model: Model, prompt: str = PROMPT, **options: Any) -> dict[str, Any]:
    """Finish reason, report and usage of one call."""
    if isinstance(model, ChatSemShareKV):
        message = model.invoke(prompt, **options)
        return message.response_metadata | {"usage": message.usage_metadata}
    return model.generate([prompt], **options).generations[0][0].generation_info or {}


def plain_answer(model: Model, prompt: str, engine: SemShareEngine, max_tokens: int = 12) -> str:
    chat = isinstance(model, ChatSemShareKV)
    return engine.generate([{"role": "user", "content": prompt}] if chat else prompt, max_new_tokens=max_tokens).text


async def test_every_way_to_call_gives_what_the_engine_gives(model: Model, make_engine: EngineMaker) -> None:
    expected = plain_answer(model, PROMPT, make_engine("off"))
    assert len(expected) > 5
    assert text(model.invoke(PROMPT)) == expected
    assert "".join(map(text, model.stream(PROMPT))) == expected
    assert text(await model.ainvoke(PROMPT)) == expected
    assert "".join([text(chunk) async for chunk in model.astream(PROMPT)]) == expected
    assert [text(answer) for answer in model.batch([PROMPT, PROMPT])] == [expected] * 2
    assert [text(answer) for answer in await model.abatch([PROMPT, PROMPT])] == [expected] * 2


def test_streams_hand_out_pieces(model: Model) -> None:
    assert sum(bool(text(chunk)) for chunk in model.stream(PROMPT)) > 3


async def test_batches_keep_their_order(model: Model, make_engine: EngineMaker) -> None:
    expected = [plain_answer(model, prompt, make_engine("off")) for prompt in OTHERS]
    assert len(set(expected)) > 1
    assert [text(answer) for answer in model.batch(OTHERS)] == expected
    assert [text(answer) for answer in await model.abatch(OTHERS)] == expected
    assert [text(answer) for answer in model.batch(OTHERS, config={"max_concurrency": 2})] == expected


async def test_stop_strings_end_the_text_however_given(model: Model) -> None:
    whole = text(model.invoke(PROMPT))
    stop = whole[6:9]
    expected = whole[: whole.index(stop)]
    stopping = type(model)(engine=model.engine, max_tokens=12, stop=[stop])
    for answer in (model.invoke(PROMPT, stop=[stop]), await model.ainvoke(PROMPT, stop=[stop])):
        assert text(answer) == expected
    assert "".join(map(text, model.stream(PROMPT, stop=[stop]))) == expected
    assert "".join(map(text, model.bind(stop=[stop]).stream(PROMPT))) == expected
    assert text(stopping.invoke(PROMPT)) == expected
    assert details(stopping)["finish_reason"] == "stop" and details(model)["finish_reason"] == "length"


def test_stop_strings_of_a_call_replace_those_of_the_model(model: Model) -> None:
    whole = text(model.invoke(PROMPT))
    stopping = type(model)(engine=model.engine, max_tokens=12, stop=[whole[2:4]])
    assert text(stopping.invoke(PROMPT, stop=["not in the text"])) == whole
    assert text(stopping.invoke(PROMPT, stop=[])) == whole


def test_a_second_call_reuses_the_first_and_says_so(model: Model) -> None:
    first, second = details(model), details(model)
    assert first["kv_cache"]["prefix_tokens"] == 0 and second["kv_cache"]["prefix_tokens"] > 0
    for seen in (first, second):
        assert seen["usage"]["input_token_details"]["cache_read"] == seen["kv_cache"]["prefix_tokens"]
        assert seen["usage"]["input_tokens"] == seen["kv_cache"]["prompt_tokens"]
        assert seen["usage"]["output_tokens"] == seen["kv_cache"]["output_tokens"] == 12
        assert seen["model_name"] == model.engine.name
        assert seen["kv_cache"].keys() == ReuseReport.__dataclass_fields__.keys()
        assert json.loads(json.dumps(seen)) == seen


def test_namespaces_do_not_share(model: Model) -> None:
    model.invoke(PROMPT)
    assert details(model, namespace="other")["kv_cache"]["prefix_tokens"] == 0
    assert details(model, namespace="other")["kv_cache"]["prefix_tokens"] > 0
    elsewhere = type(model)(engine=model.engine, namespace="third", max_tokens=12)
    assert details(elsewhere)["kv_cache"]["prefix_tokens"] == 0


def test_mode_off_reuses_nothing(model: Model, make_engine: EngineMaker) -> None:
    off = type(model)(engine=make_engine("off"), max_tokens=12)
    assert off.mode == "off"
    assert text(off.invoke(PROMPT)) == text(model.invoke(PROMPT)) and details(off)["kv_cache"]["prefix_tokens"] == 0


def test_the_token_limit_has_two_names(model: Model) -> None:
    for name in ("max_tokens", "max_new_tokens"):
        assert details(model, **{name: 3})["usage"]["output_tokens"] == 3
        built = type(model)(engine=model.engine, **{name: 3})
        assert built.max_tokens == 3 and details(built)["usage"]["output_tokens"] == 3
    with pytest.raises(ValueError, match="max_new_tokens is 4; accepted is 3"):
        model.invoke(PROMPT, max_tokens=3, max_new_tokens=4)


def test_none_means_the_value_of_the_field(model: Model) -> None:
    nothing = {"temperature": None, "max_tokens": None, "namespace": None, "documents": None, "stop": None}
    assert text(model.invoke(PROMPT, **nothing)) == text(model.invoke(PROMPT))


def test_sampling_fields_reach_the_engine(model: Model) -> None:
    greedy = text(model.invoke(PROMPT))
    hot = {"temperature": 3.0, "seed": 1}
    sampled = text(model.invoke(PROMPT, **hot))
    assert sampled != greedy
    assert (
        sampled
        == text(model.invoke(PROMPT, **hot))
        == text(type(model)(engine=model.engine, max_tokens=12, **hot).invoke(PROMPT))
    )
    assert sampled != text(model.invoke(PROMPT, **{**hot, "seed": 2}))
    assert greedy == text(model.invoke(PROMPT, **hot, top_k=1)) == text(model.invoke(PROMPT, **hot, top_p=1e-6))
    assert greedy != text(model.invoke(PROMPT, repetition_penalty=5.0))


@pytest.mark.parametrize("option", [{"foo": 1}, {"model": "another"}, {"functions": [{}]}, {"max_token": 3}])
async def test_unknown_options_are_refused(model: Model, option: dict[str, Any]) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: model.invoke(PROMPT, **option),
        lambda: list(model.stream(PROMPT, **option)),
        lambda: model.bind(**option).invoke(PROMPT),
        lambda: asyncio.run(model.ainvoke(PROMPT, **option)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"{next(iter(option))}.*accepted is temperature"):
            await asyncio.to_thread(call)
    assert model.engine.stats()["requests"] == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": "hot"}, "temperature\n"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"top_p": 2}, "top_p is 2"),
        ({"namespace": ""}, "namespace is ''"),
        ({"documents": "one text"}, "documents is 'one text'; accepted is None, texts in a list"),
        ({"documents": [Document("a", id="1"), Document("b", id="1")]}, "two texts with the id '1'"),
    ],
)
def test_bad_values_are_named(model: Model, option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.invoke(PROMPT, **option)


async def test_engine_errors_arrive_unchanged(model: Model) -> None:
    long = PROMPT * 100
    with pytest.raises(ContextWindowError):
        model.invoke(long)
    with pytest.raises(ContextWindowError):
        await model.ainvoke(long)
    with pytest.raises(ContextWindowError):
        [chunk async for chunk in model.astream(long)]


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ({"flag": "a green flag was raised"}, ["flag"]),
        ([Document("a green flag was raised", id="flag")], ["flag"]),
        ([Document("a green flag was raised", metadata={"id": 7})], ["7"]),
    ],
)
def test_documents_are_reported_under_their_ids(model: Model, documents: Any, expected: list[str]) -> None:
    details(model, documents=documents)
    found = details(model, documents=documents)["kv_cache"]["documents"]
    assert [use["document_id"] for use in found] == expected and found[0]["reused_tokens"] == found[0]["tokens"] > 0
    home = model.kv_namespace
    assert model.engine.forget(expected[0], home) > 0 and model.engine.forget(expected[0], home) == 0


def test_texts_and_documents_without_id_are_named_alike(model: Model) -> None:
    as_text = details(model, documents=["a green flag was raised"])["kv_cache"]["documents"]
    as_document = details(model, documents=[Document("a green flag was raised")])["kv_cache"]["documents"]
    assert as_text[0]["document_id"] == as_document[0]["document_id"]


def test_token_ids_are_the_models_own(model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = model.get_token_ids(PROMPT)
    assert ids == tokenizer.encode(PROMPT, add_special_tokens=False)
    assert model.get_num_tokens(PROMPT) == len(ids)
    model.custom_get_token_ids = lambda _: [1, 2]
    assert model.get_num_tokens(PROMPT) == 2


def test_one_engine_serves_both_interfaces(make_engine: EngineMaker) -> None:
    engine = make_engine()
    chat, llm = (cls(engine=engine, namespace="ours", max_tokens=4) for cls in (ChatSemShareKV, SemShareKVLLM))
    chat.invoke(PROMPT)
    rendered = engine.tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
    )
    assert details(llm, str(rendered))["kv_cache"]["prefix_tokens"] > 10


def test_exactly_one_chunk_of_a_chat_stream_carries_usage(make_engine: EngineMaker) -> None:
    chat = ChatSemShareKV(engine=make_engine(), max_tokens=6)
    chunks = list(chat.stream(PROMPT))
    carrying = [chunk for chunk in chunks if chunk.usage_metadata or chunk.response_metadata]
    assert carrying == [chunks[-1]] and chunks[-1].response_metadata["finish_reason"] == "length"
    assert chunks[-1].response_metadata.keys() == chat.invoke(PROMPT).response_metadata.keys()


def test_a_conversations_next_turn_reuses_all_before_it(make_engine: EngineMaker) -> None:
    """Also the answer, as far as it was sampled in the tokens of its text."""
    engine = make_engine()
    chat, asked = ChatSemShareKV(engine=engine, max_tokens=12), HumanMessage(PROMPT)
    answer = chat.invoke([asked])
    following = chat.invoke([asked, AIMessage(answer.content), HumanMessage("And then ?")])
    said = engine.tokenizer(answer.content, add_special_tokens=False).input_ids
    sampled = engine.generate([{"role": "user", "content": PROMPT}], max_new_tokens=12).token_ids
    kept = next((at for at, (one, other) in enumerate(zip(said, sampled, strict=False)) if one != other), len(said))
    before = answer.usage_metadata["input_tokens"] + kept - 1
    assert following.usage_metadata["input_token_details"]["cache_read"] >= before


def test_llm_results_add_up_their_usage(make_engine: EngineMaker) -> None:
    result = SemShareKVLLM(engine=make_engine(), max_tokens=4).generate(OTHERS)
    usages = [answers[0].generation_info["usage"] for answers in result.generations]
    total = result.llm_output["token_usage"]
    assert total["completion_tokens"] == 4 * len(OTHERS)
    assert total["prompt_tokens"] == sum(usage["input_tokens"] for usage in usages)
    assert total["total_tokens"] == total["prompt_tokens"] + total["completion_tokens"]
    assert usages[1]["input_token_details"]["cache_read"] > 0


@pytest.mark.parametrize("streaming", [True, False, None])
def test_streaming_says_how_chunks_come(make_engine: EngineMaker, streaming: bool | None) -> None:
    chat = ChatSemShareKV(engine=make_engine(), max_tokens=8, streaming=streaming)
    pieces = [chunk for chunk in chat.stream(PROMPT) if chunk.text]
    assert (len(pieces) == 1) == (streaming is False)
    assert "".join(map(text, pieces)) == text(chat.invoke(PROMPT)) == text(chat.invoke(PROMPT, stream=True))
