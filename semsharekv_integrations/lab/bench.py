"""The bench runs every scenario under every policy, on one model. Each call gives figures of quality and of speed.

The KV of a case's references is computed once, in full. Before each call it is put into the policy's empty store, so
that a call finds the references and not its own earlier prompt. Decoding is greedy. A call that cannot be measured is
recorded with its reason, and the run goes on.
"""

from __future__ import annotations

import gc
import re
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Literal, get_args

import torch

from semsharekv_integrations.config import EngineConfig, ReuseConfig
from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.errors import SemShareError, require
from semsharekv_integrations.kv import Reference
from semsharekv_integrations.lab.figures import FIGURES, Failure, Figure, Outcome
from semsharekv_integrations.lab.policies import FULL, UNBOUNDED, Subject, drop_guard
from semsharekv_integrations.lab.scenarios import Case, Scenario
from semsharekv_integrations.lab.world import share_right

Judging = Literal["exact", "mentions"]
JUDGINGS: tuple[Judging, ...] = get_args(Judging)
NAMESPACE = "bench"
EVERY_POLICY = "all"
EXTRA_TOKENS = 4  # generated at most beyond those of the right answer
FREE_TOKENS = 64  # generated at most where the answer may be in any words, or is not known
_FULL_CONFIG = EngineConfig(reuse=ReuseConfig(mode="off"))
_FILLER = EngineConfig(reuse=ReuseConfig(mode="exact", min_prefix_tokens=2**31), store=UNBOUNDED)  # computes in full
_FAILURES = (SemShareError, MemoryError, RuntimeError)
_NO_MEMORY = ("out of memory", "can't allocate memory")

Watch = Callable[[Case, str, int], AbstractContextManager[dict[str, Any]]]


@dataclass(frozen=True)
class Study:
    """What a run measures, and how its report counts."""

    title: str
    scenarios: Sequence[Scenario]
    configs: Mapping[str, EngineConfig]  # engine settings by policy
    # `exact` takes an answer as right in the words of the case; `mentions` takes any words that hold its facts, since
    # other models were not trained on these words
    judging: Judging = "exact"
    # wraps one call in one round, and yields a dict for what it measures, the outcome's `extra`
    watch: Watch = lambda case, policy, turn: nullcontext({})
    figures: Sequence[Figure] = FIGURES  # what the rows of the report hold
    # moves outcomes to other scenarios before they are counted
    regroup: Callable[[Sequence[Outcome]], list[Outcome]] = list
    about: Mapping[str, str] = field(default_factory=dict)  # a line on each policy that has one


@dataclass
class Results:
    """Every outcome of a run, and every failure."""

    outcomes: list[Outcome] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def fail(self, scenario: Scenario, policy: str, reason: str) -> None:
        """Record once what was not measured."""
        failure = Failure(scenario.name, scenario.length, policy, reason)
        if failure not in self.failures:
            self.failures.append(failure)


