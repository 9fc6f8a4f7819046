"""The simulation of the router runs, and says of small traces what must be so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import simulate_router
from semsharekv_integrations.serving.routing import SKETCH_BYTES
from simulate_router import POLICIES, Plan, simulate

SMALL = Plan("small", 2, 12, 0.0, documents=3, document_chars=600, room=24, requests=600)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, simulate_router.Outcome]:
    return simulate(SMALL, seed=1)


def test_two_replicas_keep_most_of_the_hits_of_one_if_content_decides(
    outcomes: dict[str, simulate_router.Outcome],
) -> None:
    assert outcomes["content"].hit_rate > 0.95 * outcomes["one"].hit_rate > outcomes["prefix"].hit_rate
    assert outcomes["random"].hit_rate < 0.8 * outcomes["one"].hit_rate
    assert outcomes["content"].spread < 1.25, "both do a fair share"
    assert outcomes["content"].sketch_bytes <= SKETCH_BYTES


def test_shares_are_shares(outcomes: dict[str, simulate_router.Outcome]) -> None:
    for outcome in outcomes.values():
        assert 0 <= outcome.hit_rate <= 1 <= outcome.spread <= SMALL.replicas
        assert 0 <= outcome.wait_s[0] <= outcome.wait_s[1]


def test_a_run_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate_router, "list_plans", lambda requests: iter([replace(SMALL, requests=requests)]))
    simulate_router.main(["--requests", "40", "--out", str(tmp_path / "router.md")])
    rows = [line for line in (tmp_path / "router.md").read_text().splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 1 + len(POLICIES) and len({row.count("|") for row in rows}) == 1
