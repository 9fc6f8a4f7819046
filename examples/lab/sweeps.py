"""Sweeps: one thing is varied, and everything else stays; each is a study with its own axis.

    PYTHONPATH=. python examples/lab/sweeps.py budget --cases 100 --sizes 6 30 --threads 1 --out budget.md

Takes what ``drawn.py`` takes but for scenarios and policies, and draws plots beside the tables.

``sentences``, ``similarity`` and ``retention`` are SemShareKV's sensitivity tests (arXiv 2509.24832) with facts in
place of ROUGE-L. ``budget`` asks which signal makes the most of a recomputed token, ``lsh`` how many bits it takes.
Every sweep has a full prefill, its rerun, the exact prefix and the negative control beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import floor
from random import Random
from typing import Any

import drawn
from arguments import parse_arguments
from drawn import (
    DEFAULT_DOCUMENTS,
    DEFAULT_LAYOUTS,
    DRAWN_FIGURES,
    NEGATIVE_CONTROL,
    Scene,
    ask_about_scene,
    make_cases,
)
from methods import RAW
from plots import Axis, draw_answers, read_compute
from probes import RECALL, SIMILARITY, RecallProbe, SimilarityProbe
from semsharekv_integrations import EngineConfig, ReuseConfig, world
from semsharekv_integrations.lab import command
from semsharekv_integrations.lab.bench import Study
from semsharekv_integrations.lab.figures import Outcome, Row, summarize
from semsharekv_integrations.lab.policies import POLICIES, Policy, Subject, make_configs
from semsharekv_integrations.lab.running import run_study
from semsharekv_integrations.lab.scenarios import Case, Query, Scenario
from semsharekv_integrations.world import Layout
from sentences import CHANGES, name_group, sentence_cases
from shapes import UNGUARDED

CONTROL_POLICIES = ("off", "rerun", "exact")
QUICK_CASES, DEFAULT_CASES = 3, 200
QUICK_DOCUMENTS = (4, 8)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
KEPT_RATIOS = (0.2, 0.3, 0.42, 0.58, 0.7, 0.85, 1.0)
FINAL_SHARES = (0.25, 1.0)  # of the first layer's; the paper's decay as mode ``paper`` has it, and none
SIGNAL_RATIOS = (0.05, 0.1, 0.2, 0.3, 0.4)
RELEVANCE_RATIOS = (0.02, 0.05, 0.1, 0.2, 0.3)
HASH_BITS = (16, 32, 64, 128, 256, 512)
LONG_DOCUMENTS = (14, 30)  # reports in one long document: more tokens than are compared in full
_REPORT = "report"
_BIN = 0.1
_ROUNDING = 1e-6  # so that 0.3 is not below 0.3
_EITHER = "sentences removed or replaced"


@dataclass(frozen=True)
class Options:
    """What a command line says on any sweep.

    Attributes:
        cases: of each scenario; None for the default.
        seed: of all that is drawn.
        documents: fewest and most in a prompt; None for the default.
        layouts: where documents may stand.
        settings: fields of ``ReuseConfig`` for all policies that reuse KV off the prefix.
        quick: few and short cases, and few points.
    """

    cases: int | None = None
    seed: int = 0
    documents: tuple[int, int] | None = None
    layouts: Sequence[Layout] = DEFAULT_LAYOUTS
    settings: Mapping[str, Any] = field(default_factory=dict)
    quick: bool = False

    @property
    def num_cases(self) -> int:
        """Of each scenario."""
        return self.cases or (QUICK_CASES if self.quick else DEFAULT_CASES)

    @property
    def num_documents(self) -> tuple[int, int]:
        """Fewest and most in a prompt."""
        return self.documents or (QUICK_DOCUMENTS if self.quick else DEFAULT_DOCUMENTS)

    def pick(self, values: tuple[float, ...]) -> tuple[float, ...]:
        """All of them, or the first, the middle and the last."""
        return (values[0], values[len(values) // 2], values[-1]) if self.quick else values


MakeStudy = Callable[[Options, Subject], tuple[Study, Axis]]


def make_controls() -> dict[str, EngineConfig]:
    """A full prefill, the same again for the noise, and the exact prefix."""
    return make_configs(CONTROL_POLICIES)


def add_controls(options: Options, varied: Mapping[str, ReuseConfig]) -> dict[str, EngineConfig]:
    """The controls, and what a sweep varies."""
    policies = {name: Policy("", reuse) for name, reuse in varied.items()}
    return make_controls() | make_configs(policies, options.settings, policies)


def draw_scenario(options: Options, name: str) -> Scenario:
    """The cases of a drawn scenario."""
    count = options.num_cases
    return Scenario(name, make_cases(name, count, options.seed, options.num_documents, options.layouts), count)


def sweep_sentences(options: Options, subject: Subject) -> tuple[Study, Axis]:
    """Shares of every document's sentences removed or replaced; the question is about one that stays."""
    shares = {name_group(change, share): share for change in CHANGES for share in options.pick(SHARES)}
    changes = {name_group(change, share): change for change in CHANGES for share in SHARES}
    count, documents = options.num_cases, options.num_documents
    scenarios = [
        Scenario(name, sentence_cases(changes[name], share, count, options.seed, documents, options.layouts), count)
        for name, share in shares.items()
    ]
    study = Study(
        "Sentences removed or replaced",
        [*scenarios, draw_scenario(options, NEGATIVE_CONTROL)],
        make_controls() | make_configs(("identical", "semantic"), options.settings),
        watch=SimilarityProbe(subject).watch,
        figures=(*DRAWN_FIGURES, SIMILARITY),
    )
    return study, Axis(
        "sentences changed (%)",
        lambda row: 100 * shares[row.scenario] if row.scenario in shares else None,
        lambda row: row.policy,
        lambda row: str(changes.get(row.scenario, row.scenario)),
    )


