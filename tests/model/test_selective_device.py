"""A selective pass on a simulated accelerator: when the host waits, what is launched, and whose attention it is."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from semsharekv_integrations.config import ReuseConfig
from semsharekv_integrations.kv import Reference, Run
from semsharekv_integrations.model.adapter import ModelAdapter
from semsharekv_integrations.model.backends import WithoutCudnn, without_cudnn
from semsharekv_integrations.model.gathering import gather
from semsharekv_integrations.model.selective import Outcome, SelectivePrefill
from semsharekv_integrations.model.sight import Sight
from semsharekv_integrations.reuse.plan import ReusePlan, build_plan
from simulated_device import count, move_model
from tiny_models import make_model

NUM_TOKENS = 200
CUDA = torch.device("cuda")
is_switched_on = torch.backends.cuda.cudnn_sdp_enabled
# what a layer launches beside its own pass: two writes to the cache are its own, as is one copy behind attention
MOST_GATHERED, MOST_LOOKED, MOST_CHOSEN = 12, 16, 4


def plan_on(adapter: ModelAdapter, num_layers: int, budget: float, **settings: Any) -> ReusePlan:
    """A prompt most of which stood elsewhere; attention chooses as much of it as ``budget`` leaves."""
    random = np.random.default_rng(0)
    stored = random.integers(3, 99, 180)
    token_ids = np.concatenate([random.integers(3, 99, 20), stored[10:170], random.integers(3, 99, 20)])
    reference = Reference("r", "n", stored, adapter.read_layers(adapter.prefill(stored).cache))
    rules = ReuseConfig(mode="identical", budget=budget, max_deviation=100.0, **settings)
    question = np.arange(NUM_TOKENS) >= NUM_TOKENS - 8
    return build_plan(token_ids, None, [Run(20, reference, 10, 160)], [], question, rules, num_layers)


class Counts:
    """What one pass over a model of so many layers takes, and what a full prefill does."""

    def __init__(self, num_layers: int, budget: float, **settings: Any) -> None:
        adapter = ModelAdapter(move_model(make_model("llama", 99, num_hidden_layers=num_layers)), "identical")
        selective = SelectivePrefill(adapter)
        plan = plan_on(adapter, num_layers, budget, **settings)
        selective.run(plan)
        full = count(lambda: adapter.prefill(plan.token_ids))
        gathered = count(lambda: gather(plan, selective.rotations))
        own = count(lambda: selective.run(plan))
        self.outcome: Outcome = own.result
        self.plan, self.waits, self.table = plan, own.waits - gathered.waits, own.table()
        self.full, self.launches = full.launches, own.launches - gathered.launches


@pytest.mark.parametrize(("budget", "num_passes", "waits"), [(0.3, 2, 2), (0.0, 1, 1)])
def test_neither_waits_nor_launches_grow_with_layers_beyond_their_passes(
    budget: float, num_passes: int, waits: int, pretended_device: str
) -> None:
    few, many = (Counts(num_layers, budget) for num_layers in (2, 5))
    assert few.plan.attention_tokens == many.plan.attention_tokens and bool(few.plan.attention_tokens) == (budget > 0)
    assert few.waits == many.waits <= waits, many.table
    a_layer, a_full_one = (many.launches - few.launches) / 3, (many.full - few.full) / 3
    most = num_passes * a_full_one + (MOST_LOOKED if num_passes > 1 else MOST_CHOSEN)
    assert a_layer <= most, (a_layer, a_full_one, many.table)


def test_rows_that_decay_with_depth_wait_no_more(pretended_device: str) -> None:
    decaying = Counts(4, 0.3, final_share=0.2)
    assert decaying.outcome.compute_ratio < Counts(4, 0.3).outcome.compute_ratio
    assert decaying.waits <= 2, decaying.table


def test_the_outcome_is_that_of_the_cpu(pretended_device: str) -> None:
    model = make_model("llama", 99)
    outcomes = []
    for each in (model, move_model(model)):
        adapter = ModelAdapter(each, "identical")
        outcomes.append(SelectivePrefill(adapter).run(plan_on(adapter, 3, 0.3)))
    assert np.array_equal(outcomes[0].computed, outcomes[1].computed)
    torch.testing.assert_close(outcomes[1].prefill.logits.cpu(), outcomes[0].prefill.logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_no_mask_of_all_rows_and_tokens_is_made(
    device: str, pretended_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama", 99)
    adapter = ModelAdapter(model if device == "cpu" else move_model(model), "identical")
    selective, plan = SelectivePrefill(adapter), plan_on(adapter, 3, 0.0)

    def fail(*_: Any) -> torch.Tensor:
        raise AssertionError("a mask of all rows and tokens")

    monkeypatch.setattr(Sight, "get_whole_mask", fail)
    assert selective.run(plan).computed.sum() < NUM_TOKENS


class Spy(TorchFunctionMode):
    """Notes for each attention whether cuDNN could have computed it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            self.seen.append(is_switched_on())
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[True, False])
def switch(request: pytest.FixtureRequest) -> Any:
    """Whether the user has cuDNN's attention on; put back after."""
    before = is_switched_on()
    torch.backends.cuda.enable_cudnn_sdp(request.param)
    yield request.param
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("is_own", [False, True])
def test_no_attention_of_a_selective_pass_is_cudnns(is_own: bool, switch: bool, pretended_device: str) -> None:
    adapter = ModelAdapter(move_model(make_model("llama", 99)), "identical")
    selective, plan = SelectivePrefill(adapter), plan_on(adapter, 3, 0.0)
    if is_own:  # as of models that compute attention by code of their own
        selective._view = replace(selective._view, by_positions=False)
        adapter.way = adapter.way._replace(in_blocks=False)
    with Spy() as spy:
        selective.run(plan)
    assert spy.seen and not any(spy.seen)
    assert is_switched_on() == switch
    with Spy() as spy:
        adapter.prefill(plan.token_ids)
    assert spy.seen and set(spy.seen) == {switch}, "others' attention is as it was"


def test_cudnn_is_back_after_an_error_and_never_off_for_the_cpu(switch: bool) -> None:
    def fail(device: torch.device) -> None:
        with without_cudnn(device):
            assert is_switched_on() == (switch and device.type == "cpu")
            raise KeyError

    for device in (CUDA, torch.device("cpu")):
        with pytest.raises(KeyError):
            fail(device)
        assert is_switched_on() == switch


def test_cudnn_is_back_when_several_threads_switched_it_off(switch: bool) -> None:
    inside, seen = threading.Barrier(2), []

    def attend() -> None:
        inside.wait()
        with without_cudnn(CUDA):
            seen.append(is_switched_on())

    other = threading.Thread(target=attend)
    other.start()
    with without_cudnn(CUDA):
        inside.wait()  # now the other one comes, and has to wait for this one
        seen.append(is_switched_on())
    other.join()
    assert seen == [False, False] and is_switched_on() == switch


def test_only_attention_is_computed_without_cudnn(switch: bool, pretended_device: str) -> None:
    query = torch.ones(1, 2, 3, 4, device=pretended_device)
    with Spy() as spy, WithoutCudnn():
        scaled_dot_product_attention(query, query, value=query)
        scaled_dot_product_attention(query=query, key=query, value=query)
        assert is_switched_on() == switch
    assert spy.seen == [False, False] and is_switched_on() == switch
