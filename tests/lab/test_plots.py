"""Plots of answers and of speed, from whatever was measured."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

import plots
from lengths import name_scenario
from semsharekv_integrations.lab.figures import Estimate, Row


def answered(scenario: str, compute: float, policy: str = "identical") -> Row:
    figures = {"compute_ratio": Estimate(compute, compute, compute), "accuracy": Estimate(0.9, 0.8, 1.0)}
    return Row(scenario, policy, 3, 0, figures)


def timed(scenario: str, length: int, policy: str, compute: float | None) -> Row:
    known = {"ttft_ratio": 2.0, "prompt_tokens": length - 3} | ({} if compute is None else {"compute_ratio": compute})
    figures = {name: Estimate(*(v,) * 3) for name, v in known.items()}
    return Row(name_scenario(scenario, length), policy, 3, 1, figures)


def test_every_point_of_every_panel_is_in_the_picture() -> None:
    rows = [answered("turns", 0.1), answered("edited", 0.6)]
    panels = plots._place_points(rows, plots.BY_COMPUTE, "accuracy")
    picture = plots._draw_panels(panels, rows, "Title", plots.BY_COMPUTE, "accuracy", "answer accuracy")
    assert len(picture.axes) == 2
    for plot in picture.axes:
        left, right = plot.get_xlim()
        assert left == 0 and right >= 0.6


def test_controls_are_no_points() -> None:
    rows = [answered("edited", 1.0, "off"), answered("unlike", 0.3), answered("edited", 0.2)]
    assert plots._place_points(rows, plots.BY_COMPUTE, "accuracy").keys() == {"edited"}


def test_a_json_file_is_drawn_beside_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        timed(scenario, length, policy, compute)
        for scenario in ("reordered", "unlike")
        for length in (512, 2048)
        for policy, compute in (("off", 1.0), ("identical", 0.2), ("HuggingFaceLLM", None))
    ]
    failed = Row(name_scenario("reordered", 9000), "all", note="out of memory")
    path = tmp_path / "speed.json"
    path.write_text(
        json.dumps({"title": "tiny", "rows": [asdict(r) for r in (*rows, failed, answered("edited", 0.2))]})
    )
    plots.main([str(path)])
    drawn = sorted(found.name for found in tmp_path.glob("*.png"))
    assert drawn == ["speed-shares.png", "speed-speedup.png", "speed.accuracy.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in drawn)
    said = capsys.readouterr().out
    assert all(name in said for name in drawn)
    assert plots.draw_speed([failed], "tiny", path) == []
