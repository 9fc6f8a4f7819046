"""Measure on prompts at a length, each asked several times: how does time grow with it?

    PYTHONPATH=. python examples/lab/lengths.py --lengths 512 1024 2048 4096 --threads 1 --out speed.md
    PYTHONPATH=. python examples/lab/lengths.py --preset qwen-0.5b --lengths 512 1024 --repeats 3 --new-tokens 2

Takes what ``semsharekv bench`` takes, but for real text. A first round is not timed, since one-time costs fall into it.
In the tables n is timed rounds and groups are prompts; brackets of a single prompt are quartiles over its rounds. A
preset is a known model's shape with random weights, of which no answer is right or wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from arguments import parse_arguments
from semsharekv_integrations.lab import command
from semsharekv_integrations.lab.bench import Study
from semsharekv_integrations.lab.figures import (
    FIGURES,
    Estimate,
    Figure,
    Groups,
    Outcome,
    Pair,
    estimate_mean,
    estimate_median,
    estimate_share,
)
from semsharekv_integrations.lab.policies import POLICIES, Policy, Subject
from semsharekv_integrations.lab.running import run_study
from semsharekv_integrations.lab.scenarios import Case, Scenario
from semsharekv_integrations.text.prompt import PromptRenderer
from shapes import PRESETS, REFERENCE, SHAPES, drop_guard, load_preset
from sized import SIZED, make_sized_case

REPEATS, LENGTHS = 5, (512, 1024, 2048, 4096, 8192, 16384)
QUICK_SCENARIOS = ("next_turn", "reordered", "unlike")
QUICK_REPEATS, QUICK_LENGTHS = 2, (512, 2048)
NEW_TOKENS = 16  # of an answer: as many as the longest right one has
UNTIMED = 0  # the round into which one-time costs fall
FAMILIES = {"reworded": tuple(name for name in SIZED if name.startswith("reworded"))}
_AT = " at "


def name_scenario(name: str, length: int) -> str:
    """What the prompts of a scenario at a length are called."""
    return f"{name}{_AT}{length}"


def split_name(scenario: str) -> tuple[str, int | None]:
    """Scenario and length, which is None for a scenario of another kind."""
    name, sign, length = scenario.rpartition(_AT)
    return (name, int(length)) if sign else (scenario, None)


def find_quartiles(values: Sequence[float]) -> Estimate:
    """Median and quartiles of one value or more."""
    low, value, high = np.percentile(values, (25, 50, 75))
    return Estimate(float(value), float(low), float(high))


def estimate_rounds(values: Sequence[float], groups: Groups = None) -> Estimate:
    """Median over the rounds of a single prompt, with quartiles; over several prompts with a 95% interval."""
    return estimate_median(values, groups) if groups and len(set(groups)) > 1 else find_quartiles(values)


def _measure_overhead(pair: Pair) -> float | None:
    """Share of a full prefill's time over share of its compute."""
    compute = pair.own.report.compute_ratio
    return pair.own.report.ttft_s / pair.full.report.ttft_s / compute if pair.full and compute else None


