"""Whatever the engine raises, who asked LlamaIndex hears of it: no engine answers "Empty Response" in its place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core import Document, SummaryIndex
from llama_index.core.llms import ChatMessage
from llama_index.core.program import LLMTextCompletionProgram
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.types import PydanticProgramMode
from pydantic import BaseModel

from semsharekv_integrations import CallError, ContextWindowError, PromptError, SemShareEngine, SemShareError
from semsharekv_integrations.llama_index import SemShareKVLLM

DOCUMENTS = [Document(text=f"In {town} , the bridge was closed . " * 20) for town in ("Velmar", "Hexvia")]
QUESTION = "What was closed ? "
HISTORY = [ChatMessage("Hello ."), ChatMessage("Hello .", role="assistant")]
MODES = ("refine", "compact", "tree_summarize", "simple_summarize", "accumulate", "compact_accumulate")
STREAMED = MODES[:4]
CHATS = ("simple", "context", "condense_question", "condense_plus_context")
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of chat streams
# Of those of this package, all are of one base: see the last test
ERRORS: list[type[Exception]] = [ValueError, TypeError, UnicodeError, ContextWindowError]


class Fact(BaseModel):
    town: str


def queries(mode: Any, **options: Any) -> Any:
    return SummaryIndex.from_documents(DOCUMENTS).as_query_engine(response_mode=mode, **options)


async def read(stream: Any) -> str:
    return "".join([text async for text in stream])


async def astreamed(mode: str, question: str) -> str:
    return await read((await queries(mode, streaming=True).aquery(question)).response_gen)


def chats(mode: Any) -> Any:
    return SummaryIndex.from_documents(DOCUMENTS).as_chat_engine(chat_mode=mode)


async def astreamed_chat(mode: str, question: str) -> str:
    return await read((await chats(mode).astream_chat(question, chat_history=HISTORY)).async_response_gen())


def filtered(llm: Any) -> Any:
    return get_response_synthesizer(llm=llm, response_mode="refine", structured_answer_filtering=True)


def structured(llm: Any, question: str) -> Any:
    return LLMTextCompletionProgram.from_defaults(output_cls=Fact, prompt_template_str=question, llm=llm)


def ways(llm: SemShareKVLLM, question: str = QUESTION) -> dict[str, Callable[[], Any]]:
    """Every way to ask, by name; some are asynchronous."""
    nodes = [document.text for document in DOCUMENTS]
    found: dict[str, Callable[[], Any]] = {
        "filtering": lambda: filtered(llm).get_response(question, nodes),
        "filtering, async": lambda: filtered(llm).aget_response(question, nodes),
        "program": lambda: structured(llm, question)(),
        "objects": lambda: queries("compact", output_cls=Fact).query(question),
        "objects, streamed": lambda: str(queries("refine", output_cls=Fact, streaming=True).query(question)),
    }
    if "stream_call" in vars(LLMTextCompletionProgram):  # not in the oldest version
        found["program, streamed"] = lambda: list(structured(llm, question).stream_call())
    for mode in MODES:
        found[mode] = lambda mode=mode: queries(mode).query(question)
        found[f"{mode}, async"] = lambda mode=mode: queries(mode).aquery(question)
    for mode in STREAMED:
        found[f"{mode}, streamed"] = lambda mode=mode: str(queries(mode, streaming=True).query(question))
        found[f"{mode}, async stream"] = lambda mode=mode: astreamed(mode, question)
    for mode in CHATS:
        found[f"{mode} chat"] = lambda mode=mode: chats(mode).chat(question, chat_history=HISTORY)
        found[f"{mode} chat, async"] = lambda mode=mode: chats(mode).achat(question, chat_history=HISTORY)
        found[f"{mode} chat, streamed"] = lambda mode=mode: "".join(
            chats(mode).stream_chat(question, chat_history=HISTORY).response_gen
        )
        found[f"{mode} chat, async stream"] = lambda mode=mode: astreamed_chat(mode, question)
    return found


async def outcome(ask: Callable[[], Any]) -> Any:
    """The error that asking ends in, or the answer."""
    try:
        answer = ask()
        return await answer if hasattr(answer, "__await__") else answer
    except Exception as error:
        return error


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
async def test_what_the_engine_raises_comes_out(settings: Any, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        raise kind("told by the engine")

    monkeypatch.setattr(SemShareEngine, "_run", fail)
    expected = kind if issubclass(kind, SemShareError) else CallError
    for name, ask in ways(settings.llm).items():
        error = await outcome(ask)
        assert type(error) is expected and "told by the engine" in str(error), f"{name}: {error!r}"


async def test_prompts_beyond_the_window_come_out(settings: Any) -> None:
    settings.tokenizer = lambda text: []  # as if chunks were counted with another model's tokenizer
    for name, ask in ways(settings.llm, QUESTION * 400).items():
        error = await outcome(ask)
        assert isinstance(error, ContextWindowError), f"{name}: {error!r}"


async def test_refused_messages_come_out(settings: Any, make_engine: Callable[..., SemShareEngine]) -> None:
    engine = make_engine(max_context_tokens=1024)
    tokenizer = copy.copy(engine.tokenizer)
    tokenizer.chat_template = "{{ raise_exception('not today') }}"
    refusing = SemShareEngine(engine.model, tokenizer, engine.config)
    settings.llm = SemShareKVLLM(engine=refusing, max_tokens=8, pydantic_program_mode=PydanticProgramMode.LLM)
    for name, ask in ways(settings.llm).items():
        error = await outcome(ask)
        assert isinstance(error, PromptError) and "not today" in str(error), f"{name}: {error!r}"


@pytest.mark.parametrize(("field", "value"), [("temperature", -1.0), ("max_tokens", 0), ("session", 5)])
async def test_bad_settings_come_out(settings: Any, field: str, value: Any) -> None:
    setattr(settings.llm, field, value)
    for name, ask in ways(settings.llm).items():
        error = await outcome(ask)
        assert isinstance(error, CallError) and f"{field} is {value}" in str(error), f"{name}: {error!r}"


def test_errors_are_none_that_llama_index_swallows() -> None:
    for kind in SemShareError.__subclasses__():
        assert not issubclass(kind, (ValueError, TypeError))
