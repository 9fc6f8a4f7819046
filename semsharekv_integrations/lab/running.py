"""Runs a study to its report, case by case, in one process or in several, and from where an earlier run stopped.

With ``--out`` every case goes to a journal as soon as it is done, and the report is written anew now and then.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from semsharekv_integrations.errors import SemShareError
from semsharekv_integrations.lab import report
from semsharekv_integrations.lab.bench import Bench, Results, Study
from semsharekv_integrations.lab.figures import Row, summarize
from semsharekv_integrations.lab.folder import digest_folder
from semsharekv_integrations.lab.journal import Entry, Journal
from semsharekv_integrations.lab.policies import Subject
from semsharekv_integrations.lab.scenarios import Case, Scenario

WRITE_EVERY_S = 300.0  # while cases are measured; and at the end
POLL_EVERY_S = 5.0
# arguments that cases and figures depend on, of this command and of scripts that take more
_DRAWING = ("documents", "ask", "sizes", "layouts", "passages", "questions", "quick", "kl", "repeats")

MakeBench = Callable[[Subject, Study], Bench]
Prepare = Callable[[argparse.Namespace], tuple[Study, Subject]]


def find_journal(args: argparse.Namespace) -> Path | None:
    """Where the journal goes: beside the report, and never into the user's own data."""
    if args.out is None:
        return None
    path: Path = args.out.with_suffix(".jsonl")
    is_data = args.data is not None and path.resolve() == args.data.resolve()
    return path.with_suffix(".journal.jsonl") if is_data else path


def _digest_data(args: argparse.Namespace) -> str | None:
    """What names the content of the user's own data or documents; None if there are none."""
    if args.documents is not None:
        return digest_folder(args.documents)
    return blake2b(args.data.read_bytes()).hexdigest()[:16] if args.data else None


class Run:
    """One study on its way to its report."""

    def __init__(self, study: Study, subject: Subject, args: argparse.Namespace) -> None:
        self.study = study
        self.args = args
        self.about = {
            **report.describe_origin(report.record_command(args.program)),
            **report.describe_machine(subject.model),
            "title": study.title,
            "model": subject.name,
            "note": subject.note,
            "seed": args.seed,
            "judging": study.judging,
            "policies": {name: asdict(config) for name, config in study.configs.items()},
            "about_policies": dict(study.about),
        }
        self.journal = Journal(find_journal(args), self._make_header())
        self.rows: list[Row] = []
        self.results = Results()
        self._written = time.monotonic()

    def _make_header(self) -> dict[str, Any]:
        """What outcomes depend on, but for how many cases there are."""
        named = {name: self.about[name] for name in ("title", "model", "dtype", "seed", "judging", "policies")}
        asked = {name: getattr(self.args, name, None) for name in _DRAWING}
        drawing = {name: str(value) if isinstance(value, Path) else value for name, value in asked.items()}
        # None and 1 are what journals of earlier versions hold of such scenarios: no length, and one round
        scenarios = [[s.name, None, s.max_new_tokens, 1] for s in self.study.scenarios]
        return {**named, **drawing, "data": _digest_data(self.args), "scenarios": scenarios}

    def summarize(self) -> None:
        """Set ``results`` and ``rows`` to what the journal holds, and write the report if it has a place."""
        places = {scenario.name: place for place, scenario in enumerate(self.study.scenarios)}
        entries = sorted(self.journal.read(), key=lambda entry: places[entry.scenario])
        self.results = Results()
        for entry in entries:
            self.results.add(Results(list(entry.outcomes), list(entry.failures)))
        outcomes = self.study.regroup(self.results.outcomes)
        self.rows = summarize(outcomes, self.results.failures, self.study.figures)
        self.about["conclusion"] = self.study.conclude(outcomes)
        self.about["seconds"] = round(sum(entry.seconds for entry in entries), 1)
        if self.args.out is not None:
            report.write_files(self.args.out, self.about, self.rows, self.results, self.study.figures)
        self._written = time.monotonic()

    def summarize_sometimes(self) -> None:
        """As ``summarize``, if that is long ago."""
        if self.args.out is not None and time.monotonic() - self._written > WRITE_EVERY_S:
            self.summarize()


