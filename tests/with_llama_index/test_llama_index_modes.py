"""The modes that reuse KV off the prefix, through LlamaIndex's class: they reach the engine, and reports come out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.schema import TextNode

from semsharekv_integrations import EngineConfig, ReuseConfig, ReuseReport
from semsharekv_integrations.config import MODES
from semsharekv_integrations.llama_index import SemShareKVLLM

EAGER = ReuseConfig(mode="identical", min_run_tokens=8, max_compute_ratio=1.0, max_deviation=100.0)
DOCUMENTS = {
    "flood": "A flood hit the old town of Prorna in May , and the mayor said that many people were affected .",
    "fire": "The report from Velmar names a fire at the bridge , which was closed on Monday for repairs .",
}


def prompt(start: str, *names: str) -> str:
    return "\n\n".join([start, *(DOCUMENTS[name] for name in names), "Who was affected ?"])


FIRST, SECOND = prompt("Answer in one line .", "flood", "fire"), prompt("You read the news for us .", "fire", "flood")


def raw_of(llm: SemShareKVLLM, text: str, chat: bool, **options: Any) -> dict[str, Any]:
    answer = llm.chat([ChatMessage(content=text)], **options) if chat else llm.complete(text, **options)
    assert isinstance(answer.raw, dict)
    return answer.raw


def reused(report: dict[str, Any]) -> int:
    return report["prefix_tokens"] + report["identical_tokens"] + report["fuzzy_tokens"]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_taken_and_reported(model_path: Path, mode: str, chat: bool) -> None:
    llm = SemShareKVLLM(model=str(model_path), mode=mode, max_tokens=4)
    assert llm.engine.config.reuse.mode == mode
    for text in (FIRST, SECOND, FIRST):
        raw = raw_of(llm, text, chat, documents=DOCUMENTS)
        report = raw["kv_cache"]
        assert report["mode"] == mode and json.loads(json.dumps(raw)) == raw
        assert raw["usage"]["prompt_tokens_details"]["cached_tokens"] == reused(report)
        assert reused(report) + report["recomputed_tokens"] == raw["usage"]["prompt_tokens"]
        assert report.keys() == set(ReuseReport.__dataclass_fields__)
    assert (reused(report) > 0) == (mode != "off")


def test_moved_nodes_are_counted(model_path: Path) -> None:
    llm = SemShareKVLLM(model=str(model_path), config=EngineConfig(reuse=EAGER), max_tokens=4)
    nodes = [TextNode(id_=key, text=text) for key, text in DOCUMENTS.items()]
    llm.complete(FIRST, documents=nodes)
    *_, last = llm.stream_complete(SECOND, documents=nodes)
    report = last.raw["kv_cache"]  # type: ignore[index]
    assert report["identical_tokens"] > 15
    assert {document["document_id"] for document in report["documents"]} == set(DOCUMENTS)
    assert all(document["reused_tokens"] > 0 for document in report["documents"])


def test_settings_reach_the_engine_and_come_back_from_files(model_path: Path) -> None:
    config = EngineConfig(reuse=ReuseConfig(mode="semantic", attention_ratio=0.3))
    llm = SemShareKVLLM(model=str(model_path), config=config, max_tokens=4)
    assert llm.engine.config.reuse.resolve().attention_ratio == 0.3
    assert raw_of(llm, FIRST, chat=False)["kv_cache"]["mode"] == "semantic"
    assert llm.to_dict()["config"]["reuse"]["attention_ratio"] == 0.3
    again = SemShareKVLLM.from_dict(llm.to_dict())
    assert again.engine.config == config and again.config == config


def test_settings_that_do_not_fit_the_mode_are_refused() -> None:
    config = EngineConfig(reuse=ReuseConfig(mode="semantic", attention_ratio=0.3))
    with pytest.raises(ValueError, match="attention_ratio"):
        SemShareKVLLM(model="some/model", mode="exact", config=config)


def test_sessions_continue_from_approximate_kv(model_path: Path) -> None:
    llm = SemShareKVLLM(model=str(model_path), config=EngineConfig(reuse=EAGER), max_tokens=4)
    llm.complete(FIRST)
    llm.complete(SECOND, session="one")
    assert llm.engine.stats()["store_tainted_entries"] == 1
    assert raw_of(llm, SECOND, False, session="one")["kv_cache"]["recomputed_tokens"] == 1
    assert raw_of(llm, SECOND, False, session="two")["kv_cache"]["recomputed_tokens"] > 5
