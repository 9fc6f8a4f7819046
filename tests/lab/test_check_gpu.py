"""The checks for a GPU run on the simulated one, report what fails and go on, and hold its counts under bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import check_gpu
from check_gpu import SECTIONS, Section, main, parse
from gpu.cases import CASES
from gpu.checks import Checks
from gpu.subjects import TimedSubject
from gpu.waits import count_call
from simulated_device import explain_absence

PRETENDING = ["--device", "cpu", "--pretend", "--preset", "tiny", "--quick", "--seconds", "3000"]
SMALL = [*PRETENDING, "--layers", "2", "--lengths", "400"]
# The rest is a matter of the whole run: each takes seconds
LEFT_OUT = {"mode off", "mode semantic", "mode paper", "KV in 8 bits", "sampling", "sampling by seed"}
LEFT_OUT |= {"session", "audit", "loaded by name"}
SHORT = [name for name in CASES if name not in LEFT_OUT]
pytestmark = pytest.mark.skipif(bool(explain_absence()), reason=explain_absence() or "a device can be pretended")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_those_of_the_cpu_however_the_engine_is_used(tmp_path: Path) -> None:
    out = tmp_path / "found.jsonl"
    assert main([*SMALL, "--sections", "env", "correct", "--cases", *SHORT, "--out", str(out)]) == 0
    found = {line["what"]: line for line in read_lines(out) if "as_on_the_cpu" in line}
    assert set(found) == set(SHORT) and set(CASES) >= LEFT_OUT
    for name, line in found.items():
        assert line["ok"] == "PASS" and line["as_on_the_cpu"] == line["of"] > 0, name


def test_every_other_section_runs(tmp_path: Path) -> None:
    out, families = tmp_path / "found.jsonl", ["lfm2"]
    sections = [name for name in SECTIONS if name not in ("env", "correct")]
    few = ["--scenarios", "reordered", "--modes", "off", "identical", "--families", *families]
    assert main([*SMALL, "--sections", *sections, *few, "--out", str(out)]) == 0
    lines = read_lines(out)
    for name in sections:
        assert any(line["section"] == name and line["what"] != "section took" for line in lines), name
    assert {line["what"].split(",")[0] for line in lines if "reused" in line and "as_on_the_cpu" in line} == set(
        families
    )


def test_what_fails_is_counted_and_the_next_section_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(checks: Checks) -> None:
        checks.check("a bound", False, found=3)
        raise RuntimeError("out of luck")

    sections = {"env": Section(fail, 0), "waits": Section(lambda checks: checks.check("fine", True), 0)}
    monkeypatch.setattr(check_gpu, "SECTIONS", {**SECTIONS, **sections})
    assert main(["--device", "cpu", "--sections", "env", "waits", "speed", "--seconds", "39"]) == 2
    said = capsys.readouterr().out
    assert "out of luck" in said and "fine" in said and "skipped" in said


@pytest.fixture
def counted(pretended_device: str) -> dict[int, Any]:
    """What a call takes, by layers."""
    found = {}
    for layers in (4, 8):
        checks = Checks(parse([*SMALL, "--layers", str(layers)]))
        found[layers] = count_call(checks, TimedSubject(checks), "reordered", "identical", 400)
    return found


def test_waits_and_launches_stay_under_bounds(counted: dict[int, Any]) -> None:
    (few, _), (many, longer) = counted[4], counted[8]
    report = few.said.report
    assert report.identical_tokens > 0.5 * report.prompt_tokens, "it is a selective pass"
    assert many.waits == few.waits <= 16, many.lines
    launches = (many.launches - few.launches) / 4  # for each layer more
    assert launches <= 50 and few.launches <= 330, many.lines
    waits_a_token, launches_a_token = longer.count_further(many)
    assert waits_a_token <= 1 and launches_a_token <= 40 * 8 + 60, longer.lines