def sweep_similarity(options: Options, subject: Subject) -> tuple[Study, Axis]:
    """The cases of ``sentences``, by how alike the document asked about is to its stored version."""
    centre = {_name_bin(index): (index + 0.5) * _BIN for index in range(-10, 11)}
    study, _ = sweep_sentences(options, subject)
    return replace(study, title="Similarity of the document asked about", regroup=group_by_similarity), Axis(
        "similarity of pooled embeddings",
        lambda row: centre.get(row.scenario),
        lambda row: row.policy,
        lambda row: _EITHER if row.scenario in centre else row.scenario,
    )


def group_by_similarity(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes with a similarity, least first, in groups 0.1 wide and numbered anew; then the others, unchanged."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys((o.scenario, o.case) for o in outcomes))}
    known = [outcome for outcome in outcomes if "similarity" in outcome.extra]
    binned = [
        (_choose_bin(outcome.extra["similarity"]), numbers[outcome.scenario, outcome.case], outcome)
        for outcome in known
    ]
    binned.sort(key=lambda entry: entry[:2])
    found = [replace(outcome, scenario=_name_bin(index), case=number) for index, number, outcome in binned]
    return [*found, *(outcome for outcome in outcomes if "similarity" not in outcome.extra)]


def _choose_bin(value: float) -> int:
    """The last one ends with the value 1 itself."""
    return min(floor(value / _BIN + _ROUNDING), round(1 / _BIN) - 1)


def _name_bin(index: int) -> str:
    return f"{index * _BIN:.1f} to {(index + 1) * _BIN:.1f}"


def sweep_retention(options: Options, subject: Subject) -> tuple[Study, Axis]:
    """What share of the KV is kept for decoding: even in all layers, or decaying to a quarter from first to last."""
    names = {
        f"keeps {ratio:g}, {_name_spread(final)}": (ratio, final)
        for final in FINAL_SHARES
        for ratio in options.pick(KEPT_RATIOS)
    }
    kept = {
        name: ReuseConfig(mode="identical", retention_ratio=ratio, retention_final_share=final)
        for name, (ratio, final) in names.items()
    }

    def place(row: Row) -> float | None:
        ratio = row["kv_kept_ratio"]
        return ratio.value if ratio and row.policy in names else None

    scenarios = [draw_scenario(options, name) for name in ("reordered", NEGATIVE_CONTROL)]
    return Study("KV kept for decoding", scenarios, add_controls(options, kept), figures=DRAWN_FIGURES), Axis(
        "KV kept (share of bytes, median)", place, lambda row: _name_spread(names[row.policy][1])
    )


def _name_spread(final_share: float) -> str:
    return "even" if final_share == 1 else "decaying"


def sweep_budget(options: Options, subject: Subject) -> tuple[Study, Axis]:
    """Quality against compute, by what chooses the tokens to compute again; each signal on top of the boundaries."""
    signals = make_budget_policies(options)
    named = {name: reuse for signal in signals.values() for name, reuse in signal.items()}
    signal_of = {name: signal for signal, configs in signals.items() for name in configs}
    scenarios = [draw_scenario(options, name) for name in ("reordered", NEGATIVE_CONTROL)]
    title, configs = "Quality against compute, by signal", add_controls(options, named)
    return Study(title, scenarios, configs, figures=DRAWN_FIGURES), Axis(
        "compute ratio (median)",
        lambda row: read_compute(row) if row.policy in signal_of else None,
        lambda row: signal_of.get(row.policy, row.policy),
    )


def make_budget_policies(options: Options) -> dict[str, dict[str, ReuseConfig]]:
    """Settings by signal and by name. Attention and deviation act only where no document is relevant."""
    bounds = ReuseConfig(
        mode="identical",
        relevance_ratio=0.0,
        attention_ratio=0.0,
        max_deviation=UNGUARDED,
        max_compute_ratio=1.0,
    )
    ratios = options.pick(SIGNAL_RATIOS)
    return {
        "none": {"none": RAW},
        "boundaries": {"boundaries": bounds},
        "deviation": {f"deviation {r:g}": replace(bounds, full_layers=1, deviation_ratio=r) for r in ratios},
        "attention": {f"attention {r:g}": replace(bounds, attention_ratio=r) for r in ratios},
        "both": {
            f"both {r:g}": replace(bounds, full_layers=1, deviation_ratio=r / 2, attention_ratio=r / 2) for r in ratios
        },
        "relevance": {f"relevance {r:g}": replace(bounds, relevance_ratio=r) for r in options.pick(RELEVANCE_RATIOS)},
    }


def sweep_lsh(options: Options, subject: Subject) -> tuple[Study, Axis]:
    """Hash bits against recall and answers, on one long reworded document; 0 bits compare all tokens."""
    bits_of = {f"{bits:g} bits": int(bits) for bits in (0, *options.pick(HASH_BITS))}
    hashed = {name: ReuseConfig(mode="paper", lsh_bits=bits) for name, bits in bits_of.items()}
    configs, long = add_controls(options, hashed), replace(options, documents=options.documents or LONG_DOCUMENTS)
    study = Study(
        "Bits of the locality-sensitive hash",
        [Scenario(_name_long(alike), long_cases(long, alike=alike), long.num_cases) for alike in (True, False)],
        configs,
        watch=RecallProbe(subject, configs).watch,
        figures=(*DRAWN_FIGURES, RECALL),
    )
    return study, Axis(
        "hash bits", lambda row: bits_of.get(row.policy) or None, lambda row: "paper", is_logarithmic=True
    )


def long_cases(options: Options, *, alike: bool) -> Iterator[Case]:
    """Cases in which all documents of a prompt are one to the engine, so long that its tokens are hashed.

    Args:
        options: how many cases, of how many reports.
        alike: whether the stored one tells the same in other words, or is on other towns.
    """
    for index in range(options.num_cases):
        rng = Random(f"long {options.seed} {index}")
        count = rng.randint(*options.num_documents)
        documents = world.make_documents(rng, count if alike else 2 * count)
        seen = documents[:count]
        target = [world.reword(rng, document) for document in seen] if alike else documents[count:]
        case = ask_about_scene(rng, _name_long(alike), Scene([seen], target), options.layouts)
        references = tuple(map(_join_documents, case.references))
        yield replace(case, references=references, target=_join_documents(case.target), asked=None)


def _name_long(alike: bool) -> str:
    return f"{'reworded' if alike else NEGATIVE_CONTROL}, long"


def _join_documents(query: Query) -> Query:
    return Query(query.prompt, {_REPORT: "\n\n".join(query.documents.values())})


SWEEPS: Mapping[str, MakeStudy] = {
    "sentences": sweep_sentences,
    "similarity": sweep_similarity,
    "retention": sweep_retention,
    "budget": sweep_budget,
    "lsh": sweep_lsh,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one sweep, and draw it where it is written."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    names = [name for name in given[:1] if name in SWEEPS]
    about = "\n".join(f"    {name}\n      {(make.__doc__ or '').strip()}" for name, make in SWEEPS.items())
    args = parse_arguments(f"{__doc__}\n\n{about}", given[1:] if names else ["--help"], more=drawn.add_arguments)
    options = Options(
        args.cases,
        args.seed,
        tuple(args.documents) if args.documents else None,
        args.layouts or DEFAULT_LAYOUTS,
        dict(args.set),
        args.quick,
    )
    plain, subject = command.prepare(args, find=lambda args, subject: [])
    study, axis = SWEEPS[names[0]](options, subject)
    about_policies = {name: POLICIES[name].about for name in study.configs if name in POLICIES}
    study = replace(study, judging=drawn.judge_drawn(plain, subject).judging, about=about_policies)
    results = run_study(study, subject, args)
    if args.out:
        rows = summarize(study.regroup(results.outcomes), results.failures, study.figures)
        print("Plots:", *draw_answers(rows, study.title, axis, args.out))


if __name__ == "__main__":
    main()
