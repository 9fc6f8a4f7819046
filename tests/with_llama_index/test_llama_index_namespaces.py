"""Whose KV a call reads and leaves: namespaces, sessions, and conversations that branch."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document, SummaryIndex
from llama_index.core.chat_engine import ContextChatEngine, SimpleChatEngine
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.storage.chat_store import SimpleChatStore

from semsharekv_integrations import SemShareEngine
from semsharekv_integrations.llama_index import SemShareKVLLM

PROMPT = "What did the mayor say about the flood in the old town ?"


def prefix_tokens(llm: SemShareKVLLM, text: str = PROMPT, **options: Any) -> int:
    return int(llm.complete(text, max_tokens=3, **options).raw["kv_cache"]["prefix_tokens"])  # type: ignore[index]


def test_namespaces_are_kept_apart(make_engine: Callable[..., SemShareEngine]) -> None:
    engine = make_engine()
    ours, theirs = SemShareKVLLM(engine=engine, namespace="ours"), SemShareKVLLM(engine=engine, namespace="theirs")
    prefix_tokens(ours)
    assert prefix_tokens(theirs) == 0
    assert prefix_tokens(theirs, namespace="ours") > 0
    assert engine.clear("ours") > 0
    assert prefix_tokens(ours) == 0


def test_without_a_name_kv_is_the_object_s_own(make_engine: Callable[..., SemShareEngine]) -> None:
    engine = make_engine()
    ours, theirs = SemShareKVLLM(engine=engine), SemShareKVLLM(engine=engine)
    prefix_tokens(ours)
    assert prefix_tokens(theirs) == 0 and prefix_tokens(theirs, namespace="default") == 0
    assert prefix_tokens(ours) > 0
    assert prefix_tokens(ours.scoped(session="monday")) > 0, "a copy of it is the same tenant"
    assert prefix_tokens(ours.scoped(namespace="another")) == 0
    assert ours.scoped(namespace="another").engine is engine


def test_a_private_name_is_not_handed_on(model_path: Path) -> None:
    llm = SemShareKVLLM(model=str(model_path))
    assert llm.to_dict()["namespace"] is None and llm.kv_namespace not in llm.to_json() + repr(llm)
    for copy in (SemShareKVLLM.from_dict(llm.to_dict()), pickle.loads(pickle.dumps(llm))):
        assert copy.kv_namespace not in (llm.kv_namespace, "default")
    assert SemShareKVLLM.from_dict(llm.scoped(namespace="named").to_dict()).kv_namespace == "named"


def test_names_are_checked(llm: SemShareKVLLM) -> None:
    with pytest.raises(ValueError, match="namespace is ''; accepted is None or a non-empty string"):
        llm.scoped(namespace="")
    with pytest.raises(ValueError, match="namespace is ''; accepted is None or a non-empty string"):
        llm.note([], namespace="")
    with pytest.raises(ValueError, match="session is 5; accepted is None or a non-empty string"):
        llm.scoped(session=5)  # type: ignore[arg-type]


def test_sessions_reach_the_engine(llm: SemShareKVLLM) -> None:
    for name, drop in (("monday", llm), ("tuesday", llm.scoped(session="tuesday"))):
        drop.complete(PROMPT, **({"session": name} if drop is llm else {}))
        assert llm.engine.clear(namespace=llm.kv_namespace, session="sunday") == 0
        assert llm.engine.clear(namespace=llm.kv_namespace, session=name) == 1
    llm.scoped(session="tuesday").complete(PROMPT, session="monday")
    assert llm.engine.clear(namespace=llm.kv_namespace, session="monday") == 1, "the call's own name comes first"


@pytest.mark.parametrize("engine_class", [SimpleChatEngine, ContextChatEngine])
def test_a_chat_store_s_key_can_be_the_session(settings: Any, engine_class: Any) -> None:
    llm, store = settings.llm, SimpleChatStore()
    index = SummaryIndex.from_documents([Document(text="The bridge was closed .")])
    for user in ("alice", "bob"):
        memory = ChatMemoryBuffer.from_defaults(chat_store=store, chat_store_key=user, token_limit=200)
        retrieval = {} if engine_class is SimpleChatEngine else {"retriever": index.as_retriever()}
        chat = engine_class.from_defaults(llm=llm.scoped(session=memory.chat_store_key), memory=memory, **retrieval)
        chat.chat(f"I am {user} .")
        chat.chat("Who am I ?")
    assert [len(store.get_messages(user)) for user in ("alice", "bob")] == [4, 4]
    assert llm.engine.clear(namespace=llm.kv_namespace, session="carol") == 0
    assert llm.engine.clear(namespace=llm.kv_namespace, session="alice") > 0
    assert llm.engine.clear(namespace=llm.kv_namespace, session="bob") > 0


def _user(text: str) -> ChatMessage:
    return ChatMessage(role="user", content=text)


@pytest.mark.parametrize("session", [None, "branching"])
def test_edited_and_regenerated_turns_branch(make_engine: Callable[..., SemShareEngine], session: str | None) -> None:
    plain = SemShareKVLLM(engine=make_engine("off"), max_tokens=6)
    llm = SemShareKVLLM(engine=make_engine("exact"), max_tokens=6, session=session)

    def ask(*messages: ChatMessage, **options: Any) -> tuple[ChatMessage, dict[str, Any]]:
        answer = llm.chat(list(messages), **options)
        assert answer.message.content == plain.chat(list(messages), **options).message.content
        assert isinstance(answer.raw, dict)
        return answer.message, answer.raw["kv_cache"]

    opening = [ChatMessage(role="system", content="You read the news ."), _user(PROMPT)]
    first, report = ask(*opening)
    until_first = report["prompt_tokens"] + report["output_tokens"]
    second, _ = ask(*opening, first, _user("And then ?"))

    _, edited = ask(*opening, first, _user("Who said so ?"))
    assert until_first - 1 <= edited["prefix_tokens"] < edited["prompt_tokens"] - 1, "up to the edited message"
    _, edited = ask(*opening, first, _user("And then ?"), second, _user("Why ?"))
    assert edited["prefix_tokens"] > until_first, "the branch that was left goes on where it was"

    other, regenerated = ask(*opening, temperature=1.5, seed=3)
    assert other.content != first.content
    assert regenerated["prefix_tokens"] == regenerated["prompt_tokens"] - 1
    _, after = ask(*opening, other, _user("And then ?"))
    assert until_first - report["output_tokens"] - 1 <= after["prefix_tokens"] < after["prompt_tokens"]

    _, rewritten = ask(opening[0], _user("What burnt in Velmar ?"))
    assert 0 < rewritten["prefix_tokens"] < report["prompt_tokens"] - 1, "the system message alone is common"
