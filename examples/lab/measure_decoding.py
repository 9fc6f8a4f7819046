"""Measure decoding with and without drafts (prompt lookup), beside transformers' own ``generate`` on the same model.

    PYTHONPATH=. python examples/lab/measure_decoding.py --model SmolLM2-135M-Instruct --threads 1 --out decoding.md

Tokens a second count from the first token of an answer to its last, greedily chosen, and so leave the prefill out. All
ways answer a prompt one after another, in an order drawn anew; ratios are taken within a prompt. Our two must give the
same tokens, or this stops; for the others the page says how often they do. ``asked again`` is one more call for the
same prompt, whose answer is stored by then. Texts are XQuAD's, in tasks that a small model can do: to extract, it is
shown two answers.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track
from transformers.generation.streamers import BaseStreamer

from lengths import find_quartiles
from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine
from semsharekv_integrations.lab.report import describe_machine, describe_origin, make_headline, write_whole
from semsharekv_integrations.lab.texts import Passage, read_passages
from semsharekv_integrations.world import Message

SCENARIOS = ("summary", "extraction", "chat")
PASSAGES = 3  # in a prompt
PLAIN, LOOKUP, AGAIN = "ours without drafts", "ours", "ours, asked again"
GENERATE, THEIRS = "generate", "generate, prompt_lookup_num_tokens=10"
COLUMNS = ("scenario", "way", "n", "tokens", "tokens a second", "times ours without", "accepted of drafted", "same")
_NUMBER = re.compile(r"\d[\d,.]*")


def split_sentences(passage: Passage) -> str:
    """The sentences of a passage as JSON."""
    return json.dumps({"sentences": list(passage.sentences)}, ensure_ascii=False)


def find_numbers(passage: Passage) -> str:
    """The numbers of a passage as JSON, each with its sentence."""
    found = [(match[0], text) for text in passage.sentences if (match := _NUMBER.search(text))]
    return json.dumps([{"number": number, "sentence": text} for number, text in found], ensure_ascii=False)


def copy_first(passage: Passage) -> str:
    """The first two sentences of a passage as a list."""
    return "\n".join(f"{place}. {text}" for place, text in enumerate(passage.sentences[:2], 1))


TASKS: Mapping[str, Callable[[Passage], str]] = {
    "Split the text into its sentences, as JSON.": split_sentences,
    "List the numbers in the text as JSON, each with its sentence.": find_numbers,
    "Copy the first two sentences of the text, one on each line.": copy_first,
}


def make_prompt(scenario: str, index: int) -> list[Message]:
    """The messages of one prompt."""
    passages = read_passages()[index * PASSAGES : (index + 1) * PASSAGES]
    if scenario == "summary":
        texts = "\n\n".join(passage.text for passage in passages)
        return [_say("user", f"{texts}\n\nSummarize these passages in a few sentences.")]
    if scenario == "chat":
        asked = passages[0].questions[0]
        more = _say("user", "Tell me more about that, and why it matters.")
        return [_say("user", asked.text), _say("assistant", f"{asked.golds[0]}."), more]
    task, answer = list(TASKS.items())[index % len(TASKS)]
    turns = [(_say("user", f"{each.text}\n\n{task}"), _say("assistant", answer(each))) for each in passages]
    return [message for turn in turns for message in turn][:-1]


def _say(role: str, content: str) -> Message:
    return {"role": role, "content": content}


class Timed(NamedTuple):
    """One answer: its tokens, those a second behind the first, and how many came from drafts."""

    token_ids: list[int]
    tokens_per_s: float
    drafted: int = 0
    accepted: int = 0


class _Clock(BaseStreamer):
    """Notes when tokens came, and how many, as ``generate`` streams them; the prompt comes first."""

    def __init__(self) -> None:
        self.came: list[tuple[float, int]] = []

    def put(self, value: Any) -> None:
        """Note the time and the number of tokens."""
        self.came.append((time.perf_counter(), value.numel()))

    def end(self) -> None:
        """Note nothing."""


def time_generate(engine: SemShareEngine, prompt: list[Message], tokens: int, **options: Any) -> Timed:
    """Ask transformers."""
    inputs = engine.tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    clock = _Clock()
    with torch.inference_mode():
        found = engine.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, streamer=clock, **options)
    ended = time.perf_counter()
    ids, (began, first) = found[0, inputs["input_ids"].shape[1] :].tolist(), clock.came[1]
    return Timed(ids, (len(ids) - first) / (ended - began))


def time_ours(engine: SemShareEngine, prompt: list[Message], tokens: int, *, lookup: bool, fresh: bool = True) -> Timed:
    """Ask the engine, which knows nothing before if ``fresh``."""
    if fresh:
        engine.clear()
    *_, last = engine.stream(prompt, max_new_tokens=tokens, prompt_lookup=lookup)
    assert last.generation is not None
    ids, report = last.generation.token_ids, last.generation.report
    return Timed(ids, (len(ids) - 1) / report.decode_s, report.drafted_tokens, report.accepted_tokens)


def measure_prompt(engine: SemShareEngine, prompt: list[Message], tokens: int, rng: Random) -> dict[str, Timed]:
    """All ways on one prompt; raises ``AssertionError`` if ours differ."""
    ways = {
        GENERATE: partial(time_generate, engine, prompt, tokens),
        THEIRS: partial(time_generate, engine, prompt, tokens, prompt_lookup_num_tokens=10),
        PLAIN: partial(time_ours, engine, prompt, tokens, lookup=False),
        LOOKUP: partial(time_ours, engine, prompt, tokens, lookup=True),
    }
    found = {name: ways[name]() for name in rng.sample(list(ways), len(ways))}
    found[AGAIN] = time_ours(engine, prompt, tokens, lookup=True, fresh=False)
    for name in (LOOKUP, AGAIN):
        assert found[name].token_ids == found[PLAIN].token_ids, f"{name}: other tokens than without drafts"
    return {name: found[name] for name in (GENERATE, THEIRS, PLAIN, LOOKUP, AGAIN)}


def make_rows(scenario: str, found: Sequence[Mapping[str, Timed]]) -> list[str]:
    """A row of the table for each way, over the answers that have more than one token."""
    rows, found = [], [each for each in found if len(each[PLAIN].token_ids) > 1]
    assert found, f"{scenario}: no answer has a second token"
    for name in found[0]:
        own = [each[name] for each in found]
        rate = find_quartiles([each.tokens_per_s for each in own])
        ratio = find_quartiles([each[name].tokens_per_s / each[PLAIN].tokens_per_s for each in found])
        drafts = f"{sum(t.accepted for t in own)} of {sum(t.drafted for t in own)}" if name in (LOOKUP, AGAIN) else "-"
        same = sum(each[name].token_ids == each[PLAIN].token_ids for each in found)
        length = np.mean([len(each.token_ids) for each in own])
        cells = (scenario, name, len(own), f"{length:.0f}", f"{rate.value:.1f} [{rate.low:.1f}, {rate.high:.1f}]")
        rest = (f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]", drafts, f"{same} of {len(own)}")
        rows.append(f"| {' | '.join(map(str, (*cells, *rest)))} |")
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of a model with a chat template")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the order of ways")
    parser.add_argument("--prompts", type=int, default=10, help="of each scenario, 40 at most")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer, at most")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=SCENARIOS)
    parser.add_argument("--out", type=Path, help="Markdown file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print or write the page."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    config = EngineConfig(reuse=ReuseConfig(mode="exact"))
    engine = SemShareEngine.from_pretrained(args.model, config, device=args.device, dtype=args.dtype)
    began = time.perf_counter()
    rng, rows = Random(args.seed), [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    measure_prompt(engine, make_prompt("chat", 39), 8, rng)  # once for nothing
    for scenario in args.scenarios:
        prompts = [make_prompt(scenario, index) for index in range(args.prompts)]
        rows += make_rows(
            scenario, [measure_prompt(engine, prompt, args.tokens, rng) for prompt in track(prompts, scenario)]
        )
    given = f"--threads {args.threads} --seed {args.seed} --prompts {args.prompts} --tokens {args.tokens}"
    if tuple(args.scenarios) != SCENARIOS:
        given += f" --scenarios {' '.join(args.scenarios)}"
    name = Path(args.model).name
    command = f"python examples/lab/measure_decoding.py --model {name} --dtype {args.dtype} {given}"
    about = describe_machine(engine.model) | describe_origin(command) | {"model": name, "seed": args.seed, "note": ""}
    about["seconds"] = f"{time.perf_counter() - began:.0f}"
    legend = " ".join((__doc__ or "").split("\n\n")[2].split())
    parts = ["# Decoding, with drafts and without", make_headline(about), legend, "\n".join(rows)]
    text = "\n\n".join(parts)
    if args.out is None:
        Console().print(Markdown(text))
    else:
        write_whole(args.out, f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
