"""Studies: which cases run under which policies, what is measured besides, and what a plot of it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from semsharekv_integrations.config import EngineConfig
from semsharekv_integrations.lab import dataset, policies, workloads
from semsharekv_integrations.lab.dataset import Example
from semsharekv_integrations.lab.metrics import Row
from semsharekv_integrations.lab.policies import Corrupt
from semsharekv_integrations.lab.prompts import Layout
from semsharekv_integrations.lab.quality import Outcome
from semsharekv_integrations.lab.workloads import Case

CONTROL_POLICIES = (policies.FULL, "rerun", "exact")
NEGATIVE_CONTROL = "unlike"
QUICK_CASES, DEFAULT_CASES = 3, 200
QUICK_DOCUMENTS = (4, 8)
QUICK_WORKLOADS = ("reordered", "reworded", "edited", NEGATIVE_CONTROL)

Annotate = Callable[[Case, Outcome], Outcome]
Regroup = Callable[[Sequence[Outcome]], list[Outcome]]


class Group(NamedTuple):
    """Cases that share rows of the table; iterated once."""

    name: str
    cases: Iterable[Case]
    total: int


class Axis(NamedTuple):
    """What a plot shows from left to right, which rows form a line, and which stand in one panel.

    ``x`` is None for rows that have no place on it.
    """

    label: str
    x: Callable[[Row], float | None]
    series: Callable[[Row], str]
    panel: Callable[[Row], str]
    is_logarithmic: bool = False


@dataclass(frozen=True)
class Options:
    """What a command line says on any study.

    Attributes:
        cases: of each group; None for the default.
        seed: of all that is drawn.
        documents: fewest and most in a prompt; None for the default.
        layouts: where documents may stand.
        settings: fields of ``ReuseConfig`` for all policies that reuse KV off the prefix.
        quick: few and short cases, and few points of a sweep.
    """

    cases: int | None = None
    seed: int = 0
    documents: tuple[int, int] | None = None
    layouts: Sequence[Layout] = workloads.DEFAULT_LAYOUTS
    settings: Mapping[str, Any] = field(default_factory=dict)
    quick: bool = False

    @property
    def num_cases(self) -> int:
        """Of each group."""
        return self.cases or (QUICK_CASES if self.quick else DEFAULT_CASES)

    @property
    def num_documents(self) -> tuple[int, int]:
        """Fewest and most in a prompt."""
        return self.documents or (QUICK_DOCUMENTS if self.quick else workloads.DEFAULT_DOCUMENTS)


def _unchanged(case: Case, outcome: Outcome) -> Outcome:
    return outcome


@dataclass(frozen=True)
class Study:
    """All that is needed to measure, to tabulate and to plot.

    Attributes:
        title: of table and plots.
        configs: engine settings by policy.
        groups: of cases.
        axis: of the plots.
        annotate: adds figures of its own to an outcome.
        regroup: puts outcomes of all groups into others, before they are counted.
        corrupt: what is done to stored KV, by policy.
    """

    title: str
    configs: Mapping[str, EngineConfig]
    groups: Sequence[Group]
    axis: Axis
    annotate: Annotate = _unchanged
    regroup: Regroup = list
    corrupt: Mapping[str, Corrupt] = field(default_factory=dict)


def compute_of(row: Row) -> float | None:
    """The median compute ratio."""
    return None if row.compute_ratio is None else row.compute_ratio.value


BY_COMPUTE = Axis("compute ratio (median)", compute_of, lambda row: row.policy, lambda row: row.workload)


def controls() -> dict[str, EngineConfig]:
    """A full prefill, the same again for the noise, and the exact prefix."""
    return policies.make_configs(CONTROL_POLICIES)


def world_group(options: Options, workload: str) -> Group:
    """The cases of one workload of the synthetic world."""
    count = options.num_cases
    cases = workloads.make_cases(workload, count, options.seed, options.num_documents, options.layouts)
    return Group(workload, cases, count)


def workload_study(options: Options, names: Sequence[str], policy_names: Sequence[str]) -> Study:
    """Every workload under every policy."""
    return Study(
        "Answers under reuse",
        policies.make_configs(policy_names, options.settings),
        [world_group(options, name) for name in names],
        BY_COMPUTE,
        corrupt=policies.make_corruptions(policy_names, options.seed),
    )


def data_study(options: Options, examples: Sequence[Example], policy_names: Sequence[str]) -> Study:
    """A user's examples under every policy; the first ones if there are more than cases asked for."""
    most = options.cases or (QUICK_CASES if options.quick else len(examples))
    groups = [
        (dataset.DATA, list(dataset.data_cases(examples, options.seed, options.layouts))[:most]),
        (dataset.UNLIKE, list(dataset.unlike_cases(examples, options.seed, options.layouts))[:most]),
    ]
    return Study(
        "Answers under reuse, on own data",
        policies.make_configs(policy_names, options.settings),
        [Group(name, cases, len(cases)) for name, cases in groups if cases],
        BY_COMPUTE,
        corrupt=policies.make_corruptions(policy_names, options.seed),
    )
