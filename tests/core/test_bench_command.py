"""The command: its arguments, the files that it writes, and what it says of what it could not measure."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

from semsharekv_integrations.errors import SemShareError
from semsharekv_integrations.lab import bench_command, speed_plots
from semsharekv_integrations.lab.bench_command import BenchPlan
from semsharekv_integrations.lab.speed_figures import Row, Spread

SMALL = ["--lengths", "256", "--scenarios", "reordered", "--repeats", "2", "--new-tokens", "2", "--device", "cpu"]


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    bench_command.add_arguments(parser)
    return parser.parse_args(arguments)


def test_defaults_measure_everything_and_quick_less() -> None:
    plan, quick = BenchPlan.of(parsed()), BenchPlan.of(parsed("--quick"))
    assert plan.lengths == (512, 1024, 2048, 4096, 8192, 16384) and (plan.repeats, plan.model) == (5, "reference")
    assert set(quick.lengths) < set(plan.lengths) and max(quick.lengths) == 2048
    assert quick.scenarios == plan.scenarios and quick.policies == plan.policies
    assert (quick.repeats, quick.new_tokens, plan.new_tokens) == (3, 4, 16)
    assert BenchPlan.of(parsed("--quick", "--repeats", "7", "--new-tokens", "5")).repeats == 7


def test_reworded_stands_for_all_its_shares_and_off_is_always_there() -> None:
    plan = BenchPlan.of(
        parsed("--scenarios", "unlike", "reworded", "--policies", "semantic", "--lengths", "9", "5", "9")
    )
    assert plan.scenarios == ("reworded_10", "reworded_30", "reworded_50", "unlike")
    assert plan.policies == ("off", "semantic") and plan.reusing == ["semantic"] and plan.lengths == (5, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "512", "0"], "lengths is 0; accepted is 1 or more"),
        (["--repeats", "0"], "repeats is 0; accepted is 1 or more"),
        (["--new-tokens", "0"], "new_tokens is 0; accepted is 1 or more"),
        (["--threads", "0"], "threads is 0; accepted is 1 or more"),
        (["--out", "x.json"], "out is 'x.json'; accepted is a path that ends in .md"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench_command.run(parsed(*arguments))


def test_a_length_that_holds_no_documents_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match=r"length is 100; accepted is .* tokens or more in scenario 'next_turn'"):
        bench_command.run(parsed("--lengths", "100", "--device", "cpu"))


def test_a_run_writes_tables_and_every_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "speed.md"
    code = bench_command.run(
        parsed(*SMALL, "--lengths", "256", "9000", "--policies", "identical", "--no-plots", "--out", str(out))
    )
    written = json.loads(out.with_suffix(".json").read_text())
    assert code == 0 and sorted(path.name for path in out.parent.iterdir()) == ["speed.json", "speed.md"]
    assert {(s["policy"], s["round"]) for s in written["samples"]} == {
        (p, r) for p in ("off", "identical") for r in range(3)
    }
    assert {"command", "commit", "versions", "dtype", "device", "threads", "seed", "repeats"} <= written.keys()
    (failure,) = written["failures"]
    assert failure["length"] == 9000 and failure["reason"] == "beyond the model's context window of 8192 tokens"
    for text in (out.read_text(), capsys.readouterr().out):
        assert "beyond the model's context window of 8192 tokens" in text and "reordered" in text
        assert "first token 10 times faster than off" in text


def test_plots_are_asked_for_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SemShareError, match=r"--no-plots.* needs matplotlib: pip install -e \"\.\[lab\]\""):
        bench_command.run(parsed(*SMALL, "--out", str(tmp_path / "speed.md")))


def test_both_plots_are_drawn_from_whatever_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    beside = tmp_path / "speed.md"
    spread = Spread(2.0, 1.5, 2.5)
    rows = [
        Row(scenario, length, length - 3, policy, 3, spread, spread, None, compute)
        for scenario in ("reordered", "unlike")
        for length in (512, 2048)
        for policy, compute in (("off", 1.0), ("identical", 0.2), ("HuggingFaceLLM", None))
    ]
    failed = Row("reordered", 9000, None, "all", note="out of memory")
    assert [path.name for path in speed_plots.draw([*rows, failed], "tiny", beside)] == [
        "speed-speedup.png",
        "speed-shares.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
    assert speed_plots.draw([failed], "tiny", beside) == []
