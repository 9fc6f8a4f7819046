"""What the paper rests on, looked at in a model: text that is the same, moved, or another."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("rouge_score")

import paper_claims
from semsharekv_integrations.kv import Rotation
from tiny_models import make_model


@pytest.fixture(scope="module")
def model():
    return make_model("llama", 99, attn_implementation="eager").eval()


def rotation_of(model: torch.nn.Module) -> Rotation:
    return Rotation(model.model.rotary_emb.inv_freq.float())


def test_moved_text_deviates_by_its_context_alone(model) -> None:
    ids = torch.arange(1, 31)
    moved = torch.cat([torch.tensor([50, 51, 52]), ids])
    stored, target = (paper_claims.read_text(model, each) for each in (ids, moved))
    sources = np.r_[0, 0, 0, np.arange(30)]
    first, second, *_ = paper_claims.measure_layers(target, stored, sources, rotation_of(model))
    torch.testing.assert_close(first[3:], torch.zeros(30), atol=1e-4, rtol=0)
    assert (first[:2] > 0.1).all() and (second[3:] > 1e-3).all()
    itself = paper_claims.measure_layers(stored, stored, np.arange(30), rotation_of(model))
    assert all(float(layer.max()) < 1e-4 for layer in itself)


def test_ranks_agree_from_minus_one_to_one_and_attention_is_recovered_by_the_most_received() -> None:
    one = torch.tensor([3.0, 1.0, 2.0, 5.0])
    assert paper_claims.rank_alike(one, 2 * one + 1) == pytest.approx(1)
    assert paper_claims.rank_alike(one, -one) == pytest.approx(-1)
    assert paper_claims.recover_attention(torch.tensor([6.0, 2.0, 1.0, 1.0])) == 0.25
    assert paper_claims.recover_attention(torch.ones(100)) == pytest.approx(0.56, abs=0.011)


def test_rewritten_dialogues_are_more_alike_than_others(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said, parts = tmp_path / "dialogues.json", tmp_path / "rewritten.json"
    names = ("flood", "fire", "storm")
    turns = [[f"#A#: The {name} hit town {n} on day {n}" for n in range(6)] for name in names]
    said.write_text(json.dumps([{"dialogue": "\n".join(each), "summaries": ["S"]} for each in turns]))
    rows = [
        {"text": f"dialogue {number}", "place": 2, "tag": "#A#: ", "rewritten": f"On day 2 the {name} came to town 2"}
        for number, name in enumerate(names)
    ]
    parts.write_text(json.dumps({"parts": rows}))
    paper_claims.main(["--dialogues", str(said), "--rewritten", str(parts), "--model", folder])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| similarity, plain")]
    alike, unlike = (float(cell.split()[0]) for cell in lines[0].split("|")[2:4])
    assert 0 <= unlike <= alike <= 1
