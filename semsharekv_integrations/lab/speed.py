"""Speed: every scenario under every policy, interleaved and repeated, on one model in one run.

What a scenario's references leave in the store is computed once, in full, and given to every policy anew before each
call, so that a call finds them and not its own earlier prompt. A first round is not timed: memory is measured in it,
and one-time costs fall into it. What cannot be measured is recorded with its reason, and the run goes on.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from random import Random

import torch

from semsharekv_integrations.config import EngineConfig, ReuseConfig
from semsharekv_integrations.errors import SemShareError, UnsupportedModelError
from semsharekv_integrations.kv import Reference
from semsharekv_integrations.lab.presets import Subject
from semsharekv_integrations.lab.speed_policies import (
    NAMESPACE,
    UNBOUNDED,
    EnginePolicy,
    Maker,
    Policy,
    Reading,
)
from semsharekv_integrations.lab.speed_probes import LayerClock, with_peak
from semsharekv_integrations.lab.speed_scenarios import Scenario
from semsharekv_integrations.lab.workloads import Query
from semsharekv_integrations.model.layers import decoder_layers

UNTIMED = 0  # the round in which memory is measured
EVERY_POLICY = "all"
_FILLER = EngineConfig(reuse=ReuseConfig(mode="exact", min_prefix_tokens=2**31), store=UNBOUNDED)  # computes in full
_NO_MEMORY = ("out of memory", "can't allocate memory")


@dataclass(frozen=True)
class Sample:
    """One call of one policy.

    Attributes:
        scenario: its name.
        length: tokens asked for.
        prompt_tokens: tokens of the prompt.
        policy: what ran.
        round: 0 for the one that is not timed, then from 1 on.
        reading: what came out.
    """

    scenario: str
    length: int
    prompt_tokens: int
    policy: str
    round: int
    reading: Reading


@dataclass(frozen=True)
class Failure:
    """What was not measured, and why; ``policy`` is ``all`` if that holds for every one."""

    scenario: str
    length: int
    policy: str
    reason: str


@dataclass
class Results:
    """All that was measured, and what was not."""

    samples: list[Sample] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


class SpeedBench:
    """The policies on one model; those that cannot be made are left out, with their reasons in ``missing``.

    Args:
        subject: what is measured on.
        makers: how to make each policy, by name.
    """

    def __init__(self, subject: Subject, makers: Mapping[str, Maker]) -> None:
        self.device = subject.model.device
        self.policies: dict[str, Policy] = {}
        self.missing: dict[str, str] = {}
        self.clock = _clock(subject)
        self._filler = EnginePolicy(subject, _FILLER, new_tokens=1)
        for name, make in makers.items():
            try:
                self.policies[name] = _warmed(make())
            except SemShareError as error:
                self.missing[name] = str(error)

    def measure(self, scenario: Scenario, repeats: int, advance: Callable[[], None] = lambda: None) -> Results:
        """One untimed round and ``repeats`` timed ones; the order changes from round to round.

        Args:
            scenario: what is asked, behind what.
            repeats: timed rounds, at least 1.
            advance: called after every call, done or failed.
        """
        results = Results(failures=[_failure(scenario, *item) for item in self.missing.items()])
        try:
            references = self._references(scenario)
        except _FAILURES as error:
            return Results(failures=[_failure(scenario, EVERY_POLICY, _reason(error))])
        for turn in range(repeats + 1):
            order = Random(f"{scenario.name} {scenario.length} {turn}")
            for name in order.sample(list(self.policies), len(self.policies)):
                advance()
                if any(failure.policy == name for failure in results.failures):
                    continue
                try:
                    reading = self._read(name, scenario.target, references, with_memory=turn == UNTIMED)
                except _FAILURES as error:
                    results.failures.append(_failure(scenario, name, _reason(error)))
                    continue
                place = (scenario.name, scenario.length, scenario.prompt_tokens)
                results.samples.append(Sample(*place, name, turn, reading))
        results.samples.sort(key=lambda sample: (sample.round, list(self.policies).index(sample.policy)))
        return results

    def _read(self, name: str, query: Query, references: Sequence[Reference], *, with_memory: bool) -> Reading:
        """One call behind ``references`` alone."""
        policy = self.policies[name]
        try:
            policy.prepare(references)
            if self.clock:
                self.clock.start()
            with _no_collection():
                if with_memory:
                    reading, peak = with_peak(lambda: policy.ask(query), self.device)
                else:
                    reading, peak = policy.ask(query), None
            return replace(reading, peak_bytes=peak, layers=self.clock.read() if self.clock else ())
        finally:
            policy.clear()

    def _references(self, scenario: Scenario) -> list[Reference]:
        """What the scenario's references leave in a store, exact and in their order."""
        try:
            for query in scenario.references:
                self._filler.ask(query)
            return self._filler.engine.store.fetch_all(NAMESPACE)
        finally:
            self._filler.clear()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector from running, so that no call pays for another one's garbage."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _failure(scenario: Scenario, policy: str, reason: str) -> Failure:
    return Failure(scenario.name, scenario.length, policy, reason)


_FAILURES = (SemShareError, MemoryError, RuntimeError)


def _reason(error: BaseException) -> str:
    """Why a call failed. What is no known reason is raised again: a bug must not read as a figure."""
    text = " ".join(str(error).split())
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in text for words in _NO_MEMORY):
        traceback.clear_frames(error.__traceback__)  # they hold what did not fit
        gc.collect()
        torch.cuda.empty_cache()
        return "out of memory"
    if isinstance(error, SemShareError):
        return text
    raise error


def _clock(subject: Subject) -> LayerClock | None:
    """A clock on the decoder layers, or None if the model has no plain list of them."""
    try:
        layers = decoder_layers(subject.model, subject.model.config.get_text_config(decoder=True))
    except UnsupportedModelError:
        return None
    return LayerClock(layers, subject.model.device)


def _warmed(policy: Policy) -> Policy:
    policy.ask(Query([{"role": "user", "content": "Warm up."}], {}))
    policy.clear()
    return policy
