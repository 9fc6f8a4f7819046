"""``semsharekv quality``: what its arguments lead to, what it writes, and how it refuses."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from semsharekv_integrations.lab import (
    extra,
    metrics,
    origin,
    policies,
    quality_command,
    quality_plots,
    rouge,
    studies,
    tables,
)
from semsharekv_integrations.lab.metrics import Estimate
from semsharekv_integrations.lab.quality import Outcome
from tiny_models import make_model

FEW = ["--cases", "2", "--documents", "2", "3", "--policies", "off", "exact", "--max-new-tokens", "3"]


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="semsharekv quality")
    quality_command.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    make_model("llama", len(tokenizer), max_position_embeddings=4096).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def written_by(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """The table and the JSON that a command line leaves."""
    line = ["quality", *arguments, "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["semsharekv", *line])
    assert quality_command.run(parsed(*line[1:])) == 0
    return out.read_text(), json.loads(out.with_suffix(".json").read_text())


def test_a_table_and_every_outcome_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "reuse.md"
    arguments = ["--workloads", "reordered", "edited", *FEW, "--model", folder, "--device", "cpu", "--seed", "7"]
    text, written = written_by(monkeypatch, out, *arguments)
    outcomes = [Outcome(**outcome) for outcome in written["outcomes"]]
    assert len(outcomes) == 8 and tables.table(metrics.summarize(outcomes)) in text
    assert written["command"] == f"semsharekv quality {' '.join(arguments)}" and f"`{written['command']}`" in text
    assert str(out) not in text and (written["seed"], written["dtype"]) == (7, "float32")
    assert written["policies"]["exact"]["reuse"]["mode"] == "exact" and policies.POLICIES["exact"].about in text
    assert written["judging"] == "mentions", "the model is not the one that was trained on these words"
    assert {path.suffix for path in out.parent.iterdir()} <= {".md", ".json", ".png"}
    assert "reordered" in capsys.readouterr().out


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
    outcomes = [Outcome(**outcome) for outcome in written["outcomes"]]
    found = [(o.workload, o.case, o.policy, o.right is None) for o in outcomes]
    both = ("off", "identical")
    assert found == [(w, c, p, c == 1) for w in ("data", "unlike") for c in (0, 1) for p in both]
    assert "on own data" in text


def test_the_command_of_a_file_does_not_say_where_it_went() -> None:
    assert origin.recorded_command(["quality", "--out", "x.md", "--cases", "3"]) == "semsharekv quality --cases 3"
    assert origin.recorded_command(["quality", "--out=x.md", "--set", "a=b c"]) == "semsharekv quality --set 'a=b c'"


def test_files_are_put_in_place_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "x.md"
    origin.write_whole(path, "first")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        origin.write_whole(path, "second")
    assert path.read_text() == "first"


def test_settings_are_read_as_literals() -> None:
    args = parsed("--set", "attention_ratio=0.2", "fuzzy=True", "lsh_bits=None", "embedder=some/name")
    assert dict(args.set) == {"attention_ratio": 0.2, "fuzzy": True, "lsh_bits": None, "embedder": "some/name"}


@pytest.mark.parametrize("line", [["--set", "ratio"], ["--cases", "0"], ["--threads", "x"], ["--sweep", "bits"]])
def test_bad_usage_is_refused(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(*line)
    assert line[1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--sweep", "lsh", "--workloads", "edited"], "--workloads and --sweep are given; accepted is one"),
        (["--sweep", "lsh", "--policies", "off"], "--policies is given; accepted is nothing with --sweep lsh"),
        (["--quick", "--out", "x.json"], "--out is 'x.json'; accepted is a file name ending in .md"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused_before_loading(line: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quality_command.run(parsed("--model", "no/such/model", *line))


def test_a_missing_package_is_told_before_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str, purpose: str) -> None:
        raise extra.MissingPackageError(f"{purpose} needs {module}")

    monkeypatch.setattr(rouge, "imported", missing)
    rouge._scorer.cache_clear()
    for line in ([], ["--workloads", "summaries"]):
        with pytest.raises(extra.MissingPackageError, match="ROUGE-L of summaries needs rouge_score"):
            quality_command.run(parsed("--model", "no/such/model", *line))


def test_without_matplotlib_there_are_tables_and_a_word_on_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quality_command, "is_installed", lambda module: module != "matplotlib")
    arguments = ["--workloads", "edited", *FEW, "--cases", "1", "--model", folder]
    written_by(monkeypatch, tmp_path / "x.md", *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.md"]
    assert 'pip install -e ".[lab]"' in " ".join(capsys.readouterr().err.split())


def test_help_names_policies_sweeps_and_the_format_of_data() -> None:
    parser = argparse.ArgumentParser(prog="semsharekv quality")
    quality_command.add_arguments(parser)
    text = " ".join(parser.format_help().split())
    for word in ("CacheBlend, arXiv", "15% of the tokens", "sentences:", '"stored": {"id": "text", ...}'):
        assert word in text


def test_every_point_of_every_panel_is_in_the_picture() -> None:
    figures = pytest.importorskip("matplotlib.figure")
    places = {"turns": 0.1, "summaries": 0.6}
    rows = [SimpleNamespace(workload=name, policy="identical", compute_ratio=(x, x, x)) for name, x in places.items()]
    panels = {name: {"identical": [quality_plots._Point(x, Estimate(0.9, 0.8, 1.0))]} for name, x in places.items()}
    axis = studies.BY_COMPUTE._replace(x=lambda row: row.compute_ratio[0])
    figure = quality_plots._figure(figures, panels, rows, "Title", axis, quality_plots.QUANTITIES[0])
    for plot in figure.axes:
        left, right = plot.get_xlim()
        assert left == 0 and right >= 0.6
