"""The modes that reuse KV off the prefix, through LangChain's classes: they reach the engine, and reports come out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.runnables import RunnableLambda
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from semsharekv_integrations import EngineConfig, ReuseConfig, ReuseReport
from semsharekv_integrations.config import MODES
from semsharekv_integrations.langchain import ChatSemShareKV, SemShareKVLLM

EAGER = ReuseConfig(mode="identical", min_run_tokens=8, max_compute_ratio=1.0, max_deviation=100.0)
ModelClass = type[ChatSemShareKV] | type[SemShareKVLLM]
DOCUMENTS = {
    "flood": "A flood hit the old town of Prorna in May , and the mayor said that many people were affected .",
    "fire": "The report from Velmar names a fire at the bridge , which was closed on Monday for repairs .",
}


def prompt(start: str, *names: str) -> str:
    return "\n\n".join([start, *(DOCUMENTS[name] for name in names), "Who was affected ?"])


FIRST, SECOND = prompt("Answer in one line .", "flood", "fire"), prompt("You read the news for us .", "fire", "flood")


@pytest.fixture(params=[ChatSemShareKV, SemShareKVLLM])
def cls(request: pytest.FixtureRequest) -> ModelClass:
    return request.param


@pytest.fixture(scope="module")
def path(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: Any) -> str:
    folder: Path = tmp_path_factory.mktemp("model")
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def call(model: ChatSemShareKV | SemShareKVLLM, text: str, **options: Any) -> tuple[dict[str, Any], int, str]:
    """Report, tokens read from the cache as LangChain counts them, and the text."""
    if isinstance(model, ChatSemShareKV):
        message = model.invoke(text, **options)
        assert message.usage_metadata is not None
        usage = message.usage_metadata
        return message.response_metadata["kv_cache"], usage["input_token_details"]["cache_read"], str(message.text)
    (generation,) = model.generate([text], **options).generations[0]
    info = generation.generation_info or {}
    usage = info["usage_metadata"] if "usage_metadata" in info else info["usage"]
    return info["kv_cache"], usage["input_token_details"]["cache_read"], generation.text


def reused(report: dict[str, Any]) -> int:
    return report["prefix_tokens"] + report["identical_tokens"] + report["fuzzy_tokens"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_taken_and_reported(cls: ModelClass, path: str, mode: str) -> None:
    model = cls(model=path, mode=mode, max_tokens=4)
    assert model.mode == model.engine.config.reuse.mode == mode
    for text in (FIRST, SECOND, FIRST):
        report, read, _ = call(model, text, documents=DOCUMENTS)
        assert report["mode"] == mode and read == reused(report)
        assert reused(report) + report["recomputed_tokens"] == report["prompt_tokens"]
        assert json.loads(json.dumps(report)) == report
        assert report.keys() == set(ReuseReport.__dataclass_fields__)
    assert (reused(report) > 0) == (mode != "off")


def test_moved_documents_are_counted_as_read_from_the_cache(cls: ModelClass, path: str) -> None:
    model = cls(model=path, config=EngineConfig(reuse=EAGER), max_tokens=4)
    call(model, FIRST)
    report, read, _ = call(model, SECOND, documents=DOCUMENTS)
    assert report["identical_tokens"] > 15 and read == report["prefix_tokens"] + report["identical_tokens"]
    assert {document["document_id"] for document in report["documents"]} == set(DOCUMENTS)
    assert all(document["reused_tokens"] > 0 for document in report["documents"])
    assert report["sources"] and report["compute_ratio"] < 1


def test_streams_and_batches_report_it_too(path: str) -> None:
    model = ChatSemShareKV(model=path, config=EngineConfig(reuse=EAGER), max_tokens=4)
    model.invoke(FIRST)
    chunks = list(model.stream(SECOND))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    report = whole.response_metadata["kv_cache"]
    assert report["identical_tokens"] > 0
    assert whole.usage_metadata["input_token_details"]["cache_read"] == reused(report)
    answers = model.batch([FIRST, SECOND])
    assert all(reused(answer.response_metadata["kv_cache"]) > 0 for answer in answers)


def test_settings_reach_the_engine_and_identify_the_model(cls: ModelClass, path: str) -> None:
    config = EngineConfig(reuse=ReuseConfig(mode="semantic", attention_ratio=0.3))
    model = cls(model=path, config=config, max_tokens=4)
    assert model.engine.config.reuse.resolve().attention_ratio == 0.3 and model.mode == "semantic"
    assert call(model, FIRST)[0]["mode"] == "semantic"
    others = [
        cls(model=path, config=EngineConfig(reuse=ReuseConfig(mode="semantic", attention_ratio=0.2)), max_tokens=4),
        cls(model=path, mode="semantic", max_tokens=4),
        cls(model=path, mode="identical", max_tokens=4),
        cls(model=path, max_tokens=4),
    ]
    identities = [repr(sorted(one._identifying_params.items())) for one in (model, *others)]
    assert len(set(identities)) == len(identities)
    assert "'attention_ratio': 0.3" in identities[0]


def test_answers_of_other_settings_are_not_taken_from_the_cache(cls: ModelClass, path: str) -> None:
    cache, texts = InMemoryCache(), []
    for ratio in (0.1, 0.3):
        reuse = ReuseConfig(mode="identical", attention_ratio=ratio)
        model = cls(model=path, config=EngineConfig(reuse=reuse), cache=cache, max_tokens=4)
        texts += [call(model, FIRST)[2], call(model, FIRST)[2]]
        assert model.engine.stats()["requests"] == 1, "the second came from LangChain's cache, the first did not"
    assert len(set(texts)) == 1


def test_settings_that_do_not_fit_the_mode_are_refused(cls: ModelClass) -> None:
    config = EngineConfig(reuse=ReuseConfig(mode="semantic", attention_ratio=0.3))
    with pytest.raises(ValueError, match="attention_ratio"):
        cls(model="some/model", mode="exact", config=config)
    assert cls(model="some/model", mode="identical", config=config).config.reuse.attention_ratio == 0.3


def test_threads_continue_as_sessions(path: str) -> None:
    """The thread id that LangChain runs a call under is the session that approximate KV belongs to."""
    eager = {"max_compute_ratio": 1.0, "max_deviation": 100.0, "attention_ratio": 0.0, "relevance_ratio": 0.0}
    reuse = ReuseConfig(mode="identical", **eager)
    model = ChatSemShareKV(model=path, config=EngineConfig(reuse=reuse), max_tokens=4)
    node = RunnableLambda(lambda text: model.invoke(text).response_metadata["kv_cache"])
    model.invoke(FIRST)
    node.invoke(SECOND, config={"configurable": {"thread_id": "one"}})
    assert model.engine.stats()["store_tainted_entries"] == 1
    assert node.invoke(SECOND, config={"configurable": {"thread_id": "one"}})["recomputed_tokens"] == 1
    assert node.invoke(SECOND, config={"configurable": {"thread_id": "two"}})["recomputed_tokens"] > 5
    assert model.invoke(SECOND).response_metadata["kv_cache"]["recomputed_tokens"] > 5
    assert model.invoke(SECOND, session="one").response_metadata["kv_cache"]["recomputed_tokens"] == 1
