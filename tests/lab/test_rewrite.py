"""Rewritings that count: the same facts in other words, about as long; and texts that keep their length."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

import rewrite
from rewrite import CopyPenalty, NameBook, Part, fit_lengths, run_rounds

SOURCE = "The council of Velmar closed the bridge for 3 weeks because its pier had sunk."
BOOK = NameBook([SOURCE, "They said that repairs in Osteck took longer, since weeks of rain fell on the bridge."])


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ("The council of Velmar shut the bridge for 3 weeks, since its pier had subsided.", None),
        ("Repairs shut the bridge of the Velmar council for 3 weeks since its pier had sunk.", None),
        ("the council of Velmar closed the bridge, for 3 weeks because its pier had sunk", "as it was"),
        ("The council of Velmar shut the bridge for 4 weeks, since its pier had subsided.", "facts"),
        ("The council of Osteck shut the bridge for 3 weeks, since its pier had subsided.", "facts"),
        ("The council shut the bridge for 3 weeks, since its old pier had subsided.", "facts"),
        ("The council of Velmar did not close the bridge for 3 weeks, as its pier sank.", "facts"),
        ("Osteck and Velmar closed the bridge for 3 weeks because its pier had sunk.", "facts"),
        ("Velmar shut it for 3 weeks.", "length"),
        ("I am sorry, but in Velmar nobody has told me so for these 3 weeks.", "words"),
        ("The council of Velmar closed the bridge for 3 weeks because its piers had sunk.", "words"),
    ],
)
def test_a_rewriting_counts_if_it_says_the_same_facts_in_other_words(said: str, fault: str | None) -> None:
    assert BOOK.find_fault(SOURCE, said) == fault


def test_a_contracted_negation_is_the_same_as_a_written_one() -> None:
    one, other = "He says that we don't close it today.", "He says that today we do not close it."
    assert BOOK.find_fault(one, other) is None
    assert BOOK.list_facts(one) != BOOK.list_facts("He says that we close it today.")


def test_texts_keep_their_length_and_only_what_changes_it_most_stays_as_it_was() -> None:
    parts = [(10, 11), (10, 18), (10, 9), (10, 12)]
    assert fit_lengths({"long": parts, "right": [(10, 11), (10, 9)]}, {}) == {"long": {1}, "right": set()}
    assert fit_lengths({"short": [(10, 2), (10, 10), (10, 9)]}, {}) == {"short": {0}}
    assert fit_lengths({"short": [(10, 2), (10, 10), (10, 9)]}, {"short": 70}) == {"short": set()}
    for most in (0.0, 0.05, 0.3):
        kept = fit_lengths({"text": parts}, {}, most)["text"]
        after = sum(before if place in kept else now for place, (before, now) in enumerate(parts))
        assert abs(after - 40) <= most * 40


def test_going_on_to_copy_is_made_less_likely_but_facts_are_free() -> None:
    penalty = CopyPenalty([([5, 6, 7, 8], [False, False, False, True]), ([5, 6, 9, 8], [False] * 4)], 1, 2, 3.0)
    ids = torch.tensor([[1, 5, 6], [1, 5, 6]])
    scores = torch.zeros(2, 10)
    changed = penalty(ids, scores)
    assert changed.nonzero().tolist() == [[0, 7], [1, 9]] and changed.sum() == -6 and not scores.any()
    assert not penalty(torch.tensor([[1, 6, 7], [1, 6, 5]]), scores).any(), "8 states a fact; nothing was copied"


class Echo:
    """Answers with what it is asked, but from its second try on in other words."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def rewrite(self, sources: list[str], seed: str | None) -> list[str]:
        self.asked += sources
        return [source if seed is None else source.replace("closed", "shut").replace("had", "") for source in sources]


def test_a_later_run_goes_on_behind_an_earlier_one_and_tries_again_what_did_not_count(tmp_path: Path) -> None:
    parts = [Part("a", place, SOURCE.replace("3", str(place))) for place in range(5)]
    args = argparse.Namespace(out=tmp_path / "out.json", tries=1, batch=2, seed=0)
    first, second = Echo(), Echo()
    assert [each["fault"] for each in run_rounds(first, parts, BOOK, args)] == ["as it was"] * 5
    journal = tmp_path / "out.jsonl"
    journal.write_text(journal.read_text()[:-20])  # a kill tore the last line
    args.tries = 3
    tries = list(run_rounds(second, parts, BOOK, args))
    assert len(tries) == 10 and len(first.asked) == 5 and len(second.asked) == 1 + 5
    found = rewrite.collect(parts, tries, len, {})
    assert found["counts"]["rewritten"] == 5 and all(row["round"] == 1 for row in found["parts"])
    assert list(run_rounds(Echo(), parts, BOOK, args)) == tries


def test_turns_keep_their_tags_and_shipped_sentences_are_those_without_a_rewording(tmp_path: Path) -> None:
    path = tmp_path / "dialogues.json"
    path.write_text(json.dumps([{"dialogue": "#A#: Hello there.\nNo tag here."}, {"dialogue": "#B#: Bye."}]))
    assert rewrite.read_turns(path, 1) == [
        Part("dialogue 0", 0, "Hello there.", "#A#: "),
        Part("dialogue 0", 1, "No tag here."),
    ]
    shipped = rewrite.read_shipped()
    assert len({part.key for part in shipped}) == len(shipped) > 300


def test_quotes_and_what_follows_the_first_line_are_no_part_of_an_answer() -> None:
    assert rewrite.clean('\n "It is shut." \n\nNote: rewritten.') == "It is shut."
    assert rewrite.clean("") == ""
