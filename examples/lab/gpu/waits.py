"""Section ``waits``: how often the host waits for the device, and how many kernels start, until and behind a token.

On the simulated accelerator they are counted; on a GPU PyTorch warns of waits, and its profiler sees the kernels.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpu.checks import Checks, to_ms
from gpu.subjects import TimedSubject, tell
from semsharekv_integrations import Generation, SemShareEngine

FURTHER = 8  # tokens behind the first
SCENARIOS = ("reordered", "next_turn", "shared", "reworded_30")
COUNTED = ("identical", "semantic", "exact", "off")


@dataclass(frozen=True)
class Count:
    """What a call took.

    Attributes:
        waits: times that the host waited.
        launches: kernels started.
        said: what the call gave.
        lines: what took them, a line each.
    """

    waits: int
    launches: int
    said: Generation
    lines: str = ""

    def count_further(self, first: Count) -> tuple[float, float]:
        """Waits and launches for each token behind the first, where ``first`` is the call that ended there."""
        more = max(1, len(self.said.token_ids) - len(first.said.token_ids))
        return (self.waits - first.waits) / more, (self.launches - first.launches) / more


def check_waits(checks: Checks) -> None:
    """Count on each scenario that is asked for, in each mode."""
    subject = TimedSubject(checks)
    subject.model.generation_config.eos_token_id = None
    lengths = checks.options.lengths
    length = lengths[min(1, len(lengths) - 1)]
    for name in [name for name in SCENARIOS if name in checks.options.scenarios]:
        for mode in [mode for mode in COUNTED if mode in checks.options.modes]:
            if checks.left_s > 10:
                checks.attempt(
                    f"{name}, {mode}", lambda name=name, mode=mode: _count(checks, subject, name, mode, length)
                )
    if checks.on_gpu:
        _profile(checks, subject, length)


def _count(checks: Checks, subject: TimedSubject, name: str, mode: str, length: int) -> None:
    first, whole = count_call(checks, subject, name, mode, length)
    report = first.said.report
    rates = dict(zip(("waits_a_token", "launches_a_token"), whole.count_further(first), strict=True))
    facts = {
        "prompt": report.prompt_tokens,
        "reused": report.reused_tokens,
        "layers": subject.model.config.num_hidden_layers,
    }
    checks.say(f"{name}, {mode}", waits=first.waits, launches=first.launches, **rates, **facts)
    if checks.options.lines:
        print(f"{first.lines}\nwith {FURTHER} tokens more:\n{whole.lines}", flush=True)


def count_call(checks: Checks, subject: TimedSubject, name: str, mode: str, length: int) -> tuple[Count, Count]:
    """What it takes to the first token, and with further ones; nothing of these calls is stored.

    The first calls of their shapes warm up.
    """
    engine = subject.make_engine(mode)
    for seed in (3, 4):
        case = subject.make_case(name, length, seed)
        for query in case.references:
            tell(engine, query)
        if seed == 3:
            tell(engine, case.target, 1 + FURTHER)
            engine.clear()
    engine.keeps = False
    return count_one(checks, engine, case.target, 1), count_one(checks, engine, case.target, 1 + FURTHER)


def count_one(checks: Checks, engine: SemShareEngine, query: Any, tokens: int) -> Count:
    """What one call takes; without a device, nothing."""
    if checks.is_pretended:
        from simulated_device import count

        counted = count(lambda: tell(engine, query, tokens))
        return Count(counted.waits, counted.launches, counted.result, counted.table())
    if not checks.on_gpu:
        return Count(0, 0, tell(engine, query, tokens))
    with _noting_waits() as places:
        said = tell(engine, query, tokens)
    kernels = _see_kernels(lambda: tell(engine, query, tokens))
    lines = "\n".join(f"  wait   {number:6d} {place}" for place, number in places.most_common(25))
    return Count(places.total(), len(kernels), said, lines)


@contextmanager
def _noting_waits() -> Iterator[Counter[str]]:
    """Lines by how often they waited for CUDA, as PyTorch warns of."""
    places: Counter[str] = Counter()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(before)
    seen = [warning for warning in caught if "synchroniz" in str(warning.message)]
    places.update(f"{Path(warning.filename).name}:{warning.lineno}" for warning in seen)


def _see_kernels(call: Any) -> list[Any]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return [event for event in seen.events() if str(event.device_type).endswith("CUDA")]


def _profile(checks: Checks, subject: TimedSubject, length: int) -> None:
    """How long the card is busy for in one prefill, and with what."""
    engine, case = subject.make_engine("identical"), subject.make_case("reordered", length, 3)
    for query in case.references:
        tell(engine, query)
    subject.ask(engine, case.target)
    said: list[Generation] = []
    kernels = _see_kernels(lambda: said.append(subject.ask(engine, case.target)[0]))
    by_name: Counter[str] = Counter()
    for kernel in kernels:
        by_name[re.sub(r"<.*", "", kernel.name)[:48]] += kernel.device_time_total / 1e3
    report = said[0].report
    facts = {"busy_ms": by_name.total(), "ttft_ms": 1e3 * report.ttft_s, "phases_ms": to_ms(report.phases_s)}
    checks.say("kernels of one identical prefill", count=len(kernels), **facts)
    for name, ms in by_name.most_common(12):
        checks.say(name, ms=ms)
