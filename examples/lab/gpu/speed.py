"""Sections ``speed``, ``nocudnn`` and ``tiers``: time to the first token beside a full prefill, and what storing takes.

Each seed is a new prompt, and so new shapes: its first call is what a user sees; the second knows the shapes. The first
seed warms up.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from functools import partial
from typing import NamedTuple

import torch

from gpu.checks import SHORTEST_S, Checks, to_ms
from gpu.subjects import NAMESPACE, ForgetfulEngine, TimedSubject, tell
from semsharekv_integrations import Generation, StoreConfig
from semsharekv_integrations.lab.scenarios import Case

SEEDS = (3, 4, 5)
SHARE = 0.4  # of the time, that other sections are left


class Pair(NamedTuple):
    """The first call with a shape, the second one, and the larger peak in GB."""

    first: Generation
    again: Generation
    peak_gb: float


def check_speed(checks: Checks) -> None:
    """Every scenario at every length, then what storing takes."""
    subject = TimedSubject(checks)
    for length in checks.options.lengths:
        for name in checks.options.scenarios:
            if checks.left_s < max(10 + length / 1000, SHARE * checks.options.seconds):
                checks.say(f"{name} {length}", skipped="its share of the time is used")
                continue
            checks.attempt(f"{name} {length}", partial(_measure, checks, subject, name, length))
    checks.attempt("storing", partial(_measure_storing, checks, subject))


def check_without_cudnn(checks: Checks) -> None:
    """The same with cuDNN taken out of attention's choice: it builds a plan for every new shape."""
    if not checks.on_gpu:
        checks.say("skipped", needs="a GPU")
        return
    subject = TimedSubject(checks)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        for length in checks.options.lengths[:3]:
            for name in checks.options.scenarios[:2]:
                if checks.left_s > 10 + length / 1000:
                    checks.attempt(f"{name} {length}", partial(_measure, checks, subject, name, length))
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def _measure(checks: Checks, subject: TimedSubject, name: str, length: int) -> None:
    filler, modes = subject.make_engine("exact"), checks.options.modes
    engines, pairs = {mode: subject.make_engine(mode) for mode in modes}, {mode: [] for mode in modes}
    for seed in SEEDS:
        case = subject.make_case(name, length, seed)
        filler.clear()
        for query in case.references:
            tell(filler, query)
        for mode, engine in engines.items():
            if checks.left_s < SHORTEST_S:
                return
            pairs[mode].append(_ask_twice(subject, filler, engine, case))
            engine.clear()
    base = None
    for mode in modes:
        base = base or _find_medians(pairs[mode])
        _tell_of(checks, f"{name} {length} {mode}", pairs[mode], base)


def _ask_twice(subject: TimedSubject, filler: ForgetfulEngine, engine: ForgetfulEngine, case: Case) -> Pair:
    if engine.config.reuse.mode != "off":
        for reference in filler.store.fetch_all(NAMESPACE):
            engine.store.put(reference)
    (first, peak), (again, other) = (subject.ask(engine, case.target) for _ in range(2))
    return Pair(first, again, max(peak, other))


def _find_medians(pairs: list[Pair]) -> tuple[float, float]:
    """Seconds to the first token, of first calls and of second ones."""
    later = pairs[1:] or pairs
    return (
        statistics.median(pair.first.report.ttft_s for pair in later),
        statistics.median(pair.again.report.ttft_s for pair in later),
    )


def _tell_of(checks: Checks, what: str, pairs: list[Pair], base: tuple[float, float]) -> None:
    first, again = _find_medians(pairs)
    report = pairs[-1].again.report
    checks.say(
        what,
        prompt=report.prompt_tokens,
        computed=round(report.compute_ratio, 3),
        ttft_new_ms=1e3 * first,
        ttft_ms=1e3 * again,
        speedup_new=base[0] / first,
        speedup=base[1] / again,
        peak_gb=max(pair.peak_gb for pair in pairs),
        phases_ms=to_ms(report.phases_s),
        declined=(report.declined or "")[:40],
    )


def _measure_storing(checks: Checks, subject: TimedSubject) -> None:
    lengths = checks.options.lengths
    case = subject.make_case("next_turn", lengths[min(1, len(lengths) - 1)], 3)
    (reference,), target = case.references, case.target
    engine = subject.make_engine("exact")
    first, turn = (checks.time(partial(tell, engine, query)) for query in (reference, target))
    checks.say("storing a prompt, device", first_call_ms=1e3 * first, next_turn_ms=1e3 * turn)
    with tempfile.TemporaryDirectory() as folder:
        stored = StoreConfig(max_bytes=40 << 30, directory=folder)
        engine = subject.make_engine("exact", stored)
        seconds = checks.time(partial(tell, engine, reference))
        size = engine.store.stats()["disk_bytes"] / 1e6
        checks.say("storing a prompt, device and disk", first_call_ms=1e3 * seconds, disk_mb=size)
        engine.close()
        engine = subject.make_engine("exact", stored)
        for what in ("disk, first read", "memory"):
            report = subject.ask(engine, target)[0].report
            facts = {"prefix": report.prefix_tokens, "phases_ms": to_ms(report.phases_s)}
            checks.say(f"next turn from {what}", ttft_ms=1e3 * report.ttft_s, **facts)
        full = subject.ask(subject.make_engine("off"), target)[0].report
        checks.say("the same prompt in full", ttft_ms=1e3 * full.ttft_s)
        engine.close()


def check_tiers(checks: Checks) -> None:
    """How long it takes to bring a prompt's KV back from host memory, and to push it there."""
    subject, lengths = TimedSubject(checks), checks.options.lengths
    length = lengths[min(1, len(lengths) - 1)]
    case = subject.make_case("next_turn", length, 3)
    size = tell(subject.make_engine("exact"), case.references[0]).report.kv_bytes
    for room, what in ((int(0.5 * size), "stays on the host"), (int(1.3 * size), "moves up")):
        engine = subject.make_engine("exact", StoreConfig(max_bytes=room, host_max_bytes=4 * size))
        for query in case.references:
            tell(engine, query)
        if room > size:
            other = subject.make_case("next_turn", length, 4).references[0]
            pushed = checks.time(partial(tell, engine, other))
            checks.say("a call that pushes it out", ms=1e3 * pushed, demoted=engine.store.stats()["demoted"])
        first, again = (subject.ask(engine, case.target)[0].report for _ in range(2))
        facts = {"prefix": first.prefix_tokens, "promoted": engine.store.stats()["promoted"]}
        times = {"ttft_ms": 1e3 * first.ttft_s, "again_ms": 1e3 * again.ttft_s, "phases_ms": to_ms(first.phases_s)}
        checks.check(f"next turn {length}, {what}", first.prefix_tokens > 0, **times, **facts)
        del engine
        gc.collect()
