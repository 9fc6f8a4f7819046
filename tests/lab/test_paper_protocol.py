"""Dialogues that are asked about in other words, or with turns gone or foreign, as the paper's authors measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("rouge_score")

import paper_protocol
from paper_protocol import BETWEEN, KINDS, Dialogue, change_turns, join_dialogues, make_cases, read_dialogues

DIALOGUES = [
    Dialogue(
        tuple(f"#P{turn % 2}#: turn {turn} of dialogue {number} says this" for turn in range(10)),
        {turn: f"#P{turn % 2}#: this is said by turn {turn} of dialogue {number}" for turn in range(0, 10, 2)},
        (f"Ten turns of {number}.", f"{number} has ten.", f"All of {number}."),
    )
    for number in range(8)
]


def count_words(text: str) -> int:
    return len(text.split())


def count_changes(before: Sequence[str], after: Sequence[str]) -> int:
    return sum(one != other for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 1.0])
def test_the_share_of_turns_that_change_is_what_is_asked_for(share: float) -> None:
    dialogue, others, wanted = DIALOGUES[0], DIALOGUES[1:], round(10 * share)
    rewritten, removed, replaced = (change_turns(dialogue, kind, share, Random(0), others) for kind in KINDS)
    assert count_changes(dialogue.turns, rewritten) == min(wanted, 5), "half of the turns have other words"
    assert all(turn in (dialogue.turns[place], dialogue.rewritten.get(place)) for place, turn in enumerate(rewritten))
    assert len(removed) == max(1, 10 - wanted) and [turn for turn in dialogue.turns if turn in removed] == list(removed)
    assert count_changes(dialogue.turns, replaced) == wanted
    assert all(turn in dialogue.turns or any(turn in other.turns for other in others) for turn in replaced)


def test_dialogues_are_joined_up_to_a_length_and_one_is_always_there() -> None:
    alone = join_dialogues(DIALOGUES, 1, count_words, Random(0))
    assert len(alone) == 1
    joined = join_dialogues(DIALOGUES, 250, count_words, Random(0))
    text = BETWEEN.join("\n".join(dialogue.turns) for dialogue in joined)
    assert len(joined) == 3 and count_words(text) <= 250 and joined[0] == alone[0]


def test_cases_of_every_kind_and_share_ask_about_the_same_dialogues() -> None:
    drawn = {
        (kind, share): list(make_cases(kind, share, 250, 3, 0, DIALOGUES, count_words))
        for kind in KINDS
        for share in (0.2, 1.0)
    }
    first = drawn["rewritten", 1.0]
    for cases in drawn.values():
        assert [case.references for case in cases] == [case.references for case in first]
        assert [case.answer for case in cases] == [case.answer for case in first]
        for case in cases:
            assert case.target != case.references[0] and len(case.answer.split(BETWEEN)) == 3
            message = case.target.prompt[-1]
            assert all(text in message["content"] for text in case.target.documents.values())
            assert message["content"].endswith(paper_protocol.REQUEST)
    assert list(make_cases("removed", 0.2, 250, 2, 0, DIALOGUES, count_words)) == drawn["removed", 0.2][:2]
    assert len({case.answer for case in first}) == 3


def test_only_dialogues_that_were_rewritten_are_read_with_their_tags(tmp_path: Path) -> None:
    said, parts = tmp_path / "dialogues.json", tmp_path / "rewritten.json"
    said.write_text(
        json.dumps([{"dialogue": f"#A#: one {n}\n#B#: two {n}", "summaries": ["S  1\n."]} for n in range(3)])
    )
    rows = [
        {"text": "dialogue 1", "place": 0, "tag": "#A#: ", "rewritten": "uno"},
        {"text": "dialogue 1", "place": 1, "tag": "#B#: ", "rewritten": None},
    ]
    parts.write_text(json.dumps({"parts": rows}))
    assert read_dialogues(said, parts) == [Dialogue(("#A#: one 1", "#B#: two 1"), {0: "#A#: uno"}, ("S 1 .",))]


def test_summaries_are_scored_to_every_person_and_to_a_full_prefill(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said, parts, out = (tmp_path / name for name in ("dialogues.json", "rewritten.json", "out.md"))
    said.write_text(json.dumps([{"dialogue": "\n".join(d.turns), "summaries": d.summaries} for d in DIALOGUES]))
    rows = [
        {"text": f"dialogue {number}", "place": place, "tag": "", "rewritten": text}
        for number, dialogue in enumerate(DIALOGUES)
        for place, text in dialogue.rewritten.items()
    ]
    parts.write_text(json.dumps({"parts": rows}))
    where = ["--dialogues", str(said), "--rewritten", str(parts), "--model", folder, "--out", str(out)]
    how = ["--tokens", "300", "--cases", "2", "--max-new-tokens", "3", "--policies", "off", "paper", "zeroed"]
    paper_protocol.main([*where, *how, "--policy", "whole=paper,retention_ratio=1.0,max_deviation=1e9"])
    found = {row["policy"]: row["figures"] for row in json.loads(out.with_suffix(".json").read_text())["rows"]}
    assert set(found) == {"off", "paper", "zeroed", "whole"}
    for figures in found.values():
        assert 0 <= figures["rouge_l"][0] <= figures["best_rouge_l"][0] <= 1
        assert 0 < figures["changed"][0] < 0.5 < figures["paper_similarity"][0] <= 1
    assert found["off"]["rouge_l_to_full"][0] == 1 and found["paper"]["compute_ratio"][0] < 1
    assert found["paper"]["kv_kept_ratio"][0] < found["whole"]["kv_kept_ratio"][0] == 1
    paper_protocol.main(["tables", str(out.with_suffix(".json"))])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines if line.startswith("| rewritten 100% of 300")] == list(found)
