"""Measure batches: questions about the same documents, one after another and at the same time.

    PYTHONPATH=. python examples/lab/measure_batches.py --out examples/lab/results/batches.md
    PYTHONPATH=. python examples/lab/measure_batches.py --preset qwen-0.5b --sizes 1 8 --documents 1 --rounds 1

Every round asks an engine with an empty store for long answers to several questions; the ratio is that of one round's
times. ``one by one`` decodes each call in a forward pass of its own, the other policies up to so many in one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track

from lengths import find_quartiles
from semsharekv_integrations import EngineConfig, Generation, ReuseConfig, SemShareEngine, world
from semsharekv_integrations.lab.report import describe_machine, describe_origin, write_whole
from shapes import PRESETS, REFERENCE, load_preset

PROMPTS = 16
COLUMNS = ("calls in one pass", "tokens a second", "times as fast", "answers", "prompt tokens reused")


def prompts_of(rng: Random, count: int, num_documents: int) -> list[str]:
    """Prompts that begin with the same documents and end in different words."""
    documents = "\n\n".join(document.text for document in world.make_documents(rng, num_documents))
    return [f"{documents}\n\n{town} and {number} more:" for number, town in enumerate(rng.sample(world.TOWNS, count))]


def timed(model: SemShareEngine, size: int, prompts: Sequence[str], tokens: int) -> tuple[float, list[Generation]]:
    """Seconds, and the answers: sampled hot, so that they are long."""
    config = EngineConfig(reuse=ReuseConfig(mode="exact"), max_batch_size=size)
    engine = SemShareEngine(model.model, model.tokenizer, config)
    began = time.perf_counter()
    answers = engine.generate_batch(prompts, max_new_tokens=tokens, temperature=4.0, seed=1)
    return time.perf_counter() - began, answers


def table(args: argparse.Namespace, model: SemShareEngine) -> list[str]:
    prompts, sizes = prompts_of(Random(args.seed), PROMPTS, args.documents), [1, *args.sizes]
    timed(model, max(sizes), prompts, 2)  # once for nothing
    rounds = [{n: timed(model, n, prompts, args.tokens) for n in sizes} for _ in track(range(args.rounds))]
    rows = [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    for size in dict.fromkeys(sizes):
        done = [(round_[size], round_[1]) for round_ in rounds]
        rates = find_quartiles([sum(len(a.token_ids) for a in answers) / seconds for (seconds, answers), _ in done])
        ratios = find_quartiles([alone[0] / seconds for (seconds, _), alone in done])
        same = sum(a.token_ids == b.token_ids for (_, one), (_, two) in done for a, b in zip(one, two, strict=True))
        reused = find_quartiles([sum(a.report.reused_tokens for a in answers) for (_, answers), _ in done]).value
        total = sum(answer.report.prompt_tokens for answer in done[0][0][1])
        rows.append(
            f"| {size} | {rates.value:.0f} [{rates.low:.0f}, {rates.high:.0f}] "
            f"| {ratios.value:.2f} [{ratios.low:.2f}, {ratios.high:.2f}] "
            f"| {same} of {len(done) * len(prompts)} the same | {reused / total:.0%} |"
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file")
    parser.add_argument("--preset", choices=PRESETS, default=REFERENCE, help="the shipped model, or a known shape")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5, help="how many times")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="calls in one pass, beside 1")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--documents", type=int, default=6)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    subject = load_preset(args.preset, device="cpu", dtype="float32", seed=args.seed)
    model = SemShareEngine(subject.model, subject.tokenizer, EngineConfig(reuse=ReuseConfig(mode="off")))
    rows = table(args, model)
    sizes = " ".join(map(str, args.sizes))
    given = f"--preset {args.preset} --seed {args.seed} --rounds {args.rounds} --sizes {sizes} --tokens {args.tokens}"
    command = f"python examples/lab/measure_batches.py {given} --documents {args.documents}"
    about = describe_machine(model.model) | describe_origin(command)
    commit = about["commit"][:12] + " with uncommitted changes" * about["uncommitted_changes"]
    came = f"`{command}` at commit {commit}: {args.preset} in {about['dtype']} on {about['device']}, one thread."
    how = f"{PROMPTS} prompts, n = {args.rounds} rounds, median and quartiles; what prompts share is computed once"
    parts = ["# Batches: calls that run at the same time", f"{came} {how} in all rows.", "\n".join(rows)]
    text = "\n\n".join(parts)
    if args.out is None:
        Console().print(Markdown(text))
    else:
        write_whole(args.out, text + "\n")


if __name__ == "__main__":
    main()