class Bench:
    """One engine for each policy of a study, all on the same weights.

    The bench adds a full prefill named ``off`` if there is none. ``missing`` holds the policies that the model does not
    allow, with the reasons. On random weights there is no deviation guard, and no answer is right or wrong.
    """

    def __init__(self, subject: Subject, study: Study) -> None:
        self.subject = subject
        self.study = study
        self.engines: dict[str, SemShareEngine] = {}
        self.missing: dict[str, str] = {}
        self.filler = SemShareEngine(subject.model, subject.tokenizer, _FILLER)
        configs = {FULL: _FULL_CONFIG, **study.configs}
        require(configs[FULL].reuse.mode == "off", f"configs[{FULL!r}].reuse.mode", configs[FULL].reuse.mode, "'off'")
        for name, config in configs.items():
            try:
                self.engines[name] = self._start_engine(drop_guard(config) if subject.is_random else config)
            except SemShareError as error:
                self.missing[name] = str(error)

    def _start_engine(self, config: EngineConfig) -> SemShareEngine:
        engine = SemShareEngine(self.subject.model, self.subject.tokenizer, config)
        engine.generate("Warm up.", max_new_tokens=2)  # so that no timing holds one-time costs
        engine.clear()
        return engine

    def count_calls(self, scenario: Scenario) -> int:
        """How many calls ``measure`` makes at most."""
        return scenario.total * len(scenario.rounds) * len(self.engines)

    def measure(self, scenario: Scenario, results: Results, advance: Callable[[], None] = lambda: None) -> None:
        """Run every case under every policy in every round, in an order drawn for each round.

        ``results`` receives outcomes and failures; ``advance`` is called for every call, done or failed.
        """
        for name, reason in self.missing.items():
            results.fail(scenario, name, reason)
        if scenario.problem:
            results.fail(scenario, EVERY_POLICY, scenario.problem)
        for index, case in enumerate(scenario.cases):
            try:
                references = self.make_references(case)
            except _FAILURES as error:
                results.fail(scenario, EVERY_POLICY, _explain(error))
                continue
            failed, room = set[str](), scenario.max_new_tokens or self.count_room(case)
            for turn in scenario.rounds:
                blank = Outcome(scenario.name, scenario.length, "", index, turn, expected=case.answer)
                order = Random(f"{scenario.name} {scenario.length} {index} {turn}")
                said: dict[str, Outcome] = {}
                for name in order.sample(list(self.engines), len(self.engines)):
                    advance()
                    if name in failed:
                        continue
                    try:
                        said[name] = self._call(replace(blank, policy=name), case, references, room)
                    except _FAILURES as error:
                        failed.add(name)
                        results.fail(scenario, name, _explain(error))
                full = said[FULL].text.strip() if FULL in said else None
                for name in self.engines:
                    if name in said:
                        agrees = None if full is None else said[name].text.strip() == full
                        results.outcomes.append(replace(said[name], agrees=agrees))

    def make_references(self, case: Case) -> list[Reference]:
        """The KV of the case's references, computed in full, in their order."""
        try:
            for query in case.references:
                self.filler.generate(query.prompt, documents=query.documents, namespace=NAMESPACE, max_new_tokens=1)
            return self.filler.store.fetch_all(NAMESPACE)
        finally:
            self.filler.clear()

    def _call(self, outcome: Outcome, case: Case, references: Sequence[Reference], room: int) -> Outcome:
        """Make one call with ``references`` in the store; return ``outcome`` with what came of it."""
        engine, store_s, collects = self.engines[outcome.policy], None, gc.isenabled()
        try:
            if engine.config.reuse.mode != "off":
                store_s = self.store_references(outcome.policy, references)
            gc.disable()  # so that no call pays for another one's garbage
            with self.study.watch(case, outcome.policy, outcome.round) as extra:
                generation = engine.generate(
                    case.target.prompt, documents=case.target.documents, namespace=NAMESPACE, max_new_tokens=room
                )
            store_bytes = None if store_s is None else engine.store.stats()["bytes"]
        finally:
            if collects:
                gc.enable()
            engine.clear()
        report, text = generation.report, generation.text
        outcome = replace(outcome, report=report, text=text, store_s=store_s, store_bytes=store_bytes, extra=extra)
        if self.subject.is_random:
            return outcome
        right = is_answer(text, case.answer, case.values, self.study.judging)
        return replace(outcome, right=right, stale=is_answer(text, case.stale, case.stale_values, self.study.judging))

    def store_references(self, policy: str, references: Sequence[Reference]) -> float:
        """Put the references into a policy's store; how many seconds it took."""
        engine, began = self.engines[policy], time.perf_counter()
        for reference in references:
            stored = engine.store.put(reference)
            require(stored, "store.max_bytes", engine.config.store.max_bytes, f"{reference.num_bytes} or more")
        return time.perf_counter() - began

    def count_room(self, case: Case) -> int:
        """How many tokens an answer may have."""
        if case.answer is None:
            return FREE_TOKENS
        answer_tokens = len(self.subject.tokenizer.encode(case.answer, add_special_tokens=False))
        return max(answer_tokens + EXTRA_TOKENS, FREE_TOKENS if self.study.judging == "mentions" else 0)


def _explain(error: BaseException) -> str:
    """Why a call failed. An error without a known reason is raised again: a bug must not read as a figure."""
    text = " ".join(str(error).split())
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in text for words in _NO_MEMORY):
        traceback.clear_frames(error.__traceback__)  # they hold what did not fit
        gc.collect()
        torch.cuda.empty_cache()
        return "out of memory"
    if isinstance(error, SemShareError):
        return text
    raise error


def is_answer(said: str, answer: str | None, values: Sequence[str], judging: Judging) -> bool | None:
    """Whether ``said`` is the answer; None if there is none.

    ``exact`` asks for the words of ``answer``, its lines in any order. ``mentions`` asks for all ``values``, each as
    whole words in any case.
    """
    if answer is None:
        return None
    if judging == "exact":
        return share_right(said, answer) == 1
    words = [r"\s+".join(map(re.escape, value.split())) for value in values]
    return all(re.search(rf"(?<!\w){pattern}(?!\w)", said, re.IGNORECASE) for pattern in words)
