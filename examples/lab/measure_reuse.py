"""Measure answers under reuse: every workload under every policy, beside a full prefill of the same prompts.

    PYTHONPATH=. python examples/lab/measure_reuse.py --cases 200 --out reuse.md

writes a table, and beside it a ``.json`` with every outcome and what they came from. Both are written anew after each
workload. To use several cores, start one process for some of the workloads each: figures of one workload depend on
nothing else. ``--set attention_ratio=0.2`` sets a field of ``ReuseConfig`` for all policies that reuse off the prefix.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track

from semsharekv_integrations.lab import metrics, policies, quality, workloads
from semsharekv_integrations.model.loading import REFERENCE_MODEL, NamedModel, hide_progress_bars

LEGEND = (
    "Brackets are 95% intervals. Figures are over the cases on which reuse fired, beside a full prefill of the same "
    "cases, or over all of them for a control. Compute and TTFT ratio (a full prefill's over the policy's) are "
    "medians; the last column is over the cases on which reuse did not fire."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write after each workload."""
    args = _parse(arguments)
    hide_progress_bars()
    if args.threads:
        torch.set_num_threads(args.threads)
    source = NamedModel(args.model, args.device, args.dtype, {})
    model, tokenizer = source.load(), source.tokenizer
    configs = policies.make_configs(args.policies, dict(args.set))
    about = {**_origin(), **_setting(args, model), "policies": {name: asdict(c) for name, c in configs.items()}}
    outcomes: list[quality.Outcome] = []
    began = time.perf_counter()
    for workload in args.workloads:
        outcomes += quality.run(
            model,
            tokenizer,
            configs,
            workload,
            args.cases,
            args.seed,
            num_documents=tuple(args.documents),
            corrupt=policies.make_corruptions(args.policies, args.seed),
            progress=partial(track, description=workload, total=args.cases, console=Console(stderr=True)),
        )
        _report(args.out, about | {"seconds": round(time.perf_counter() - began, 1)}, outcomes)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=workloads.WORKLOADS, choices=workloads.WORKLOADS)
    parser.add_argument("--policies", nargs="+", default=[*policies.POLICIES], choices=policies.POLICIES)
    parser.add_argument("--cases", type=int, default=200, help="of each workload")
    parser.add_argument("--documents", type=int, nargs=2, default=workloads.DEFAULT_DOCUMENTS, metavar=("FROM", "TO"))
    parser.add_argument("--seed", type=int, default=0, help="of cases and of random KV")
    parser.add_argument("--threads", type=int, help="of PyTorch; default: its own choice")
    parser.add_argument("--model", default=REFERENCE_MODEL, help="folder or hub id")
    parser.add_argument("--device", help="default: CUDA if there is one, else the CPU")
    parser.add_argument("--dtype", default="auto", help="default: the model's own")
    parser.add_argument("--set", type=_assignment, nargs="+", default=[], metavar="KEY=VALUE", help="of ReuseConfig")
    parser.add_argument("--out", type=Path, help="where the table goes, ending in .md; default: printed only")
    return parser.parse_args(arguments)


def _assignment(text: str) -> tuple[str, Any]:
    """``key=value`` as key and Python literal; what is no literal is a string."""
    key, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} has no '='; accepted is key=value")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _origin() -> dict[str, Any]:
    """What anyone needs to get the same figures: command line, commit and versions."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip()


def _setting(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Where and on what it ran."""
    on_gpu = model.device.type == "cuda"
    return {
        "model": args.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device) if on_gpu else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "seed": args.seed,
        "documents": list(args.documents),
        "cases": args.cases,
    }


def _report(out: Path | None, about: dict[str, Any], outcomes: Sequence[quality.Outcome]) -> None:
    table = metrics.table(metrics.summarize(outcomes))
    if out is None:
        Console().print(Markdown(table))
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    _write(out.with_suffix(".json"), json.dumps(about | {"outcomes": [asdict(o) for o in outcomes]}, indent=1))
    _write(out, f"{_headline(about)}\n\n{table}\n")


def _headline(about: dict[str, Any]) -> str:
    commit = about["commit"][:12] + (" with uncommitted changes" if about["uncommitted_changes"] else "")
    return (
        f"`{about['command']}` at commit {commit}: model {about['model']} in {about['dtype']} on {about['device']}, "
        f"{about['threads']} threads, seed {about['seed']}, {about['seconds']} s.\n\n{LEGEND}"
    )


def _write(path: Path, text: str) -> None:
    """Put the whole file in place at once."""
    partial_path = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial_path.write_text(text)
    partial_path.replace(path)


if __name__ == "__main__":
    main()
