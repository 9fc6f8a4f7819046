"""``semsharekv bench``: what its arguments lead to, what it writes as it goes, and how it refuses."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from semsharekv_integrations.lab import command
from semsharekv_integrations.lab.bench import Bench
from semsharekv_integrations.lab.figures import UNTIMED
from semsharekv_integrations.lab.policies import POLICIES
from semsharekv_integrations.lab.scenarios import DRAWN
from semsharekv_integrations.lab.sized import SIZED

FEW = ["--cases", "2", "--documents", "2", "3", "--policies", "off", "exact", "--max-new-tokens", "3"]
REWORDED = ("reworded_10", "reworded_30", "reworded_50")
SMALL = ["--lengths", "256", "--scenarios", "reordered", "--repeats", "2", "--new-tokens", "2", "--device", "cpu"]


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="semsharekv bench")
    command.add_arguments(parser)
    return parser.parse_args(arguments)


def written_by(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """The tables and the JSON that a command line leaves."""
    line = ["bench", *arguments, "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["semsharekv", *line])
    assert command.run(parsed(*line[1:])) == 0
    return out.read_text(), json.loads(out.with_suffix(".json").read_text())


@pytest.mark.parametrize(
    ("line", "drawn", "sized"),
    [
        ([], list(DRAWN), list(SIZED)),
        (["--quick"], ["reordered", "edited", "unlike", "turns"], ["next_turn", "reordered", "unlike"]),
        (["--cases", "3"], list(DRAWN), []),
        (["--documents", "2", "3", "--scenarios", "edited", "unlike"], ["edited", "unlike"], []),
        (["--lengths", "512"], [], list(SIZED)),
        (["--lengths", "512", "--cases", "2", "--scenarios", "unlike"], [], ["unlike"]),
        (
            ["--lengths", "9", "--scenarios", "unlike", "reworded"],
            [],
            ["reworded_10", "reworded_30", "reworded_50", "unlike"],
        ),
        (["--scenarios", "reworded", "next_turn"], ["reworded"], ["next_turn"]),
        (["--workloads", "turns"], ["turns"], []),
        (["--data", "x.jsonl"], [], []),
    ],
)
def test_sizes_choose_the_scenarios(line: list[str], drawn: list[str], sized: list[str]) -> None:
    assert command._choose_scenarios(parsed(*line)) == (drawn, sized)


def test_a_study_is_what_was_asked_for(folder: str) -> None:
    args = parsed("--model", folder, "--quick", "--device", "cpu", "--set", "min_run_tokens=9")
    study, subject = command.prepare(args)
    assert tuple(study.configs) == command.QUICK_POLICIES and study.judging == "mentions"
    assert study.configs["identical"].reuse.min_run_tokens == 9 and not subject.is_random
    drawn = [scenario for scenario in study.scenarios if scenario.length is None]
    assert all(len(scenario.rounds) == 1 and scenario.total == command.QUICK_CASES for scenario in drawn)
    sized = [scenario for scenario in study.scenarios if scenario.length]
    assert {scenario.length for scenario in sized} == set(command.QUICK_LENGTHS) and len(sized) == 6
    assert all(list(scenario.rounds) == [UNTIMED, 1, 2] for scenario in sized)
    assert {scenario.max_new_tokens for scenario in sized} == {command.NEW_TOKENS}
    whole, _ = command.prepare(parsed("--model", folder, "--lengths", "512", "--scenarios", "unlike", "--cases", "2"))
    (scenario,) = whole.scenarios
    assert tuple(whole.configs) == command.DEFAULT_POLICIES and len(scenario.rounds) == command.REPEATS + 1
    one, other = scenario.cases
    assert one != other, "each case has a seed of its own"


def test_off_is_always_there_and_kl_is_an_audit_of_every_call(folder: str) -> None:
    args = parsed("--model", folder, "--policies", "identical", "--scenarios", "turns", "--kl", "--cases", "1")
    study, _ = command.prepare(args)
    assert list(study.configs) == ["off", "identical"]
    assert {config.audit.sample_ratio for config in study.configs.values()} == {1.0}


def test_drawn_prompts_leave_tables_and_every_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "reuse.md"
    arguments = ["--scenarios", "reordered", "edited", *FEW, "--model", folder, "--device", "cpu", "--seed", "7"]
    text, written = written_by(monkeypatch, out, *arguments)
    assert len(written["outcomes"]) == 8 and not written["failures"]
    assert written["command"] == f"semsharekv bench {' '.join(arguments)}" and f"`{written['command']}`" in text
    assert str(out) not in text and (written["seed"], written["dtype"]) == (7, "float32")
    assert written["policies"]["exact"]["reuse"]["mode"] == "exact" and POLICIES["exact"].about in text
    assert written["judging"] == "mentions", "the model is not the one that was trained on these words"
    assert sorted(path.name for path in out.parent.iterdir()) == ["reuse.json", "reuse.jsonl", "reuse.md"]
    assert "reordered" in capsys.readouterr().out


def test_prompts_at_a_length_leave_tables_and_every_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, "--lengths", "256", "9000", "--policies", "identical"]
    text, written = written_by(monkeypatch, tmp_path / "speed.md", *arguments)
    found = {(outcome["policy"], outcome["round"]) for outcome in written["outcomes"]}
    assert found == {(policy, turn) for policy in ("off", "identical") for turn in range(3)}
    assert {"command", "commit", "versions", "dtype", "device", "threads", "seed", "seconds"} <= written.keys()
    (failure,) = written["failures"]
    assert failure["length"] == 9000 and failure["reason"] == "beyond the model's context window of 8192 tokens"
    for said in (text, capsys.readouterr().out):
        assert "beyond the model's context window of 8192 tokens" in said.replace("\n", " ") and "reordered" in said


def test_a_run_that_breaks_leaves_what_was_measured_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    measure = Bench.measure

    def break_at_the_second(self: Bench, scenario, *args) -> None:
        if scenario.name == "edited":
            raise KeyboardInterrupt
        measure(self, scenario, *args)

    monkeypatch.setattr(Bench, "measure", break_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        written_by(monkeypatch, tmp_path / "x.md", "--scenarios", "reordered", "edited", *FEW, "--model", folder)
    written = json.loads((tmp_path / "x.json").read_text())
    assert {outcome["scenario"] for outcome in written["outcomes"]} == {"reordered"} and len(written["rows"]) == 2


def test_own_data_is_measured_beside_its_negative_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    lines = [
        {"documents": {"a": "One text here.", "b": "Two texts here."}, "question": "What?", "answer": "one"},
        {"documents": {"c": "Three are there.", "d": "Four are there."}, "question": "Where?"},
    ]
    data = tmp_path / "own.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["--data", str(data), "--policies", "identical", "--max-new-tokens", "3", "--model", folder]
    text, written = written_by(monkeypatch, tmp_path / "own.md", *arguments)
    found = [(o["scenario"], o["case"], o["policy"], o["right"] is None) for o in written["outcomes"]]
    both = ("off", "identical")
    assert found == [(w, c, p, c == 1) for w in ("data", "unlike") for c in (0, 1) for p in both]
    assert "on own data" in text


def test_json_goes_to_standard_output_and_nothing_else(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(parsed("--scenarios", "edited", *FEW, "--cases", "1", "--model", folder, "--json")) == 0
    written = json.loads(capsys.readouterr().out)
    assert [row["policy"] for row in written["rows"]] == ["off", "exact"] and "seconds" in written


def test_a_preset_is_measured_without_judging(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shape = {"like": "Nothing", "model_type": "llama", "hidden_size": 32, "intermediate_size": 64}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 900}
    monkeypatch.setattr("semsharekv_integrations.lab.policies.SHAPES", {"llama-8b": shape | sizes})
    text, written = written_by(
        monkeypatch, tmp_path / "x.md", *SMALL, "--preset", "llama-8b", "--policies", "identical"
    )
    assert "in the shape of Nothing" in text and written["model"] == "llama-8b"
    assert {outcome["right"] for outcome in written["outcomes"]} == {None}
    assert any(outcome["report"]["identical_tokens"] for outcome in written["outcomes"]), "there is no guard"


def test_settings_are_read_as_literals() -> None:
    args = parsed("--set", "attention_ratio=0.2", "fuzzy=True", "lsh_bits=None", "embedder=some/name")
    assert dict(args.set) == {"attention_ratio": 0.2, "fuzzy": True, "lsh_bits": None, "embedder": "some/name"}


@pytest.mark.parametrize(
    "line",
    [
        ["--set", "ratio"],
        ["--cases", "0"],
        ["--threads", "x"],
        ["--lengths", "0"],
        ["--repeats", "0"],
        ["--new-tokens", "-1"],
        ["--scenarios", "bits"],
        ["--preset", "gpt"],
    ],
)
def test_bad_usage_is_refused(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(*line)
    assert repr(line[1]) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--data", "x", "--scenarios", "edited"], "--scenarios and --data are given; accepted is one of them"),
        (["--data", "x", "--lengths", "512"], "--lengths and --data are given; accepted is one of them"),
        (["--quick", "--out", "x.json"], "--out is 'x.json'; accepted is a file name ending in .md"),
        (["--lengths", "512", "--scenarios", "turns"], "--scenarios is turns; accepted .* is next_turn, reordered"),
        (["--cases", "2", "--scenarios", "next_turn"], "--scenarios is next_turn; accepted .* is reordered, shared"),
        (["--set", "ratio=2"], "settings is 'ratio'; accepted is"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused_before_loading(line: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command.run(parsed("--model", "no/such/model", *line))


def test_a_length_that_holds_no_documents_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match=r"length is 100; accepted is .* tokens or more in scenario 'next_turn'"):
        command.run(parsed("--lengths", "100", "--device", "cpu"))


def test_help_names_policies_scenarios_and_the_format_of_data() -> None:
    parser = argparse.ArgumentParser(prog="semsharekv bench")
    command.add_arguments(parser)
    text = " ".join(parser.format_help().split())
    for word in ("as every serving engine", "42% less KV", "reworded_10", '"stored": {"id": "text", ...}'):
        assert word in text


def test_quality_is_another_name_of_the_command(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    from semsharekv_integrations.cli.main import main

    assert main(["quality", "--workloads", "edited", *FEW, "--cases", "1", "--model", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["scenario"] == "edited"
