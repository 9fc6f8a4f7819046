"""Summaries of documents that were summarized before, and how alike they are to the right ones."""

from __future__ import annotations

import pytest

pytest.importorskip("rouge_score")

import summaries
from semsharekv_integrations import world
from semsharekv_integrations.lab.bench import is_answer
from semsharekv_integrations.lab.figures import Outcome, summarize
from semsharekv_integrations.lab.scenarios import Query
from semsharekv_integrations.report import ReuseReport
from summaries import ROUGE, score_rouge_l, summary_cases


def text_of(query: Query) -> str:
    prompt = query.prompt
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def test_a_summary_has_a_line_for_each_document_and_states_its_facts() -> None:
    found = list(summary_cases(40, 0))
    assert {len(case.target.documents) for case in found} == {2, 3}
    for case in found:
        assert case.answer is not None and case.stale is None
        for line, (town, text) in zip(case.answer.splitlines(), case.target.documents.items(), strict=True):
            assert line.startswith(f"In {town}, ") and text in text_of(case.target)
        assert len(case.values) == len(world.CORE_KINDS) * len(case.target.documents)
        assert all(value in case.answer and value in text_of(case.target) for value in case.values)
    known = [
        {item for r in case.references for item in r.documents.items()} & case.target.documents.items()
        for case in found
    ]
    assert any(known) and not all(known), "some share documents with what was seen, some share none word for word"


def test_a_case_depends_on_seed_and_index_alone() -> None:
    assert list(summary_cases(4, 3)) == list(summary_cases(6, 3))[:4] != list(summary_cases(4, 4))


def test_no_document_of_the_target_stands_in_a_shared_prefix() -> None:
    for case in summary_cases(20, 0):
        target = text_of(case.target)
        ends = [target.index(text) + len(text) for text in case.target.documents.values()]
        assert not any(text_of(reference).startswith(target[: min(ends)]) for reference in case.references)


def test_a_summary_is_right_with_its_lines_in_any_order() -> None:
    case = next(summary_cases(1, 0))
    assert case.answer is not None
    lines = case.answer.splitlines()
    for text, right in (("\n".join(reversed(lines)), True), (lines[0], False), ("", False)):
        assert is_answer(text, case.answer, case.values, "exact") is right


def test_rouge_sees_the_words_in_common() -> None:
    assert score_rouge_l("In Velna, the cost was 3 crowns.", "In Velna, the cost was 3 crowns.") == 1
    assert score_rouge_l("a", "b") == 0 and score_rouge_l("a", None) is None
    assert 0 < (score_rouge_l("In Velna, it was 4.", "In Velna, it was 3.") or 0) < 1


def test_rouge_stands_beside_a_full_prefills() -> None:
    one, other = "In Velna, it was 4.", "In Velna, it was 3."
    outcomes = [
        Outcome(summaries.NAME, policy, 0, ReuseReport("exact", 100, ttft_s=1.0), text, one)
        for policy, text in (("off", one), ("exact", other))
    ]
    _, row = summarize(outcomes, figures=ROUGE)
    score = pytest.approx(score_rouge_l(other, one))
    assert row["rouge_l"].value == score == row["rouge_l_to_full"].value and row["full_rouge_l"].value == 1


def test_a_run_writes_rouge_beside_the_other_figures(tmp_path, tokenizer) -> None:
    out = tmp_path / "x.md"
    summaries.main(["--cases", "1", "--policies", "exact", "--max-new-tokens", "2", "--out", str(out)])
    assert "ROUGE-L to full prefill" in out.read_text() and "accuracy" in out.read_text()
