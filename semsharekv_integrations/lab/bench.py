"""The bench runs every scenario under every policy, on one model. Each call gives figures of quality and of speed.

The KV of references is computed in full, once for cases in a row that have the same. Before each call it is put into
the policy's empty store, so that a call finds the references and not its own earlier prompt. Decoding is greedy. A call
that cannot be measured is recorded with its reason, and the run goes on.

Cases on real text come in groups over the same documents. The first of a group has a true full prefill, from which the
full prefills of the others continue: exactly, as a prefix. Their answers count like any other, their times do not.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from random import Random
from typing import Any

import torch

from semsharekv_integrations.config import EngineConfig, ReuseConfig
from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.errors import SemShareError, require
from semsharekv_integrations.kv import Reference
from semsharekv_integrations.lab.answers import Judging, is_answer, measure_f1
from semsharekv_integrations.lab.figures import FIGURES, Failure, Figure, Outcome
from semsharekv_integrations.lab.policies import CHUNKS, FLOORS, FULL, ORDER, UNBOUNDED, Subject
from semsharekv_integrations.lab.scenarios import Case, Query, Scenario
from semsharekv_integrations.lab.traces import Draft, TracedEngine, measure_divergence

NAMESPACE = "bench"
EVERY_POLICY = "all"
_FULL_CONFIG = EngineConfig(reuse=ReuseConfig(mode="off"))
_FILLER = EngineConfig(reuse=ReuseConfig(mode="exact", min_prefix_tokens=2**31), store=UNBOUNDED)  # computes in full
_FAILURES = (SemShareError, MemoryError, RuntimeError)
_NO_MEMORY = ("out of memory", "can't allocate memory")

Watch = Callable[[Case, str, int], AbstractContextManager[dict[str, Any]]]
Wants = Callable[[int, Case], bool]


@dataclass(frozen=True)
class Study:
    """What a run measures, and how its report counts."""

    title: str
    scenarios: Sequence[Scenario]
    configs: Mapping[str, EngineConfig]  # engine settings by policy
    judging: Judging = "mentions"  # how answers are judged, where a scenario does not say
    # wraps one call, given its case, policy and the case's index; yields a dict for what it measures, `extra`
    watch: Watch = lambda case, policy, index: nullcontext({})
    figures: Sequence[Figure] = FIGURES  # what the rows of the report hold
    # moves outcomes to other scenarios before they are counted
    regroup: Callable[[Sequence[Outcome]], list[Outcome]] = list
    about: Mapping[str, str] = field(default_factory=dict)  # a line on each policy that has one
    conclude: Callable[[Sequence[Outcome]], str] = lambda outcomes: ""  # what the outcomes come to, if anything


@dataclass
class Results:
    """Every outcome of a run, and every failure."""

    outcomes: list[Outcome] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def add(self, found: Results) -> None:
        """Take in what was found besides, each failure once."""
        self.outcomes += found.outcomes
        self.failures += [failure for failure in found.failures if failure not in self.failures]


class Bench:
    """One engine for each policy of a study, all on the same weights.

    The bench adds a full prefill named ``off`` if there is none. ``missing`` holds the policies that the model does not
    allow, with the reasons.
    """

    def __init__(self, subject: Subject, study: Study) -> None:
        self.subject = subject
        self.study = study
        self.engines: dict[str, SemShareEngine] = {}
        self.missing: dict[str, str] = {}
        self.filler = TracedEngine(subject.model, subject.tokenizer, _FILLER)
        self._stored: tuple[tuple[Query, ...], list[Reference]] = ((), [])  # references as asked for, and as computed
        self._group: tuple[str, int] | None = None  # whose full prefill ``sharing`` holds
        configs = {FULL: _FULL_CONFIG, **study.configs}
        require(configs[FULL].reuse.mode == "off", f"configs[{FULL!r}].reuse.mode", configs[FULL].reuse.mode, "'off'")
        for name, config in configs.items():
            try:
                self.engines[name] = self._start_engine(config)
            except SemShareError as error:
                self.missing[name] = str(error)

    @cached_property
    def sharing(self) -> SemShareEngine:
        """What computes the full prefills of a group, whose documents it computes once; if need be, each anew."""
        try:
            return self._start_engine(EngineConfig(reuse=ReuseConfig(mode="exact"), store=UNBOUNDED))
        except SemShareError:
            return self.engines[FULL]

    def _start_engine(self, config: EngineConfig) -> SemShareEngine:
        engine = TracedEngine(self.subject.model, self.subject.tokenizer, config)
        engine.generate("Warm up.", max_new_tokens=2)  # so that no timing holds one-time costs
        engine.clear()
        return engine

    def measure(
        self, scenario: Scenario, wants: Wants = lambda index, case: True
    ) -> Iterator[tuple[int | None, Results]]:
        """Run every case that ``wants`` wants under every policy, and yield its index with what it gave.

        First, under None, comes what fails for all cases.
        """
        failures = [Failure(scenario.name, name, reason) for name, reason in self.missing.items()]
        if scenario.problem:
            failures.append(Failure(scenario.name, EVERY_POLICY, scenario.problem))
        yield None, Results(failures=failures)
        for index, case in enumerate(scenario.cases):
            if wants(index, case):
                yield index, self._measure_case(scenario, index, case)

    def _measure_case(self, scenario: Scenario, index: int, case: Case) -> Results:
        """Make the calls in a drawn order, but a group's full prefill first: along its answer the others are read."""
        try:
            references = self._get_references(case)
        except _FAILURES as error:
            return Results(failures=[Failure(scenario.name, EVERY_POLICY, _explain(error))])
        results, room = Results(), scenario.max_new_tokens
        blank = Outcome(scenario.name, "", index, expected=case.answer, group=case.place[0] if case.place else None)
        order = Random(f"{scenario.name} {index}").sample(list(self.engines), len(self.engines))
        order.sort(key=lambda name: case.place is not None and name != FULL)
        said: dict[str, Outcome] = {}
        draft: Draft | None = None
        for name in order:
            if not _has_call(name, case):
                continue
            try:
                said[name], traced = self._call(replace(blank, policy=name), case, references, room, draft)
            except _FAILURES as error:
                results.failures.append(Failure(scenario.name, name, _explain(error)))
            else:
                draft = traced if name == FULL else draft
        judging = scenario.judging or self.study.judging
        found = [said[name] for name in self.engines if name in said]
        results.outcomes += [_judge(own, said.get(FULL), case, judging) for own in found]
        return results

    def _get_references(self, case: Case) -> list[Reference]:
        """The KV of the case's references; that of the case before if it has the same."""
        if not case.references or self._stored[0] != case.references:
            self._stored = ((), [])  # so that there is room
            self._stored = (case.references, self.make_references(case))
        return self._stored[1]

    def make_references(self, case: Case) -> list[Reference]:
        """The KV of the case's references, computed in full, in their order."""
        try:
            for query in case.references:
                self.filler.generate(query.prompt, documents=query.documents, namespace=NAMESPACE, max_new_tokens=1)
            return self.filler.store.fetch_all(NAMESPACE)
        finally:
            self.filler.clear()

    def _call(
        self, outcome: Outcome, case: Case, references: Sequence[Reference], room: int, draft: Draft | None
    ) -> tuple[Outcome, Draft | None]:
        """Make one call with ``references`` in the store.

        Return ``outcome`` with what came of it, and what was read along ``draft`` or, for a full prefill of a group,
        along its own answer.
        """
        name, store_s, collects = outcome.policy, None, gc.isenabled()
        engine, target = self.engines[name], case.in_order if name == ORDER and case.in_order else case.target
        is_shared = case.place is not None and name == FULL
        if is_shared:
            engine = self._share(case)
        if isinstance(engine, TracedEngine):
            engine.draft = () if is_shared else draft.token_ids if draft and name != ORDER else None
        if name == CHUNKS:
            references = [self.filler.compute_first_half(target.prompt, NAMESPACE)]
        try:
            if self.engines[name].config.reuse.mode != "off":
                store_s = self.store_references(name, references)
            gc.disable()  # so that no call pays for another one's garbage
            with self.study.watch(case, name, outcome.case) as extra:
                generation = engine.generate(
                    target.prompt, documents=target.documents, namespace=NAMESPACE, max_new_tokens=room
                )
            store_bytes = None if store_s is None else engine.store.stats()["bytes"]
        finally:
            if collects:
                gc.enable()
            if not is_shared:
                engine.clear()
        traced = engine.traced if isinstance(engine, TracedEngine) and engine.draft is not None else None
        report, text = generation.report, generation.text
        outcome = replace(outcome, report=report, text=text, store_s=store_s, store_bytes=store_bytes, extra=extra)
        if draft and traced:
            outcome = replace(outcome, **measure_divergence(draft.logits, traced.logits)._asdict())
        return outcome, traced

    def _share(self, case: Case) -> SemShareEngine:
        """``sharing``, which holds the full prefills of the case's group alone."""
        assert case.place is not None, "the case is one of a group"
        if self._group != (case.scenario, case.place[0]):
            self.sharing.clear()
            self._group = (case.scenario, case.place[0])
        return self.sharing

    def store_references(self, policy: str, references: Sequence[Reference]) -> float:
        """Put the references into a policy's store; how many seconds it took."""
        engine, began = self.engines[policy], time.perf_counter()
        for reference in references:
            stored = engine.store.put(reference)
            require(stored, "store.max_bytes", engine.config.store.max_bytes, f"{reference.num_bytes} or more")
        return time.perf_counter() - began


def _judge(own: Outcome, full: Outcome | None, case: Case, judging: Judging) -> Outcome:
    """``own`` beside the full prefill's answer and the right one."""
    own = replace(
        own,
        agrees=None if full is None else own.text.strip() == full.text.strip(),
        right=is_answer(own.text, case.answer, case.values, judging),
        stale=is_answer(own.text, case.stale, case.stale_values, judging),
    )
    if case.place is None:
        return own
    f1 = measure_f1(own.text, case.values) if case.values else None
    return replace(own, f1=f1, full_f1=None if full is None else measure_f1(own.text, [full.text]))


def _has_call(policy: str, case: Case) -> bool:
    """Whether the policy says something on the case. Floors cost a full prefill each: the first of a group has them."""
    if policy not in FLOORS:
        return True
    return case.place is not None and case.place[1] == 0 and (policy == CHUNKS or case.in_order is not None)


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
