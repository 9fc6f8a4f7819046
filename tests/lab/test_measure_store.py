"""The lab's measurement of the store runs, and its figures are what such figures must be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress

import measure_store
from measure_store import PHASES, Outcome, Plan, rates, trace, traced

TINY = Plan((12, 30), 48, (48, 64), (48,), 3, 2, 1, 1, 10, 2**20)


def test_a_run_writes_every_table_and_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(Plan, "quick", lambda: TINY)
    out = tmp_path / "new" / "store.md"
    measure_store.main(["--quick", "--out", str(out), "--seed", "3"])
    text = out.read_text()
    assert sorted(path.name for path in out.parent.iterdir()) == ["store-hits.png", "store.md"]
    assert out.with_name("store-hits.png").read_bytes().startswith(b"\x89PNG")
    tables = text.split("\n## ")[1:]
    assert len(tables) == 4
    for table in tables:
        assert "measure_store.py --seed 3 --threads 1 --quick` at commit" in table and "n = " in table
        rows = [line.count("|") for line in table.splitlines() if line.startswith("|")]
        assert len(rows) >= 3 and len(set(rows)) == 1, "columns"
    assert "nan" not in text and "| 30 |" in text and "| 64 |" in text and "store-hits.png" in text


@pytest.fixture(scope="module")
def outcomes() -> measure_store.Outcomes:
    with Progress(disable=True) as progress:
        return traced(Plan(requests=150), 0, progress, half_cost_tokens=1000.0)


def test_hit_rates_are_shares_and_value_keeps_more_in_a_scan(outcomes: measure_store.Outcomes) -> None:
    by_phase = {}
    for rule, done in outcomes.items():
        for phase in PHASES:
            found = by_phase[rule, phase] = rates([outcome for outcome in done if outcome.phase == phase])
            assert all(0 <= share <= 1 for share in found)
    for phase in ("scan", "after"):
        assert all(np.greater_equal(by_phase["value", phase], by_phase["lru", phase]))
    assert by_phase["value", "scan"] > by_phase["lru", "scan"], "or the trace shows nothing"
    assert 0 < by_phase["lru", "mixed"][0] < 1 and by_phase["lru", "scan"] < by_phase["lru", "mixed"]


def test_a_trace_is_the_same_for_a_seed() -> None:
    one, again, other = ([request.token_ids.tolist() for request in trace(seed, 10)] for seed in (1, 1, 2))
    assert one == again != other and len(one) == 10 * len(PHASES)


def test_compute_weighs_late_tokens_more() -> None:
    assert rates([Outcome("mixed", 100, 50, 100.0, 30.0)]) == (0.5, 0.3)
