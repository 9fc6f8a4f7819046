"""Measure what arranging spares: streams of questions over the same paragraphs, as retrieved and arranged.

    PYTHONPATH=. python examples/lab/streams.py --model FOLDER --streams 20 --out streams.jsonl

A stream has ten questions over 20 paragraphs of XQuAD. For each, the six that BM25 ranks highest are retrieved, the
one with the answer always among them. Every stream runs twice in mode ``exact``, each time from an empty store: as
retrieved, and as ``engine.arrange`` orders it. Each stream's rows are appended to ``--out``; a later run goes on
behind them.
Written down before the first run: more is reused, and answers are right as often.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch

from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine, StoreConfig
from semsharekv_integrations.lab.answers import is_answer, normalize
from semsharekv_integrations.lab.figures import estimate_mean
from semsharekv_integrations.lab.texts import Passage, read_passages

PARAGRAPHS, QUESTIONS, RETRIEVED = 20, 10, 6  # of a stream; for each question
ORDERS = ("given", "arranged")
SYSTEM = {"role": "system", "content": "Answer with as few words as possible, taken from the documents."}
BEFORE = [SYSTEM, {"role": "user", "content": "Documents:\n\n"}]
K1, B = 1.5, 0.75  # of BM25
GIB = 1024**3


class Question(NamedTuple):
    """A question, its right answers, and the paragraphs that were retrieved for it, best first."""

    text: str
    answers: Sequence[str]
    paragraphs: Sequence[str]


def rank(question: str, paragraphs: Sequence[str]) -> list[int]:
    """Return the indices of the paragraphs by BM25, the best first."""
    bags = [Counter(normalize(paragraph).split()) for paragraph in paragraphs]
    usual = sum(map(Counter.total, bags)) / len(bags)
    scores = [0.0] * len(bags)
    for word in set(normalize(question).split()):
        holding = sum(word in bag for bag in bags)
        weight = math.log(1 + (len(bags) - holding + 0.5) / (holding + 0.5))
        for index, bag in enumerate(bags):
            found = bag[word]
            scores[index] += weight * found * (K1 + 1) / (found + K1 * (1 - B + B * bag.total() / usual))
    return sorted(range(len(bags)), key=lambda index: -scores[index])


def draw_stream(passages: Sequence[Passage], seed: int) -> Iterator[Question]:
    """Yield the questions of the stream with this seed, each with what was retrieved for it."""
    chance = random.Random(seed)
    drawn = chance.sample(passages, PARAGRAPHS)
    texts = [passage.text for passage in drawn]
    asked = [(place, each) for place, passage in enumerate(drawn) for each in passage.questions]
    for gold, (question, answers) in chance.sample(asked, QUESTIONS):
        ranked = rank(question, texts)
        top = ranked[:RETRIEVED] if gold in ranked[:RETRIEVED] else [*ranked[: RETRIEVED - 1], gold]
        yield Question(question, answers, [texts[index] for index in top])


def ask(engine: SemShareEngine, question: Question, order: str, namespace: str, max_new_tokens: int) -> dict[str, Any]:
    """Return what one call said, reused and took, arranging included."""
    began = perf_counter()
    texts = list(question.paragraphs)
    if order == "arranged":
        texts = engine.arrange(texts, namespace, before=BEFORE)
    arrange_s = perf_counter() - began
    content = "".join([BEFORE[1]["content"], *(f"{text}\n\n" for text in texts), f"Question: {question.text}"])
    prompt = [SYSTEM, {"role": "user", "content": content}]
    generation = engine.generate(prompt, namespace=namespace, max_new_tokens=max_new_tokens)
    report = generation.report
    return {
        "order": order,
        "text": generation.text,
        "hit": is_answer(generation.text, question.answers[0], question.answers, "gold"),
        "prompt_tokens": report.prompt_tokens,
        "prefix_tokens": report.prefix_tokens,
        "arranged_tokens": report.arranged_tokens,
        "ttft_s": report.ttft_s + arrange_s,
        "arrange_s": arrange_s,
    }


def run_stream(engine: SemShareEngine, questions: Sequence[Question], seed: int, max_new_tokens: int) -> dict[str, Any]:
    """Return the calls of one stream in both orders, each in a namespace of its own, from an empty store.

    Both ask a question one behind the other, so that a busy machine slows both alike; which is first alternates.
    """
    calls: list[dict[str, Any]] = []
    for index, question in enumerate(questions):
        orders = ORDERS[:: 1 if (seed + index) % 2 else -1]
        calls += [{"question": index, **ask(engine, question, order, order, max_new_tokens)} for order in orders]
    engine.clear()
    return {"stream": seed, "calls": calls}


def summarize(streams: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of both orders and their paired differences, with 95% intervals by resampling streams."""
    every = [call for stream in streams for call in sorted(stream["calls"], key=lambda call: call["question"])]
    flat = {order: [call for call in every if call["order"] == order] for order in ORDERS}
    pairs = list(zip(flat["given"], flat["arranged"], strict=True))
    found: dict[str, Any] = {"streams": len(streams), "n": len(pairs)}
    for order, calls in flat.items():
        found[order] = {
            "reused": sum(c["prefix_tokens"] for c in calls) / sum(c["prompt_tokens"] for c in calls),
            "gold": sum(c["hit"] for c in calls) / len(calls),
            "ttft_s": median(c["ttft_s"] for c in calls),
            "arranged_tokens": sum(c["arranged_tokens"] for c in calls) / len(calls),
        }
    differences = [b["hit"] - a["hit"] for a, b in pairs]
    estimate = estimate_mean(differences, [case // QUESTIONS for case in range(len(pairs))])
    found["gold_difference"] = list(estimate)
    found["won_lost"] = [differences.count(sign) for sign in (1, -1)]
    found["ttft_ratio"] = median(b["ttft_s"] / a["ttft_s"] for a, b in pairs)
    found["ttft_ratio_of_sums"] = sum(b["ttft_s"] for _, b in pairs) / sum(a["ttft_s"] for a, _ in pairs)
    found["agreement"] = sum(a["text"] == b["text"] for a, b in pairs) / len(pairs)
    found["arrange_ms"] = 1000 * median(call["arrange_s"] for call in flat["arranged"])
    return found


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="a folder or hub id")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--streams", type=int, default=20, help="how many in all, those in --out included")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one for each stream; continued if there")
    return parser.parse_args()


def main() -> None:
    """Run the streams that ``--out`` lacks, and print the figures of all as JSON."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    lines = arguments.out.read_text().splitlines() if arguments.out.exists() else []
    streams = [json.loads(line) for line in lines if re.fullmatch(r"\{.*\}", line)]  # the last may have been cut
    config = EngineConfig(reuse=ReuseConfig(mode="exact"), store=StoreConfig(max_bytes=3 * GIB))
    engine = SemShareEngine.from_pretrained(arguments.model, config, device="cpu", dtype=arguments.dtype)
    for seed in range(len(streams), arguments.streams):
        streams.append(run_stream(engine, list(draw_stream(read_passages(), seed)), seed, arguments.max_new_tokens))
        with arguments.out.open("a") as file:
            file.write(json.dumps(streams[-1]) + "\n")
    print(json.dumps(summarize(streams), indent=1))


if __name__ == "__main__":
    main()
