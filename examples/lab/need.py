r"""Would it pay to compute more where a prompt needs it? Signs of need, beside how far answers are from a full prefill.

    PYTHONPATH=. python examples/lab/need.py measure --model FOLDER --dtype float32 --threads 1 --seed 7 \
        --groups 3 --questions 12 --out need.md
    PYTHONPATH=. python examples/lab/need.py tables need.jsonl

``measure`` takes what ``semsharekv bench`` takes. It answers each question under five budgets, and under two with which
the question looks ahead through fewer layers. ``tables`` tells what the mean KL would be if the prompts with the
highest sign had the largest budget and the others the smallest, beside one budget for all at the same mean compute; the
last line knows each prompt's KL beforehand. Written down before the first run: a cheap sign that finds the hard prompts
should halve the KL at the same compute.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from semsharekv_integrations import ReuseConfig
from semsharekv_integrations.lab import command
from semsharekv_integrations.lab.policies import FULL, UNBOUNDED, Policy
from semsharekv_integrations.lab.running import run_study
from semsharekv_integrations.lab.scenarios import Case
from semsharekv_integrations.model.adapter import ModelAdapter
from semsharekv_integrations.model.selective import SelectivePrefill
from semsharekv_integrations.reuse.plan import ReusePlan
from semsharekv_integrations.reuse.selection import measure_reading

BUDGETS = {f"b{round(100 * budget)}": {"budget": budget} for budget in (0.1, 0.15, 0.2, 0.3, 0.45)}
DEPTHS = {
    f"b30-{name}": {"budget": 0.3, "attention_depth": depth} for name, depth in (("quarter", 0.25), ("0.15", 0.15))
}
SIGNS = {
    "early": "share of what the question reads in the first third of the layers that lies on tokens not yet computed",
    "spread": "entropy of what it reads there, over tokens",
    "shift": "KL of the first token's distribution behind the selective pass to that behind the look alone",
}
SHARES = (0.15, 0.3, 0.5)  # of the prompts that get the largest budget


def measure_signs(plan: ReusePlan, read: Tensor) -> dict[str, float]:
    """Signs of need from ``read`` [L, T], what the question reads in each layer."""
    optional = torch.from_numpy(plan.optional)
    early, all_layers = read[: max(1, len(read) // 3)].mean(0), read.mean(0)[optional]
    shares = all_layers / all_layers.sum()
    spread = float(-(shares * (shares + 1e-12).log()).sum())
    return {"early": float(early[optional].sum() / early.sum()), "spread": spread}


@contextmanager
def watch(case: Case, policy: str, turn: int) -> Iterator[dict[str, Any]]:
    """The signs of one call, for those whose question looks ahead."""
    signs: dict[str, Any] = {}
    logits: list[Tensor] = []
    attend, look, forward = SelectivePrefill._attend, SelectivePrefill.watch_attention, ModelAdapter.forward_rows
    layers: list[Tensor] = []

    def note_layers(self: SelectivePrefill, *args: Any) -> list[Tensor]:
        layers[:] = look(self, *args)
        return layers

    def note_signs(self: SelectivePrefill, plan: ReusePlan, cache: Any) -> Tensor:
        amounts = attend(self, plan, cache)
        kept = [layer.values for layer in cache.layers]
        signs.update(measure_signs(plan, torch.stack([measure_reading(*p) for p in zip(layers, kept, strict=False)])))
        return amounts

    def note_logits(self: ModelAdapter, *args: Any) -> Tensor:
        logits.append(forward(self, *args))
        return logits[-1]

    with ExitStack() as stack:
        for owner, name, stand in (
            (SelectivePrefill, "watch_attention", note_layers),
            (SelectivePrefill, "_attend", note_signs),
            (ModelAdapter, "forward_rows", note_logits),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand))
        yield signs
    if len(logits) == 2:
        before, behind = (each[0].float().log_softmax(-1) for each in logits)
        signs["shift"] = float((behind.exp() * (behind - before)).sum())


def measure(arguments: Sequence[str]) -> None:
    """Ask under every budget; see the module."""
    policies = {
        name: Policy(f"`{name}`.", ReuseConfig(mode="identical", **settings), UNBOUNDED)
        for name, settings in (BUDGETS | DEPTHS).items()
    }
    parser = argparse.ArgumentParser(prog="need.py measure")
    command.add_arguments(parser, {**command.POLICIES, **policies})
    parser.set_defaults(program="examples/lab/need.py", scenarios=["text_reordered"], policies=[FULL, *policies])
    args = parser.parse_args(arguments)
    study, subject = command.prepare(args, {**command.POLICIES, **policies})
    run_study(replace(study, watch=watch), subject, args)


def read_cases(path: Path) -> list[dict[str, dict[str, Any]]]:
    """KL, compute and signs of each case, by policy."""
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return [
        {
            found["policy"]: {"kl": fmean(found["kl"]), "compute": found["report"]["compute_ratio"], **found["extra"]}
            for found in line["outcomes"]
            if found["kl"]
        }
        for line in lines
    ]


def spend(cases: Sequence[Any], sign: Sequence[float], share: float, low: str, high: str) -> tuple[float, float]:
    """Mean KL and compute if the ``share`` of the cases with the highest ``sign`` has the budget ``high``."""
    first = set(np.argsort(sign)[::-1][: round(share * len(cases))].tolist())
    chosen = [case[high if at in first else low] for at, case in enumerate(cases)]
    return fmean(each["kl"] for each in chosen), fmean(each["compute"] for each in chosen)


def print_tables(path: Path) -> None:
    """Print the two tables of one journal."""
    cases = read_cases(path)
    names = [name for name in (*BUDGETS, *DEPTHS) if name in cases[0]]
    print(f"n = {len(cases)}\n\n| policy | computed | KL, mean | median | largest |\n|---|---|---|---|---|")
    for name in names:
        kl = [case[name]["kl"] for case in cases]
        computed = fmean(case[name]["compute"] for case in cases)
        print(f"| {name} | {computed:.3f} | {fmean(kl):.4f} | {median(kl):.4f} | {max(kl):.3f} |")
    fixed = [name for name in BUDGETS if name in names]
    low, high = fixed[0], fixed[-1]
    at = [fmean(case[name]["compute"] for case in cases) for name in fixed]
    log_kl = np.log([fmean(case[name]["kl"] for case in cases) for name in fixed])
    print(f"\n| who gets {high}, the others {low} | {' | '.join(f'{share:.0%}' for share in SHARES)} |")
    print(f"|---|{'---|' * len(SHARES)}")
    for name in (*SIGNS, "known beforehand"):
        sign = [case[low]["kl"] - case[high]["kl"] if name not in SIGNS else case[low].get(name, 0.0) for case in cases]
        found = [spend(cases, sign, share, low, high) for share in SHARES]
        ratios = (f"{kl / np.exp(np.interp(compute, at, log_kl)):.2f}" for kl, compute in found)
        print(f"| {name} | {' | '.join(ratios)} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2:])
    elif sys.argv[1:2] == ["tables"] and len(sys.argv) == 3:
        print_tables(Path(sys.argv[2]))
    else:
        sys.exit(__doc__)