_SHORT = {"prompt_tokens": "tokens", "ttft_s": "TTFT, ms", "exact_ratio": "x exact", "difference_points": ""}
SPEED_FIGURES = (
    *(
        figure._replace(
            statistic={estimate_median: estimate_rounds, estimate_share: estimate_mean}.get(
                figure.statistic, figure.statistic
            ),
            short=_SHORT.get(figure.name, figure.short),
        )
        for figure in FIGURES
        if figure.name != "mcnemar_p"
    ),
    Figure("overhead", "overhead", ".2f", _measure_overhead, estimate_rounds, short="overhead"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` what prompts at a length take besides."""
    sized = parser.add_argument_group("prompts at a length")
    count = command.parse_count
    sized.add_argument("--lengths", type=count, nargs="+", metavar="N", help="tokens (default: 512 to 16384)")
    sized.add_argument("--repeats", type=count, metavar="N", help=f"timed rounds of each prompt ({REPEATS})")
    sized.add_argument("--cases", type=count, default=1, metavar="N", help="prompts of each scenario and length (1)")
    sized.add_argument("--preset", choices=PRESETS, default=REFERENCE, help="instead of --model")


def parse(
    description: str, arguments: Sequence[str] | None, policies: Mapping[str, Policy] = POLICIES
) -> argparse.Namespace:
    """The arguments of a script on prompts at a length."""
    return parse_arguments(description, arguments, policies, (*SIZED, *FAMILIES), add_arguments)


def count_rounds(args: argparse.Namespace) -> int:
    """Of each prompt, the one that is not timed included."""
    return 1 + (args.repeats or (QUICK_REPEATS if args.quick else REPEATS))


def find_scenarios(args: argparse.Namespace, subject: Subject) -> list[Scenario]:
    """Every scenario asked for at every length; each round of a prompt is a case."""
    names = args.scenarios or (QUICK_SCENARIOS if args.quick else tuple(SIZED))
    asked = {*names, *(part for name in names for part in FAMILIES.get(name, ()))}
    lengths = sorted(set(args.lengths or (QUICK_LENGTHS if args.quick else LENGTHS)))
    return [_size_scenario(args, subject, name, length) for length in lengths for name in SIZED if name in asked]


def _size_scenario(args: argparse.Namespace, subject: Subject, name: str, length: int) -> Scenario:
    """Prompts of seeds that follow on each other; none beyond the context window."""
    title = name_scenario(name, length)
    window = getattr(subject.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if window is not None and length > window:
        return Scenario(title, (), 0, problem=f"beyond the model's context window of {window} tokens")
    if not subject.tokenizer.chat_template:
        return Scenario(title, (), 0, problem="the model has no chat template")
    new_tokens = args.max_new_tokens or NEW_TOKENS
    room = length if window is None else min(length, window - new_tokens)
    cases = [replace(case, scenario=title) for case in _make_prompts(args, subject, name, room)]
    rounds = [case for case in cases for _ in range(count_rounds(args))]
    return Scenario(title, rounds, len(rounds), new_tokens)


def _make_prompts(args: argparse.Namespace, subject: Subject, name: str, length: int) -> Iterator[Case]:
    renderer = PromptRenderer(subject.tokenizer)
    for index in range(args.cases):
        case = make_sized_case(name, length, args.seed + index, lambda p: len(renderer.render(p, {}).token_ids))
        yield replace(case, answer=None) if subject.name in SHAPES else case


def load_subject(args: argparse.Namespace) -> Subject:
    """The model or the preset asked for."""
    return command.load_subject(args) if args.model else load_preset(args.preset, args.device, args.dtype, args.seed)


def prepare(args: argparse.Namespace, policies: Mapping[str, Policy] = POLICIES) -> tuple[Study, Subject]:
    """What the arguments ask for, and the model it is measured on."""
    study, subject = command.prepare(args, policies, find_scenarios, load_subject)
    rounds = count_rounds(args)

    def leave_out_untimed(outcomes: Sequence[Outcome]) -> list[Outcome]:
        return [replace(own, group=own.case // rounds) for own in outcomes if own.case % rounds != UNTIMED]

    drop = drop_guard if subject.name in SHAPES else lambda config: config
    configs = {name: drop(config) for name, config in study.configs.items()}
    judging = "exact" if subject.name not in SHAPES and not args.model else "mentions"
    return replace(study, configs=configs, judging=judging, figures=SPEED_FIGURES, regroup=leave_out_untimed), subject


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the scenarios asked for, at every length."""
    args = parse(__doc__ or "", arguments)
    study, subject = prepare(args)
    run_study(study, subject, args, prepare=prepare)


if __name__ == "__main__":
    sys.exit(main())
