"""``semsharekv bench``: is the answer still right, and how much time and memory did reuse save?

    semsharekv bench --quick
      a first look, in under two minutes
    semsharekv bench --scenarios reordered edited --cases 200 --out reuse.md
      prompts of the synthetic news world, drawn
    semsharekv bench --lengths 2048 8192 --preset qwen-0.5b
      prompts at these lengths, each asked several times
    semsharekv bench --model path-or-hub-id --data questions.jsonl
      own documents and questions, on any model

  semsharekv bench --model folder --scenarios text_reordered --groups 40 --questions 16 --policies off exact order \
      --policy wide=identical,boundary_tokens=16 --processes 2 --out reordered.md
    questions over real text, on a real model, in two processes

Every scenario is measured under every policy, in one run on one model, beside a full prefill. Some prompts are drawn,
others have a length, and others are real text, in groups of questions over the same documents; --lengths leaves out
all but those at a length, --cases or --documents without it those, and real text is measured if it is named.

With --out the tables go to a Markdown file, and every outcome to a .json beside it, written anew now and then. A .jsonl
beside them gets each case as soon as it is done: the same command goes on where an earlier one stopped, also if it asks
for more cases.

Answers on own data, and those of models other than the built-in one, are right if they mention the right facts, in any
words; those of the built-in model must be right word for word, as it was trained. On real text an answer is right if it
holds a gold one.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from semsharekv_integrations.config import MODES, AuditConfig, ReuseConfig
from semsharekv_integrations.errors import require
from semsharekv_integrations.lab import dataset, scenarios, world
from semsharekv_integrations.lab.answers import JUDGINGS
from semsharekv_integrations.lab.bench import Study
from semsharekv_integrations.lab.policies import (
    FULL,
    POLICIES,
    PRESETS,
    REFERENCE,
    SETTINGS,
    UNBOUNDED,
    Policy,
    Subject,
    load_subject,
    make_configs,
)
from semsharekv_integrations.lab.running import run_study
from semsharekv_integrations.lab.scenarios import DRAWN, NEGATIVE_CONTROL, Scenario
from semsharekv_integrations.lab.sized import SIZED, make_sized_case
from semsharekv_integrations.lab.texts import MULTI_HOP, SIZE, TEXTS, check_size, make_text_cases
from semsharekv_integrations.model.loading import REFERENCE_MODEL, hide_progress_bars
from semsharekv_integrations.text.prompt import PromptRenderer

SCENARIOS = tuple(dict.fromkeys([*DRAWN, *SIZED]))  # measured if none is named
FAMILIES = {"reworded": tuple(name for name in SIZED if name.startswith("reworded"))}  # of prompts at a length
DEFAULT_POLICIES = (FULL, "exact", "identical", "semantic", "retained")
CASES, REPEATS, LENGTHS = 50, 5, (512, 1024, 2048, 4096, 8192, 16384)
QUICK_CASES, QUICK_REPEATS, QUICK_LENGTHS, QUICK_DOCUMENTS = 3, 2, (512, 2048), (4, 8)
QUICK_SCENARIOS = ("reordered", "edited", "turns", "next_turn", NEGATIVE_CONTROL)
QUICK_POLICIES = DEFAULT_POLICIES[:-1]
GROUPS, QUESTIONS, TEXT_TOKENS = 20, 8, 24  # on real text: tokens of an answer, its end included
NEW_TOKENS = 16  # of an answer to a prompt at a length: as many as its longest right one


def add_arguments(parser: argparse.ArgumentParser, policies: Mapping[str, Policy] = POLICIES) -> None:
    """Give ``parser`` the arguments of this command, and this module's text for its help."""
    parser.description = __doc__
    parser.epilog = f"--data: {dataset.__doc__}"
    parser.set_defaults(program="semsharekv")
    names = f"drawn: {', '.join(DRAWN)}; at a length: {', '.join(SIZED)} (default: all of these); "
    names += f"real text: {', '.join(TEXTS)}"
    about = " ".join(f"{name}: {policy.about}" for name, policy in policies.items()).replace("%", "%%")
    few, many = scenarios.DEFAULT_DOCUMENTS
    what = parser.add_argument_group("what is measured")
    what.add_argument("--quick", action="store_true", help="few scenarios, few and short prompts, few rounds")
    what.add_argument("--scenarios", "--workloads", nargs="+", choices=(*SCENARIOS, *TEXTS), metavar="NAME", help=names)
    what.add_argument("--data", type=Path, metavar="FILE.jsonl", help="own documents and questions, see below")
    what.add_argument("--policies", nargs="+", choices=policies, metavar="NAME", help=about)
    own = "a policy of your own: a mode, and fields of ReuseConfig; can be given again"
    what.add_argument(
        "--policy", type=_parse_policy, action="append", default=[], metavar="NAME=MODE[,KEY=VALUE...]", help=own
    )
    what.add_argument("--set", type=_parse_setting, nargs="+", default=[], metavar="KEY=VALUE", help="of ReuseConfig")
    what.add_argument("--kl", action="store_true", help="also how far the distributions of first tokens are apart")
    what.add_argument("--judging", choices=JUDGINGS, help="whether a right answer is exact or mentions the facts")
    size = parser.add_argument_group("how much")
    documents = f"of a drawn prompt (default: {few} {many})"
    layouts = f"where documents stand in a drawn prompt: {', '.join(world.LAYOUTS)}"
    size.add_argument("--cases", type=_parse_count, metavar="N", help=f"of each scenario ({CASES}; at a length 1)")
    size.add_argument("--documents", type=_parse_count, nargs=2, metavar=("FROM", "TO"), help=documents)
    size.add_argument("--layouts", nargs="+", choices=world.LAYOUTS, metavar="NAME", help=layouts)
    size.add_argument("--lengths", type=_parse_count, nargs="+", metavar="N", help="tokens (default: 512 to 16384)")
    size.add_argument("--repeats", type=_parse_count, metavar="N", help=f"timed rounds at a length ({REPEATS})")
    size.add_argument("--groups", type=_parse_count, metavar="N", help=f"of questions on real text ({GROUPS})")
    size.add_argument("--questions", type=_parse_count, metavar="N", help=f"in a group, at most ({QUESTIONS})")
    passages = f"paragraphs in a prompt of real text ({SIZE}); 30 are about 5,000 tokens"
    size.add_argument("--passages", type=_parse_count, metavar="N", help=passages)
    size.add_argument("--max-new-tokens", "--new-tokens", type=_parse_count, metavar="N", help="of an answer")
    model = parser.add_argument_group("model")
    which = model.add_mutually_exclusive_group()
    which.add_argument("--model", help="folder or hub id (default: the built-in reference model)")
    which.add_argument("--preset", choices=PRESETS, metavar="NAME", help=f"of {', '.join(PRESETS)} (random weights)")
    model.add_argument("--device", help="cpu, cuda, cuda:1 (default: CUDA if there is one)")
    model.add_argument("--dtype", default="auto", help="torch dtype, or auto (default)")
    model.add_argument("--threads", type=_parse_count, metavar="N", help="of PyTorch (default: its own choice)")
    processes = "that share the cases, with one thread each unless --threads says otherwise; needs --out"
    model.add_argument("--processes", type=_parse_count, default=1, metavar="N", help=processes)
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: 0)")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="where the tables go (default: printed only)")
    parser.add_argument("--json", action="store_true", help="print rows as JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """Measure, and write as it goes; the exit code."""
    if args.processes > 1:
        require(args.out is not None, "--out", args.out, "a file name ending in .md where there are several processes")
        args.threads = args.threads or 1
    study, subject = prepare(args)
    run_study(study, subject, args, prepare=prepare)
    return 0


def prepare(
    args: argparse.Namespace, policies: Mapping[str, Policy] = POLICIES, *, with_scenarios: bool = True
) -> tuple[Study, Subject]:
    """What the arguments ask for, and the model it is measured on."""
    _check(args)
    drawn, sized = _choose_scenarios(args) if with_scenarios else ([], [])
    texts = [name for name in TEXTS if with_scenarios and name in (args.scenarios or ())]
    if with_scenarios:
        _check_text_sizes(args, texts)
    policies = _add_own(policies, args.policy)
    examples = dataset.read_examples(args.data) if args.data else []
    usual = () if args.policy else QUICK_POLICIES if args.quick else DEFAULT_POLICIES
    chosen = list(dict.fromkeys([FULL, *(args.policies or usual), *dict(args.policy)]))
    configs = make_configs(chosen, dict(args.set), policies)
    if args.kl:
        audit = AuditConfig(sample_ratio=1.0, min_agreement=0.0)
        configs = {name: replace(config, audit=audit) for name, config in configs.items()}
    hide_progress_bars()
    if args.threads:
        torch.set_num_threads(args.threads)
    with Console(stderr=True).status("Loading the model"):
        subject = load_subject(args.model or args.preset or REFERENCE, args.device, args.dtype, args.seed)
    lengths = sorted(set(args.lengths or (QUICK_LENGTHS if args.quick else LENGTHS)))
    found = [_draw_scenario(args, subject, name) for name in drawn]
    found += [_size_scenario(args, subject, name, length) for length in lengths for name in sized]
    found += [_ask_about_text(args, subject, name) for name in texts]
    most = args.cases or (QUICK_CASES if args.quick else None)
    for name in (dataset.DATA, NEGATIVE_CONTROL):
        cases = list(dataset.make_own_cases(name, examples, args.seed, choose_layouts(args, subject)))[:most]
        found += [Scenario(name, cases, len(cases), max_new_tokens=args.max_new_tokens)] if cases else []
    is_exact = subject.name == REFERENCE_MODEL and not args.data
    study = Study(
        "Answers under reuse, on own data" if args.data else "Answers and speed under reuse",
        found,
        configs,
        judging=args.judging or ("exact" if is_exact else "mentions"),
        about={name: policies[name].about for name in chosen},
    )
    return study, subject


def _check(args: argparse.Namespace) -> None:
    """Refuse what does not go together, before anything is loaded."""
    require(args.out is None or args.out.suffix == ".md", "--out", str(args.out), "a file name ending in .md")
    for name in ("scenarios", "lengths"):
        if args.data and getattr(args, name):
            raise ValueError(f"--{name} and --data are given; accepted is one of them")


def _check_text_sizes(args: argparse.Namespace, texts: Sequence[str]) -> None:
    drawn = [name for name in TEXTS if name != MULTI_HOP]
    for name, known in (("groups", TEXTS), ("questions", TEXTS), ("passages", drawn)):
        size = getattr(args, name)
        is_used = size is None or not set(known).isdisjoint(texts)
        require(is_used, f"--{name}", size, f"nothing without --scenarios of {', '.join(known)}")
    if args.passages is not None:
        check_size(args.passages)


def _choose_scenarios(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Names of drawn ones, and of those at a length."""
    if args.data:
        return [], []
    names = args.scenarios or (QUICK_SCENARIOS if args.quick else SCENARIOS)
    names = [name for name in names if name not in TEXTS]
    known_drawn = () if args.lengths else DRAWN
    known_sized = () if not args.lengths and (args.cases or args.documents) else SIZED
    families = FAMILIES if args.lengths else {}
    for name in names if args.scenarios else ():
        if name not in (*known_drawn, *known_sized, *families):
            accepted = ", ".join(dict.fromkeys([*known_drawn, *known_sized]))
            raise ValueError(f"--scenarios is {name}; accepted for prompts of these sizes is {accepted}")
    asked = {*names, *(part for name in names for part in families.get(name, ()))}
    return [name for name in known_drawn if name in asked], [name for name in known_sized if name in asked]


def _draw_scenario(args: argparse.Namespace, subject: Subject, name: str) -> Scenario:
    count = args.cases or (QUICK_CASES if args.quick else CASES)
    few, many = args.documents or (QUICK_DOCUMENTS if args.quick else scenarios.DEFAULT_DOCUMENTS)
    cases = scenarios.make_cases(name, count, args.seed, (few, many), choose_layouts(args, subject))
    return Scenario(name, cases, count, max_new_tokens=args.max_new_tokens)


def _size_scenario(args: argparse.Namespace, subject: Subject, name: str, length: int) -> Scenario:
    """Cases of seeds that follow on each other; none beyond the context window."""
    window = getattr(subject.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if window is not None and length > window:
        return Scenario(name, (), 0, length, problem=f"beyond the model's context window of {window} tokens")
    if not subject.tokenizer.chat_template:
        return Scenario(name, (), 0, length, problem="the model has no chat template")
    renderer, new_tokens = PromptRenderer(subject.tokenizer), args.max_new_tokens or NEW_TOKENS
    room = length if window is None else min(length, window - new_tokens)
    cases = [
        make_sized_case(name, room, args.seed + index, lambda prompt: len(renderer.render(prompt, {}).token_ids))
        for index in range(args.cases or 1)
    ]
    repeats = args.repeats or (QUICK_REPEATS if args.quick else REPEATS)
    return Scenario(name, cases, len(cases), length, range(repeats + 1), new_tokens)


def _ask_about_text(args: argparse.Namespace, subject: Subject, name: str) -> Scenario:
    if not subject.tokenizer.chat_template:
        return Scenario(name, (), 0, problem="the model has no chat template")
    groups, questions, passages = args.groups or GROUPS, args.questions or QUESTIONS, args.passages or SIZE
    cases = list(make_text_cases(name, groups, questions, args.seed, size=passages))
    return Scenario(name, cases, len(cases), max_new_tokens=args.max_new_tokens or TEXT_TOKENS, judging="gold")


def _add_own(policies: Mapping[str, Policy], own: Sequence[tuple[str, Policy]]) -> Mapping[str, Policy]:
    """All policies by name. A name cannot mean two."""
    found = dict(policies)
    for name, policy in own:
        require(name not in found, "--policy", name, f"a name that is not taken, as these are: {', '.join(found)}")
        found[name] = policy
    return found


def choose_layouts(args: argparse.Namespace, subject: Subject) -> Sequence[world.Layout]:
    """Those asked for, else all usual ones of a model that knows messages, else plain text."""
    return args.layouts or (scenarios.DEFAULT_LAYOUTS if subject.tokenizer.chat_template else ("completion",))


def _parse_count(text: str) -> int:
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