def run_study(
    study: Study,
    subject: Subject,
    args: argparse.Namespace,
    make_bench: MakeBench = Bench,
    prepare: Prepare | None = None,
) -> Results:
    """Measure what is not in the journal yet, and report as ``args`` ask for.

    ``prepare`` is what each of several processes gets study and subject from; None if there can be only one.
    """
    if args.processes > 1 and prepare is None:
        raise ValueError(f"--processes is {args.processes}; accepted is 1 for this command")
    run, console = Run(study, subject, args), Console(stderr=True)
    if known := run.journal.count():
        console.print(f"{run.journal.path} holds {known} cases already; they are not measured again", markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("cases", total=sum(scenario.total for scenario in study.scenarios))

        def look_up() -> None:
            progress.update(task, completed=run.journal.count())
            run.summarize_sometimes()

        try:
            if args.processes > 1 and prepare is not None:
                subject.model.to("meta")  # each process has its own
                _run_processes(run, prepare, look_up)
            else:
                measure_share(make_bench(subject, study), run.journal, look_up)
        finally:
            run.summarize()
    if args.json:
        sys.stdout.write(f"{report.make_json(run.about, run.rows)}\n")
        return run.results
    report.print_rows(Console(), run.rows, run.study.figures)
    if run.about["conclusion"]:
        Console().print(f"\n{run.about['conclusion']}", style="bold", highlight=False, markup=False)
    Console().print(f"\n{report.make_headline(run.about)}", highlight=False, markup=False)
    if args.out is not None:
        console.print(f"Written: {args.out}, and every outcome to {args.out.with_suffix('.json')}", markup=False)
    return run.results


def measure_share(
    bench: Bench, journal: Journal, look_up: Callable[[], None], index: int = 0, processes: int = 1
) -> None:
    """Measure what one process does: every ``processes``-th group, as far as the journal does not have it.

    ``look_up`` is called behind each case.
    """
    done = {entry.key for entry in journal.read()}
    for place, scenario in enumerate(bench.study.scenarios):

        def wants(number: int, case: Case, place: int = place, scenario: Scenario = scenario) -> bool:
            group = case.place[0] if case.place else number
            return (group + place) % processes == index and (scenario.name, number) not in done

        began = time.perf_counter()
        for number, found in bench.measure(scenario, wants):
            seconds, began = time.perf_counter() - began, time.perf_counter()
            entry = Entry(scenario.name, number, seconds, tuple(found.outcomes), tuple(found.failures))
            if number is not None or (found.failures and index == 0 and entry.key not in done):
                journal.add(entry)
                look_up()


def _run_processes(run: Run, prepare: Prepare, look_up: Callable[[], None]) -> None:
    """Measure in several processes; one that fails does not end the others, but the run ends with an error."""
    context = multiprocessing.get_context("spawn")
    children = [
        context.Process(target=_run_share, args=(run.args, prepare, index), daemon=True)
        for index in range(run.args.processes)
    ]
    try:
        for child in children:
            child.start()
        while running := [child for child in children if child.is_alive()]:
            running[0].join(POLL_EVERY_S)
            look_up()
    finally:
        for child in children:
            child.terminate()
    codes = [child.exitcode for child in children]
    if any(codes):
        raise SemShareError(f"processes ended with exit codes {codes}; run again to go on from {run.journal.path}")


def _run_share(args: argparse.Namespace, prepare: Prepare, index: int) -> None:
    study, subject = prepare(args)
    journal = Journal(find_journal(args), None)
    measure_share(Bench(subject, study), journal, _leave_if_orphaned, index, args.processes)


def _leave_if_orphaned() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        sys.exit(1)
