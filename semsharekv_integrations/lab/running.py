"""Runs a study to its report, case by case, in one process or in several, and from where an earlier run stopped.

With ``--out`` every case goes to a journal as soon as it is done, and the report is written anew now and then.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from hashlib import blake2b
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from semsharekv_integrations.errors import SemShareError
from semsharekv_integrations.lab import report
from semsharekv_integrations.lab.bench import Bench, Results, Study
from semsharekv_integrations.lab.figures import Row, summarize
from semsharekv_integrations.lab.journal import Entry, Journal
from semsharekv_integrations.lab.policies import Subject
from semsharekv_integrations.lab.scenarios import Case, Scenario

WRITE_EVERY_S = 300.0  # while a scenario is measured; and behind each one
POLL_EVERY_S = 5.0
_DRAWING = (
    "documents",
    "layouts",
    "passages",
    "questions",
    "quick",
    "kl",
)  # arguments that cases and figures depend on

MakeBench = Callable[[Subject, Study], Bench]
Prepare = Callable[[argparse.Namespace], tuple[Study, Subject]]


def find_journal(args: argparse.Namespace) -> Path | None:
    """Where the journal goes: beside the report, and never into the user's own data."""
    if args.out is None:
        return None
    path: Path = args.out.with_suffix(".jsonl")
    is_data = args.data is not None and path.resolve() == args.data.resolve()
    return path.with_suffix(".journal.jsonl") if is_data else path


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
        drawing = {name: getattr(self.args, name) for name in _DRAWING}
        data = blake2b(self.args.data.read_bytes()).hexdigest()[:16] if self.args.data else None
        scenarios = [[s.name, s.length, s.max_new_tokens, len(s.rounds)] for s in self.study.scenarios]
        return {**named, **drawing, "data": data, "scenarios": scenarios}

    def summarize(self) -> None:
        """Set ``results`` and ``rows`` to what the journal holds, and write the report if it has a place."""
        places = {(s.name, s.length): place for place, s in enumerate(self.study.scenarios)}
        entries = sorted(self.journal.read(), key=lambda entry: places[entry.scenario, entry.length])
        self.results = Results()
        for entry in entries:
            self.results.add(Results(list(entry.outcomes), list(entry.failures)))
        outcomes = self.study.regroup(self.results.outcomes)
        self.rows = summarize(outcomes, self.results.failures, self.study.figures)
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
        if args.processes > 1 and prepare is not None:
            subject.model.to("meta")  # each process has its own
            _run_processes(run, prepare, progress)
        else:
            _run_here(run, make_bench(subject, study), progress)
    run.summarize()
    if args.json:
        sys.stdout.write(f"{report.make_json(run.about, run.rows)}\n")
        return run.results
    report.print_rows(Console(), run.rows)
    Console().print(f"\n{report.make_headline(run.about)}", highlight=False, markup=False)
    if args.out is not None:
        console.print(f"Written: {args.out}, and every outcome to {args.out.with_suffix('.json')}", markup=False)
    return run.results


def _run_here(run: Run, bench: Bench, progress: Progress) -> None:
    task = progress.add_task("", total=sum(map(bench.count_calls, run.study.scenarios)))
    share = Share(bench, run.journal, 0, 1)
    for place, scenario in enumerate(run.study.scenarios):
        progress.update(task, description=f"{scenario.name} {scenario.length or ''}")
        share.measure(place, scenario, lambda: progress.advance(task), run.summarize_sometimes)
        run.summarize()


def _run_processes(run: Run, prepare: Prepare, progress: Progress) -> None:
    """Measure in several processes; one that fails does not end the others, but the run ends with an error."""
    count = run.args.processes
    task = progress.add_task("cases", total=sum(scenario.total for scenario in run.study.scenarios))
    context = multiprocessing.get_context("spawn")
    children = [
        context.Process(target=_run_share, args=(run.args, prepare, index), daemon=True) for index in range(count)
    ]
    try:
        for child in children:
            child.start()
        while any(child.is_alive() for child in children):
            _wait(children)
            progress.update(task, completed=run.journal.count())
            run.summarize_sometimes()
    finally:
        for child in children:
            child.terminate()
    codes = [child.exitcode for child in children]
    if any(codes):
        run.summarize()
        raise SemShareError(f"processes ended with exit codes {codes}; run again to go on from {run.journal.path}")


def _wait(children: Sequence[BaseProcess]) -> None:
    for child in children:
        if child.is_alive():
            child.join(POLL_EVERY_S)
            return


def _run_share(args: argparse.Namespace, prepare: Prepare, index: int) -> None:
    """What one of several processes does: every N-th group."""
    study, subject = prepare(args)
    share = Share(Bench(subject, study), Journal(find_journal(args), None), index, args.processes)
    for place, scenario in enumerate(study.scenarios):
        share.measure(place, scenario, lambda: None, _leave_if_orphaned)


def _leave_if_orphaned() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        sys.exit(1)


class Share:
    """What one process measures: every ``processes``-th group, as far as the journal does not have it."""

    def __init__(self, bench: Bench, journal: Journal, index: int, processes: int) -> None:
        self._bench = bench
        self._journal = journal
        self._index = index
        self._processes = processes
        self._done = {entry.key for entry in journal.read()}

    def measure(self, place: int, scenario: Scenario, advance: Callable[[], None], look_up: Callable[[], None]) -> None:
        """Measure a scenario, which stands at ``place`` in the study; ``look_up`` is called behind each case."""
        began = time.perf_counter()

        def wants(number: int, case: Case) -> bool:
            group = case.place[0] if case.place else number
            is_own = (group + place) % self._processes == self._index
            return is_own and (scenario.name, scenario.length, number) not in self._done

        def keep(number: int | None, found: Results) -> None:
            nonlocal began
            seconds, began = time.perf_counter() - began, time.perf_counter()
            entry = Entry(scenario.name, scenario.length, number, seconds, tuple(found.outcomes), tuple(found.failures))
            if number is not None or (found.failures and self._index == 0 and entry.key not in self._done):
                self._journal.add(entry)
                look_up()

        self._bench.measure(scenario, Results(), advance, wants, keep)
