"""A pretended accelerator: tensors that claim to be on ``cuda:0`` (or another) and are computed on the CPU.

    from simulated_device import count, move_model, pretended

    def test_a_token_waits_once(llama, make_engine) -> None:
        with pretended():
            engine = make_engine("exact", move_model(llama))         # a copy of the model, on "cuda:0"
            counted = count(lambda: engine.generate("The mayor", max_new_tokens=1))
        assert counted.waits <= 16 and counted.launches <= 1500, counted.table()
        assert counted.result.token_ids == ...

What raises, as on CUDA: tensors of different devices in one operation (0-dim CPU tensors pass in pointwise operations,
CPU index tensors pass in ``a[i]``), ``.numpy()``, a generator of another device, pinning device memory.

What is counted by ``count`` and ``traced``: kernel launches, times that the host waits for the device, copies and their
bytes, allocations, each with the line of the package that caused it (``Trace.table``). Warm up first: the first call
with a model builds what later ones use.

Works by ``__torch_dispatch__`` on a wrapper subclass, and a ``TorchFunctionMode`` for what names a device (factories,
``.to``), in every thread that is started inside. A fixture ``pretended_device`` of the suite enters it for one test and
skips where ``explain_absence`` gives a reason: a real CUDA device, or no C++ compiler.
Time means nothing here, and neither does a stream: everything is done at once.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from unittest import mock

import torch

from simulated.functions import SimulatedFunctions, SimulatedGenerator
from simulated.runtime import explain_absence, load_guard, register_factories, replaced_runtime
from simulated.tensors import DeviceMismatchError, Pretended, is_pretended, set_types
from simulated.trace import Trace, traced

__all__ = [
    "Counted",
    "DeviceMismatchError",
    "Pretended",
    "Trace",
    "count",
    "explain_absence",
    "is_pretended",
    "move_model",
    "pretended",
    "traced",
]
_Result = TypeVar("_Result")
_Model = TypeVar("_Model", bound=torch.nn.Module)


@contextlib.contextmanager
def pretended(*types: str) -> Iterator[None]:
    """Inside, devices of these types (default ``cuda``) are there.

    Raises:
        RuntimeError: if none can be pretended on this machine.
    """
    problem = explain_absence()
    if problem:
        raise RuntimeError(f"no device can be pretended: {problem}")
    load_guard()
    register_factories()
    run = threading.Thread.run

    def run_inside(thread: threading.Thread) -> None:
        with SimulatedFunctions():
            run(thread)

    types_before = set_types(types or ("cuda",))
    params_before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with (
            mock.patch.object(threading.Thread, "run", run_inside),
            mock.patch.object(torch, "Generator", SimulatedGenerator),
            replaced_runtime(),
            SimulatedFunctions(),
        ):
            yield
    finally:
        set_types(types_before)
        torch.__future__.set_overwrite_module_params_on_conversion(params_before)


def move_model(model: _Model, device: str = "cuda:0") -> _Model:
    """A copy of the model on a pretended device; the model itself stays where it is."""
    return copy.deepcopy(model).to(device)


@dataclass(frozen=True)
class Counted(Generic[_Result]):
    """What a call gave, and what it took.

    Attributes:
        result: what it returned.
        trace: what happened, line by line.
    """

    result: _Result
    trace: Trace

    @property
    def waits(self) -> int:
        """How often the host waited for the device."""
        return self.trace.num_waits

    @property
    def launches(self) -> int:
        """How many kernels were started."""
        return self.trace.num_launches

    def table(self, most: int = 25) -> str:
        """The lines that cause most of them: what an assertion says where a bound does not hold."""
        return self.trace.table(most)


def count(call: Callable[[], _Result]) -> Counted[Any]:
    """Call, and count what every thread does on a pretended device meanwhile."""
    with traced() as trace:
        result = call()
    return Counted(result, trace)
