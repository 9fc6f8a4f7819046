"""Runs that go on where an earlier one stopped, that share their cases, and policies from the command line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from test_text_bench import PASSAGES

from semsharekv_integrations.lab import command, texts
from semsharekv_integrations.lab.bench import Bench, Results
from semsharekv_integrations.lab.figures import Failure, Outcome
from semsharekv_integrations.lab.journal import Entry, Journal
from semsharekv_integrations.report import AuditResult, DocumentUse, ReuseReport, SourceUse

TEXT = ["--scenarios", "text_reordered", "--groups", "2", "--questions", "3", "--policies", "off", "exact", "chunks"]


@pytest.fixture(autouse=True)
def few_passages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "read_passages", lambda: PASSAGES)


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="semsharekv bench")
    command.add_arguments(parser)
    return parser.parse_args(arguments)


def run(out: Path, folder: str, *arguments: str) -> dict[str, Any]:
    """What the command leaves in its JSON."""
    line = ["--model", folder, "--max-new-tokens", "3", "--device", "cpu", *arguments, "--out", str(out)]
    assert command.run(parsed(*line)) == 0
    return json.loads(out.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def whole(folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run in one piece finds."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(texts, "read_passages", lambda: PASSAGES)
        return run(tmp_path_factory.mktemp("whole") / "whole.md", folder, *TEXT)


@pytest.fixture(scope="module")
def begun(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run over the first group of cases; its journal lies beside it."""
    out = tmp_path_factory.mktemp("begun") / "x.md"
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(texts, "read_passages", lambda: PASSAGES)
        run(out, folder, *TEXT, "--groups", "1")
    return out


def said_in(written: dict[str, Any]) -> list[tuple[Any, ...]]:
    """All that does not depend on the clock, or on whether a full prefill was shared."""
    return [
        (o["scenario"], o["case"], o["group"], o["policy"], o["text"], o["right"], o["agrees"], o["f1"], o["top1"])
        for o in written["outcomes"]
    ]


def figures_in(written: dict[str, Any]) -> list[tuple[Any, ...]]:
    names = ("accuracy", "difference_points", "agreement", "f1", "mcnemar_p", "top1")
    return [
        (row["scenario"], row["policy"], row["cases"], row["groups"], *(row["figures"].get(name) for name in names))
        for row in written["rows"]
    ]


@pytest.mark.parametrize("torn", ["", '{"scenario": "text_reordered", "leng'])
def test_a_run_that_was_ended_goes_on_to_the_same_results(
    torn: str, tmp_path: Path, folder: str, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    measure = Bench._measure_case

    def break_at_the_third(self: Bench, scenario, index: int, *rest) -> Results:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(index)
        return measure(self, scenario, index, *rest)

    monkeypatch.setattr(Bench, "_measure_case", break_at_the_third)
    out = tmp_path / "broken.md"
    with pytest.raises(KeyboardInterrupt):
        run(out, folder, *TEXT)
    journal = out.with_suffix(".jsonl")
    assert len(journal.read_text().splitlines()) == 3, "a header and two cases"
    journal.write_text(journal.read_text() + torn)
    monkeypatch.setattr(Bench, "_measure_case", lambda *rest: (measured.append(rest[2]), measure(*rest))[1])
    found = run(out, folder, *TEXT)
    assert len(measured) == 6, "each case once"
    assert said_in(found) == said_in(whole) and figures_in(found) == figures_in(whole)
    run(out, folder, *TEXT)
    assert len(measured) == 6, "all of them are there"


def test_a_longer_run_goes_on_from_a_shorter_one(
    tmp_path: Path, folder: str, begun: Path, whole: dict[str, Any]
) -> None:
    copytree(begun.parent, tmp_path, dirs_exist_ok=True)
    assert said_in(run(tmp_path / begun.name, folder, *TEXT)) == said_in(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seed", "1"], "seed is 0 in .*x.jsonl, of an earlier run; accepted is 1 as in this run, or another --out"),
        (["--questions", "2"], "questions is 3 in"),
        (["--passages", "3"], "passages is None in"),
        (["--policies", "off", "identical"], r"policies.identical is None in"),
        (["--policy", "own=identical"], "policies.own is None in"),
        (["--dtype", "float64"], "dtype is 'float32' in"),
        (["--scenarios", "text_system"], "scenarios is"),
        (["--max-new-tokens", "2"], "scenarios is"),
    ],
)
def test_a_journal_of_other_arguments_is_refused_and_kept(
    change: list[str], message: str, folder: str, begun: Path
) -> None:
    before = begun.with_suffix(".jsonl").read_bytes()
    with pytest.raises(ValueError, match=message):
        run(begun, folder, *TEXT, *change)
    assert begun.with_suffix(".jsonl").read_bytes() == before


def test_what_is_no_journal_is_left_as_it_is(tmp_path: Path, folder: str) -> None:
    other = tmp_path / "x.jsonl"
    other.write_text("some notes\nwithout an end")
    with pytest.raises(ValueError, match=r"x\.jsonl is no journal of this command; accepted is another --out"):
        run(tmp_path / "x.md", folder, *TEXT)
    assert other.read_text() == "some notes\nwithout an end"


def test_processes_give_the_rows_of_one(tmp_path: Path, folder: str, whole: dict[str, Any]) -> None:
    two = run(tmp_path / "two.md", folder, *TEXT, "--processes", "2")
    assert said_in(whole) == said_in(two) and figures_in(whole) == figures_in(two) and two["threads"] == 1


