"""Reports: what a table shows and leaves out, what stands above it, and files that are put in place whole."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from test_figures import DRAWN

from semsharekv_integrations.lab import report
from semsharekv_integrations.lab.bench import Results
from semsharekv_integrations.lab.figures import FIGURES, Failure, Figure, summarize

ABOUT = {
    "command": "semsharekv bench",
    "commit": "0123456789abcdef",
    "uncommitted_changes": True,
    "versions": {"torch": "2"},
    "title": "Answers",
    "model": "tiny",
    "dtype": "float32",
    "device": "a CPU",
    "threads": 1,
    "seed": 3,
    "seconds": 1.5,
    "note": "Random weights.",
    "about_policies": {"exact": "The longest prefix."},
}


def cells_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_table_shows_each_row_and_no_empty_column() -> None:
    table = report.make_table(summarize(DRAWN))
    heads, _, off, identical = cells_of(table)
    assert len(heads) == len(off) == len(identical)
    assert not {"KV kept", "KL", "note", "groups", "than exact"} & set(heads)
    assert off[:3] == ["edited", "off", "5"] and identical[:3] == ["edited", "identical", "5"]
    shown = dict(zip(heads, identical, strict=True))
    assert shown["accuracy"].startswith("0.600 [") and shown["difference in points"].startswith("+0.0 [")
    assert shown["agreement"].startswith("0.800 [") and shown["stale"].startswith("0.500 [")
    assert shown["compute"].startswith("0.300 [") and shown["times faster than off"].startswith("2.00 [")
    kept = [replace(o, report=replace(o.report, kv_retained_ratio=0.4)) for o in DRAWN]
    assert "KV kept" in report.make_table(summarize(kept))


def test_what_is_not_known_has_no_column() -> None:
    unknown = [replace(outcome, right=None, stale=None) for outcome in DRAWN]
    assert "accuracy" not in report.make_table(summarize(unknown))


def test_a_page_holds_losses_failures_and_where_it_comes_from() -> None:
    slow = [
        replace(o, policy="semantic", report=replace(o.report, ttft_s=100.0, declined="so | so")) for o in DRAWN[5:]
    ]
    failures = [Failure("reordered", "all", "out of memory"), Failure("edited", "identical", "broken")]
    text = report.make_page(ABOUT, summarize([*DRAWN, *slow], failures))
    for line in (
        "`semsharekv bench` at commit 0123456789ab with uncommitted changes: model tiny in float32 on a CPU, 1 thread,",
        "| 100000.0 | 0.02 [0.02, 0.06]",
        "| so / so |",
        "out of memory |",
        "broken |",
        "Random weights.",
        "- exact: The longest prefix.",
    ):
        assert line in text, line
    tables = [part for part in text.split("\n\n") if part.startswith("| ")]
    assert len(tables) == 2 and all(len({len(row) for row in cells_of(table)}) == 1 for table in tables)


def test_a_figure_of_a_study_stands_with_the_answers() -> None:
    rouge = Figure("rouge", "ROUGE", ".3f", lambda pair: 0.5)
    figures = (*FIGURES, rouge)
    page = report.make_page(ABOUT, summarize(DRAWN, figures=figures), figures)
    assert "| ROUGE |" in page and "ROUGE" not in report.make_page(ABOUT, summarize(DRAWN))


def test_a_terminal_shows_a_table_of_each_scenario_within_80_columns() -> None:
    screen = Console(file=StringIO(), width=80)
    long = [replace(o, scenario="text_next_turn", kl=(0.1,), top1=1.0, group=o.case) for o in DRAWN]
    long = [replace(o, report=replace(o.report, declined="so | so" if o.policy != "off" else None)) for o in long]
    report.print_rows(screen, summarize([*DRAWN, *long], [Failure("reordered", "all", "out of memory")]))
    lines = screen.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.strip() == "text_next_turn" for line in lines)
    assert any("identical" in line and "0.60" in line and "2.00" in line for line in lines)
    assert any("so | so: text_next_turn identical" in line for line in lines)
    assert any("out of memory: reordered all" in line for line in lines)


def test_json_has_every_figure_with_its_interval_and_all_that_was_measured(tmp_path: Path) -> None:
    rows, results = summarize(DRAWN), Results(list(DRAWN), [Failure("x", "all", "so")])
    out = tmp_path / "new" / "x.md"
    report.write_files(out, ABOUT, rows, results)
    written = json.loads(out.with_suffix(".json").read_text())
    assert written["rows"][1]["figures"]["accuracy"] == list(rows[1]["accuracy"]) and written["seed"] == 3
    assert len(written["outcomes"]) == len(DRAWN) and written["failures"][0]["reason"] == "so"
    assert written["outcomes"][5]["report"]["identical_tokens"] == 90
    assert "outcomes" not in json.loads(report.make_json(ABOUT, rows))


def test_the_command_of_a_file_does_not_say_where_it_went() -> None:
    assert report.record_command("x", ["bench", "--out", "x.md", "--cases", "3"]) == "x bench --cases 3"
    assert report.record_command("x", ["bench", "--out=x.md", "--set", "a=b c"]) == "x bench --set 'a=b c'"


def test_files_are_put_in_place_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "x.md"
    report.write_whole(path, "first")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        report.write_whole(path, "second")
    assert path.read_text() == "first"
