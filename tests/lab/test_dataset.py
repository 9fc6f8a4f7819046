"""Own documents and questions: what a file may hold, and the prompts that come of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from semsharekv_integrations import world
from semsharekv_integrations.lab.dataset import DATA, UNLIKE, Example, make_own_cases, read_examples
from semsharekv_integrations.lab.texts import complete

GOOD: dict[str, Any] = {"documents": {"a": "One {odd} text.", "b": "Another text."}, "question": "What?"}


def read(path: Path, *lines: object) -> list[Example]:
    file = path / "data.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return read_examples(file)


def test_lines_are_read_with_what_they_leave_out(tmp_path: Path) -> None:
    stored = {"z": "An old text."}
    plain, whole = read(tmp_path, GOOD, "", {**GOOD, "stored": stored, "answer": "this"})
    assert (plain.documents, plain.question, plain.stored, plain.answer) == (GOOD["documents"], "What?", None, None)
    assert (whole.stored, whole.answer) == (stored, "this")
    alone = {"documents": {"a": "One text."}, "question": "What?", "stored": stored}
    assert read(tmp_path, alone)[0].stored == stored


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: the line is '{'; accepted is a JSON object of documents, question"),
        ("[1]", r"line 2: the line is \[1\]; accepted is a JSON object"),
        (
            {**GOOD, "anwser": "x"},
            "line 2: anwser is 'x'; accepted is a JSON object of documents, question, stored, answer",
        ),
        ({"question": "What?"}, "line 2: documents is None; accepted is an object of one or more texts by id"),
        ({**GOOD, "documents": {}}, "line 2: documents is {}"),
        ({**GOOD, "documents": {"a": " "}, "stored": {"b": "x"}}, r"line 2: documents\['a'\] is ' '; accepted is"),
        ({**GOOD, "documents": {"a": "x"}}, "line 2: documents is {'a': 'x'}; accepted is two or more where 'stored'"),
        ({**GOOD, "stored": {"a": 3}}, r"line 2: stored\['a'\] is 3; accepted is a string that is not blank"),
        ({**GOOD, "stored": []}, r"line 2: stored is \[\]; accepted is null, or an object"),
        ({"documents": GOOD["documents"]}, "line 2: question is None; accepted is a string"),
        ({**GOOD, "answer": 7}, "line 2: answer is 7; accepted is null, or a string"),
        ({**GOOD, "question": ["x" * 500]}, r"line 2: question is \['x{150,}\.\.\.x{150,}'\]; accepted"),
    ],
)
def test_a_bad_line_is_named_with_its_field(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.jsonl, {message}"):
        read(tmp_path, GOOD, line)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.jsonl: the file is empty; accepted is one JSON object"):
        read(tmp_path, "")


def text_of(prompt: str | list[world.Message]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


@pytest.mark.parametrize("is_plain", [False, True])
def test_prompts_hold_the_texts_as_they_are(tmp_path: Path, is_plain: bool) -> None:
    example = {**GOOD, "answer": "odd"}
    (case,) = make_own_cases(DATA, read(tmp_path, example), 0)
    case = complete(case) if is_plain else case
    assert isinstance(case.target.prompt, str) is is_plain
    (reference,), target = case.references, case.target
    assert dict(target.documents) == GOOD["documents"] == dict(reference.documents)
    assert list(target.documents) != list(reference.documents), "stored in another order"
    for query in (reference, target):
        places = [text_of(query.prompt).index(text) for text in query.documents.values()]
        assert places == sorted(places)
    assert "What?" in text_of(target.prompt) and "What?" not in text_of(reference.prompt)
    assert (case.scenario, case.answer, case.values, case.stale) == ("data", "odd", ("odd",), None)
    assert case.in_order is not None and list(case.in_order.documents) == list(reference.documents)


def test_what_was_stored_stands_in_the_reference(tmp_path: Path) -> None:
    (case,) = make_own_cases(DATA, read(tmp_path, {**GOOD, "stored": {"z": "An old text."}}), 0)
    assert dict(case.references[0].documents) == {"z": "An old text."} and case.answer is None and not case.values


def test_the_negative_control_shares_no_text(tmp_path: Path) -> None:
    other = {"documents": {"c": "A third text.", "d": "A fourth text."}, "question": "Which?"}
    same = {**GOOD, "question": "Who?"}
    cases = list(make_own_cases(UNLIKE, read(tmp_path, GOOD, same, other), 0))
    assert [case.scenario for case in cases] == [UNLIKE] * 3
    for case in cases:
        assert not set(case.references[0].documents.values()) & set(case.target.documents.values())
    assert not list(make_own_cases(UNLIKE, read(tmp_path, GOOD, same), 0)), "there is no other one"
