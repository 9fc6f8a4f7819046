"""The command ``semsharekv bench``: how much time and memory did reuse save?

Every scenario is measured at every length, under every policy, in one run on one model. Tables go to standard output
or, with ``--out``, to a Markdown file with every sample as JSON and plots beside it, written anew after each scenario.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from semsharekv_integrations.checks import require
from semsharekv_integrations.lab import speed_plots, speed_tables
from semsharekv_integrations.lab.origin import origin, recorded_command, setting_of, write_whole
from semsharekv_integrations.lab.policies import FULL
from semsharekv_integrations.lab.presets import PRESETS, REFERENCE, Subject, load
from semsharekv_integrations.lab.speed import EVERY_POLICY, Failure, Results, SpeedBench
from semsharekv_integrations.lab.speed_figures import AIM_LENGTH, Row, Verdict, summarize, verdicts
from semsharekv_integrations.lab.speed_policies import MODE_OF, makers, peer_makers
from semsharekv_integrations.lab.speed_scenarios import SCENARIOS, Scenario, build
from semsharekv_integrations.model.loading import hide_progress_bars
from semsharekv_integrations.model.prompt import PromptRenderer
from semsharekv_integrations.terminal import print_table

LENGTHS, QUICK_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384), (512, 2048)
REPEATS, QUICK_REPEATS = 5, 3
NEW_TOKENS, QUICK_NEW_TOKENS = 16, 4
FAMILIES = ("reworded",)  # stand for all scenarios whose names begin so


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="folder or hub id (default: the built-in reference model)")
    which.add_argument("--preset", choices=PRESETS, metavar="NAME", help=_presets_help())
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="prompt tokens (default: 512 to 16384)")
    parser.add_argument("--scenarios", nargs="+", choices=[*SCENARIOS, *FAMILIES], default=[*SCENARIOS], metavar="NAME")
    parser.add_argument("--policies", nargs="+", choices=[*MODE_OF], default=[*MODE_OF], metavar="NAME")
    parser.add_argument("--peers", action="store_true", help="also LangChain's and LlamaIndex's own local classes")
    parser.add_argument("--repeats", type=int, metavar="N", help=f"timed rounds (default: {REPEATS})")
    parser.add_argument("--new-tokens", type=int, metavar="N", help=f"generated in each call (default: {NEW_TOKENS})")
    parser.add_argument("--quick", action="store_true", help="a first look: 512 and 2048 tokens, few rounds")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: CUDA if there is one)")
    parser.add_argument("--dtype", default="auto", help="torch dtype, or auto (default)")
    parser.add_argument("--threads", type=int, metavar="N", help="of PyTorch (default: its own choice)")
    parser.add_argument("--seed", type=int, default=0, help="of documents, questions and random weights")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write tables, samples and plots")
    parser.add_argument("--no-plots", action="store_true", help="leave plots out")


def _presets_help() -> str:
    return f"the reference model, or random weights of a known shape: {', '.join(PRESETS)}"


def run(args: argparse.Namespace) -> int:
    """Measure and report; returns the exit code.

    Raises:
        ValueError: for an argument that is out of bounds.
        SemShareError: if the model cannot be loaded, or plots are asked for without matplotlib.
    """
    plan = BenchPlan.of(args)
    if args.out and not args.no_plots:
        speed_plots.pyplot()
    if args.threads:
        torch.set_num_threads(args.threads)
    hide_progress_bars()
    console = Console(stderr=True)
    with console.status(f"Loading {plan.model}"):
        subject = load(plan.model, args.device, args.dtype, args.seed)
    bench = BenchRun(plan, subject)
    with _progress(console) as progress:
        for _ in bench.steps(progress):
            if args.out:
                bench.write(args.out, plots=False)
    if args.out:
        bench.write(args.out, plots=not args.no_plots)
    _print(Console(), bench)
    if args.out:
        console.print(f"Written to {args.out}, with every sample and plots beside it.")
    return 0


@dataclass(frozen=True)
class BenchPlan:
    """What is measured, checked.

    Attributes:
        model: a preset, folder or hub id.
        lengths: tokens asked for, ascending.
        scenarios: of ``SCENARIOS``.
        policies: of our engine, a full prefill first.
        peers: whether the frameworks' own classes are timed too.
        repeats: timed rounds.
        new_tokens: most tokens generated in each call.
        seed: of documents, questions and random weights.
    """

    model: str
    lengths: tuple[int, ...]
    scenarios: tuple[str, ...]
    policies: tuple[str, ...]
    peers: bool
    repeats: int
    new_tokens: int
    seed: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> BenchPlan:
        """The plan that the arguments ask for.

        Raises:
            ValueError: naming the argument, its value and what is accepted.
        """
        lengths = args.lengths or (QUICK_LENGTHS if args.quick else LENGTHS)
        repeats = _given(args.repeats, QUICK_REPEATS if args.quick else REPEATS)
        new_tokens = _given(args.new_tokens, QUICK_NEW_TOKENS if args.quick else NEW_TOKENS)
        for name, value in (("lengths", min(lengths)), ("repeats", repeats), ("new_tokens", new_tokens)):
            require(value >= 1, name, value, "1 or more")
        require(args.threads is None or args.threads >= 1, "threads", args.threads, "1 or more")
        require(args.out is None or args.out.suffix == ".md", "out", str(args.out), "a path that ends in .md")
        wanted = [name for name in SCENARIOS if name in args.scenarios or name.split("_")[0] in args.scenarios]
        return cls(
            model=args.model or args.preset or REFERENCE,
            lengths=tuple(sorted(set(lengths))),
            scenarios=tuple(wanted),
            policies=tuple(name for name in MODE_OF if name == FULL or name in args.policies),
            peers=args.peers,
            repeats=repeats,
            new_tokens=new_tokens,
            seed=args.seed,
        )

    @property
    def reusing(self) -> list[str]:
        """Policies that aims are held against."""
        return [name for name in self.policies if name != FULL]


def _given(value: int | None, default: int) -> int:
    return default if value is None else value


class BenchRun:
    """One run: what it is of, and what has been measured so far.

    Args:
        plan: what to measure.
        subject: on what.

    Raises:
        ValueError: if a length is too short for a scenario.
    """

    def __init__(self, plan: BenchPlan, subject: Subject) -> None:
        self.plan = plan
        self.subject = subject
        self.results = Results()
        self.seconds = 0.0
        self._origin = origin(recorded_command())
        renderer = PromptRenderer(subject.tokenizer)
        self._count = lambda prompt: len(renderer.render(prompt, {}).token_ids)
        self._window = getattr(subject.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self.scenarios = [self._scenario(name, length) for length in plan.lengths for name in plan.scenarios]

    def steps(self, progress: Progress) -> Iterator[None]:
        """Measure one scenario at one length after the other, short prompts first."""
        plan, began = self.plan, time.perf_counter()
        mine = makers(plan.policies, self.subject, plan.new_tokens)
        bench = SpeedBench(self.subject, mine | (peer_makers(self.subject) if plan.peers else {}))
        per_scenario = len(bench.policies) * (plan.repeats + 1)
        task = progress.add_task("", total=per_scenario * len(self.scenarios))
        for done, scenario in enumerate(self.scenarios):
            name = scenario.scenario if isinstance(scenario, Failure) else scenario.name
            progress.update(task, description=f"{name}, {scenario.length} tokens", completed=done * per_scenario)
            if isinstance(scenario, Failure):
                self.results.failures.append(scenario)
            else:
                found = bench.measure(scenario, plan.repeats, lambda: progress.advance(task))
                self.results.samples += found.samples
                self.results.failures += found.failures
            progress.update(task, completed=(done + 1) * per_scenario)
            self.seconds = time.perf_counter() - began
            yield

    def about(self) -> dict[str, Any]:
        """Where the figures come from."""
        setting = {"model": self.subject.name, **setting_of(self.subject.model), "seed": self.plan.seed}
        counts = {"repeats": self.plan.repeats, "seconds": round(self.seconds, 1), "note": self.subject.note}
        return {**self._origin, **setting, **counts}

    def rows(self) -> list[Row]:
        """The figures so far."""
        return summarize(self.results.samples, self.results.failures)

    def write(self, out: Path, *, plots: bool) -> None:
        """Tables to ``out``; all samples as JSON and, if so asked, plots beside it."""
        about = self.about()
        write_whole(out, speed_tables.report(about, self.results, self.plan.reusing))
        write_whole(out.with_suffix(".json"), json.dumps({**about, **asdict(self.results)}, indent=1) + "\n")
        if plots:
            title = f"{about['model']}, {about['dtype']}, {about['device']}, {speed_tables.threads_of(about)}"
            speed_plots.draw(self.rows(), title, out)

    def _scenario(self, name: str, length: int) -> Scenario | Failure:
        """What is asked, or why it cannot be: beyond the context window nothing is measured."""
        window, new_tokens = self._window, self.plan.new_tokens
        if window is not None and length > window:
            return Failure(name, length, EVERY_POLICY, f"beyond the model's context window of {window} tokens")
        room = length if window is None else min(length, window - new_tokens)
        return replace(build(name, room, self.plan.seed, self._count), length=length)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _print(console: Console, bench: BenchRun) -> None:
    """The figures that matter most, what there is to say about them, and the aims."""
    rows = bench.rows()
    table = Table(title="Time to first token, median of rounds", title_justify="left", title_style="bold")
    for name in ("scenario", "tokens", "policy", "TTFT, ms", "x off", "x exact", "compute", "overhead"):
        table.add_column(name, justify="left" if name in ("scenario", "policy") else "right", no_wrap=True)
    places = dict.fromkeys((row.scenario, row.length) for row in rows)
    for place in places:
        group = [row for row in rows if (row.scenario, row.length) == place]
        for number, row in enumerate(group):
            where = ("", "") if number else (row.scenario, str(row.prompt_tokens or row.length))
            table.add_row(*where, *_cells(row), end_section=row is group[-1])
    print_table(console, table)
    for line in _notes(rows):
        console.print(line, style="dim", highlight=False)
    console.print(f"\n[bold]Aims[/] at the longest prompts measured of up to {AIM_LENGTH} tokens")
    for aim, held in _by_aim(verdicts(rows, bench.plan.reusing)).items():
        said = (f"{v.policy} {v.figure} ({'[green]met[/]' if v.met else '[red]missed[/]'})" for v in held)
        console.print(f"  {aim}: {', '.join(said)}", highlight=False)
    headline = f"\n{speed_tables.headline(bench.about())} {bench.subject.note}"
    console.print(headline, highlight=False, markup=False)


def _cells(row: Row) -> list[str]:
    ttft = f"{row.ttft_s.value * 1000:.1f}" if row.ttft_s else "-"
    ratios = [f"{spread.value:.2f}" if spread else "-" for spread in (row.speedup, row.speedup_over_exact)]
    costs = [f"{cost:.2f}" if cost is not None else "-" for cost in (row.compute_ratio, row.overhead_quotient)]
    return [row.policy, ttft, *ratios, *costs]


def _notes(rows: Sequence[Row]) -> list[str]:
    """Every note once, with the rows that it holds for."""
    places: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            places.setdefault(row.note, []).append(f"{row.scenario} {row.length} {row.policy}")
    return [f"{note}: {', '.join(held)}" for note, held in places.items()]


def _by_aim(found: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    groups: dict[str, list[Verdict]] = {}
    for verdict in found:
        groups.setdefault(verdict.aim, []).append(verdict)
    return groups
