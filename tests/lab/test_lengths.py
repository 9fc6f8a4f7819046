"""Prompts at a length, in rounds of which the first is not timed, on a model or on the shape of one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lengths
from semsharekv_integrations.lab.figures import Failure, Outcome, summarize
from semsharekv_integrations.report import ReuseReport
from sized import SIZED

SMALL = ["--lengths", "256", "--scenarios", "reordered", "--repeats", "2", "--new-tokens", "2", "--device", "cpu"]
REWORDED = ["reworded_10", "reworded_30", "reworded_50"]


def written_by(out: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """The tables and the JSON that a command line leaves."""
    lengths.main([*arguments, "--out", str(out)])
    return out.read_text(), json.loads(out.with_suffix(".json").read_text())


@pytest.mark.parametrize(
    ("line", "names"),
    [
        (["--lengths", "512"], [f"{name} at 512" for name in SIZED]),
        (["--quick"], [f"{name} at {n}" for n in (512, 2048) for name in ("next_turn", "reordered", "unlike")]),
        (["--lengths", "600", "400", "--scenarios", "unlike"], ["unlike at 400", "unlike at 600"]),
        (["--lengths", "900", "--scenarios", "reworded"], [f"{name} at 900" for name in REWORDED]),
    ],
)
def test_every_scenario_is_measured_at_every_length(line: list[str], names: list[str], folder: str) -> None:
    study, _ = lengths.prepare(lengths.parse("", [*line, "--model", folder, "--cases", "2"]))
    assert [scenario.name for scenario in study.scenarios] == names
    for scenario in study.scenarios:
        cases = list(scenario.cases)
        rounds = 1 + (lengths.QUICK_REPEATS if "--quick" in line else lengths.REPEATS)
        assert scenario.total == len(cases) == 2 * rounds and scenario.max_new_tokens == lengths.NEW_TOKENS
        assert len({str(case) for case in cases}) == 2, "each prompt has a seed of its own"
        assert cases[0] == cases[rounds - 1] != cases[rounds]


def test_names_hold_lengths() -> None:
    assert lengths.split_name(lengths.name_scenario("reworded_10", 512)) == ("reworded_10", 512)
    assert lengths.split_name("text_reordered") == ("text_reordered", None)


def test_prompts_at_a_length_leave_tables_and_every_round(
    tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, "--lengths", "256", "9000", "--policies", "identical", "--model", folder]
    text, written = written_by(tmp_path / "speed.md", *arguments)
    found = {(outcome["policy"], outcome["case"]) for outcome in written["outcomes"]}
    assert found == {(policy, turn) for policy in ("off", "identical") for turn in range(3)}
    assert [row["cases"] for row in written["rows"]] == [2, 2, 0], "the first round is not timed"
    (failure,) = written["failures"]
    reason = "beyond the model's context window of 4096 tokens"
    assert failure["scenario"] == "reordered at 9000" and failure["reason"] == reason
    for said in (text, capsys.readouterr().out):
        assert reason in said.replace("\n", " ") and "reordered at 256" in said and "overhead" in said


def test_a_preset_is_measured_without_judging(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shape = {"like": "Nothing", "model_type": "llama", "hidden_size": 32, "intermediate_size": 64}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 900}
    for module in ("shapes", "lengths"):
        monkeypatch.setattr(f"{module}.SHAPES", {"llama-8b": shape | sizes})
    text, written = written_by(tmp_path / "x.md", *SMALL, "--preset", "llama-8b", "--policies", "identical")
    assert "in the shape of Nothing" in text and written["model"] == "llama-8b"
    assert {outcome["right"] for outcome in written["outcomes"]} == {None}
    assert any(outcome["report"]["identical_tokens"] for outcome in written["outcomes"]), "there is no guard"


def test_a_journal_of_other_rounds_is_refused(tmp_path: Path, folder: str) -> None:
    line = [*SMALL, "--policies", "off", "--model", folder]
    written_by(tmp_path / "x.md", *line)
    with pytest.raises(ValueError, match=r"repeats is 2 in .*x.jsonl, of an earlier run; accepted is 3"):
        written_by(tmp_path / "x.md", *line, "--repeats", "3")


@pytest.mark.parametrize(("option", "value"), [("--lengths", "0"), ("--repeats", "0"), ("--preset", "gpt")])
def test_bad_usage_is_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lengths.parse("", [option, value])
    assert repr(value) in capsys.readouterr().err


def test_a_length_that_holds_no_documents_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match=r"length is 100; accepted is .* tokens or more in scenario 'next_turn'"):
        lengths.main(["--lengths", "100", "--device", "cpu"])


def sized(policy: str, turn: int, ttft_s: float, prompt: int = 0, **report: Any) -> Outcome:
    mode = policy if policy in ("off", "exact") else "identical"
    found = ReuseReport(mode, 4087, ttft_s=ttft_s, **report)
    return Outcome("reordered at 4096", policy, turn, found, right=turn == 1, group=prompt)


TIMED = [
    *(sized("off", turn, seconds) for turn, seconds in enumerate((10.0, 20.0, 12.0), 1)),
    *(sized("exact", turn, 5.0) for turn in (1, 2, 3)),
    *(sized("identical", turn, 1.0, compute_ratio=0.05, declined="so | so") for turn in (1, 2, 3)),
]


def test_a_single_prompt_has_quartiles_over_its_rounds_and_ratios_are_taken_within_one() -> None:
    off, exact, identical = summarize(TIMED, figures=lengths.SPEED_FIGURES)
    assert identical["ttft_ratio"] == (12.0, 11.0, 16.0), "10, 20 and 12 times, and not 12 over 1"
    assert identical["exact_ratio"] == (5.0, 5.0, 5.0) and off["ttft_ratio"] == (1.0, 1.0, 1.0)
    assert exact["ttft_ratio"].value == pytest.approx(2.4)
    assert identical["overhead"].value == pytest.approx(1 / 12 / 0.05)
    assert (identical.cases, identical["prompt_tokens"].value, identical.note) == (3, 4087, "so | so")
    assert (off["ttft_s"], off.note) == ((12.0, 11.0, 16.0), "")
    assert off["accuracy"] == (pytest.approx(1 / 3),) * 3, "one prompt says nothing of others"
    (alone,) = summarize([sized("identical", 1, 1.0, compute_ratio=0.5)], figures=lengths.SPEED_FIGURES)
    assert alone["ttft_ratio"] is alone["overhead"] is None


def test_of_several_prompts_the_interval_is_over_prompts() -> None:
    outcomes = [
        replace(sized("off", 0, seconds, prompt), case=3 * prompt + turn)
        for prompt, found in enumerate(((1.0, 2.0, 9.0), (4.0, 4.0, 4.0)))
        for turn, seconds in enumerate(found)
    ]
    (row,) = summarize(outcomes, [Failure("x", "all", "no")], lengths.SPEED_FIGURES)[:1]
    assert (row.cases, row.groups, row["ttft_s"].value) == (6, 2, 4.0)
    assert 2.0 <= row["ttft_s"].low <= row["ttft_s"].high <= 4.0
    assert lengths.find_quartiles([3.0]) == (3, 3, 3)
