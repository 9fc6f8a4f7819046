"""A user's own folder: how it is cut, what is asked of it, and what a run over it recommends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from semsharekv_integrations import EngineConfig, ReuseConfig
from semsharekv_integrations.cli.main import main
from semsharekv_integrations.lab.advice import MOST_KL, recommend
from semsharekv_integrations.lab.figures import Outcome
from semsharekv_integrations.lab.folder import (
    GENERAL,
    PASSAGE_WORDS,
    SCENARIOS,
    choose_size,
    digest_folder,
    read_folder,
)
from semsharekv_integrations.lab.policies import UNBOUNDED
from semsharekv_integrations.lab.texts import make_text_cases
from semsharekv_integrations.report import ReuseReport

TOWNS = ("Prorna", "Velmar", "Tolmin", "Ashford", "Kelso", "Brinmoor", "Dorana", "Elmot")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with one passage of each town but the last, which is long, and what is no document."""
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for town in TOWNS[:-1]:
        (folder / "deep" / f"{town}.md").write_text(f"{town} has a mayor. The harbour of {town} is old.\n\n")
    (folder / f"{TOWNS[-1]}.txt").write_text(
        "".join(f"House {n} of {TOWNS[-1]} is red and stands alone. " for n in range(60))
    )
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "binary.txt").write_bytes(b"\0\1")
    return folder


def test_passages_hold_every_word_of_the_documents_once_and_are_short(texts: Path) -> None:
    passages = read_folder(texts)
    whole = " ".join(
        path.read_text()
        for path in sorted(texts.rglob("*"))
        if path.suffix in (".md", ".txt") and path.stem != "binary"
    )
    assert sorted(" ".join(passage.text for passage in passages).split()) == sorted(whole.split())
    assert all(0 < len(passage.text.split()) <= PASSAGE_WORDS for passage in passages)
    assert [passage.id for passage in passages][:2] == ["Elmot.txt, passage 1", "Elmot.txt, passage 2"]
    assert len(passages) > len(TOWNS)


def test_questions_are_about_what_a_passage_alone_has_or_the_users_own(texts: Path) -> None:
    for passage in read_folder(texts):
        _, topic, *rest = (question.text for question in passage.questions)
        assert tuple(rest) == GENERAL and passage.id.split(".")[0].removeprefix("deep/") in topic
    own = ("Who rules?", "What are the passages about?")
    for passage in read_folder(texts, own):
        stored, *asked = (question.text for question in passage.questions)
        assert tuple(asked) == own and stored not in own


@pytest.mark.parametrize("name", SCENARIOS)
def test_cases_have_no_right_answer_and_never_ask_what_is_stored(name: str, texts: Path) -> None:
    passages = read_folder(texts)
    cases = list(make_text_cases(name, 3, 3, 0, passages, choose_size(passages, None)))
    assert len(cases) == 9
    for case in cases:
        assert case.answer is None and not case.values and case.place is not None
        assert case.target.prompt[-1]["content"] != case.references[0].prompt[-1]["content"]


def test_what_a_folder_holds_decides_how_many_passages_stand_in_a_prompt(texts: Path) -> None:
    passages = read_folder(texts)
    assert choose_size(passages, None) == len(passages) // 2 and choose_size(passages, 3) == 3
    with pytest.raises(ValueError, match=f"passages is 6; accepted is a whole number from 2 to {len(passages) // 2}"):
        choose_size(passages, 6)


