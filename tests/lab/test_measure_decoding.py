"""The lab's measurement of decoding: its prompts are real tasks, and its page says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import measure_decoding
from measure_decoding import PLAIN, SCENARIOS, TASKS, Timed, make_prompt, make_rows
from semsharekv_integrations.lab.texts import read_passages


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_prompts_differ_and_end_with_what_is_asked(scenario: str) -> None:
    prompts = [make_prompt(scenario, index) for index in range(6)]
    assert len({json.dumps(prompt) for prompt in prompts}) == 6
    for prompt in prompts:
        roles = [message["role"] for message in prompt]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


def test_answers_that_are_shown_stand_in_their_text() -> None:
    passage = read_passages()[0]
    sentences, numbers, copied = (task(passage) for task in TASKS.values())
    assert json.loads(sentences)["sentences"] == list(passage.sentences)
    assert all(each["number"] in each["sentence"] in passage.text for each in json.loads(numbers))
    assert all(line.partition(" ")[2] in passage.text for line in copied.splitlines())


def test_the_page_has_a_row_for_each_way_with_ratios_within_a_prompt(tmp_path: Path) -> None:
    found = [
        {PLAIN: Timed([1, 2], rate), "ours": Timed([1, 2], 3 * rate, 4, 2), "generate": Timed([1, 3], 2 * rate)}
        for rate in (1.0, 5.0)
    ]
    plain, ours, generate = make_rows("chat", [*found, {name: Timed([1], 0.0) for name in found[0]}])
    assert "| 2 |" in plain and "| 1.00 [1.00, 1.00] |" in plain and plain.endswith("| 2 of 2 |")
    assert "| 3.00 [3.00, 3.00] | 4 of 8 |" in ours and generate.endswith("| 0 of 2 |")
    out = tmp_path / "decoding.md"
    options = ["--scenarios", "chat", "--prompts", "1", "--tokens", "5", "--out", str(out)]
    measure_decoding.main(["--model", "semsharekv/reference", *options])
    page = out.read_text()
    assert page.count("| chat |") == 5 and "--model reference " in page and str(tmp_path) not in page
