"""The comparison of classes in one chain: what is asked, what a page says of answers, and one way that runs."""

from __future__ import annotations

import json
import sys

import pytest

import compare_chains
from compare_chains import ABOUT, PLAIN, Answer, Asked, draw_questions, make_page, make_way
from semsharekv_integrations.lab.answers import holds_answer
from semsharekv_integrations.lab.texts import SIZE, Question

OURS = "langchain SemShareKVLLM exact, arranged"


def test_documents_of_a_set_move_from_question_to_question_and_hold_the_answers() -> None:
    asked = list(draw_questions(3, 10, 0))
    assert asked == list(draw_questions(3, 10, 0)) and asked != list(draw_questions(3, 10, 1))
    for group in range(3):
        own = [each for each in asked if each.group == group]
        assert len({each.question.text for each in own}) == 10
        assert len({frozenset(each.documents) for each in own}) == 1 and len(own[0].documents) == SIZE
        assert len({tuple(each.documents) for each in own}) > 5
        for each in own:
            texts = each.documents.values()
            assert any(holds_answer(text, gold) for text in texts for gold in each.question.golds)


@pytest.mark.parametrize("name", [PLAIN, "llama-index HuggingFaceLLM", "KVBoost"])
def test_what_is_not_installed_is_named_and_left_out(name: str, monkeypatch, capsys) -> None:
    for module in ("langchain_huggingface", "llama_index.llms.huggingface", "kvboost"):
        monkeypatch.setitem(sys.modules, module, None)
    compare_chains.work(name, "nothing")
    assert json.loads(capsys.readouterr().out)["missing"]


def test_the_chain_is_the_same_whatever_answers(folder: str) -> None:
    """Each way reads the same words of the documents; the arranged one in the stored order."""
    texts = {town: f"{town} has a mayor. The harbour of {town} is old and deep." for town in ("Velmar", "Karna")}
    ways = {name: make_way(name, folder) for name in (OURS, "transformers, cached prefix")}
    said = {}
    for name, way in ways.items():
        for order in (["Velmar", "Karna"], ["Karna", "Velmar"]):
            asked = Asked(0, Question("Who rules?", ()), {town: texts[town] for town in order})
            ttft_s, text = compare_chains.answer(way, asked)
            assert ttft_s > 0
            said[name, *order] = text
    first = [text for (_, *order), text in said.items() if order[0] == "Velmar"]
    assert first[0] == first[1], "a full prefill of the same prompt"
    assert said[OURS, "Karna", "Velmar"] == first[0], "arranged, it is the same prompt"


def answers_of(seconds: float, texts: list[str]) -> list[Answer]:
    return [Answer(seconds * (1 + place), text, 1024**2) for place, text in enumerate(texts)]


def test_a_page_says_who_is_faster_and_who_is_right_question_by_question() -> None:
    golds = ("red", "blue", "green", "grey")
    asked = [Asked(place // 2, Question(f"{place}?", (gold,)), {}) for place, gold in enumerate(golds)]
    found = {PLAIN: answers_of(2.0, list(golds)), OURS: answers_of(0.5, ["red", "pink", "green", "grey"])}
    page = make_page("command", found, {"KVBoost": "no module"}, asked)
    plain, ours = (line.split(" | ") for line in page.splitlines() if line.startswith("| langchain"))
    assert plain[3] == "1.0 [1.0, 1.0]" and ours[3] == "4.0 [4.0, 4.0]"
    assert plain[4:7] == ["4 of 4", "+0.0 [+0.0, +0.0]", "100%"] and ours[4] == "3 of 4"
    assert ours[5].startswith("-25.0") and ours[6] == "75%"
    assert plain[2] == "6.00", "of the second and the fourth question: the others are the first of their set"
    assert "Not installed: KVBoost (no module)" in page and ABOUT[OURS] in page
