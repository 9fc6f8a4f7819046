"""Methods of the field and ablations: the former compute what they say, the latter change KV and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import drawn
import methods
from methods import METHODS, make_corruptions
from semsharekv_integrations.kv import Reference, Run
from semsharekv_integrations.lab.bench import Bench, Study
from semsharekv_integrations.lab.policies import Subject
from semsharekv_integrations.reuse.plan import ReusePlan, build_plan, decline_if_costly
from shapes import UNGUARDED
from tiny_models import make_model


@pytest.fixture(scope="module")
def reference(tokenizer) -> Reference:
    subject = Subject("tiny", make_model("llama", len(tokenizer), max_position_embeddings=4096), tokenizer)
    case = next(drawn.make_cases("reordered", 1, 0, (2, 3)))
    (found,) = Bench(subject, Study("", (), {})).make_references(case)
    return found


@pytest.mark.parametrize("name", ["zeroed", "random"])
def test_ablations_change_kv_and_nothing_else(name: str, reference: Reference) -> None:
    before = [tensor.clone() for layer in reference.layers for tensor in layer]
    damaged = make_corruptions([name], seed=1)[name](reference)
    assert replace(damaged, layers=reference.layers) == reference
    assert np.array_equal(damaged.token_ids, reference.token_ids)
    after = [tensor for layer in damaged.layers for tensor in layer]
    for old, given, new in zip(before, (t for layer in reference.layers for t in layer), after, strict=True):
        assert torch.equal(old, given), "the reference itself is left alone"
        assert (new.shape, new.dtype) == (old.shape, old.dtype) and not torch.equal(new, old)
        if name == "zeroed":
            assert not new.any()
        else:
            assert float(new.mean()) == pytest.approx(float(old.mean()), abs=0.1 * float(old.std()))
            assert float(new.std()) == pytest.approx(float(old.std()), rel=0.1)
            assert abs(float(torch.corrcoef(torch.stack([new.flatten(), old.flatten()]))[0, 1])) < 0.1


def test_noise_repeats_with_its_seed(reference: Reference) -> None:
    one, same, other = (make_corruptions(["random"], s)["random"](reference) for s in (1, 1, 2))
    assert torch.equal(one.layers[0].keys, same.layers[0].keys)
    assert not torch.equal(one.layers[0].keys, other.layers[0].keys)


def plan_of(name: str, reference: Reference) -> ReusePlan:
    """The plan for 40 stored tokens behind 10 new ones and before the question."""
    rules = METHODS[name].reuse.resolve()
    ids = np.concatenate([np.full(10, 3), reference.token_ids[:40], np.full(8, 4)])
    question = np.arange(len(ids)) >= 50
    plan = build_plan(ids, None, [Run(10, reference, 0, 40)], [], question, rules, 4, [(0, 50)])
    return decline_if_costly(plan, rules)


@pytest.mark.parametrize(
    ("name", "must", "deviating", "full_layers"), [("raw", 18, 0, 0), ("cacheblend", 18, 6, 1), ("epic", 34, 0, 0)]
)
def test_methods_of_the_field_compute_what_they_say(
    name: str, must: int, deviating: int, full_layers: int, reference: Reference
) -> None:
    plan = plan_of(name, reference)
    assert plan.declined is None and plan.borrowed.sum() == 40
    assert (int(plan.must.sum()), plan.deviation_tokens, plan.full_layers) == (must, deviating, full_layers)
    assert plan.attention_tokens == 0 and not plan.relevant.any()
    assert plan.max_deviation == UNGUARDED
    if name == "cacheblend":
        assert set(plan.shares) == {1.0}, "as many at every layer"


def test_the_script_measures_them_beside_the_modes(tmp_path: Path) -> None:
    out = tmp_path / "methods.md"
    few = ["--scenarios", "edited", "--cases", "1", "--sizes", "2", "2", "--max-new-tokens", "2"]
    methods.main([*few, "--policies", "raw", "zeroed", "--out", str(out)])
    text = out.read_text()
    assert "| edited | raw |" in text and "| edited | zeroed |" in text and "Prompt Cache" in text
