"""The scripts on rewordings: edits change a fact and are refused, and what is put in says the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from judge_rewordings import EDITS, Pair, judge, read_sources
from read_stored_wording import ACCEPTED, ASKED, SPARED, STORED, Answers, list_sentences, substitute, summarize
from semsharekv_integrations.lab.texts import make_text_cases
from semsharekv_integrations.reuse.sentences import say_the_same
from tiny_models import EngineMaker

SENTENCE = "On Monday, Ann Bell said that 3 of 5 firms rose more than 20 percent and were not in Rome."


@pytest.mark.parametrize("name", EDITS)
def test_every_edit_changes_the_sentence_and_is_refused(name: str) -> None:
    edited = list(EDITS[name](SENTENCE))
    assert edited and SENTENCE not in edited
    assert judge(Pair(text, SENTENCE) for text in edited)[0] == []


def test_halves_are_disjoint_and_hold_all_rewordings() -> None:
    first, second, every = ([dict(read_sources(None, half))["rewordings"]] for half in ("first", "second", "all"))
    assert first[0] + second[0] == every[0] and not set(first[0]) & set(second[0])


def test_only_sentences_that_say_the_same_are_put_in() -> None:
    changed = 0
    for case in make_text_cases("text_reworded", 3, 1, seed=0):
        known = [each for text in case.references[0].documents.values() for each in list_sentences(text)]
        for text in case.target.documents.values():
            found, count = substitute(text, known)
            before, after = list_sentences(text), list_sentences(found)
            swapped = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
            assert len(swapped) == count
            assert all(say_the_same(*pair) and pair[1] in known for pair in swapped)
            changed += count
    assert changed > 0


def make_row(group: int, said: Sequence[str]) -> dict:
    names = (ASKED, ACCEPTED, SPARED, STORED)
    values = dict(zip(names, said, strict=True))
    hits = {name: text == "right" for name, text in values.items()}
    scores = {name: float(hit) for name, hit in hits.items()}
    return {"reworded": 4, "accepted": 1, "best": 0, "group": group, "said": values, "hit": hits, "f1": scores}


def test_the_table_pairs_each_wording_with_the_asked_one() -> None:
    rows = [make_row(0, ("right", "right", "right", "wrong")), make_row(1, ("wrong", "right", "wrong", "wrong"))]
    asked, accepted, spared, stored = (line.split(" | ") for line in summarize(rows)[4:])
    assert [cells[2] for cells in (asked, accepted, spared, stored)] == ["0.500", "1.000", "0.500", "0.000"]
    assert [cells[4] for cells in (accepted, spared, stored)] == ["1, 0", "0, 0", "0, 1"]
    assert accepted[7] == "0.500" and spared[7] == "1.000"


def test_no_prompt_is_read_twice(make_engine: EngineMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("exact", max_context_tokens=4096)
    (case,) = make_text_cases("text_reworded", 1, 1, seed=0)
    short = {key: text[:40] for key, text in case.target.documents.items()}
    said = Answers(engine, tmp_path / "answers.jsonl").ask(case, ASKED, short)
    monkeypatch.setattr(engine, "generate", None)
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"prompt": "cut')
    assert Answers(engine, tmp_path / "answers.jsonl").ask(case, STORED, short) == said
