"""Probes of a call: seconds and rows of every decoder layer, memory at its peak, and the tables made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import profile_calls
from probes import LayerClock, LayerUse, find_layers, watch_peak
from semsharekv_integrations.lab.figures import Outcome
from semsharekv_integrations.report import ReuseReport
from tiny_models import make_model


@pytest.fixture(scope="module")
def model(tokenizer) -> PreTrainedModel:
    return make_model("llama", len(tokenizer), max_position_embeddings=2048)


def test_layers_are_timed_until_decoding_begins(model: PreTrainedModel) -> None:
    clock = LayerClock(find_layers(model), model.device)
    model(torch.arange(1, 8)[None])
    assert [use.rows for use in clock.read()] == [7] * 3 and all(use.seconds > 0 for use in clock.read())
    model(torch.arange(1, 5)[None])
    model(torch.tensor([[1]]))
    assert [use.rows for use in clock.read()] == [11] * 3, "single rows are decoding"
    clock.start()
    clock.close()
    model(torch.arange(1, 8)[None])
    assert [use.rows for use in clock.read()] == [0] * 3


def test_peak_memory_is_what_the_call_needed() -> None:
    num_bytes = 64 * 2**20
    with watch_peak(torch.device("cpu")) as found:
        said = float(torch.ones(num_bytes // 4).sum())
    assert said == num_bytes / 4 and 0.9 * num_bytes < found.get("peak_bytes", num_bytes) < 2 * num_bytes
    with watch_peak(torch.device("meta")) as found:
        pass
    assert found == {}


def call(
    turn: int, policy: str = "off", layers: tuple[LayerUse, ...] = (), compute: float = 1.0, **phases_s: float
) -> Outcome:
    report = ReuseReport("off", 9, ttft_s=10.0, phases_s=phases_s, compute_ratio=compute)
    return Outcome("reordered", policy, turn, report, extra={"layers": layers})


def test_phases_and_layers_are_medians_over_timed_rounds() -> None:
    phases = [{"plan": 0.2, "forward": 0.8}, {"plan": 0.4, "forward": 0.6, "audit": 0.3}, {"plan": 0.3, "forward": 0.7}]
    calls = [call(0, plan=9.0), *(call(turn, **found) for turn, found in enumerate(phases, 1))]
    expected = {"plan": pytest.approx(0.3), "forward": pytest.approx(0.7), "audit": 0.0}
    assert profile_calls.phases_of(calls) == expected
    assert "| reordered | off | 300.0 | 700.0 | 0.0 |" in profile_calls.make_phase_table({("reordered", "off"): calls})
    timed = [call(turn, compute=0.25, gather=0.1, attend=0.2, forward=0.0) for turn in range(2)]
    table = profile_calls.make_phase_table({("reordered", "off"): calls, ("reordered", "identical"): timed})
    assert "| of the compute limit |" in table and "| - | - | 1.00 |" in table
    assert "| 100.0 | 200.0 | 0.58 |" in table, "0.7 s over 0.3 s, times a quarter"
    assert profile_calls.find_limit_share(timed, ()) is None
    uses = [((9.0, 9), (9.0, 9)), ((1.0, 4), (2.0, 3)), ((3.0, 4), (4.0, 3))]
    timed = [call(turn, layers=tuple(LayerUse(*use) for use in found)) for turn, found in enumerate(uses)]
    assert profile_calls.layers_of(timed) == ([2.0, 3.0], [4.0, 3.0])
    assert profile_calls.layers_of([call(1)]) == ([], [])
    table = profile_calls.make_layer_table({("reordered", "off"): timed})
    assert "| reordered | off | 1.000 | 1.000 | 5000.0 | 2000.0 | 2500.0 | 3000.0 | 5000.0 | - |" in table


def test_the_script_adds_its_tables(tmp_path: Path) -> None:
    out = tmp_path / "x.md"
    few = ["--lengths", "256", "--scenarios", "reordered", "--repeats", "1", "--new-tokens", "2", "--policies", "exact"]
    profile_calls.main([*few, "--device", "cpu", "--out", str(out)])
    text = out.read_text()
    assert "## Phases" in text and "## Decoder layers" in text and "| reordered | exact |" in text
