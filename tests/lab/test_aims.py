"""Aims for speed and memory are met or missed by what was measured, at the longest prompts up to 5,000 tokens."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

import aims
from lengths import name_scenario
from semsharekv_integrations.lab.figures import Estimate, Row


def row(scenario: str, policy: str, speedup: float, length: int = 4096, **figures: float) -> Row:
    known = {"ttft_ratio": speedup} | figures
    found = {name: Estimate(value, value, value) for name, value in known.items()}
    return Row(name_scenario(scenario, length), policy, 3, 1, found)


@pytest.mark.parametrize(
    ("measured", "met"),
    [
        (row("next_turn", "exact", 20.0), True),
        (row("next_turn", "exact", 19.9), False),
        (row("reordered", "identical", 10.0), True),
        (row("shared", "identical", 9.9), False),
        (row("reworded_30", "semantic", 6.25), True),
        (row("reworded_30", "semantic", 6.24), False),
        (row("unlike", "semantic", 1 / 1.029), True),
        (row("unlike", "semantic", 1 / 1.031), False),
    ],
)
def test_aims_are_met_or_missed(measured: Row, met: bool) -> None:
    (verdict,) = aims.judge([measured], ["exact", "identical", "semantic"])
    assert (verdict.met, verdict.policy, verdict.length) == (met, measured.policy, 4096)
    assert not aims.judge([measured], ["retained"])


@pytest.mark.parametrize(("kept", "met"), [(0.58, True), (0.584, True), (0.59, False), (1.0, False)])
def test_retention_is_held_against_the_kv_that_it_saves(kept: float, met: bool) -> None:
    speed_up, saved = aims.judge([row("shared", "retained", 1.0, kv_kept_ratio=kept)], ["retained"])
    assert not speed_up.met and (saved.met, saved.figure) == (met, f"{1 - kept:.1%} less")


def test_aims_are_held_against_the_longest_prompts_up_to_5k() -> None:
    rows = [row("reordered", "identical", 1.0, length=length) for length in (512, 4096, 8192)]
    assert aims.find_aim_length(rows) == 4096
    assert [verdict.length for verdict in aims.judge(rows, ["identical"])] == [4096]
    assert aims.find_aim_length([*rows, row("unlike", "x", 1.0, length=5000)]) == 5000
    assert aims.find_aim_length(rows[2:]) is None and not aims.judge(rows[2:], ["identical"])


def test_the_script_reads_what_the_bench_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "speed.json"
    for rows, line in (
        (
            [row("reordered", "identical", 12.0)],
            "| reordered: first token 10 times faster than off | identical | 4096 |",
        ),
        ([], "None of the scenarios"),
    ):
        path.write_text(json.dumps({"title": "x", "rows": [asdict(found) for found in rows]}))
        aims.main([str(path)])
        assert line in capsys.readouterr().out