def test_a_folder_around_the_working_directory_is_read_whole(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_folder(texts)
    monkeypatch.chdir(texts / "deep")
    assert read_folder(texts) == read_folder(Path("..")) == before


def test_a_folders_digest_follows_its_texts_alone(texts: Path) -> None:
    before = digest_folder(texts)
    (texts / "picture.png").write_bytes(b"other")
    assert digest_folder(texts) == before
    (texts / "deep" / "Kelso.md").write_text("Kelso has no mayor any more.")
    assert digest_folder(texts) != before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--documents", "nowhere"], "--documents is 'nowhere'; accepted is a folder of documents"),
        (["--documents", "few"], "few (1 passages)'; accepted is a folder whose files (.md, .txt) make 4"),
        (["--documents", "texts", "--data", "x.jsonl"], "--documents and --data are given; accepted is one of them"),
        (
            ["--documents", "texts", "--scenarios", "text_edited"],
            "--scenarios is 'text_edited'; accepted is one of text_re",
        ),
        (["--documents", "texts", "--ask", " "], "--ask is [' ']; accepted is a question that is not blank"),
        (["--documents", "texts", "--passages", "40"], "passages is 40; accepted is a whole number from 2 to"),
        (["--ask", "What?"], "--ask is ['What?']; accepted is nothing without --documents"),
    ],
)
def test_what_nothing_can_be_measured_on_is_refused_before_the_model_loads(
    line: list[str], message: str, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(texts.parent)
    (texts.parent / "few").mkdir()
    (texts.parent / "few" / "one.txt").write_text("One text.")
    assert main(["bench", "--model", "no-such-model", *line]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_built_in_model_is_refused_unless_it_is_named(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--documents", str(texts)]) == 2
    assert "--model is None; accepted is a folder or hub id of a model" in " ".join(capsys.readouterr().err.split())


def test_a_run_over_a_folder_ends_with_a_recommendation(
    texts: Path, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "own.md"
    few = ["--groups", "1", "--questions", "2", "--max-new-tokens", "3", "--scenarios", "text_reordered"]
    line = ["bench", "--model", folder, "--documents", str(texts), *few, "--policy", "whole=identical,budget=1.0"]
    assert main([*line, "--out", str(out)]) == 0
    written = json.loads(out.with_suffix(".json").read_text())
    assert {o["policy"] for o in written["outcomes"]} == {"off", "exact", "whole"}
    assert all(o["right"] is None for o in written["outcomes"])
    assert written["conclusion"].startswith("Recommended: ReuseConfig(mode=")
    assert written["conclusion"] in out.read_text()
    printed = capsys.readouterr()
    assert "Recommended: ReuseConfig" in printed.out
    assert "binary.txt is left out: it is binary" in printed.err and "picture" not in printed.err


CONFIGS = {
    name: EngineConfig(reuse=reuse)
    for name, reuse in {
        "off": ReuseConfig(mode="off"),
        "exact": ReuseConfig(mode="exact"),
        "near": ReuseConfig(mode="identical", budget=0.5),
        "fast": ReuseConfig(mode="identical", budget=0.2),
    }.items()
}


def outcomes_of(near: tuple[float, float], fast: tuple[float, float], fired: int = 300) -> list[Outcome]:
    """Four prompts under every policy. Of the approximate ones, KL and seconds are given."""
    found = []
    for case in range(4):
        for name, (kl, seconds) in {"off": (0.0, 3.0), "exact": (0.0, 3.0), "near": near, "fast": fast}.items():
            borrowed = fired if name in ("near", "fast") else 0
            report = ReuseReport(name, 500, identical_tokens=borrowed, ttft_s=seconds)
            found.append(Outcome("s", name, case, report, agrees=True, kl=() if name == "off" else (kl,), group=case))
    return found


@pytest.mark.parametrize(
    ("near", "fast", "expected"),
    [
        ((0.001, 2.0), (MOST_KL, 1.0), 'mode="identical", budget=0.2)'),  # both are near: the faster one
        ((0.001, 2.0), (MOST_KL + 0.001, 1.0), 'mode="identical", budget=0.5)'),  # one is not near
        (
            (0.001, 2.9),
            (0.5, 1.0),
            'mode="exact"). Of the approximate settings near a full prefill, the fastest, near,',
        ),
        ((0.4, 2.0), (0.5, 1.0), 'mode="exact"). No approximate setting stayed within'),
    ],
)
def test_the_fastest_setting_that_stays_near_a_full_prefill_is_recommended(
    near: tuple[float, float], fast: tuple[float, float], expected: str
) -> None:
    assert recommend(CONFIGS, outcomes_of(near, fast)).startswith(f"Recommended: ReuseConfig({expected}")


def test_a_recommendation_names_all_that_a_user_must_set() -> None:
    """Else what they set would not be what was measured."""
    wide = {**CONFIGS, "fast": EngineConfig(ReuseConfig("semantic", boundary_tokens=9), replace(UNBOUNDED, kv_bits=8))}
    said = recommend(wide, outcomes_of((0.5, 2.0), (0.0, 1.0)))
    written = 'ReuseConfig(mode="semantic", boundary_tokens=9) with StoreConfig(kv_bits=8)'
    assert said.startswith(f"Recommended: {written}.")


def test_prompts_that_a_setting_answers_as_exact_does_say_nothing_of_it() -> None:
    """Else many of them would hide how far the others are from a full prefill."""
    far = outcomes_of((0.001, 2.0), (0.06, 1.0))
    unused = [
        replace(outcome, scenario=f"t{number}")
        for number in range(8)
        for outcome in outcomes_of((0.0, 3.0), (0.0, 3.0), fired=0)
    ]
    assert "budget=0.5" in recommend(CONFIGS, [*far, *unused])
    assert "reused anything" in recommend(CONFIGS, unused)


def test_an_interval_that_reaches_too_far_is_said() -> None:
    even = outcomes_of((0.5, 2.0), (0.0, 1.0))
    uneven = [replace(o, kl=(0.06,)) if o.policy == "fast" and o.case == 0 else o for o in even]
    assert "The interval reaches beyond" in recommend(CONFIGS, uneven)
    assert "The interval reaches beyond" not in recommend(CONFIGS, even)