def test_a_process_that_fails_is_told_and_the_rest_is_kept(tmp_path: Path, folder: str) -> None:
    out = tmp_path / "x.md"
    with pytest.raises(ValueError, match="--out is None; accepted is"):
        command.run(parsed("--processes", "2", "--quick"))
    args = parsed("--model", folder, *TEXT, "--processes", "2", "--out", str(out))
    study, subject = command.prepare(args)
    with pytest.raises(ValueError, match="--processes is 2; accepted is 1 for this command"):
        command.run_study(study, subject, args)
    assert not out.exists()


def test_an_entry_comes_back_as_it_went_in(tmp_path: Path) -> None:
    report = ReuseReport(
        "identical",
        9,
        identical_tokens=4,
        sources=(SourceUse("r", 4),),
        documents=(DocumentUse("d", 5, 4),),
        audit=AuditResult(True, 0.1, 2),
        phases_s={"forward": 0.25},
        declined="so",
    )
    outcome = Outcome("s", "x", 3, report, "tëxt\n", right=True, extra={"a": 1}, group=2, kl=(0.1, 1e-9))
    entries = [
        Entry("s", 3, 0.5, (outcome,), (Failure("s", "y", "no"),)),
        Entry("s", None, 0.0, (), (Failure("s", "all", "no"),)),
    ]
    for path in (tmp_path / "new" / "j.jsonl", None):
        journal = Journal(path, {"seed": 0})
        for entry in entries:
            journal.add(entry)
        assert journal.read() == entries[::-1]
    journal.add(entries[0])
    assert len(Journal(tmp_path / "new" / "j.jsonl", {"seed": 0}).read()) == 2


def test_any_policy_can_be_named(folder: str) -> None:
    wide = "wide=identical,boundary_tokens=16,attention_ratio=0.1,relevance_ratio=0,final_share=1"
    args = parsed("--model", folder, *TEXT[:-4], "--policy", wide, "--policy", "plain=exact")
    study, _ = command.prepare(args)
    assert list(study.configs) == ["off", "wide", "plain"] and wide in study.about["wide"]
    reuse = study.configs["wide"].reuse
    assert (reuse.mode, reuse.boundary_tokens, reuse.attention_ratio, reuse.final_share) == ("identical", 16, 0.1, 1)
    assert study.configs["wide"].store == study.configs["plain"].store
    with pytest.raises(ValueError, match="--policy is 'exact'; accepted is a name that is not taken"):
        command.prepare(parsed("--model", folder, *TEXT, "--policy", "exact=identical"))
    with pytest.raises(ValueError, match="--policy is 'a'; accepted is a name that is not taken"):
        command.prepare(parsed("--model", folder, *TEXT, "--policy", "a=exact", "--policy", "a=identical"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wide", "accepted is NAME=MODE[,KEY=VALUE...] with a mode of off, exact, identical"),
        ("=identical", "accepted is NAME=MODE"),
        ("wide=fast", "accepted is NAME=MODE"),
        ("wide=identical,boundary=16", "sets boundary; accepted is min_prefix_tokens"),
        ("wide=identical,boundary_tokens=-1", "reuse.boundary_tokens is -1"),
        ("wide=identical,boundary_tokens", "has no '='"),
        ("wide=exact,boundary_tokens=3", "reuse.boundary_tokens is 3; accepted is None in mode 'exact'"),
    ],
)
def test_a_bad_policy_is_refused(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--policy", text)
    assert message in capsys.readouterr().err


def test_sizes_of_text_need_a_scenario_on_text(folder: str) -> None:
    for option in ("--questions", "--passages"):
        with pytest.raises(ValueError, match=rf"{option} is 2; accepted is nothing without .*text_reordered"):
            command.prepare(parsed("--model", "no/such/model", "--data", "x.jsonl", option, "2"))
    with pytest.raises(ValueError, match=r"--passages is 2; accepted is nothing without .*text_reordered"):
        command.prepare(parsed("--model", "no/such/model", "--scenarios", "musique", "--passages", "2"))
    with pytest.raises(ValueError, match="passages is 7; accepted is a whole number from 2 to 6"):
        command.prepare(parsed("--model", "no/such/model", *TEXT, "--passages", "7"))


def test_prompts_have_as_many_paragraphs_as_asked_for(folder: str) -> None:
    study, _ = command.prepare(parsed("--model", folder, *TEXT, "--passages", "3"))
    (scenario,) = study.scenarios
    assert {len(case.target.documents) for case in scenario.cases} == {3}


def test_text_is_judged_by_gold_answers_on_a_page_of_its_own(tmp_path: Path, folder: str) -> None:
    out = tmp_path / "x.md"
    run(out, folder, *TEXT, "order", "--scenarios", "text_reordered", "text_system")
    page = out.read_text()
    assert "## text_reordered" in page and "## text_system" in page
    rows = [line for line in page.splitlines() if line.startswith("| text_reordered")]
    assert [row.split(" | ")[1:4] for row in rows] == [
        ["off", "6", "2"],
        ["exact", "6", "2"],
        ["chunks", "2", "2"],
        ["order", "2", "2"],
    ]
    assert "McNemar's p" in page and "bootstraps over groups" in page
