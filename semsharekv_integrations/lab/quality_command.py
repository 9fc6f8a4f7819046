"""``semsharekv quality``: is the answer still right? Every workload under every policy, beside a full prefill.

    semsharekv quality --quick
      a smoke test
    semsharekv quality --cases 200 --out reuse.md
      every workload of the synthetic news world
    semsharekv quality --sweep budget --out budget.md
      one sweep
    semsharekv quality --model path-or-hub-id --data questions.jsonl
      own documents and questions, on any model

With ``--out`` the table goes to a Markdown file, every outcome and what it came from to a ``.json`` beside it, and,
where matplotlib is installed, plots to ``.png`` files: these at the end, the others anew after each workload. To use
several cores, start one process for some of the workloads each: figures of one workload depend on
nothing else.

Answers on own data, and those of models other than the built-in one, are right if they mention the right facts, in any
words; those of the built-in model must be right word for word, as it was trained.
"""

from __future__ import annotations

import argparse
import ast
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from semsharekv_integrations.lab import dataset, metrics, policies, prompts, rouge, studies, sweeps, tables, workloads
from semsharekv_integrations.lab.extra import INSTALL, is_installed
from semsharekv_integrations.lab.origin import origin, recorded_command, setting_of, write_whole
from semsharekv_integrations.lab.quality import JUDGINGS, Bench, Judging, Outcome
from semsharekv_integrations.lab.studies import Options, Study
from semsharekv_integrations.model.loading import REFERENCE_MODEL, NamedModel, hide_progress_bars
from semsharekv_integrations.terminal import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of this command, and this module's text for its help."""
    parser.description = __doc__
    parser.epilog = f"--data: {dataset.__doc__}"
    what = parser.add_argument_group("what is measured")
    what.add_argument("--quick", action="store_true", help="few and short cases, few points of a sweep: a smoke test")
    what.add_argument("--workloads", nargs="+", choices=workloads.WORKLOADS, metavar="NAME", help=_workloads_help())
    what.add_argument("--sweep", choices=sweeps.SWEEPS, metavar="NAME", help=_sweeps_help())
    what.add_argument("--data", type=Path, metavar="FILE.jsonl", help="own documents and questions, see above")
    what.add_argument("--policies", nargs="+", choices=policies.POLICIES, metavar="NAME", help=_policies_help())
    what.add_argument("--set", type=_assignment, nargs="+", default=[], metavar="KEY=VALUE", help="of ReuseConfig")
    cases = parser.add_argument_group("cases")
    cases.add_argument("--cases", type=_positive, help=_cases_help())
    cases.add_argument("--documents", type=_positive, nargs=2, metavar=("FROM", "TO"), help=_documents_help())
    cases.add_argument("--layouts", nargs="+", choices=prompts.LAYOUTS, metavar="NAME", help=_layouts_help())
    cases.add_argument("--seed", type=int, default=0, help="of cases and of random KV (default: 0)")
    cases.add_argument("--judging", choices=JUDGINGS, help="whether a right answer is exact or mentions the facts")
    cases.add_argument("--max-new-tokens", type=_positive, metavar="N", help="of an answer")
    model = parser.add_argument_group("model")
    model.add_argument("--model", default=REFERENCE_MODEL, help=f"folder or hub id (default: {REFERENCE_MODEL})")
    model.add_argument("--device", help="default: CUDA if there is one, else the CPU")
    model.add_argument("--dtype", default="auto", help="default: that of the weights")
    model.add_argument("--threads", type=_positive, help="of PyTorch (default: its own choice)")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="where the table goes (default: printed only)")


