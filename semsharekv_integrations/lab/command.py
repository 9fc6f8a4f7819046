"""``semsharekv bench``: is the answer still right, and how much time and memory did reuse save?

    semsharekv bench --quick
      a first look on the built-in model, in under two minutes
    semsharekv bench --model folder --scenarios text_reordered --groups 40 --questions 16 --policies off exact order \
      --policy wide=identical,boundary_tokens=16 --processes 2 --out reordered.md
      questions over real text, in two processes
    semsharekv bench --model path-or-hub-id --documents folder
      your own documents, without gold answers; ends with the mode and budget that it recommends
    semsharekv bench --model path-or-hub-id --data questions.jsonl
      own documents and questions

Every scenario is measured under every policy, in one run on one model, beside a full prefill. Cases come in groups of
questions over the same documents. The text is real, but for the built-in model, which reads made-up news. An answer is
right if it holds a gold one.

With --out the tables go to a Markdown file, and every outcome to a .json beside it, written anew now and then. A .jsonl
beside them gets each case as soon as it is done: the same command goes on where an earlier one stopped, also if it asks
for more cases.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from semsharekv_integrations.config import MODES, AuditConfig, ReuseConfig
from semsharekv_integrations.errors import require
from semsharekv_integrations.lab import dataset, folder
from semsharekv_integrations.lab.advice import recommend
from semsharekv_integrations.lab.answers import Judging
from semsharekv_integrations.lab.bench import Study
from semsharekv_integrations.lab.policies import (
    BUDGETS,
    CHUNKS,
    EXACT,
    FULL,
    ORDER,
    POLICIES,
    SETTINGS,
    UNBOUNDED,
    Policy,
    Subject,
    make_configs,
)
from semsharekv_integrations.lab.policies import load_subject as load_model
from semsharekv_integrations.lab.running import run_study
from semsharekv_integrations.lab.scenarios import Case, Scenario
from semsharekv_integrations.lab.texts import (
    CHANGES,
    MULTI_HOP,
    SIZE,
    TEXTS,
    check_size,
    complete,
    make_news,
    make_text_cases,
    read_passages,
)
from semsharekv_integrations.model.loading import REFERENCE_MODEL, hide_progress_bars

DEFAULT_POLICIES = (FULL, "exact", "identical", "semantic", "retained")
QUICK_POLICIES = DEFAULT_POLICIES[:-1]
QUICK_SCENARIOS = ("text_reordered", "text_edited", "text_next_turn", "text_unlike")
DOCUMENTS_POLICIES = (FULL, EXACT, "identical", *BUDGETS, CHUNKS, ORDER)
GROUPS, QUESTIONS, QUICK_GROUPS, QUICK_QUESTIONS = 20, 8, 2, 4
DOCUMENTS_GROUPS, DOCUMENTS_QUESTIONS = 8, 3
TEXT_TOKENS, OWN_TOKENS = 24, 64  # of an answer, its end included

FindScenarios = Callable[[argparse.Namespace, Subject], list[Scenario]]
LoadSubject = Callable[[argparse.Namespace], Subject]


def add_arguments(
    parser: argparse.ArgumentParser,
    policies: Mapping[str, Policy] = POLICIES,
    scenarios: Sequence[str] = TEXTS,
) -> None:
    """Give ``parser`` the arguments of this command, and this module's text for its help."""
    parser.description = __doc__
    parser.epilog = f"--data: {dataset.__doc__}"
    parser.set_defaults(program="semsharekv")
    names = f"of {', '.join(scenarios)} (default: all but {MULTI_HOP})"
    about = " ".join(f"{name}: {policy.about}" for name, policy in policies.items()).replace("%", "%%")
    own = "a policy of your own: a mode, and fields of ReuseConfig; can be given again"
    what = parser.add_argument_group("what is measured")
    what.add_argument("--quick", action="store_true", help=f"few prompts of {', '.join(QUICK_SCENARIOS)}")
    what.add_argument("--scenarios", "--workloads", nargs="+", choices=scenarios, metavar="NAME", help=names)
    what.add_argument("--documents", type=Path, metavar="FOLDER", help="own texts (.md, .txt), asked general questions")
    what.add_argument("--ask", action="append", metavar="QUESTION", help="of --documents instead; can be given again")
    what.add_argument("--data", type=Path, metavar="FILE.jsonl", help="own documents and questions, see below")
    what.add_argument("--policies", nargs="+", choices=policies, metavar="NAME", help=about)
    what.add_argument(
        "--policy", type=_parse_policy, action="append", default=[], metavar="NAME=MODE[,KEY=VALUE...]", help=own
    )
    what.add_argument("--set", type=_parse_setting, nargs="+", default=[], metavar="KEY=VALUE", help="of ReuseConfig")
    what.add_argument("--kl", action="store_true", help="also how far the distributions of first tokens are apart")
    size = parser.add_argument_group("how much")
    for name, said in (
        ("--groups", f"of questions ({GROUPS}, of --documents {DOCUMENTS_GROUPS}); of own data at most so many lines"),
        ("--questions", f"in a group, at most ({QUESTIONS}, of --documents {DOCUMENTS_QUESTIONS})"),
        ("--passages", f"paragraphs in a prompt ({SIZE}); 30 of real text are about 5,000 tokens"),
    ):
        size.add_argument(name, type=parse_count, metavar="N", help=said)
    size.add_argument("--max-new-tokens", "--new-tokens", type=parse_count, metavar="N", help="of an answer")
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="folder or hub id (default: the built-in reference model)")
    model.add_argument("--device", help="cpu, cuda, cuda:1 (default: CUDA if there is one)")
    model.add_argument("--dtype", default="auto", help="torch dtype, or auto (default)")
    model.add_argument("--threads", type=parse_count, metavar="N", help="of PyTorch (default: its own choice)")
    processes = "that share the cases, with one thread each unless --threads says otherwise; needs --out"
    model.add_argument("--processes", type=parse_count, default=1, metavar="N", help=processes)
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: 0)")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="where the tables go (default: printed only)")
    parser.add_argument("--json", action="store_true", help="print rows as JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """Measure, and write as it goes; the exit code."""
    if args.processes > 1:
        require(args.out is not None, "--out", args.out, "a file name ending in .md where there are several processes")
        args.threads = args.threads or 1
    study, subject = prepare(args)
    for key, why in folder.find_unusable(args.documents) if args.documents else ():
        Console(stderr=True).print(f"{key} is left out: {why}", highlight=False, markup=False)
    run_study(study, subject, args, prepare=prepare)
    return 0


def find_scenarios(args: argparse.Namespace, subject: Subject) -> list[Scenario]:
    """The scenarios asked for: on own data or documents, on the news for the built-in model, else on real text."""
    asks = _ask_about_own if args.data else _ask_about_folder if args.documents else _ask_about_text
    made = asks(args, subject)
    found = {name: list(cases) for name, cases in made.items()}
    if not subject.tokenizer.chat_template:
        found = {name: [complete(case) for case in cases] for name, cases in found.items()}
    judging: Judging = "mentions" if args.data else "gold"
    room = args.max_new_tokens or (OWN_TOKENS if args.data or args.documents else TEXT_TOKENS)
    return [Scenario(name, cases, len(cases), room, judging) for name, cases in found.items() if cases]


def _ask_about_own(args: argparse.Namespace, subject: Subject) -> dict[str, Iterator[Case]]:
    examples = dataset.read_examples(args.data)[: args.groups]
    return {name: dataset.make_own_cases(name, examples, args.seed) for name in (dataset.DATA, dataset.UNLIKE)}


def _ask_about_folder(args: argparse.Namespace, subject: Subject) -> dict[str, Iterator[Case]]:
    groups, questions = (QUICK_GROUPS, QUICK_QUESTIONS) if args.quick else (DOCUMENTS_GROUPS, DOCUMENTS_QUESTIONS)
    passages = folder.read_folder(args.documents, args.ask or ())
    size = folder.choose_size(passages, args.passages)
    sizes = args.groups or groups, args.questions or questions, args.seed, passages, size
    names = args.scenarios or (folder.QUICK if args.quick else folder.USUAL)
    return {name: make_text_cases(name, *sizes) for name in names}


def _ask_about_text(args: argparse.Namespace, subject: Subject) -> dict[str, Iterator[Case]]:
    groups, questions = (QUICK_GROUPS, QUICK_QUESTIONS) if args.quick else (GROUPS, QUESTIONS)
    sizes = args.groups or groups, args.questions or questions, args.seed
    passages = make_news() if subject.name == REFERENCE_MODEL else read_passages()
    names = args.scenarios or (QUICK_SCENARIOS if args.quick else CHANGES)
    return {name: make_text_cases(name, *sizes, passages, args.passages or SIZE) for name in TEXTS if name in names}


def load_subject(args: argparse.Namespace) -> Subject:
    """The model asked for."""
    return load_model(args.model, args.device, args.dtype)


def prepare(
    args: argparse.Namespace,
    policies: Mapping[str, Policy] = POLICIES,
    find: FindScenarios = find_scenarios,
    load: LoadSubject = load_subject,
) -> tuple[Study, Subject]:
    """What the arguments ask for, and the model it is measured on."""
    _check(args)
    policies = _add_own({**policies, **BUDGETS} if args.documents else policies, args.policy)
    chosen = _choose_policies(args)
    configs = make_configs(chosen, dict(args.set), policies)
    if args.kl:
        audit = AuditConfig(sample_ratio=1.0, min_agreement=0.0)
        configs = {name: replace(config, audit=audit) for name, config in configs.items()}
    hide_progress_bars()
    if args.threads:
        torch.set_num_threads(args.threads)
    with Console(stderr=True).status("Loading the model"):
        subject = load(args)
    study = Study(
        "Answers under reuse, on own data" if args.data else "Answers and speed under reuse",
        find(args, subject),
        configs,
        about={name: policies[name].about for name in chosen},
    )
    if args.documents:
        study = replace(
            study, title=f"Reuse on the documents of {args.documents}", conclude=partial(recommend, configs)
        )
    return study, subject


def _choose_policies(args: argparse.Namespace) -> list[str]:
    """Those asked for, else the usual ones; always a full prefill, and for a recommendation exact reuse."""
    usual = DOCUMENTS_POLICIES if args.documents else QUICK_POLICIES if args.quick else DEFAULT_POLICIES
    asked = args.policies or (() if args.policy else usual)
    return list(dict.fromkeys([FULL, *([EXACT] if args.documents else ()), *asked, *dict(args.policy)]))


def _check(args: argparse.Namespace) -> None:
    """Refuse what does not go together, before anything is loaded."""
    require(args.out is None or args.out.suffix == ".md", "--out", str(args.out), "a file name ending in .md")
    for one, other in (("data", "scenarios"), ("data", "documents")):
        if getattr(args, one) and getattr(args, other):
            raise ValueError(f"--{other} and --{one} are given; accepted is one of them")
    require(args.documents is not None or not args.ask, "--ask", args.ask, "nothing without --documents")
    if args.documents is not None:
        _check_folder(args)
    for name, known in (("questions", TEXTS), ("passages", CHANGES)):
        size, names = getattr(args, name), args.scenarios or (() if args.data else CHANGES)
        is_used = size is None or not set(known).isdisjoint(names)
        require(is_used, f"--{name}", size, f"nothing without --scenarios of {', '.join(known)}")
    if args.passages is not None and args.documents is None:
        check_size(args.passages)
    if args.data:
        dataset.read_examples(args.data)


def _check_folder(args: argparse.Namespace) -> None:
    """Refuse documents that nothing can be measured on."""
    said = "a folder or hub id of a model: the built-in one reads made-up news alone"
    require(args.model is not None, "--model", args.model, said)
    unknown = [name for name in args.scenarios or () if name not in folder.SCENARIOS]
    require(not unknown, "--scenarios", ", ".join(unknown), f"one of {', '.join(folder.SCENARIOS)} with --documents")
    blank = [question for question in args.ask or () if not question.strip()]
    require(not blank, "--ask", blank, "a question that is not blank")
    folder.choose_size(folder.read_folder(args.documents), args.passages)


def _add_own(policies: Mapping[str, Policy], own: Sequence[tuple[str, Policy]]) -> Mapping[str, Policy]:
    """All policies by name. A name cannot mean two."""
    found = dict(policies)
    for name, policy in own:
        require(name not in found, "--policy", name, f"a name that is not taken, as these are: {', '.join(found)}")
        found[name] = policy
    return found


def parse_count(text: str) -> int:
    """The whole number that a command line names, 1 or more."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r}; accepted is a whole number, 1 or more")
    return int(text)


def _parse_setting(text: str) -> tuple[str, Any]:
    """``key=value`` as key and Python literal; what is no literal is a string."""
    key, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} has no '='; accepted is key=value")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _parse_policy(text: str) -> tuple[str, Policy]:
    """``name=mode,key=value,...`` as name and policy."""
    (name, sign, mode), *settings = (part.partition("=") for part in text.split(","))
    if not (name and sign and mode in MODES):
        accepted = f"NAME=MODE[,KEY=VALUE...] with a mode of {', '.join(MODES)}"
        raise argparse.ArgumentTypeError(f"{text!r}; accepted is {accepted}")
    fields = dict(_parse_setting("".join(setting)) for setting in settings)
    unknown = sorted(fields.keys() - set(SETTINGS))
    if unknown:
        raise argparse.ArgumentTypeError(f"{text!r} sets {', '.join(unknown)}; accepted is {', '.join(SETTINGS)}")
    try:
        return name, Policy(f"`{text}`.", ReuseConfig(mode=mode, **fields), UNBOUNDED)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
