"""The simulated accelerator refuses what CUDA refuses, and counts what CUDA would do."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from simulated_device import DeviceMismatchError, count, move_model


@pytest.fixture
def there(pretended_device: str) -> torch.Tensor:
    return torch.arange(6.0).to(pretended_device)


def test_what_waits_is_counted(there: torch.Tensor) -> None:
    assert count(lambda: there + 1).waits == 0
    for call in (there.sum().item, there.tolist, there.cpu, lambda: there[there > 2], torch.cuda.synchronize):
        assert count(call).waits == 1, call
    pinned = torch.ones(2).pin_memory()
    assert count(lambda: pinned.to("cuda:0", non_blocking=True)).waits == 0
    assert count(lambda: torch.ones(2).to("cuda:0", non_blocking=True)).waits == 1, "pageable memory"


def test_what_is_launched_is_counted(there: torch.Tensor) -> None:
    assert count(lambda: there.view(2, 3)[1:].T).launches == 0, "views"
    counted = count(lambda: (there * 2).sum())
    assert counted.launches == 2 and counted.result.device == there.device and float(counted.result) == 30.0
    assert "launches 2, waits 0" in counted.table()


def test_what_other_threads_do_is_counted(there: torch.Tensor) -> None:
    def run() -> None:
        thread = threading.Thread(target=lambda: torch.ones(3, device="cuda:0").sum().item())
        thread.start()
        thread.join()

    assert count(run).waits == 1


def test_tensors_of_several_devices_do_not_mix(there: torch.Tensor) -> None:
    other = torch.arange(6.0, device="cuda:1")
    for call in (lambda: there + other, lambda: there + torch.ones(6), lambda: torch.cat([there, torch.ones(1)])):
        with pytest.raises(DeviceMismatchError, match="at least two devices"):
            call()
    with pytest.raises(DeviceMismatchError, match="indices"):
        torch.ones(6)[there.long()]
    assert (there + torch.tensor(1.0)).device == there.device, "a number on the CPU passes"
    assert (there[torch.tensor([0, 2])]).tolist() == [0.0, 2.0], "and so does an index"
    assert (there.to(other.device) + other).device == torch.device("cuda:1")


def test_numpy_and_generators_stay_on_the_host(there: torch.Tensor) -> None:
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        there.numpy()
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.rand(2, device="cuda:0", generator=torch.Generator())
    assert torch.rand(2, device="cuda:0", generator=torch.Generator("cuda:0")).device == there.device


@pytest.mark.parametrize("data", [3, 2.5, True, [1, 2], ()])
@pytest.mark.parametrize("make", [torch.tensor, torch.as_tensor])
def test_plain_numbers_make_tensors_where_they_are_asked_for(make: Any, data: Any, pretended_device: str) -> None:
    assert make(data).device == torch.device("cpu")
    assert make(data, device=pretended_device).device == torch.device(pretended_device)
    with torch.device(pretended_device):
        assert make(data).device == torch.device(pretended_device)
    assert make(data, device=pretended_device).tolist() == make(data).tolist()


def test_a_tensor_of_a_tensor_stays_on_its_device(there: torch.Tensor) -> None:
    assert torch.as_tensor(there) is there
    assert torch.as_tensor(there, dtype=torch.int64).device == torch.tensor(there).device == there.device
    assert torch.as_tensor(there, device="cpu").device == torch.device("cpu")
    assert torch.tensor([there[0], there[2]]).device == torch.device("cpu")


def test_a_model_that_moves_leaves_its_original_behind(llama: PreTrainedModel, pretended_device: str) -> None:
    moved, ids = move_model(llama), torch.tensor([[5, 6, 7]])
    assert next(llama.parameters()).device.type == "cpu" and moved.device == torch.device(pretended_device)
    with torch.no_grad():
        logits = moved(ids.to(pretended_device)).logits
        torch.testing.assert_close(logits.cpu(), llama(ids).logits)
        with pytest.raises(DeviceMismatchError):
            moved(ids)


def test_nothing_is_pretended_afterwards(llama: PreTrainedModel) -> None:
    assert type(torch.Generator()) is torch.Generator
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(2).to("cuda:0")
