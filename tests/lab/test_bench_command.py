"""``semsharekv bench``: what its arguments lead to, what it writes as it goes, and how it refuses."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from semsharekv_integrations.lab import command
from semsharekv_integrations.lab.bench import Bench
from semsharekv_integrations.lab.policies import POLICIES
from semsharekv_integrations.lab.texts import CHANGES
from semsharekv_integrations.model.loading import REFERENCE_MODEL

FEW = ["--groups", "1", "--questions", "2", "--policies", "off", "exact", "--max-new-tokens", "3"]


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
    ("line", "names"),
    [
        ([], list(CHANGES)),
        (["--quick"], ["text_reordered", "text_edited", "text_next_turn", "text_unlike"]),
        (["--quick", "--scenarios", "text_system"], ["text_system"]),
        (["--workloads", "musique", "text_edited"], ["text_edited", "musique"]),
    ],
)
def test_scenarios_are_those_asked_for(line: list[str], names: list[str], folder: str) -> None:
    study, _ = command.prepare(parsed("--model", folder, *line, "--groups", "1", "--questions", "1"))
    assert [scenario.name for scenario in study.scenarios] == names


def test_a_study_is_what_was_asked_for(folder: str) -> None:
    args = parsed("--model", folder, "--quick", "--device", "cpu", "--set", "min_run_tokens=9")
    study, _ = command.prepare(args)
    assert tuple(study.configs) == command.QUICK_POLICIES
    assert study.configs["identical"].reuse.min_run_tokens == 9
    most = command.QUICK_GROUPS * command.QUICK_QUESTIONS
    assert all(0 < scenario.total <= most and scenario.judging == "gold" for scenario in study.scenarios)
    whole, _ = command.prepare(parsed("--model", folder, "--scenarios", "text_unlike"))
    (scenario,) = whole.scenarios
    assert tuple(whole.configs) == command.DEFAULT_POLICIES
    assert command.GROUPS < scenario.total <= command.GROUPS * command.QUESTIONS
    assert scenario.max_new_tokens == command.TEXT_TOKENS


def test_the_built_in_model_reads_news_and_others_real_text(folder: str) -> None:
    line = ["--scenarios", "text_reordered", "--groups", "1", "--questions", "1"]
    (news,), (real,) = (command.prepare(parsed(*line, *more))[0].scenarios for more in ([], ["--model", folder]))
    assert all(key in text for key, text in next(iter(news.cases)).target.documents.items())
    assert all(key.startswith("paragraph") for key in next(iter(real.cases)).target.documents)


def test_off_is_always_there_and_kl_is_an_audit_of_every_call(folder: str) -> None:
    args = parsed("--model", folder, "--policies", "identical", "--scenarios", "text_edited", "--kl", "--groups", "1")
    study, _ = command.prepare(args)
    assert list(study.configs) == ["off", "identical"]
    assert {config.audit.sample_ratio for config in study.configs.values()} == {1.0}


def test_a_quick_look_at_the_built_in_model_is_right_and_tells_reuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, written = written_by(monkeypatch, tmp_path / "x.md", "--quick", "--groups", "1", "--questions", "1")
    assert written["model"] == REFERENCE_MODEL and not written["failures"]
    assert all(outcome["right"] for outcome in written["outcomes"] if outcome["policy"] == "off")
    reused = {o["scenario"] for o in written["outcomes"] if o["report"]["identical_tokens"]}
    assert "text_reordered" in reused and "text_unlike" not in reused


def test_a_run_leaves_tables_and_every_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "reuse.md"
    scenarios = ["--scenarios", "text_reordered", "text_edited"]
    arguments = [*scenarios, *FEW, "--model", folder, "--device", "cpu", "--seed", "7"]
    text, written = written_by(monkeypatch, out, *arguments)
    assert len(written["outcomes"]) == 8 and not written["failures"]
    assert written["command"] == f"semsharekv bench {' '.join(arguments)}" and f"`{written['command']}`" in text
    assert str(out) not in text and (written["seed"], written["dtype"]) == (7, "float32")
    assert {"commit", "versions", "device", "threads", "seconds"} <= written.keys()
    assert written["policies"]["exact"]["reuse"]["mode"] == "exact" and POLICIES["exact"].about in text
    assert sorted(path.name for path in out.parent.iterdir()) == ["reuse.json", "reuse.jsonl", "reuse.md"]
    assert "text_reordered" in capsys.readouterr().out


def test_a_run_that_breaks_leaves_what_was_measured_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    measure = Bench.measure

    def break_at_the_second(self: Bench, scenario, *args) -> None:
        if scenario.name == "text_edited":
            raise KeyboardInterrupt
        yield from measure(self, scenario, *args)

    monkeypatch.setattr(Bench, "measure", break_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        written_by(
            monkeypatch, tmp_path / "x.md", "--scenarios", "text_reordered", "text_edited", *FEW, "--model", folder
        )
    written = json.loads((tmp_path / "x.json").read_text())
    assert {outcome["scenario"] for outcome in written["outcomes"]} == {"text_reordered"} and len(written["rows"]) == 2


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
    assert all(len(o["kl"]) == 3 for o in written["outcomes"] if o["policy"] == "identical")
    both = ("off", "identical")
    assert found == [(w, c, p, c == 1) for w in ("data", "unlike") for c in (0, 1) for p in both]
    assert "on own data" in text


def test_json_goes_to_standard_output_and_nothing_else(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(parsed("--scenarios", "text_edited", *FEW, "--model", folder, "--json")) == 0
    written = json.loads(capsys.readouterr().out)
    assert [row["policy"] for row in written["rows"]] == ["off", "exact"] and "seconds" in written


def test_settings_are_read_as_literals() -> None:
    args = parsed("--set", "attention_ratio=0.2", "fuzzy=True", "lsh_bits=None", "embedder=some/name")
    assert dict(args.set) == {"attention_ratio": 0.2, "fuzzy": True, "lsh_bits": None, "embedder": "some/name"}


@pytest.mark.parametrize(
    "line",
    [
        ["--set", "ratio"],
        ["--groups", "0"],
        ["--threads", "x"],
        ["--new-tokens", "-1"],
        ["--scenarios", "bits"],
    ],
)
def test_bad_usage_is_refused(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(*line)
    assert repr(line[1]) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--data", "x", "--scenarios", "text_edited"], "--scenarios and --data are given; accepted is one of them"),
        (["--quick", "--out", "x.json"], "--out is 'x.json'; accepted is a file name ending in .md"),
        (["--set", "ratio=2"], "settings is 'ratio'; accepted is"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused_before_loading(line: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command.run(parsed("--model", "no/such/model", *line))


def test_help_names_policies_scenarios_and_the_format_of_data() -> None:
    parser = argparse.ArgumentParser(prog="semsharekv bench")
    command.add_arguments(parser)
    text = " ".join(parser.format_help().split())
    for word in ("as every serving engine", "42% less KV", "text_reworded", '"stored": {"id": "text", ...}'):
        assert word in text


def test_quality_is_another_name_of_the_command(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    from semsharekv_integrations.cli.main import main

    assert main(["quality", "--workloads", "text_edited", *FEW, "--model", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["scenario"] == "text_edited"
