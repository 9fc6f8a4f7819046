"""Documents warmed in an indexing pipeline are reused by the first prompt that has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.documents import Document

from semsharekv_integrations import ReuseConfig, SemShareEngine
from semsharekv_integrations.langchain import ChatSemShareKV, SemShareKVLLM, SemShareKVWarmer

EngineMaker = Callable[..., SemShareEngine]
FLAG = Document("In Prorna , a green flag was raised on Monday , and the mayor was there to see it .", id="flag")
FLOOD = Document("In Erivia , a flood affected 12 people , and families slept in the old school .", id="flood")
EAGER = ReuseConfig(mode="identical", min_run_tokens=8, max_compute_ratio=1.0, max_deviation=100.0)


@pytest.fixture
def chat(make_engine: EngineMaker) -> ChatSemShareKV:
    return ChatSemShareKV(engine=make_engine(reuse=EAGER), max_tokens=4)


def ask(chat: ChatSemShareKV, *documents: Document, **options: Any) -> dict[str, Any]:
    content = "\n\n".join(["Read this .", *(document.page_content for document in documents), "What happened ?"])
    return chat.invoke(content, **options).response_metadata["kv_cache"]


@pytest.mark.parametrize("awaited", [False, True])
async def test_the_first_prompt_reuses_what_was_warmed(chat: ChatSemShareKV, awaited: bool) -> None:
    warmer, given = SemShareKVWarmer(chat), [FLAG, FLOOD]
    assert (await warmer.atransform_documents(given) if awaited else warmer.transform_documents(given)) is given
    report = ask(chat, FLOOD, FLAG)
    assert {use["document_id"] for use in report["documents"] if use["reused_tokens"] > 0} == {"flag", "flood"}
    assert report["identical_tokens"] > 20


def test_other_tenants_gain_nothing(chat: ChatSemShareKV) -> None:
    SemShareKVWarmer(chat, namespace="tenant").transform_documents([FLAG, FLOOD])
    assert ask(chat, FLOOD, FLAG)["identical_tokens"] == 0
    assert ask(chat, FLOOD, FLAG, namespace="tenant")["identical_tokens"] > 20


def test_a_changed_text_replaces_the_one_before(chat: ChatSemShareKV) -> None:
    warmer = SemShareKVWarmer(chat)
    warmer.transform_documents([FLAG])
    warmer.transform_documents([Document(FLOOD.page_content, id="flag")])
    assert chat.engine.stats()["store_entries"] == 1
    assert [use["document_id"] for use in ask(chat, FLAG, FLOOD)["documents"]] == ["flag"]


def test_progress_is_shown_if_asked_for(chat: ChatSemShareKV, capfd: pytest.CaptureFixture[str]) -> None:
    for progress in (False, True):
        SemShareKVWarmer(chat, progress=progress).transform_documents([FLAG, FLOOD])
        assert bool(capfd.readouterr().err) == progress


def test_documents_are_forgotten_by_their_ids(chat: ChatSemShareKV) -> None:
    SemShareKVWarmer(chat).transform_documents([FLAG, Document(FLOOD.page_content, metadata={"id": 7})])
    assert chat.engine.forget("flag", chat.kv_namespace) == chat.engine.forget("7", chat.kv_namespace) == 1
    assert chat.engine.stats()["store_entries"] == 0


def test_an_engine_is_warmed_in_the_namespace_named(make_engine: EngineMaker) -> None:
    engine = make_engine()
    SemShareKVWarmer(engine, namespace="ours").transform_documents([FLAG])
    llm = SemShareKVLLM(engine=engine, namespace="ours", max_tokens=2)
    (answer,) = llm.generate([f"{FLAG.page_content} What happened ?"]).generations[0]
    assert answer.generation_info["kv_cache"]["prefix_tokens"] > 15


def test_lifetime_and_pin_reach_the_store(chat: ChatSemShareKV) -> None:
    SemShareKVWarmer(chat, pinned=True, ttl_s=1000).transform_documents([FLAG])
    (entry,) = chat.engine.store.fetch_all()
    assert entry.pinned and entry.expires_after_s == 1000


def test_bad_arguments_are_named(chat: ChatSemShareKV) -> None:
    with pytest.raises(ValueError, match="model is 'str'"):
        SemShareKVWarmer("m")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ttl_s is -1"):
        SemShareKVWarmer(chat, ttl_s=-1)
    with pytest.raises(ValueError, match="two texts with the id 'flag'"):
        SemShareKVWarmer(chat).transform_documents([FLAG, Document("Another .", id="flag")])
    with pytest.raises(ValueError, match="keyword arguments"):
        SemShareKVWarmer(chat).transform_documents([FLAG], wait=True)
    assert SemShareKVWarmer(chat).transform_documents([]) == []
