"""The kernel for attention of rows, beside PyTorch's attention with a mask; and what happens where it is not there.

Needs Triton. Without a GPU it runs in Triton's interpreter, which has to be asked for before Triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

from semsharekv_integrations.model import backends
from semsharekv_integrations.model.sight import Rows, Sight

CHECK = """
import torch
from semsharekv_integrations.model import backends, row_kernel
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
for heads, key_heads, width, depth, window, splits in (
    (4, 2, 16, 16, None, 1), (6, 2, 24, 40, None, 3), (2, 2, 32, 16, False, 1), (2, 1, 16, 16, True, 2)
):
    shape = backends._Shape(device, torch.float32, heads, key_heads, width, depth, window, splits > 1)
    error = backends._measure_error(
        shape, lambda *given: row_kernel.attend_rows(*given, tiles=(32, 32, 1), splits=splits)
    )
    assert error < 1e-4, (shape, error)
sizes = (4, 10**5), (4, 900), (9000, 10**5)
splits = [row_kernel.choose_splits(rows, 8, 2, keys, (64, 64, 3)) for rows, keys in sizes]
assert splits[0] > 1 and splits[1:] == [1, 1], splits
print("checked")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_gives_what_pytorch_does() -> None:
    settings = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHECK], capture_output=True, text=True, env=os.environ | settings, check=False
    )
    assert done.stdout.strip() == "checked", done.stderr


SHAPE = backends._Shape(torch.device("cpu"), torch.float32, 4, 2, 16, 16, None, False)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    """As the kernel, plainly."""
    unseen = torch.arange(key.shape[2]) > positions[:, None]
    keys, values = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    logits = (query @ keys.mT * query.shape[3] ** -0.5).masked_fill(unseen, -torch.inf)
    return (logits.softmax(-1) @ values).transpose(1, 2)


def test_a_kernel_is_used_by_the_first_tiles_that_give_what_pytorch_does() -> None:
    def fail_with_large_tiles(*given: Any, tiles: tuple[int, int, int], **more: Any) -> torch.Tensor:
        if tiles == backends._TILES[0]:
            raise OSError("out of resources: shared memory")
        return attend(*given)

    assert backends.find_tiles(SHAPE, attend) == backends._TILES[0]
    assert backends.find_tiles(SHAPE, fail_with_large_tiles) == backends._TILES[1]


@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_a_kernel_that_fails_is_told_and_not_used(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*given: Any, **_: Any) -> torch.Tensor:
        if fault == "raises":
            raise OSError("no compiler")
        return attend(*given) * 1.01

    assert backends.find_tiles(SHAPE, fail) is None
    assert ("no compiler" if fault == "raises" else "it is off by") in caplog.text


def test_a_device_that_runs_out_of_memory_is_no_fault_of_the_kernel() -> None:
    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        backends.find_tiles(SHAPE, fail)


def test_the_cpu_has_no_kernel() -> None:
    rows = np.arange(3)
    query, key = torch.zeros(1, 4, 3, 16), torch.zeros(1, 2, 9, 16)
    assert backends.find_row_attention(query, key, key, Sight(Rows(rows, torch.from_numpy(rows)), 9, None)) is None
