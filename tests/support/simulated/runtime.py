"""What PyTorch asks of a device's runtime by itself, answered without one: guards, memory for results, streams."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from simulated.tensors import Pretended, complete
from simulated.trace import find_line, is_traced, note_wait

_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard());
"""
_COMPILERS = ("c++", "g++", "clang++")
CAPABILITY = (9, 0)  # an H100's


def explain_absence() -> str:
    """Why no device can be pretended on this machine; empty if one can."""
    if torch.cuda.is_available():
        return "a real CUDA device is here, and its kernels would be replaced"
    if os.name != "posix" or _find_compiler() is None:
        return f"no C++ compiler is here ({', '.join(_COMPILERS)})"
    return ""


def _find_compiler() -> str | None:
    return next(
        (found for name in (os.environ.get("CXX"), *_COMPILERS) if name and (found := shutil.which(name))), None
    )


@cache
def load_guard() -> None:
    """Let switching to a CUDA device do nothing; ``a[i]`` and ``float(a)`` switch, and PyTorch without CUDA refuses."""
    home = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(_GUARD)
        command = [_find_compiler() or "c++", "-shared", "-fPIC", "-std=c++20", str(source), "-o", str(made)]
        subprocess.run([*command, f"-I{home / 'include'}", f"-L{home / 'lib'}", "-lc10"], check=True)
        ctypes.CDLL(str(made), mode=ctypes.RTLD_GLOBAL)


@cache
def register_factories() -> torch.library.Library:
    """Make what C++ makes on the device by itself, as for the scalar in ``torch.where(mask, 0.0, a)``."""
    kernels = torch.library.Library("aten", "IMPL")

    def empty(size: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Pretended:
        return Pretended(torch.empty(size, dtype=dtype), complete(device or "cuda"))

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Pretended:
        return Pretended(torch.empty_strided(size, stride, dtype=dtype), complete(device or "cuda"))

    kernels.impl("empty.memory_format", empty, "CUDA")
    kernels.impl("empty_strided", empty_strided, "CUDA")
    return kernels


class SimulatedStream:
    """A stream on which everything is done at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, stream: SimulatedStream) -> None:
        """Nothing is left to wait for."""

    def wait_event(self, event: SimulatedEvent) -> None:
        """Nothing is left to wait for."""

    def record_event(self, event: SimulatedEvent | None = None) -> SimulatedEvent:
        """An event that has happened."""
        return event or SimulatedEvent()

    def query(self) -> bool:
        """Whether all is done."""
        return True

    def synchronize(self) -> None:
        """The host waits."""
        _synchronize()

    def __enter__(self) -> SimulatedStream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class SimulatedEvent:
    """An event that has happened as soon as it is recorded."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: SimulatedStream | None = None) -> None:
        """It happens."""

    def wait(self, stream: SimulatedStream | None = None) -> None:
        """The device waits, the host does not."""

    def query(self) -> bool:
        """Whether it has happened."""
        return True

    def synchronize(self) -> None:
        """The host waits."""
        _synchronize()

    def elapsed_time(self, other: SimulatedEvent) -> float:
        """Milliseconds, of which nothing is known."""
        return 0.0


def _synchronize(device: Any = None) -> None:
    if is_traced():
        note_wait("synchronize", find_line())


@contextlib.contextmanager
def replaced_runtime() -> Iterator[None]:
    """Inside, ``torch.cuda`` has streams and events, and to synchronize is a wait that is counted."""
    stream = SimulatedStream()
    stands = {
        "is_initialized": lambda: True,
        "synchronize": _synchronize,
        "Stream": SimulatedStream,
        "Event": SimulatedEvent,
        "current_stream": lambda device=None: stream,
        "stream": lambda of: of or contextlib.nullcontext(),
        "get_device_capability": lambda device=None: CAPABILITY,
        "empty_cache": lambda: None,
    }
    with contextlib.ExitStack() as stack:
        for name, stand in stands.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand))
        stack.enter_context(mock.patch.object(torch.accelerator, "synchronize", _synchronize))
        yield