def run(args: argparse.Namespace) -> int:
    """Measure, and write after each workload; the exit code.

    Raises:
        ValueError: for arguments that do not go together, and lines of ``--data`` that are no examples.
        SemShareError: if the model cannot be loaded or a package is missing.
        OSError: if a file cannot be read or written.
    """
    _check(args)
    examples = dataset.read_examples(args.data) if args.data else []
    hide_progress_bars()
    if args.threads:
        torch.set_num_threads(args.threads)
    source = NamedModel(args.model, args.device, args.dtype, {})
    model, tokenizer = source.load(), source.tokenizer
    study = _study(args, examples, model, tokenizer)
    bench = Bench(
        model,
        tokenizer,
        study.configs,
        study.corrupt,
        judging=_judging(args),
        max_new_tokens=args.max_new_tokens,
    )
    about = _about(args, study, model)
    outcomes: list[Outcome] = []
    began = time.perf_counter()
    console = Console(stderr=True)
    for group in study.groups:
        cases = track(group.cases, description=group.name, total=group.total, console=console)
        for index, case in enumerate(cases):
            outcomes += [study.annotate(case, outcome) for outcome in bench.outcomes(index, case)]
        if args.out is not None:
            _write(args.out, study, about | {"seconds": round(time.perf_counter() - began, 1)}, outcomes)
    _finish(args, study, outcomes, console)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse what does not go together, before anything is loaded."""
    chosen = [name for name in ("workloads", "sweep", "data") if getattr(args, name)]
    if len(chosen) > 1:
        raise ValueError(f"--{' and --'.join(chosen)} are given; accepted is one of them")
    if args.sweep and args.policies:
        raise ValueError(f"--policies is given; accepted is nothing with --sweep {args.sweep}, which has its own")
    if args.out is not None and args.out.suffix != ".md":
        raise ValueError(f"--out is {str(args.out)!r}; accepted is a file name ending in .md")
    if (not chosen and not args.quick) or "summaries" in (args.workloads or ()):
        rouge.rouge_l("", "")  # so that a missing package is known before, not after, all the measuring


def _study(
    args: argparse.Namespace,
    examples: Sequence[dataset.Example],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Study:
    options = Options(
        args.cases,
        args.seed,
        tuple(args.documents) if args.documents else None,
        args.layouts or _layouts(tokenizer),
        dict(args.set),
        args.quick,
    )
    names = list(dict.fromkeys([policies.FULL, *(args.policies or policies.POLICIES)]))
    if args.sweep:
        return sweeps.SWEEPS[args.sweep](options, model, tokenizer)
    if args.data:
        return studies.data_study(options, examples, names)
    default = studies.QUICK_WORKLOADS if args.quick else workloads.WORKLOADS
    return studies.workload_study(options, args.workloads or default, names)


def _layouts(tokenizer: PreTrainedTokenizerBase) -> tuple[prompts.Layout, ...]:
    """All usual ones of a model that knows messages, else plain text."""
    return workloads.DEFAULT_LAYOUTS if tokenizer.chat_template else ("completion",)


def _judging(args: argparse.Namespace) -> Judging:
    if args.judging:
        return args.judging
    return "exact" if args.model == REFERENCE_MODEL and not args.data else "mentions"


def _about(args: argparse.Namespace, study: Study, model: PreTrainedModel) -> dict[str, Any]:
    """What anyone needs to get the same figures."""
    return {
        **origin(recorded_command()),
        **setting_of(model),
        "title": study.title,
        "model": args.model,
        "seed": args.seed,
        "judging": _judging(args),
        "policies": {name: asdict(config) for name, config in study.configs.items()},
    }


def _write(out: Path, study: Study, about: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    rows = metrics.summarize(study.regroup(outcomes))
    figures = {"rows": [asdict(row) for row in rows], "outcomes": [asdict(outcome) for outcome in outcomes]}
    write_whole(out.with_suffix(".json"), json.dumps(about | figures, indent=1))
    write_whole(out, f"# {study.title}\n\n{_headline(about)}\n\n{tables.table(rows)}\n{_policy_lines(study)}")


def _headline(about: dict[str, Any]) -> str:
    commit = about["commit"][:12] + (" with uncommitted changes" if about["uncommitted_changes"] else "")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"`{about['command']}` at commit {commit}: model {about['model']} in {about['dtype']} on {about['device']}, "
        f"{about['threads']} threads, seed {about['seed']}, {about['seconds']} s; {versions}.\n\n{tables.LEGEND}"
    )


def _policy_lines(study: Study) -> str:
    """One line on each policy that has one."""
    known = [name for name in study.configs if name in policies.POLICIES]
    return "\n" + "\n".join(f"- {name}: {policies.POLICIES[name].about}" for name in known) + "\n"


def _finish(args: argparse.Namespace, study: Study, outcomes: Sequence[Outcome], console: Console) -> None:
    """Show the table, and draw the plots where they can be."""
    rows = metrics.summarize(study.regroup(outcomes))
    screen = Console()
    for shown in tables.for_terminal(rows):
        print_table(screen, shown)
    if args.out is None:
        return
    if not is_installed("matplotlib"):
        console.print(f"No plots: they need matplotlib ({INSTALL})", markup=False, highlight=False)
        return
    from semsharekv_integrations.lab import quality_plots

    written = quality_plots.draw(rows, study.title, study.axis, args.out)
    console.print(f"Written: {', '.join(map(str, (args.out, args.out.with_suffix('.json'), *written)))}", markup=False)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted is a whole number, 1 or more")
    return value


def _assignment(text: str) -> tuple[str, Any]:
    """``key=value`` as key and Python literal; what is no literal is a string."""
    key, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} has no '='; accepted is key=value")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _layouts_help() -> str:
    return f"where documents stand in a prompt: {', '.join(prompts.LAYOUTS)}"


def _workloads_help() -> str:
    return f"of {', '.join(workloads.WORKLOADS)} (default: all; with --quick {', '.join(studies.QUICK_WORKLOADS)})"


def _sweeps_help() -> str:
    return " ".join(f"{name}: {sweeps.about(name)}" for name in sweeps.SWEEPS).replace("%", "%%")


def _policies_help() -> str:
    return " ".join(f"{name}: {policy.about}" for name, policy in policies.POLICIES.items()).replace("%", "%%")


def _cases_help() -> str:
    many, few = studies.DEFAULT_CASES, studies.QUICK_CASES
    return f"of each workload or point of a sweep (default: {many}; with --quick {few}; of --data all)"


def _documents_help() -> str:
    few, many = workloads.DEFAULT_DOCUMENTS
    least, most = workloads.SUMMARIZED
    return f"documents of a synthetic prompt (default: {few} {many}; a summary is always of {least} to {most})"
