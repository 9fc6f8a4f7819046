"""What a run of the checks is asked for, how much time it has left, and what it found."""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

_PLAIN = (int, float, str, bool, list, dict, type(None))
SHORTEST_S = 5.0  # what any measurement needs


class Checks:
    """Prints what is found as it comes, writes it as JSON lines, and counts what failed.

    Args:
        options: the command line.
        out: where JSON lines go, or None.
    """

    def __init__(self, options: argparse.Namespace, out: TextIO | None = None) -> None:
        self.options = options
        self.failed: list[str] = []
        self.device = torch.device("cuda:0" if options.pretend else options.device)
        self.is_pretended = options.pretend
        self.on_gpu = self.device.type == "cuda" and not options.pretend
        self._out = out
        self._section = ""
        self._began = time.perf_counter()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._began

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return self.options.seconds - self.elapsed_s

    def wants(self, option: str, name: str) -> bool:
        """Whether an option that picks by name picks this one; without the option all are picked."""
        picked = getattr(self.options, option)
        return picked is None or name in picked

    def say(self, what: str, **found: Any) -> None:
        """Print a line, and write it."""
        shown = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in found.items()}
        text = "  ".join(f"{key}={value}" for key, value in shown.items())
        print(f"[{self.elapsed_s:6.1f}s] {self._section:8s} {what:36s} {text}", flush=True)
        if self._out is not None:
            plain = {key: value if isinstance(value, _PLAIN) else str(value) for key, value in shown.items()}
            self._out.write(json.dumps({"section": self._section, "what": what, **plain}) + "\n")
            self._out.flush()

    def check(self, what: str, good: bool, **found: Any) -> None:
        """Say whether something is as it should be."""
        if not good:
            self.failed.append(f"{self._section}: {what}")
        self.say(what, ok="PASS" if good else "**FAIL**", **found)

    def attempt(self, what: str, call: Callable[[], None]) -> None:
        """Call; an error is a failed check, and the run goes on."""
        try:
            call()
        except Exception as error:
            self.failed.append(f"{self._section}: {what}: {type(error).__name__}: {str(error)[:200]}")
            self.say(what, ok="**FAIL**", error=f"{type(error).__name__}: {str(error)[:300]}")
            traceback.print_exc(limit=-8)
        finally:
            gc.collect()
            if self.on_gpu:
                torch.cuda.empty_cache()

    def run_section(self, name: str, run: Callable[[Checks], None], needs_s: float) -> None:
        """Run a section, if so many seconds are left."""
        self._section = name
        if self.left_s < needs_s:
            self.say("skipped", seconds_left=round(self.left_s), needs=needs_s)
            return
        began = time.perf_counter()
        self.attempt("the section", lambda: run(self))
        self.say("section took", seconds=round(time.perf_counter() - began, 1), left=round(self.left_s))

    def synchronize(self) -> None:
        """Wait for the device, if there is one."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def time(self, call: Callable[[], object], repeat: int = 1) -> float:
        """Seconds of one of ``repeat`` calls, the device's work included."""
        self.synchronize()
        began = time.perf_counter()
        for _ in range(repeat):
            call()
        self.synchronize()
        return (time.perf_counter() - began) / repeat


def open_out(path: Path | None) -> TextIO | None:
    """The file that JSON lines are added to."""
    return None if path is None else path.open("a", encoding="utf-8")


def to_ms(phases: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds of the phases that take any."""
    return {name: round(1e3 * seconds, 1) for name, seconds in phases.items() if seconds >= 5e-4}
